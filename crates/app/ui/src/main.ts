import { Chart } from "./chart.ts";
import { Colours } from "./colours.ts";
import * as details from "./details.ts";
import { by, make, put } from "./dom.ts";
import { parse, term, toggle } from "./filter.ts";
import { bytes, clock, count, country, duration, rate } from "./format.ts";
import { WorldMap, gather, position, type Spot } from "./map.ts";
import { Store, type Place, type Row } from "./store.ts";
import { Stream, type State } from "./stream.ts";
import { Table, grouped, type Entry, type Grouping } from "./table.ts";

const store = new Store();
const filter = by<HTMLInputElement>("filter");
const group = by<HTMLSelectElement>("group");
const withEnded = by<HTMLInputElement>("ended");

// --- Theme: the system's, unless somebody has chosen here ---------------------------

const themes = ["", "light", "dark"];
const root = document.documentElement;
let theme = themes.includes(localStorage.getItem("theme") ?? "") ? (localStorage.getItem("theme") ?? "") : "";
if (theme) root.dataset["theme"] = theme;

const colours = new Colours();
const map = new WorldMap(colours, (place) => filterBy(termOf(place)));
const table = new Table(colours, open, () => render());
const chart = new Chart();

function recolour(): void {
  colours.read();
  map.resize();
  chart.theme();
  render();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

function nextTheme(): void {
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  theme = dark ? "light" : "dark";
  localStorage.setItem("theme", theme);
  root.dataset["theme"] = theme;
  recolour();
}

// --- What is shown -------------------------------------------------------------------

let held = false;
let asked = false;

/** Draws in the next frame, once, however often it is asked for. */
function render(): void {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw();
  });
}

function draw(): void {
  const passes = parse(filter.value);
  const rows: Row[] = [];
  for (const row of store.rows.values())
    if ((withEnded.checked || row.ended === undefined) && passes(row)) rows.push(row);
  const tops = {
    process: ranked(grouped(rows, "process")),
    remote: ranked(grouped(rows, "remote")),
    country: ranked(grouped(rows, "country")),
  };
  colours.assign(tops.process.map((entry) => entry.name));
  const spots = gather(rows);
  map.update(spots.filter((spot) => position(spot.place)), store.home);
  elsewhere(spots.filter((spot) => !position(spot.place)));
  table.update(rows, store.status?.time ?? 0);
  for (const by of ["process", "remote", "country"] as const) top(by, tops[by]);
  const all = store.rows.size;
  put(byId.count, rows.length === all ? `${count(all)}` : `${count(rows.length)} of ${count(all)}`);
  chart.update(store.history);
  head();
  details.refresh();
}

const byId = {
  count: by("count"),
  host: by("host"),
  open: by("open"),
  seen: by("seen"),
  in: by("in"),
  out: by("out"),
  lost: by("lost"),
};

function head(): void {
  const { status, about } = store;
  if (!status || !about) return;
  put(byId.host, about.host);
  put(byId.open, count(status.open));
  put(byId.seen, count(status.connections));
  put(byId.in, `${bytes(status.rx_rate)}/s`);
  put(byId.out, `${bytes(status.tx_rate)}/s`);
  const { unattributed, ...missed } = status.lost;
  const sum = Object.values(missed).reduce((a, b) => a + b, 0);
  put(byId.lost, `${count(sum)} lost, ${count(unattributed)} unattributed`);
  byId.lost.classList.toggle("alarm", sum > 0);
}

const ranked = (entries: Entry[]): Entry[] =>
  entries.sort((a, b) => b.rx + b.tx - a.rx - a.tx || b.received + b.sent - a.received - a.sent || (a.name < b.name ? -1 : 1));

/** How many lines each list beside the map has. */
const TOP = 7;

/** Gives a list as many buttons, each of which filters by its term when clicked. */
function terms(list: HTMLElement, count: number, parts: () => HTMLElement[]): void {
  while (list.children.length < count) {
    const button = make("button", {}, ...parts());
    button.type = "button";
    button.addEventListener("click", () => filterBy(button.dataset["term"] ?? ""));
    list.append(make("li", {}, button));
  }
  while (list.children.length > count) list.lastElementChild!.remove();
}

