import { geoDistance, geoEqualEarth, geoInterpolate, geoPath, type GeoProjection } from "d3-geo";
import { feature, mesh } from "topojson-client";
import type { GeometryCollection } from "topojson-specification";
import points from "virtual:countries";
import world from "world-atlas/countries-110m.json";
import type { Colours } from "./colours.ts";
import { by, make } from "./dom.ts";
import { bytes, count, rate } from "./format.ts";
import type { Place, Row } from "./store.ts";

/** What leads to one place. */
export interface Spot {
  place: Place;
  rows: number;
  rate: number;
  bytes: number;
  /** Bytes by process name. */
  shares: Map<string, number>;
}

/** A spot that is drawn. */
interface Dot extends Spot {
  at: [number, number];
  x: number;
  y: number;
  radius: number;
}

/** Where a place is drawn, in degrees [east, north]; nothing is put anywhere by guess. */
export const position = (place: Place): [number, number] | undefined =>
  place.longitude !== undefined && place.latitude !== undefined
    ? [place.longitude, place.latitude]
    : place.country === undefined
      ? undefined
      : points[place.country];

const countries = world.objects["countries"] as GeometryCollection;
const land = feature(world, world.objects["land"] as GeometryCollection);
const borders = mesh(world, countries, (a, b) => a !== b);
/** What has to be seen: the inhabited world. */
const frame = { type: "MultiPoint" as const, coordinates: [[-168, 20], [178, 20], [0, 78], [-70, -56], [20, -40]] };

export class WorldMap {
  private box = by("map");
  private canvas = this.box.querySelector("canvas")!;
  private tip = by("tip");
  private base = document.createElement("canvas");
  private projection: GeoProjection = geoEqualEarth();
  private dots: Dot[] = [];
  private home?: [number, number];
  private chosen?: string;

  constructor(
    private readonly colours: Colours,
    private readonly pick: (place: Place) => void,
  ) {
    new ResizeObserver(() => this.resize()).observe(this.box);
    this.box.addEventListener("pointermove", (event) => this.hover(event));
    this.box.addEventListener("pointerleave", () => this.choose(undefined));
    this.box.addEventListener("blur", () => this.choose(undefined));
    this.box.addEventListener("click", (event) => {
      const dot = this.under(event);
      if (dot) this.pick(dot.place);
    });
    this.box.addEventListener("keydown", (event) => this.key(event));
  }

  /** Takes in where the traffic goes. */
  update(spots: Spot[], home?: [number, number]): void {
    this.home = home && [home[1], home[0]];
    const most = Math.max(1, ...spots.map((spot) => spot.bytes));
    this.dots = spots
      .flatMap((spot): Dot[] => {
        const at = position(spot.place);
        const xy = at && this.projection(at);
        if (!xy) return [];
        const radius = 3.5 + 12 * Math.sqrt(spot.bytes / most);
        return [{ ...spot, at: at!, x: xy[0], y: xy[1], radius }];
      })
      .sort((a, b) => b.bytes - a.bytes);
    const label = this.dots.slice(0, 3).map((dot) => dot.place.label);
    this.box.setAttribute("aria-label", `World map: ${this.dots.length} places${label.length ? `, most traffic with ${label.join(", ")}` : ""}`);
    this.draw();
    if (this.chosen !== undefined) this.describe();
  }

