import type { Row } from "./store.ts";

type Test = (row: Row) => boolean;

/** What can be asked for by name; the words are those of the command line where it has them. */
const fields: Record<string, (row: Row) => string | number | undefined> = {
  process: (row) => row.comm,
  pid: (row) => row.process?.pid,
  uid: (row) => row.process?.uid,
  container: (row) => row.process?.container ?? row.process?.unit,
  port: (row) => row.port,
  remote: (row) => row.host,
  protocol: (row) => row.protocol,
  direction: (row) => row.direction,
  country: (row) => row.place.country,
  place: (row) => (row.place.kind === "located" ? row.place.label : row.place.kind),
  as: (row) => row.place.asn,
  netns: (row) => row.netns,
};
const exact = new Set(["pid", "uid", "port", "protocol", "country", "as", "netns"]);

/** Words are looked for everywhere, `name:value` in one field, a minus excludes; all must hold. */
export function parse(text: string): Test {
  const tests: Test[] = [];
  for (const [, minus, name, quoted, plain] of text.matchAll(/(-?)(?:([a-z]+):)?(?:"([^"]*)"?|(\S+))/gi)) {
    const wanted = (quoted ?? plain ?? "").toLowerCase();
    if (wanted === "") continue;
    const field = name === undefined ? undefined : fields[name.toLowerCase()];
    // A colon that names no field belongs to the word: an IPv6 address.
    const test: Test = !field
      ? ((word) => (row) => row.text.includes(word))(name === undefined ? wanted : `${name.toLowerCase()}:${wanted}`)
      : exact.has(name!.toLowerCase()) || quoted !== undefined
        ? (row) => String(field(row) ?? "").toLowerCase() === wanted
        : (row) => String(field(row) ?? "").toLowerCase().includes(wanted);
    tests.push(minus ? (row) => !test(row) : test);
  }
  return (row) => tests.every((test) => test(row));
}

/** A term for exactly this value. */
export const term = (field: string, value: string): string => `${field}:"${value.replaceAll('"', "")}"`;

/** Adds a term, or takes it away if it is there. */
export function toggle(text: string, wanted: string): string {
  const rest = text.replace(wanted, "").replace(/\s+/g, " ").trim();
  return text.includes(wanted) ? rest : `${rest} ${wanted}`.trim();
}
