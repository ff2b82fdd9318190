// The page against a real `underpass watch --web` and real traffic. Started by
// tests/net/watch_web.rs inside a network namespace, with the world at other addresses.

import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createSocket } from "node:dgram";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ask, browser, ensure, eventually, start, watch } from "./kit.mjs";

const { LOCATED, PRIVATE, GEO, SCREENSHOTS } = process.env;
const PORT = 7676;
const url = `http://127.0.0.1:${PORT}/`;
const folder = mkdtempSync(join(tmpdir(), "underpass-test-"));
process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
const options = ["--web", `127.0.0.1:${PORT}`, "--geo", GEO, "--interval", "300ms"];

const steps = [];
const step = (name, run) => steps.push([name, run]);

let server = await watch(...options, "--home", "52.5,13.4");
const context = await browser("--host-resolver-rules=MAP evil.example 127.0.0.1");
const page = context.pages()[0] ?? (await context.newPage());
const troubles = [];
const strangers = [];
const expected = /ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE/;
page.on("console", (message) => {
  if (message.type() === "error" && !expected.test(message.text())) troubles.push(message.text());
});
page.on("pageerror", (error) => troubles.push(String(error)));
page.on("dialog", (dialog) => {
  troubles.push(`a dialog: ${dialog.message()}`);
  dialog.dismiss();
});
context.on("request", (request) => {
  if (!request.url().startsWith(url)) strangers.push(request.url());
});
await page.goto(url);

const text = (selector) => page.locator(selector).innerText();
const rows = async () => (await page.locator("#table .row:not([hidden])").allInnerTexts()).map((row) => row.replace(/\s+/g, " "));
const row = (what, ...parts) =>
  eventually(what, async () => (await rows()).find((line) => parts.every((part) => line.includes(part))));
const live = () => eventually("the page is live", async () => (await text("#state")) === "live");
const filter = async (words) => {
  await page.locator("#filter").fill(words);
  await page.waitForTimeout(100);
};

