import { createRequire } from "node:module";
import { readFileSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { gzipSync } from "node:zlib";
import type { Plugin } from "vite";

/** What goes into the page. */
const parts = ["d3-geo", "d3-array", "internmap", "topojson-client", "uplot", "world-atlas", "i18n-iso-countries"];
const database = "@ip-location-db/geo-whois-asn-country-mmdb/geo-whois-asn-country.mmdb";

/** Packs every file that was built, with the licences, and the database of countries: the binary carries them so. */
export function pack(): Plugin {
  let out = "";
  const squeeze = (from: string, to: string) => writeFileSync(to, gzipSync(readFileSync(from), { level: 9 }));
  const walk = (folder: string) => {
    for (const name of readdirSync(folder)) {
      const path = join(folder, name);
      if (statSync(path).isDirectory()) walk(path);
      else {
        squeeze(path, `${path}.gz`);
        rmSync(path);
      }
    }
  };
  return {
    name: "pack",
    apply: "build",
    configResolved: (config) => void (out = resolve(config.root, config.build.outDir)),
    closeBundle() {
      const { resolve: find } = createRequire(import.meta.url);
      const licences = parts.map((name) => {
        const folder = join("node_modules", name);
        const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
        if (!file) throw new Error(`${name} has no licence`);
        return `${name}\n\n${readFileSync(join(folder, file), "utf8").trim()}\n`;
      });
      writeFileSync(join(out, "licences.txt"), licences.join("\n----\n\n"));
      walk(out);
      squeeze(find(database), join(out, "countries.mmdb.gz"));
    },
  };
}
