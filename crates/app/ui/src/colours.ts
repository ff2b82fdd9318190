/** How far a name may fall behind before it loses its colour: a colour should not change with every look. */
const KEEPS = 12;

/** Which process has which of the few colours that can be told apart: the busiest ones have. */
export class Colours {
  private slots: (string | undefined)[] = Array.from({ length: 7 }, () => undefined);
  private palette: string[] = [];
  private rest = "";

  constructor() {
    this.read();
  }

  /** Takes the colours of the theme. */
  read(): void {
    const style = getComputedStyle(document.documentElement);
    this.palette = this.slots.map((_, slot) => style.getPropertyValue(`--process-${slot + 1}`).trim());
    this.rest = style.getPropertyValue("--process-rest").trim();
  }

  /** `ranked` are the names that there are, the busiest first. */
  assign(ranked: string[]): void {
    const alive = new Set(ranked.slice(0, KEEPS));
    this.slots = this.slots.map((name) => (name !== undefined && alive.has(name) ? name : undefined));
    for (const name of ranked) {
      const free = this.slots.indexOf(undefined);
      if (free < 0) return;
      if (name !== "–" && !this.slots.includes(name)) this.slots[free] = name;
    }
  }

  of(name: string): string {
    return this.palette[this.slots.indexOf(name)] ?? this.rest;
  }
}