/** Asks the world's name server, which answers every question with its own address. */
async function resolve(labels) {
  const name = Buffer.concat(labels.map((label) => Buffer.from([label.length, ...Buffer.from(label)])));
  const head = Buffer.from([0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
  const socket = createSocket("udp4");
  const answer = new Promise((done) => socket.once("message", done));
  socket.send(Buffer.concat([head, name, Buffer.from([0, 0, 1, 0, 1])]), 53, LOCATED);
  await answer;
  socket.close();
}

step("the connection that curl makes is there, with its process and its place", async () => {
  await live();
  const curl = start("curl", "-s", "-o", "/dev/null", "--limit-rate", "30k", `http://${LOCATED}/slow`);
  await filter("process:curl");
  await row("curl is shown", `curl ${curl.pid}`, LOCATED, "London, United Kingdom", "KiB");
  await page.locator("#table .row:not([hidden])", { hasText: `curl ${curl.pid}` }).click();
  const told = await eventually("the details are shown", async () => {
    const words = await text("#dialog-body");
    return words.includes("seen at work in the kernel") && words;
  });
  for (const part of ["/curl", "the socket's own counters", "London, United Kingdom", "Test-City"])
    ensure(told.includes(part), `the details lack ${part}: ${told}`);
  await page.keyboard.press("Escape");
});

step("a connection of a moment is shown with all its bytes", async () => {
  // Beside thousands of short connections of others some are in the sums only: then once more.
  const curl = await eventually("a short curl is shown", async () => {
    const curl = start("curl", "-s", "-o", "/dev/null", `http://${LOCATED}/bytes`);
    ensure((await curl.ended) === 0, "curl has failed");
    await page.waitForTimeout(1500);
    const shown = (await rows()).some((line) => line.includes(`curl ${curl.pid}`) && line.includes("97.7 KiB"));
    return shown && curl;
  });
  await page.locator("#ended").uncheck();
  await eventually("it is hidden", async () => !(await rows()).some((line) => line.includes(`curl ${curl.pid}`)));
  await page.locator("#ended").check();
});

step("the map draws the place in the colour of its process", async () => {
  await eventually("the map tells of one place", async () => {
    const label = await page.locator("#map").getAttribute("aria-label");
    return label === "World map: 1 places, most traffic with London, United Kingdom";
  });
  await page.locator("#map").focus();
  await page.keyboard.press("ArrowRight");
  const told = await text("#tip");
  ensure(told.includes("London, United Kingdom") && told.includes("curl"), told);
  await eventually("the dot is drawn", () => page.evaluate(() => {
    const canvas = document.querySelector("#map canvas");
    const rgb = getComputedStyle(document.querySelector("#tip .swatch")).backgroundColor.match(/\d+/g).map(Number);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let found = 0;
    for (let at = 0; at < data.length; at += 4)
      if (rgb.every((value, channel) => Math.abs(data[at + channel] - value) < 40)) found += 1;
    return found > 60;
  }));
  await page.keyboard.press("Enter");
  ensure((await page.locator("#filter").inputValue()).includes('place:"London, United Kingdom"'), "Enter filters by the place");
  await page.locator("#map").blur();
});

step("the mouse tells what is behind a dot, and a click filters by it", async () => {
  await filter("");
  const curl = start("curl", "-s", "-o", "/dev/null", "--limit-rate", "30k", `http://${LOCATED}/slow`);
  await row("curl is shown", `curl ${curl.pid}`, "London");
  // Where the map is painted in the colour of curl all around: an arc is too thin for that.
  const dot = await eventually("the dot is drawn", () =>
    page.evaluate(() => {
      const swatch = [...document.querySelectorAll("#top-process button")].find((button) => button.innerText.includes("curl"));
      const rgb = getComputedStyle(swatch.querySelector(".swatch")).backgroundColor.match(/\d+/g).map(Number);
      const canvas = document.querySelector("#map canvas");
      const { width, height } = canvas;
      const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
      const painted = (x, y) => rgb.every((value, channel) => Math.abs(data[4 * (y * width + x) + channel] - value) < 40);
      for (let y = 4; y < height - 4; y += 1)
        for (let x = 4; x < width - 4; x += 1)
          if ([[0, 0], [3, 0], [-3, 0], [0, 3], [0, -3]].every(([dx, dy]) => painted(x + dx, y + dy)))
            return { x: (x * canvas.clientWidth) / width, y: (y * canvas.clientHeight) / height };
      return undefined;
    }),
  );
  const box = await page.locator("#map").boundingBox();
  const at = [box.x + dot.x, box.y + dot.y];
  ensure(!(await page.locator("#tip").isVisible()), "nothing is told before");
  await page.mouse.move(...at);
  const told = await eventually("the dot is told", async () => (await page.locator("#tip").isVisible()) && text("#tip"));
  for (const part of ["London, United Kingdom", "AS20712 Andrews & Arnold Ltd", "curl", "KiB"])
    ensure(told.includes(part), `the dot's words lack ${part}: ${told}`);
  ensure(/\d+ connections?, /.test(told), told);
  ensure(await page.locator("#map.over").count(), "the pointer says that there is something to click");
  await page.mouse.move(box.x + 3, box.y + box.height - 3);
  await eventually("the words go with the pointer", async () => !(await page.locator("#tip").isVisible()));
  await page.mouse.click(...at);
  ensure((await page.locator("#filter").inputValue()) === 'place:"London, United Kingdom"', "a click filters by the place");
  const shown = await eventually("what is behind the dot is listed", async () => (await rows()).length && rows());
  ensure(shown.every((line) => line.includes("London, United Kingdom")), shown.join("\n"));
  await page.mouse.click(...at);
  ensure((await page.locator("#filter").inputValue()) === "", "another click takes the filter back");
  await page.mouse.move(0, 0);
  curl.kill();
});

step("what has no place on the map is beside it", async () => {
  await filter("");
  const curl = start("curl", "-s", "-o", "/dev/null", "--limit-rate", "30k", `http://${PRIVATE}/slow`);
  await eventually("private networks are listed", async () => (await text("#elsewhere")).includes("Private networks"));
  await page.locator("#elsewhere button", { hasText: "Private networks" }).click();
  await row("the private connection passes its filter", `curl ${curl.pid}`);
  ensure((await rows()).every((line) => line.includes("Private networks")), "only private ones are shown");
  curl.kill();
});

step("filters, groups and orders work", async () => {
  await filter(`process:curl remote:${LOCATED}`);
  const shown = await eventually("some pass", async () => (await rows()).length && rows());
  ensure(shown.every((line) => line.includes("curl") && line.includes(LOCATED)), shown.join("\n"));
  await filter("process:curl -curl");
  await eventually("none pass", async () => (await rows()).length === 0);
  await filter("port:80 protocol:tcp country:GB");
  await row("fields are exact", "curl", LOCATED);
  await page.locator("#group").selectOption("country");
  await row("the group is shown", "GB");
  await page.locator("#group").selectOption("process");
  await row("the group is shown", "curl");
  await page.locator(".head .received button").click();
  await eventually("the order is told", async () => (await page.locator(".head .received").getAttribute("aria-sort")) === "descending");
  await page.locator("#group").selectOption("");
  await page.locator("body").press("Escape");
  ensure((await page.locator("#filter").inputValue()) === "", "Escape drops the filter");
  await page.keyboard.press("/");
  ensure(await page.locator("#filter").evaluate((input) => input === document.activeElement), "/ goes to the filter");
  await page.keyboard.press("Escape");
  await page.keyboard.press("?");
  ensure((await text("#dialog-body")).includes("Where the figures come from"), "? shows the help");
  await page.keyboard.press("Escape");
});

/** A path of the API. */
const api = async (path) => {
  const { status, headers, text } = await ask(`${url}api/v1/${path}`);
  ensure(status === 200 && headers["content-type"] === "application/json", `${path}: ${status} ${headers["content-type"]}`);
  return JSON.parse(text);
};

step("the API tells of processes, their connections and the watch", async () => {
  const curls = [1, 2].map(() => start("curl", "-s", "-o", "/dev/null", "-Z", "--limit-rate", "30k", `http://${LOCATED}/slow`, `http://${PRIVATE}/slow`));
  for (const { pid } of curls) {
    // Both are told of one look: the figures are the same.
    const [process, connections] = await eventually(`process ${pid} is told`, async () => {
      const [processes, connections] = [await api("processes"), await api("connections")];
      const process = processes.processes.find((process) => process.pid === pid);
      return processes.time === connections.time && process?.connections === 2 && [process, connections.connections];
    });
    const own = connections.filter((connection) => connection.pid === pid);
    const sum = (field) => own.reduce((sum, connection) => sum + connection[field], 0);
    ensure(own.length === 2 && own.every(({ ended }) => ended === undefined), JSON.stringify(own));
    for (const field of ["rx_bytes", "tx_bytes", "rx_rate", "tx_rate"])
      ensure(process[field] === sum(field), `${field}: ${process[field]}, of its connections ${sum(field)}`);
    ensure(process.comm === "curl" && process.exe.endsWith("/curl") && process.uid === 0, JSON.stringify(process));
    ensure(process.rx_bytes > 1000 && process.tx_bytes > 100, JSON.stringify(process));
    const [located] = own.filter(({ remote }) => remote === `${LOCATED}:80`);
    const { protocol, direction, attribution, source, netns, rtt_us, retransmits, started } = located;
    ensure([protocol, direction, attribution, source].join() === "tcp,outbound,kernel,socket", JSON.stringify(located));
    ensure(netns > 0 && rtt_us > 0 && retransmits >= 0 && started <= Date.now(), JSON.stringify(located));
    const place = { kind: "located", country: "GB", city: "London", latitude: 51.51, longitude: -0.09, asn: 20712, organization: "Andrews & Arnold Ltd" };
    ensure(JSON.stringify(located.place) === JSON.stringify(place), JSON.stringify(located.place));
    const [near] = own.filter(({ remote }) => remote === `${PRIVATE}:80`);
    ensure(JSON.stringify(near.place) === '{"kind":"private"}', JSON.stringify(near.place));
  }
  for (const curl of curls) curl.kill();
  const dead = curls.map(({ pid }) => pid);
  await eventually("processes without connections are not told", async () =>
    (await api("processes")).processes.every(({ pid }) => !dead.includes(pid)),
  );
  ensure((await api("connections")).connections.every(({ pid }) => !dead.includes(pid)), "ended ones are told on request only");
  const ended = (await api("connections?ended=true")).connections.filter(({ pid }) => dead.includes(pid));
  ensure(ended.length === 4 && ended.every((connection) => connection.ended >= connection.started), JSON.stringify(ended));
  const status = await api("status");
  for (const field of ["version", "host", "kernel", "started", "interval", "missing", "geo", "home", "time", "open", "connections", "ended", "rx_rate", "tx_rate", "lost"])
    ensure(field in status, `the status lacks ${field}`);
  ensure(status.interval === 300 && status.geo[0].includes("Test-City") && status.home.join() === "52.5,13.4", JSON.stringify(status));
  const { status: wrong } = await ask(`${url}api/v1/connections?open=true`);
  ensure(wrong === 400, `an unknown parameter: ${wrong}`);
});

step("Prometheus reads the metrics, and the board for Grafana asks for what is there", async () => {
  const curl = start("curl", "-s", "-o", "/dev/null", "--limit-rate", "30k", `http://${LOCATED}/slow`);
  const config = join(folder, "prometheus.yml");
  writeFileSync(config, `scrape_configs: [{ job_name: underpass, scrape_interval: 200ms, static_configs: [{ targets: ["127.0.0.1:${PORT}"] }] }]\n`);
  const prometheus = start("prometheus", `--config.file=${config}`, `--storage.tsdb.path=${join(folder, "prometheus")}`, "--web.listen-address=127.0.0.1:9090");
  const get = async (path) => JSON.parse((await ask(`http://127.0.0.1:9090/api/v1/${path}`)).text).data;
  // Twice and well apart, so that there are rates.
  const scraped = `count_over_time(up{job="underpass"}[1m]) > 10`;
  await eventually("Prometheus reads", async () => {
    ensure(prometheus.exitCode === null, `prometheus has ended: ${prometheus.said}`);
    return get(`query?query=${encodeURIComponent(scraped)}`).then(({ result }) => result.length, () => false);
  });
  await eventually("the target is well", async () => {
    const { activeTargets } = await get("targets");
    return activeTargets[0].health === "up" && activeTargets[0].lastError === "";
  });
  const metadata = await get("metadata");
  for (const [name, type] of [["underpass_watch_connections_open", "gauge"], ["underpass_watch_lost", "counter"], ["underpass_watch_received_bytes", "counter"]]) {
    const [{ type: told, help } = {}] = metadata[name] ?? metadata[`${name}_total`] ?? [];
    ensure(told === type && help, `${name} is a ${told}: ${help}`);
  }
  const board = JSON.parse(readFileSync(new URL("../../../../packaging/grafana-watch.json", import.meta.url), "utf8"));
  const [source, instance] = board.templating.list;
  ensure(source.type === "datasource" && instance.name === "instance", JSON.stringify(board.templating));
  const [, name, label] = /^label_values\((\w+), (\w+)\)$/.exec(instance.query.query);
  const values = await get(`label/${label}/values?match[]=${name}`);
  ensure(values.join() === `127.0.0.1:${PORT}`, values.join());
  const fill = { $instance: values[0], $__rate_interval: "2s", $__range: "1m" };
  const ids = new Set();
  for (const panel of board.panels) {
    ensure(!ids.has(panel.id) && panel.datasource.uid === `\${${source.name}}`, panel.title);
    ids.add(panel.id);
    ensure(panel.targets.length > 0, `${panel.title} asks for nothing`);
    for (const { expr, legendFormat } of panel.targets) {
      const query = expr.replace(/\$\w+/g, (word) => fill[word]);
      const result = await eventually(`${panel.title} shows something for ${query}`, async () => {
        const { result } = await get(`query?query=${encodeURIComponent(query)}`);
        return result.length > 0 && result;
      });
      for (const [, label] of legendFormat.matchAll(/{{(\w+)}}/g))
        ensure(result.every(({ metric }) => label in metric), `${panel.title}: no label ${label}`);
    }
  }
  prometheus.kill();
  curl.kill();
});

step("names from elsewhere stay text", async () => {
  const script = "<img src=x onerror=alert(1)>";
  // The kernel keeps 15 bytes of a name, the path keeps all.
  const program = join(folder, "<img src=x>");
  copyFileSync("/usr/bin/curl", program);
  await resolve(["<svg/onload=alert(1)>", "example"]);
  const evil = start(program, "-s", "-o", "/dev/null", "--limit-rate", "10k", "-A", script, `http://${LOCATED}/slow`);
  await row("the odd program is shown as it is called", `<img src=x> ${evil.pid}`, "<svg", "onload", "alert");
  await page.locator("#group").selectOption("remote");
  await page.locator("#group").selectOption("");
  await page.locator("#table .row:not([hidden])", { hasText: `<img src=x> ${evil.pid}` }).click();
  await eventually("its path is told", async () => (await text("#dialog-body")).includes(program));
  const built = await page.evaluate(() => document.querySelectorAll("img, svg, main script, dialog script").length);
  ensure(built === 0, `${built} elements were made of names`);
  await page.keyboard.press("Escape");
  const metrics = (await ask(`${url}metrics`)).text;
  ensure(metrics.includes('process="<img src=x>"') && metrics.endsWith("# EOF\n"), "the metrics name it");
  evil.kill();
});

step("screenshots", async () => {
  if (!SCREENSHOTS) return;
  mkdirSync(SCREENSHOTS, { recursive: true });
  for (const scheme of ["light", "dark"])
    for (const [width, height] of [[1440, 900], [390, 844]]) {
      await page.emulateMedia({ colorScheme: scheme });
      await page.setViewportSize({ width, height });
      await page.waitForTimeout(700);
      await page.screenshot({ path: join(SCREENSHOTS, `page-${width}-${scheme}.png`), fullPage: width < 500 });
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      ensure(wide <= 0, `the page is ${wide} px wider than ${width}`);
    }
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize({ width: 1440, height: 900 });
});

step("axe finds nothing serious", async () => {
  const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
  const check = async (where) => {
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => globalThis.axe.run());
    const serious = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
    const told = serious.map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.html} ${node.failureSummary}`).join("; ")}`);
    ensure(told.length === 0, `${where}: ${told.join("\n")}`);
  };
  for (const scheme of ["light", "dark"])
    for (const width of [1440, 390]) {
      await page.emulateMedia({ colorScheme: scheme });
      await page.setViewportSize({ width, height: 900 });
      await page.waitForTimeout(400);
      await check(`${scheme} ${width}`);
    }
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize({ width: 1440, height: 900 });
  await page.locator("#lost").click();
  await check("the window of losses");
  await page.keyboard.press("Escape");
});

