import type { Colours } from "./colours.ts";
import { by, make, put } from "./dom.ts";
import { bytes, count, duration, rtt } from "./format.ts";
import type { Row } from "./store.ts";

export type Grouping = "" | "process" | "remote" | "container" | "country";

/** What a line of the table stands for: a connection, or a group of them. */
export interface Entry {
  key: string;
  row?: Row;
  name: string;
  rows: number;
  rx: number;
  tx: number;
  received: number;
  sent: number;
}

interface Column {
  id: string;
  title: string;
  /** On what is only shown where there is room. */
  hint?: string;
  number?: boolean;
  text: (entry: Entry, now: number) => string;
  value: (entry: Entry, now: number) => number | string;
  group?: boolean;
}

const age = ({ row }: Entry, now: number): number =>
  row?.started === undefined ? -1 : (row.ended ?? now) - row.started;
/** Bytes a second, as the head of the column says; nothing where nothing moves. */
const now = (rate: number): string => (rate > 0 ? bytes(rate) : "");
const arrows: Record<string, string> = { outbound: "→", inbound: "←", forwarded: "⇄" };

const columns: Column[] = [
  { id: "name", title: "Process", text: name, value: (entry) => entry.name.toLowerCase(), group: true },
  {
    id: "protocol",
    title: "Proto",
    text: ({ row }) => (row ? `${row.protocol} ${arrows[row.direction ?? ""] ?? "–"}` : ""),
    value: ({ row }) => row?.protocol ?? "",
  },
  { id: "remote", title: "Remote", text: ({ row }) => row?.peer ?? "", value: ({ row }) => row?.peer ?? "" },
  { id: "place", title: "Place", text: ({ row }) => row?.place.label ?? "", value: ({ row }) => row?.place.label ?? "" },
  { id: "rows", title: "Conns", number: true, text: (entry) => count(entry.rows), value: (entry) => entry.rows, group: true },
  { id: "rx", title: "In/s", number: true, text: (entry) => now(entry.rx), value: (entry) => entry.rx, group: true },
  { id: "tx", title: "Out/s", number: true, text: (entry) => now(entry.tx), value: (entry) => entry.tx, group: true },
  { id: "received", title: "Received", number: true, text: (entry) => bytes(entry.received), value: (entry) => entry.received, group: true },
  { id: "sent", title: "Sent", number: true, text: (entry) => bytes(entry.sent), value: (entry) => entry.sent, group: true },
  { id: "rtt", title: "RTT", number: true, text: ({ row }) => rtt(row?.rtt_us), value: ({ row }) => row?.rtt_us ?? -1 },
  { id: "age", title: "Age", number: true, text: (entry, now) => (entry.row?.started === undefined ? "" : duration(age(entry, now))), value: age },
  { id: "source", title: "Source", text: ({ row }) => (row ? `${row.attribution}, ${row.source}` : ""), value: ({ row }) => (row ? `${row.attribution} ${row.source}` : "") },
];

function name({ row, name: text }: Entry): string {
  if (!row) return text;
  if (!row.process) return "–";
  return row.attribution === "listener" ? `(${row.comm}) ${row.process.pid}` : `${row.comm} ${row.process.pid}`;
}

const HEIGHT = 26;

/** The table: of thousands of rows only those in sight are in the document. */
export class Table {
  private box = by("table");
  private head = make("div", { class: "head", role: "row" });
  private view = make("div", { class: "view", role: "rowgroup" });
  private space = make("div", { class: "space", role: "presentation" });
  private pool: HTMLElement[] = [];
  private entries: Entry[] = [];
  private sort = "rx+tx";
  private descending = true;
  private chosen?: string;
  private now = 0;
  grouping: Grouping = "";