/** One of those lists. */
function top(field: "process" | "remote" | "country", entries: Entry[]): void {
  const list = by(`top-${field}`);
  const most = Math.max(1, ...entries.slice(0, TOP).map((entry) => entry.received + entry.sent));
  const shown = entries.slice(0, TOP);
  terms(list, shown.length, () => [make("i", { class: "bar" }), make("i", { class: "swatch" }), make("span"), make("b")]);
  shown.forEach((entry, at) => {
    const button = list.children[at]!.firstElementChild as HTMLButtonElement;
    const [bar, swatch, label, figure] = [...button.children] as [HTMLElement, HTMLElement, HTMLElement, HTMLElement];
    const located = field === "country" && /^[A-Z]{2}$/.test(entry.name);
    button.dataset["term"] = field === "country" && !located ? term("place", placeWord(entry.name)) : term(field, entry.name);
    const text = located ? country(entry.name) : entry.name;
    put(label, text);
    if (label.title !== text) label.title = text;
    put(figure, rate(entry.rx + entry.tx) || bytes(entry.received + entry.sent));
    figure.classList.toggle("now", entry.rx + entry.tx > 0);
    bar.style.width = `${(100 * (entry.received + entry.sent)) / most}%`;
    swatch.hidden = field !== "process";
    if (field === "process") swatch.style.background = colours.of(entry.name);
  });
}

const placeWord = (label: string): string => {
  for (const row of store.rows.values()) if (row.place.label === label) return row.place.kind;
  return label;
};

const termOf = (place: Place): string =>
  place.kind === "located"
    ? place.city || !place.country
      ? term("place", place.label)
      : term("country", place.country)
    : term("place", place.kind);

/** What has no place on the map has one of its own. */
function elsewhere(spots: Spot[]): void {
  const list = by("elsewhere-list");
  spots.sort((a, b) => b.bytes - a.bytes);
  by("elsewhere").hidden = spots.length === 0;
  terms(list, spots.length, () => [make("span"), make("b")]);
  spots.forEach((spot, at) => {
    const button = list.children[at]!.firstElementChild as HTMLButtonElement;
    button.dataset["term"] = termOf(spot.place);
    put(button.firstElementChild as HTMLElement, spot.place.label);
    put(button.lastElementChild as HTMLElement, `${count(spot.rows)}, ${bytes(spot.bytes)}`);
  });
}

function open(entry: Entry): void {
  if (entry.row) return details.details(store, entry.row.id);
  const field = table.grouping;
  if (field === "") return;
  const located = /^[A-Z]{2}$/.test(entry.name);
  setGroup("");
  filterBy(field === "country" && !located ? term("place", placeWord(entry.name)) : term(field, entry.name));
}

// --- What people do ------------------------------------------------------------------

function filterBy(wanted: string): void {
  filter.value = toggle(filter.value, wanted);
  render();
}

function setGroup(by: Grouping): void {
  group.value = by;
  table.grouping = by;
  render();
}

function hold(): void {
  held = !held;
  by("pause").setAttribute("aria-pressed", String(held));
  document.body.classList.toggle("held", held);
  if (!held) render();
}

filter.addEventListener("input", render);
withEnded.addEventListener("change", render);
group.addEventListener("change", () => setGroup(group.value as Grouping));
by("theme").addEventListener("click", nextTheme);
by("pause").addEventListener("click", hold);
by("help").addEventListener("click", () => details.help(store));
by("lost").addEventListener("click", () => details.lost(store));

const groups: Grouping[] = ["", "process", "remote", "container", "country"];
const keys: Record<string, () => void> = {
  "/": () => filter.focus(),
  s: () => table.next(),
  r: () => table.reverse(),
  g: () => setGroup(groups[(groups.indexOf(table.grouping) + 1) % groups.length]!),
  p: hold,
  t: nextTheme,
  "?": () => details.help(store),
  Escape: () => {
    filter.value = "";
    render();
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || by<HTMLDialogElement>("dialog").open) return;
  const typing = event.target instanceof HTMLInputElement && event.target.type !== "checkbox";
  if (typing && event.key !== "Escape") return;
  const act = keys[event.key];
  if (!act) return;
  event.preventDefault();
  act();
  if (typing) filter.blur();
});
// A click beside the window closes it.
by("dialog").addEventListener("click", (event) => {
  if (event.target === event.currentTarget) by<HTMLDialogElement>("dialog").close();
});

// --- The stream ------------------------------------------------------------------------

function tell(state: State, silence: number): void {
  document.body.dataset["state"] = state;
  const at = store.status ? `, figures of ${clock(store.status.time)}` : "";
  put(by("state-word"), state === "live" ? "live" : state === "stale" ? `no news for ${duration(Math.floor(silence / 1000) * 1000)}${at}` : "connecting");
}

new Stream((message) => {
  store.apply(message);
  if (!held) render();
}, tell);