step("the stream survives a restart, and is said to be stale meanwhile", async () => {
  server.kill("SIGINT");
  ensure((await server.ended) === 0, `watch has failed: ${server.said}`);
  await eventually("it is stale", async () => (await text("#state")).startsWith("no news for"));
  server = await watch(...options);
  await live();
  const curl = start("curl", "-s", "-o", "/dev/null", "--limit-rate", "30k", `http://${LOCATED}/slow`);
  await row("curl is shown again", `curl ${curl.pid}`, LOCATED);
  curl.kill();
});

step("a rebound name and other sites are refused", async () => {
  for (const [headers, status] of [
    [{ host: `evil.example:${PORT}` }, 421],
    [{ origin: "https://evil.example" }, 403],
    [{ origin: "null" }, 403],
    [{ "sec-fetch-site": "cross-site" }, 403],
    [{}, 200],
  ])
    for (const path of ["api/v1/connections", "api/v1/stream", "metrics"]) {
      if (status === 200 && path.endsWith("stream")) continue;
      const answer = await ask(url + path, headers);
      ensure(answer.status === status, `${path} ${JSON.stringify(headers)}: ${answer.status}`);
    }
  for (const method of ["POST", "PUT", "DELETE", "PATCH"]) {
    const { status } = await ask(`${url}api/v1/connections`, {}, method);
    ensure(status === 405, `${method}: ${status}`);
  }
  const other = createServer((_, answer) => answer.end("<!doctype html><title>elsewhere</title>")).listen(8080, "127.0.0.1");
  const tab = await context.newPage();
  await tab.goto("http://localhost:8080/");
  const got = await tab.evaluate(async (url) => {
    const read = (options) => fetch(`${url}api/v1/status`, options).then((answer) => answer.text(), () => "refused");
    const events = await new Promise((done) => {
      const source = new EventSource(`${url}api/v1/stream`);
      source.onmessage = () => done("read");
      source.onerror = () => done("refused");
    });
    return [await read({}), await read({ mode: "no-cors" }), events];
  }, url);
  // An opaque answer has no text.
  ensure(got.join() === "refused,,refused" || got.join() === "refused,refused,refused", got.join());
  const rebound = await tab.goto(`http://evil.example:${PORT}/`);
  ensure(rebound.status() === 421, `a rebound name: ${rebound.status()}`);
  await tab.close();
  other.close();
  strangers.splice(0);
  const { headers } = await ask(url);
  ensure(/script-src 'self';/.test(headers["content-security-policy"]), "there is a policy");
  ensure(!/unsafe|\*|https?:/.test(headers["content-security-policy"]), headers["content-security-policy"]);
});

