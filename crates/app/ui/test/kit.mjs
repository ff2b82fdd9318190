// What the tests of the page share: the real binary, Debian's Chromium, patience.

import { spawn } from "node:child_process";
import { existsSync, mkdtempSync } from "node:fs";
import { get, request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

/** A guard against hanging, far above what anything here takes. */
export const PATIENCE = 60_000;

export const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export function ensure(holds, what) {
  if (!holds) throw new Error(what);
}

/** Waits until it is so. */
export async function eventually(what, isSo, patience = PATIENCE) {
  const until = Date.now() + patience;
  for (;;) {
    const found = await isSo();
    if (found) return found;
    ensure(Date.now() < until, `it never came true that ${what}`);
    await sleep(50);
  }
}

/** Ends with this process. */
const children = new Set();
process.on("exit", () => children.forEach((child) => child.kill("SIGKILL")));

export function start(command, ...args) {
  const child = spawn(command, args, { stdio: ["ignore", "ignore", "pipe"] });
  children.add(child);
  child.said = "";
  child.stderr.on("data", (bytes) => (child.said += bytes));
  child.ended = new Promise((done) =>
    child.on("exit", (status) => {
      children.delete(child);
      done(status);
    }),
  );
  return child;
}

/** A running `underpass watch --web`. */
export async function watch(...args) {
  const child = start(process.env.UNDERPASS, "watch", "--json", ...args);
  let over = false;
  child.ended.then(() => (over = true));
  await eventually("watch starts", () => {
    ensure(!over, `watch ended: ${child.said}`);
    return child.said.includes("watching");
  });
  return child;
}

export async function browser(...more) {
  const path = ["/usr/bin/chromium", "/usr/bin/chromium-browser"].find(existsSync);
  ensure(path, "the tests of the page take Chromium: ./dev setup test");
  return chromium.launchPersistentContext(mkdtempSync(join(tmpdir(), "underpass-page-")), {
    executablePath: path,
    headless: true,
    viewport: { width: 1440, height: 900 },
    args: [
      "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync", ...more,
    ],
    ...(process.env.BYPASS_CSP ? { bypassCSP: true } : {}),
  });
}

/** A plain request, with any headers. */
export function ask(url, headers = {}, method = "GET", body = undefined) {
  return new Promise((done, fail) => {
    const call = (method === "GET" ? get : request)(url, { headers, method }, (answer) => {
      let text = "";
      answer.on("data", (bytes) => (text += bytes));
      answer.on("end", () => done({ status: answer.statusCode, headers: answer.headers, text }));
    });
    call.on("error", fail);
    if (method !== "GET") call.end(body);
  });
}
