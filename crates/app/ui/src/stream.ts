import type { Message } from "./store.ts";

export type State = "connecting" | "live" | "stale";

/** The server's events, again and again after it has been away. */
export class Stream {
  private source?: EventSource;
  private last = Date.now();
  private interval = 1000;
  private wait = 500;
  private state: State = "connecting";

  constructor(
    private readonly take: (message: Message) => void,
    private readonly tell: (state: State, silence: number) => void,
  ) {
    this.connect();
    setInterval(() => this.check(), 500);
  }

  private connect(): void {
    const source = new EventSource("/api/v1/stream");
    this.source = source;
    source.onmessage = (event: MessageEvent<string>) => {
      const message = JSON.parse(event.data) as Message;
      if (message.about) this.interval = message.about.interval;
      [this.last, this.wait] = [Date.now(), 500];
      this.take(message);
      this.set("live");
    };
    source.onerror = () => this.again();
  }

  private again(): void {
    this.source?.close();
    this.source = undefined;
    const wait = this.wait;
    this.wait = Math.min(5000, wait * 1.5);
    setTimeout(() => void this.retry(), wait);
  }

  private async retry(): Promise<void> {
    if (this.source) return;
    try {
      // The stream does not say why it was refused.
      const answer = await fetch("/api/v1/status");
      if (answer.status === 401) return location.assign("/login");
    } catch {
      return this.again();
    }
    this.connect();
  }

  private check(): void {
    const silence = Date.now() - this.last;
    if (silence > 2.5 * this.interval + 1500) {
      this.set("stale", silence);
      // A connection that has died without a word.
      if (this.source && silence > 4 * this.interval + 10_000) this.again();
    }
  }

  private set(state: State, silence = 0): void {
    if (state !== "stale" && state === this.state) return;
    this.state = state;
    this.tell(state, silence);
  }
}