  constructor(
    private readonly colours: Colours,
    private readonly open: (entry: Entry) => void,
    private readonly changed: () => void,
  ) {
    this.head.setAttribute("aria-rowindex", "1");
    this.box.append(make("div", { role: "rowgroup", class: "heads" }, this.head), this.view);
    this.view.append(this.space);
    // What scrolls has to be reachable by keyboard.
    this.view.tabIndex = 0;
    for (const column of columns) this.heading(column);
    this.view.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.view);
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.view.addEventListener("click", (event) => {
      const line = (event.target as HTMLElement).closest<HTMLElement>(".row");
      const entry = line && this.entries[Number(line.dataset["at"])];
      if (entry) this.activate(entry);
    });
  }

  private heading(column: Column): void {
    const button = make("button", { text: column.title });
    button.type = "button";
    button.tabIndex = -1;
    const cell = make("div", { class: `cell ${column.id}${column.number ? " number" : ""}`, role: "columnheader" }, button);
    button.addEventListener("click", () => {
      this.descending = this.sort === column.id ? !this.descending : Boolean(column.number);
      this.sort = column.id;
      this.changed();
    });
    this.head.append(cell);
  }

  /** Takes the next order. */
  by(id: string): void {
    [this.sort, this.descending] = [id, id !== "name" && id !== "remote"];
    this.changed();
  }

  /** The orders that the key s goes through. */
  next(): void {
    const order = ["rx+tx", "received", "sent", "name", "remote"];
    this.by(order[(order.indexOf(this.sort) + 1) % order.length]!);
  }

  reverse(): void {
    this.descending = !this.descending;
    this.changed();
  }

  /** Shows these rows, in order. */
  update(rows: Row[], now: number): void {
    this.now = now;
    this.entries = this.grouping === "" ? rows.map(single) : grouped(rows, this.grouping);
    const column = columns.find((candidate) => candidate.id === this.sort);
    const value = (entry: Entry) => (column ? column.value(entry, now) : entry.rx + entry.tx);
    const keys = new Map(this.entries.map((entry) => [entry, value(entry)]));
    const sign = this.descending ? -1 : 1;
    this.entries.sort((a, b) => {
      const [left, right] = [keys.get(a)!, keys.get(b)!];
      // What is alike stays in one order, or it would change places at each look.
      return left < right ? -sign : left > right ? sign : rank(a, b);
    });
    this.box.classList.toggle("grouped", this.grouping !== "");
    this.box.setAttribute("aria-rowcount", String(this.entries.length + 1));
    this.space.style.height = `${this.entries.length * HEIGHT}px`;
    const titles = [...this.head.children] as HTMLElement[];
    titles.forEach((cell, at) => {
      const order = columns[at]!.id === this.sort ? (this.descending ? "descending" : "ascending") : undefined;
      if (order) cell.setAttribute("aria-sort", order);
      else cell.removeAttribute("aria-sort");
    });
    put(titles[0]!.firstElementChild as HTMLElement, this.grouping === "" ? "Process" : this.grouping[0]!.toUpperCase() + this.grouping.slice(1));
    this.draw();
  }

  private draw(): void {
    const first = Math.max(0, Math.floor(this.view.scrollTop / HEIGHT) - 4);
    const last = Math.min(this.entries.length, Math.ceil((this.view.scrollTop + this.view.clientHeight) / HEIGHT) + 4);
    while (this.pool.length < last - first) this.pool.push(this.line());
    this.pool.forEach((line, slot) => {
      const entry = first + slot < last ? this.entries[first + slot] : undefined;
      line.hidden = !entry;
      if (entry) this.fill(line, entry, first + slot);
    });
    const at = this.entries.findIndex((entry) => entry.key === this.chosen);
    if (at >= first && at < last) this.box.setAttribute("aria-activedescendant", `row-${at - first}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  private line(): HTMLElement {
    const line = make("div", { class: "row", role: "row" });
    line.id = `row-${this.pool.length}`;
    for (const column of columns) {
      const cell = make("div", { class: `cell ${column.id}${column.number ? " number" : ""}`, role: "gridcell" });
      if (column.id === "name") cell.append(make("i", { class: "swatch" }), make("span"));
      line.append(cell);
    }
    this.space.append(line);
    return line;
  }

  private fill(line: HTMLElement, entry: Entry, at: number): void {
    line.style.transform = `translateY(${at * HEIGHT}px)`;
    line.dataset["at"] = String(at);
    line.setAttribute("aria-rowindex", String(at + 2));
    line.classList.toggle("ended", entry.row?.ended !== undefined);
    line.setAttribute("aria-selected", String(entry.key === this.chosen));
    columns.forEach((column, index) => {
      const cell = line.children[index] as HTMLElement;
      const text = column.text(entry, this.now);
      if (column.id === "name") {
        const process = entry.row?.comm ?? (this.grouping === "process" ? entry.name : undefined);
        const swatch = cell.firstElementChild as HTMLElement;
        swatch.hidden = process === undefined;
        const colour = process === undefined ? "" : this.colours.of(process);
        if (swatch.dataset["colour"] !== colour) {
          swatch.dataset["colour"] = colour;
          swatch.style.background = colour;
        }
        put(cell.lastElementChild as HTMLElement, text);
      } else put(cell, text);
      if (cell.title !== text && (column.id === "name" || column.id === "remote" || column.id === "place")) cell.title = text;
    });
  }

  private key(event: KeyboardEvent): void {
    if (event.target !== this.box && event.target !== this.view) return;
    const page = Math.max(1, Math.floor(this.view.clientHeight / HEIGHT) - 1);
    const steps: Record<string, number> = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    const at = this.entries.findIndex((entry) => entry.key === this.chosen);
    if (step !== undefined && this.entries.length) {
      const next = Math.min(this.entries.length - 1, Math.max(0, at < 0 && step < 0 ? 0 : at + step));
      this.chosen = this.entries[next]!.key;
      const [top, bottom] = [next * HEIGHT, (next + 1) * HEIGHT];
      if (top < this.view.scrollTop) this.view.scrollTop = top;
      else if (bottom > this.view.scrollTop + this.view.clientHeight) this.view.scrollTop = bottom - this.view.clientHeight;
      this.draw();
    } else if (event.key === "Enter" && at >= 0) this.activate(this.entries[at]!);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  private activate(entry: Entry): void {
    this.chosen = entry.key;
    this.draw();
    this.open(entry);
  }
}

const rank = (a: Entry, b: Entry): number =>
  a.row && b.row ? a.row.id - b.row.id : a.name < b.name ? -1 : 1;

const single = (row: Row): Entry => ({
  key: String(row.id),
  row,
  name: row.comm,
  rows: 1,
  rx: row.rx,
  tx: row.tx,
  received: row.rx_bytes,
  sent: row.tx_bytes,
});

/** What a row is grouped under. */
export const groupOf = (row: Row, by: Exclude<Grouping, "">): string =>
  by === "process"
    ? row.comm
    : by === "remote"
      ? row.host
      : by === "country"
        ? (row.place.country ?? row.place.label)
        : (row.process?.container ?? row.process?.unit ?? "–");

/** Sums of the rows of each group. */
export function grouped(rows: Iterable<Row>, by: Exclude<Grouping, "">): Entry[] {
  const groups = new Map<string, Entry>();
  for (const row of rows) {
    const name = groupOf(row, by);
    let entry = groups.get(name);
    if (!entry) groups.set(name, (entry = { key: `${by} ${name}`, name, rows: 0, rx: 0, tx: 0, received: 0, sent: 0 }));
    entry.rows += 1;
    entry.rx += row.rx;
    entry.tx += row.tx;
    entry.received += row.rx_bytes;
    entry.sent += row.tx_bytes;
  }
  return [...groups.values()];
}
