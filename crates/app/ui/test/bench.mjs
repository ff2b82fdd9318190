// Measures the page for `./dev bench watch-web`: says "ready" once it is live, waits for a
// line, and prints what it has measured in so many milliseconds.

import { get } from "node:http";
import { browser, eventually, sleep } from "./kit.mjs";

const time = Number(process.argv[2]);
const url = "http://127.0.0.1:7676/";
const context = await browser();
const page = context.pages()[0] ?? (await context.newPage());
await page.goto(url);
await eventually("the page is live", async () => (await page.locator("#state").innerText()) === "live");
const session = await context.newCDPSession(page);
await session.send("Performance.enable");
const busy = async () => {
  const { metrics } = await session.send("Performance.getMetrics");
  return metrics.find(({ name }) => name === "TaskDuration").value;
};
await sleep(3000);
process.stdout.write("ready\n");
await new Promise((done) => process.stdin.once("data", done));

const before = await busy();
const frames = await page.evaluate(
  (time) =>
    new Promise((done) => {
      const gaps = [];
      const start = performance.now();
      let last = start;
      const next = (now) => {
        gaps.push(now - last);
        last = now;
        if (now - start < time) requestAnimationFrame(next);
        else done(gaps.slice(1));
      };
      requestAnimationFrame(next);
    }),
  time,
);
const cpu = ((await busy()) - before) / (time / 1000);
await context.close();

// The bytes of the stream, by a client that only counts.
const counted = await new Promise((done) => {
  get(`${url}api/v1/stream`, (answer) => {
    let [first, rest, began, text] = [0, 0, 0, ""];
    answer.on("data", (bytes) => {
      if (!began) {
        first += bytes.length;
        text = text.slice(-1) + bytes;
        if (text.endsWith("\n\n")) began = Date.now();
      } else rest += bytes.length;
    });
    setTimeout(() => {
      answer.destroy();
      done({ first, rate: rest / ((Date.now() - began) / 1000) });
    }, 6500);
  });
});
frames.sort((a, b) => a - b);
const sum = frames.reduce((a, b) => a + b, 0);
console.log(
  JSON.stringify({
    wire: counted.rate / 1024,
    first: counted.first / 1024,
    cpu: 100 * cpu,
    frames: (1000 * frames.length) / sum,
    frame: frames[Math.floor(frames.length * 0.99)],
  }),
);
process.exit(0);
