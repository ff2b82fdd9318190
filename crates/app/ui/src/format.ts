const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** A number of bytes, as the terminal view writes it. */
export function bytes(count: number): string {
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

export const rate = (perSecond: number): string => (perSecond > 0 ? `${bytes(perSecond)}/s` : "");

export const count = (number: number): string => number.toLocaleString("en");

export function duration(milliseconds: number): string {
  const seconds = milliseconds / 1000;
  if (seconds < 1) return `${Math.max(0, Math.round(milliseconds))} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} m ${Math.floor(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} m`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

export const clock = (milliseconds: number): string =>
  new Date(milliseconds).toLocaleTimeString("en-GB", { hour12: false });

export const rtt = (microseconds?: number): string =>
  microseconds === undefined
    ? ""
    : microseconds < 1000
      ? `${microseconds} µs`
      : `${(microseconds / 1000).toFixed(microseconds < 10_000 ? 1 : 0)} ms`;

const unseen = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** Names come from elsewhere: what would not be seen, or would turn the text around, is spelled out. */
export const clean = (text: string): string =>
  text.replace(unseen, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);

const names = new Intl.DisplayNames(["en"], { type: "region", fallback: "code" });

export function country(code: string): string {
  try {
    return names.of(code) ?? code;
  } catch {
    return code;
  }
}
