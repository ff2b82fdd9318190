import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { by } from "./dom.ts";
import { bytes } from "./format.ts";

/** Distances between lines that read well in units of 1024. */
const steps = Array.from({ length: 46 }, (_, power) => 2 ** power);

type Data = [number[], number[], number[]];

/** Received and sent bytes a second over the last minutes. */
export class Chart {
  private box = by("chart");
  private plot?: uPlot;
  private data: Data = [[], [], []];

  constructor() {
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.box);
  }

  private size = () => ({ width: this.box.clientWidth || 300, height: this.box.clientHeight || 120 });

  update(data: Data): void {
    this.data = data;
    if (!this.plot) this.theme();
    else this.plot.setData(data);
    const [rx, tx] = [data[1].at(-1) ?? 0, data[2].at(-1) ?? 0];
    this.box.setAttribute("aria-label", `Throughput: ${bytes(rx)}/s received, ${bytes(tx)}/s sent`);
  }

  /** Draws anew, in the colours of the theme. */
  theme(): void {
    this.plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name: string) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const series = (label: string, name: string): uPlot.Series => ({
      label,
      stroke: colour(name),
      fill: `${colour(name)}22`,
      width: 1.5,
      points: { show: false },
    });
    this.plot = new uPlot(
      {
        ...this.size(),
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false } },
        padding: [6, 18, 0, 0],
        scales: { y: { range: (_, __, most) => [0, Math.max(1024, most * 1.1)] } },
        axes: [
          { ...axis, size: 20, space: 70, values: (_, times) => times.map((time) => new Date(time * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" })) },
          { ...axis, size: 62, space: 44, incrs: steps, values: (_, values) => values.map((value) => (value === 0 ? "0" : `${bytes(value).replace(".0", "")}/s`)) },
        ],
        series: [{}, series("received", "--in"), series("sent", "--out")],
      },
      this.data,
      this.box,
    );
  }
}