step("another address demands a token", async () => {
  const refused = start(process.env.UNDERPASS, "watch", "--web", ":7700");
  ensure((await refused.ended) === 2 && refused.said.includes("--web-token-file"), refused.said);
  const file = join(folder, "token");
  const token = "correct-horse-battery";
  writeFileSync(file, `${token}\n`, { mode: 0o644 });
  const open = start(process.env.UNDERPASS, "watch", "--web", ":7700", "--web-token-file", file);
  ensure((await open.ended) === 2 && open.said.includes("chmod 600"), open.said);
  rmSync(file);
  writeFileSync(file, `${token}\n`, { mode: 0o600 });
  const guarded = await watch("--web", ":7700", "--web-token-file", file);
  const base = "http://127.0.0.1:7700/";
  ensure((await ask(`${base}api/v1/status`)).status === 401, "no token, no figures");
  ensure((await ask(`${base}metrics`, { authorization: "Bearer correct-horse-batterx" })).status === 401, "a wrong one neither");
  ensure((await ask(`${base}metrics`, { authorization: `Bearer ${token}` })).status === 200, "the token lets in");
  const tab = await context.newPage();
  await tab.goto(base);
  ensure(tab.url() === `${base}login`, tab.url());
  await tab.locator("#token").fill("wrong-horse-battery");
  await tab.locator("button").click();
  await tab.waitForURL("**/login?wrong");
  await tab.locator("#token").fill(token);
  await tab.locator("button").click();
  await tab.waitForURL(base);
  await eventually("the page is live", async () => (await tab.locator("#state").innerText()) === "live");
  const [cookie] = (await context.cookies(base)).filter(({ name }) => name === "underpass");
  ensure(cookie.httpOnly && cookie.sameSite === "Strict", JSON.stringify(cookie));
  await tab.close();
  guarded.kill("SIGINT");
  ensure((await guarded.ended) === 0, guarded.said);
  strangers.splice(0, strangers.length, ...strangers.filter((stranger) => !stranger.startsWith(base)));
});

step("no request left the host, and nothing was wrong in the console", async () => {
  ensure(strangers.length === 0, `requests to ${strangers.join(", ")}`);
  ensure(troubles.length === 0, troubles.join("\n"));
  const { connections } = JSON.parse((await ask(`${url}api/v1/connections?ended=true`)).text);
  const away = connections.filter(({ comm, place }) => /chrom/i.test(comm ?? "") && place.kind !== "loopback");
  ensure(away.length === 0, `Chromium talks to ${away.map(({ remote }) => remote).join(", ")}`);
});

let failed = 0;
for (const [name, run] of steps) {
  try {
    // Whatever became of the step before.
    await page.evaluate(() => document.querySelector("dialog")?.close());
    await page.locator("#group").selectOption("");
    await run();
    console.log(`ok: ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED: ${name}: ${error.message}`);
    if (SCREENSHOTS) await page.screenshot({ path: join(SCREENSHOTS, `failed-${failed}.png`) }).catch(() => {});
  }
}
await context.close();
process.exit(failed ? 1 : 0);