  /** The theme or the size has changed. */
  resize(): void {
    const { clientWidth: width, clientHeight: height } = this.box;
    if (!width || !height) return;
    const scale = devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.base]) [canvas.width, canvas.height] = [width * scale, height * scale];
    this.projection.rotate([-11, 0]).fitExtent([[8, 8], [width - 8, height - 8]], frame);
    const style = getComputedStyle(document.documentElement);
    const context = this.base.getContext("2d")!;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const path = geoPath(this.projection, context);
    context.clearRect(0, 0, width, height);
    context.beginPath();
    path(land);
    context.fillStyle = style.getPropertyValue("--land");
    context.fill();
    context.beginPath();
    path(borders);
    context.strokeStyle = style.getPropertyValue("--border");
    context.lineWidth = 0.6;
    context.stroke();
    for (const dot of this.dots) [dot.x, dot.y] = this.projection(dot.at) ?? [dot.x, dot.y];
    this.draw();
  }

  private draw(): void {
    const context = this.canvas.getContext("2d")!;
    const scale = devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.base.width) context.drawImage(this.base, 0, 0);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const style = getComputedStyle(document.documentElement);
    const [paper, ink] = [style.getPropertyValue("--panel"), style.getPropertyValue("--ink")];
    const home = this.home && this.projection(this.home);
    if (home) {
      for (const dot of this.dots.slice(0, 200)) this.arc(context, dot);
      context.beginPath();
      context.arc(home[0], home[1], 4, 0, 2 * Math.PI);
      context.strokeStyle = ink;
      context.lineWidth = 1.5;
      context.fillStyle = paper;
      context.fill();
      context.stroke();
    }
    // Small ones lie on top of large ones.
    for (const dot of this.dots) this.pie(context, dot, paper);
    const chosen = this.dots.find((dot) => dot.place.label === this.chosen);
    if (chosen) {
      context.beginPath();
      context.arc(chosen.x, chosen.y, chosen.radius + 3, 0, 2 * Math.PI);
      context.strokeStyle = ink;
      context.lineWidth = 1.5;
      context.stroke();
    }
  }

  /** A line along the earth, the thicker the more moves there now. */
  private arc(context: CanvasRenderingContext2D, dot: Dot): void {
    const distance = geoDistance(this.home!, dot.at);
    if (distance < 0.02) return;
    const between = geoInterpolate(this.home!, dot.at);
    const steps = Math.max(8, Math.ceil(distance * 24));
    context.beginPath();
    let before: [number, number] | undefined;
    for (let step = 0; step <= steps; step += 1) {
      const xy = this.projection(between(step / steps));
      if (!xy) continue;
      // Beyond the edge of the map it goes on at the other side.
      if (before && Math.abs(xy[0] - before[0]) < 100) context.lineTo(...xy);
      else context.moveTo(...xy);
      before = xy;
    }
    context.strokeStyle = this.colours.of(main(dot));
    context.globalAlpha = dot.rate > 0 ? 0.75 : 0.25;
    context.lineWidth = dot.rate > 0 ? 1 + Math.min(3, Math.log10(1 + dot.rate) / 2.5) : 0.8;
    context.stroke();
    context.globalAlpha = 1;
  }

  /** A dot, with a slice for each process. */
  private pie(context: CanvasRenderingContext2D, dot: Dot, paper: string): void {
    const whole = [...dot.shares.values()].reduce((sum, share) => sum + share, 0);
    const shares = [...dot.shares].sort((a, b) => b[1] - a[1]);
    let angle = -Math.PI / 2;
    for (const [name, share] of shares) {
      const turn = whole > 0 ? (2 * Math.PI * share) / whole : (2 * Math.PI) / shares.length;
      context.beginPath();
      if (shares.length > 1) context.moveTo(dot.x, dot.y);
      context.arc(dot.x, dot.y, dot.radius, angle, angle + turn);
      context.fillStyle = this.colours.of(name);
      context.globalAlpha = 0.9;
      context.fill();
      angle += turn;
    }
    context.globalAlpha = 1;
    context.beginPath();
    context.arc(dot.x, dot.y, dot.radius, 0, 2 * Math.PI);
    context.strokeStyle = paper;
    context.lineWidth = 1;
    context.stroke();
  }

  private under(event: MouseEvent): Dot | undefined {
    const box = this.box.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const near = this.dots.filter((dot) => Math.hypot(dot.x - x, dot.y - y) <= Math.max(dot.radius, 8) + 2);
    return near.at(-1);
  }

  private hover(event: MouseEvent): void {
    const dot = this.under(event);
    this.box.classList.toggle("over", dot !== undefined);
    this.choose(dot?.place.label);
  }

  private key(event: KeyboardEvent): void {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const at = this.dots.findIndex((dot) => dot.place.label === this.chosen);
    if (step && this.dots.length) {
      const next = at < 0 && step < 0 ? this.dots.length - 1 : (at + step + this.dots.length) % this.dots.length;
      this.choose(this.dots[next]?.place.label);
    } else if (event.key === "Enter" && at >= 0) this.pick(this.dots[at]!.place);
    else if (event.key === "Escape") this.choose(undefined);
    else return;
    event.preventDefault();
  }

  private choose(label: string | undefined): void {
    if (label === this.chosen) return;
    this.chosen = label;
    this.draw();
    this.describe();
  }

  /** Says what is behind the chosen dot. */
  private describe(): void {
    const dot = this.dots.find((candidate) => candidate.place.label === this.chosen);
    this.tip.hidden = !dot;
    if (!dot) return;
    const line = `${count(dot.rows)} ${dot.rows === 1 ? "connection" : "connections"}, ${bytes(dot.bytes)}`;
    const list = make("ul");
    const shares = [...dot.shares].sort((a, b) => b[1] - a[1]);
    for (const [name, share] of shares.slice(0, 6)) {
      const swatch = make("i", { class: "swatch" });
      swatch.style.background = this.colours.of(name);
      list.append(make("li", {}, swatch, make("span", { text: name }), make("b", { text: bytes(share) })));
    }
    if (shares.length > 6) list.append(make("li", { text: `and ${shares.length - 6} more` }));
    const now = make("p", { text: dot.rate > 0 ? `${line}, now ${rate(dot.rate)}` : line });
    const owner = dot.place.organization ? [make("p", { class: "dim", text: `AS${dot.place.asn} ${dot.place.organization}` })] : [];
    this.tip.replaceChildren(make("strong", { text: dot.place.label }), ...owner, now, list);
    const width = this.box.clientWidth;
    const left = dot.x > width / 2;
    this.tip.style.left = left ? "auto" : `${dot.x + dot.radius + 10}px`;
    this.tip.style.right = left ? `${width - dot.x + dot.radius + 10}px` : "auto";
    const top = Math.min(Math.max(4, dot.y - 40), Math.max(4, this.box.clientHeight - this.tip.offsetHeight - 4));
    this.tip.style.top = `${top}px`;
  }
}

const main = (dot: Dot): string => [...dot.shares].reduce((a, b) => (b[1] > a[1] ? b : a), ["", -1])[0];

/** Adds up what leads where. */
export function gather(rows: Iterable<Row>): Spot[] {
  const spots = new Map<string, Spot>();
  for (const row of rows) {
    const key = row.place.label;
    let spot = spots.get(key);
    if (!spot) spots.set(key, (spot = { place: row.place, rows: 0, rate: 0, bytes: 0, shares: new Map() }));
    const moved = row.rx_bytes + row.tx_bytes;
    spot.rows += 1;
    spot.rate += row.rx + row.tx;
    spot.bytes += moved;
    spot.shares.set(row.comm, (spot.shares.get(row.comm) ?? 0) + moved);
  }
  return [...spots.values()];
}
