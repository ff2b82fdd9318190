import { clean, country } from "./format.ts";

/** What the server sends; its names are those of the API (docs/watch-web.md). */
export interface About {
  version: string;
  host: string;
  kernel: string;
  started: number;
  interval: number;
  missing: string[];
  geo: string[];
  interface?: string;
}

export interface Lost {
  events: number;
  names: number;
  changes: number;
  datagrams: number;
  sockets: number;
  passages: number;
  packets: number;
  unattributed: number;
  undecoded: number;
}

export interface Status {
  time: number;
  open: number;
  connections: number;
  ended: number;
  rx_rate: number;
  tx_rate: number;
  lost: Lost;
}

export interface Process {
  pid: number;
  comm: string;
  exe?: string;
  uid: number;
  cgroup?: string;
  container?: string;
  unit?: string;
}

export interface Place {
  kind: string;
  country?: string;
  city?: string;
  latitude?: number;
  longitude?: number;
  asn?: number;
  organization?: string;
  /** For people: `Berlin, Germany`. */
  label: string;
}

interface Connection {
  id: number;
  protocol: string;
  direction?: string;
  local?: string;
  remote?: string;
  remote_name?: string;
  netns?: number;
  rx_bytes: number;
  tx_bytes: number;
  rtt_us?: number;
  retransmits?: number;
  started?: number;
  ended?: number;
  attribution: string;
  source: string;
  unseen?: boolean;
}

export interface Row extends Connection {
  process?: Process;
  place: Place;
  /** Bytes a second over the last interval. */
  rx: number;
  tx: number;
  /** The process' name, or a dash. */
  comm: string;
  /** The remote's name or address, and with its port. */
  host: string;
  port: string;
  peer: string;
  /** Everything that a plain word of the filter is looked for in. */
  text: string;
}

export interface Message {
  look: number;
  about?: About;
  history?: [number, number, number, number][];
  status: Status;
  home?: [number, number];
  processes?: [number, Process][];
  places?: [number, Place][];
  rows?: [Connection, number | null, number][];
  gone?: number[];
  moved: { id: number[]; rx: number[]; tx: number[] };
  timed: { id: number[]; rtt: number[]; retransmits: number[] };
}

const kinds: Record<string, string> = {
  loopback: "This host",
  private: "Private networks",
  "link-local": "Link-local",
  multicast: "Multicast",
  unlocated: "Public, not located",
  unknown: "No remote address",
};

/** How many points of the throughput are kept. */
const HISTORY = 300;

/** All that the page knows, brought up to date by messages. */
export class Store {
  about?: About;
  status?: Status;
  home?: [number, number];
  rows = new Map<number, Row>();
  history: [number[], number[], number[]] = [[], [], []];
  private processes = new Map<number, Process>();
  private places = new Map<number, Place>();
  private moving: Row[] = [];

  apply(message: Message): void {
    if (message.about) this.reset(message.about);
    const before = this.status?.time;
    const span = message.about || !before ? 0 : Math.max(1, message.status.time - before) / 1000;
    this.status = message.status;
    if (message.home) this.home = message.home;
    for (const [id, process] of message.processes ?? []) this.processes.set(id, neat(process));
    for (const [id, place] of message.places ?? []) this.places.set(id, { ...place, label: label(place) });
    for (const row of this.moving) row.rx = row.tx = 0;
    this.moving = [];
    for (const [connection, process, place] of message.rows ?? []) this.take(connection, process, place, span);
    this.move(message, span);
    for (const id of message.gone ?? []) this.rows.delete(id);
    if (message.history) for (const [time, rx, tx] of message.history) this.point(time, rx, tx);
    else this.point(message.status.time, message.status.rx_rate, message.status.tx_rate);
    this.prune();
  }

  private reset(about: About): void {
    this.about = about;
    this.home = undefined;
    this.rows.clear();
    this.processes.clear();
    this.places.clear();
    this.history = [[], [], []];
  }

  private take(connection: Connection, process: number | null, place: number, span: number): void {
    const old = this.rows.get(connection.id);
    const row = describe(connection, process === null ? undefined : this.processes.get(process), this.places.get(place));
    if (span > 0) {
      const fresh = connection.started === undefined && !old;
      row.rx = fresh ? 0 : Math.max(0, row.rx_bytes - (old?.rx_bytes ?? 0)) / span;
      row.tx = fresh ? 0 : Math.max(0, row.tx_bytes - (old?.tx_bytes ?? 0)) / span;
      this.moving.push(row);
    }
    this.rows.set(row.id, row);
  }

  private move({ moved, timed }: Message, span: number): void {
    let id = 0;
    for (let at = 0; at < moved.id.length; at += 1) {
      id += moved.id[at]!;
      const row = this.rows.get(id);
      if (!row) continue;
      row.rx_bytes += moved.rx[at]!;
      row.tx_bytes += moved.tx[at]!;
      if (span > 0) {
        row.rx = moved.rx[at]! / span;
        row.tx = moved.tx[at]! / span;
        this.moving.push(row);
      }
    }
    id = 0;
    for (let at = 0; at < timed.id.length; at += 1) {
      id += timed.id[at]!;
      const row = this.rows.get(id);
      if (!row) continue;
      row.rtt_us = timed.rtt[at] || undefined;
      row.retransmits = timed.retransmits[at];
    }
  }

  private point(time: number, rx: number, tx: number): void {
    const [times, received, sent] = this.history;
    times.push(time / 1000);
    received.push(rx);
    sent.push(tx);
    if (times.length > HISTORY) for (const column of this.history) column.shift();
  }

  /** Forgets processes and places that no row is of: their numbers do not come again. */
  private prune(): void {
    if (this.processes.size + this.places.size <= 2 * this.rows.size + 4096) return;
    const used = new Set<unknown>();
    for (const row of this.rows.values()) used.add(row.process).add(row.place);
    for (const shared of [this.processes, this.places])
      for (const [id, value] of shared) if (!used.has(value)) shared.delete(id);
  }
}

function neat(process: Process): Process {
  const text = (value?: string) => (value === undefined ? undefined : clean(value));
  return {
    ...process,
    comm: clean(process.comm),
    exe: text(process.exe),
    cgroup: text(process.cgroup),
    container: text(process.container),
    unit: text(process.unit),
  };
}

function label(place: Place): string {
  const land = place.country ? country(place.country) : undefined;
  return clean([place.city, land].filter(Boolean).join(", ")) || kinds[place.kind] || "Coordinates only";
}

const nowhere: Place = { kind: "unknown", label: kinds["unknown"]! };

function describe(connection: Connection, process?: Process, place: Place = nowhere): Row {
  const remote = connection.remote ?? "–";
  // `[::1]:53`, `192.0.2.1:53`, `192.0.2.1`, `::1`
  const cut = /^(?:\[(.*)\]|([^:]*)):(\d+)$/.exec(remote);
  const address = cut ? (cut[1] ?? cut[2]!) : remote;
  const port = cut?.[3] ?? "";
  const name = connection.remote_name === undefined ? undefined : clean(connection.remote_name);
  const host = name ?? address;
  const peer = name ? `${name}${port && `:${port}`}` : remote;
  const comm = process ? process.comm : "–";
  const words = [comm, process?.exe, process?.pid, process?.container, process?.unit, connection.protocol];
  words.push(connection.direction, connection.local, remote, name, place.country, place.label, place.organization);
  return {
    ...connection,
    remote_name: name,
    process,
    place,
    rx: 0,
    tx: 0,
    comm,
    host,
    port,
    peer,
    text: words.join("\n").toLowerCase(),
  };
}
