import { by, make } from "./dom.ts";
import { bytes, clock, country, duration, rate, rtt } from "./format.ts";
import type { Lost, Row, Store } from "./store.ts";

const attributions: Record<string, string> = {
  kernel: "seen at work in the kernel",
  procfs: "had the socket open at the start",
  listener: "the listening process: nobody has used the connection yet",
  none: "not known",
};
const sources: Record<string, string> = {
  socket: "the socket's own counters, read once an interval and at the end",
  calls: "counted at the end of each send and receive",
  packets: "counted packet by packet as it passes through",
};
const losses: [keyof Lost, string][] = [
  ["events", "ends of connections that found the ring buffer full"],
  ["names", "descriptions of programs and answers of name servers that found it full"],
  ["changes", "state changes that the kernel did not hand over"],
  ["datagrams", "datagrams that found the map of flows full"],
  ["sockets", "sockets without memory for their owner"],
  ["passages", "forwarded flows that made room for others"],
  ["packets", "packets that were to be told one by one"],
  ["undecoded", "records that could not be decoded"],
  ["unattributed", "connections whose process is not known"],
];
const keys: [string, string][] = [
  ["/", "filter"],
  ["Esc", "drop the filter, close a window"],
  ["s, r", "next order, reverse it"],
  ["g", "next grouping"],
  ["Tab, arrows, Enter", "choose a row or a place, see what is behind it"],
  ["p", "hold the view"],
  ["t", "light or dark"],
  ["?", "this help"],
];

const dialog = () => by<HTMLDialogElement>("dialog");

/** What the window shows now: it is brought up to date while it is open. */
let shown: (() => void) | undefined;

function show(title: string, body: () => Node[]): void {
  by("dialog-title").textContent = title;
  shown = () => by("dialog-body").replaceChildren(...body());
  shown();
  if (!dialog().open) dialog().showModal();
}

export function refresh(): void {
  if (dialog().open) shown?.();
}

type Figure = [what: string, value: string | undefined, source?: string];

function list(figures: Figure[]): HTMLElement {
  const list = make("dl", { class: "details" });
  for (const [what, value, source] of figures) {
    if (value === undefined || value === "") continue;
    const told = make("dd", { text: value });
    if (source) told.append(make("small", { text: source }));
    list.append(make("div", {}, make("dt", { text: what }), told));
  }
  return list;
}

/** Everything about one connection, each figure with its source. */
export function details(store: Store, id: number): void {
  const first = store.rows.get(id);
  if (!first) return;
  let row: Row = first;
  show("Connection", () => {
    const known = store.rows.get(id);
    row = known ?? row;
    const { process, place } = row;
    const now = store.status?.time ?? 0;
    const end = row.ended ?? now;
    const located = `${store.about?.geo.join(", ") || "no database"}`;
    return [
      list([
        ["Process", process && `${row.comm}, process ${process.pid}, user ${process.uid}`, attributions[row.attribution]],
        ["Process", process ? undefined : "–", attributions["none"]],
        ["Program", process?.exe],
        ["Container", process?.container, "read off the cgroup's path"],
        ["Unit", process?.unit, "read off the cgroup's path"],
        ["Cgroup", process?.cgroup],
        ["Protocol", `${row.protocol}${row.direction ? `, ${row.direction}` : ""}`, row.direction ? undefined : "older than the watch: who opened it is not known"],
        ["Local", row.local],
        ["Remote", row.remote],
        ["Name", row.remote_name, "from a DNS answer that this host received, or a reverse look-up"],
        ["Place", place.country ? `${place.city ? `${place.city}, ` : ""}${country(place.country)}` : place.label, place.kind === "located" ? located : "from the kind of address"],
        ["Network", place.asn === undefined ? undefined : `AS${place.asn} ${place.organization ?? ""}`, located],
        ["Received", `${bytes(row.rx_bytes)} (${row.rx_bytes.toLocaleString("en")} bytes)${row.rx > 0 ? `, now ${rate(row.rx)}` : ""}`, sources[row.source]],
        ["Sent", `${bytes(row.tx_bytes)} (${row.tx_bytes.toLocaleString("en")} bytes)${row.tx > 0 ? `, now ${rate(row.tx)}` : ""}`, sources[row.source]],
        ["Round trip", rtt(row.rtt_us), "TCP's smoothed estimate"],
        ["Retransmits", row.retransmits === undefined ? undefined : String(row.retransmits), "TCP's count of segments sent again"],
        ["Began", row.started === undefined ? "before the watch" : clock(row.started)],
        ["Lasted", row.started === undefined ? undefined : duration(end - row.started)],
        ["Ended", row.ended === undefined ? (known ? undefined : "more than a minute ago") : clock(row.ended), row.unseen ? "the end was not seen: the totals are those last read" : undefined],
        ["Network namespace", row.netns === undefined ? undefined : String(row.netns)],
      ]),
    ];
  });
}

/** What was missed, each kind by itself. */
export function lost(store: Store): void {
  show("What was missed since the start", () => {
    const counts = store.status?.lost;
    return [
      list(losses.map(([kind, what]) => [kind, String(counts?.[kind] ?? 0), what])),
      make("p", { text: "Nothing of it is in the other figures, and nothing is estimated." }),
    ];
  });
}

export function help(store: Store): void {
  show("Help", () => {
    const { about } = store;
    const pairs = (rows: [string, string][]) => list(rows.map(([key, what]) => [key, what]));
    return [
      make("h3", { text: "Keys" }),
      pairs(keys),
      make("h3", { text: "Filter" }),
      make("p", { text: "Words are looked for everywhere. process: pid: uid: remote: port: protocol: direction: country: place: container: as: netns: look in one place, a minus before a term excludes it, and all terms must hold." }),
      make("h3", { text: "Where the figures come from" }),
      list([
        ["TCP bytes", sources["socket"]],
        ["Other bytes", sources["calls"]],
        ["Forwarded", about?.interface ? `${sources["packets"]}: ${about.interface}` : "not watched (--interface)"],
        ["Process", "the column Source says how it is known", Object.entries(attributions).map(([word, what]) => `${word}: ${what}`).join("; ")],
        ["Names", "DNS answers that processes of this host received"],
        ["Places", about?.geo.join(", ") || "no database", "a country's point is the middle of its largest piece of land"],
        ["Home", store.home ? store.home.join(", ") : "not known: no arcs are drawn (--home LAT,LON)"],
        ["Throughput", "sums of all connections, also of those that ended within an interval"],
        ...(about?.missing ?? []).map((missing): Figure => ["Missing", missing]),
      ]),
      make("h3", { text: "About" }),
      list([
        ["underpass", about?.version],
        ["Kernel", about?.kernel],
        ["Since", about && new Date(about.started).toLocaleString("en-GB")],
        ["Interval", about && duration(about.interval)],
      ]),
    ];
  });
}
