import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { geoArea, geoCentroid } from "d3-geo";
import type { Feature, MultiPolygon, Polygon } from "geojson";
import { feature } from "topojson-client";
import type { GeometryCollection, Topology } from "topojson-specification";
import type { Plugin } from "vite";

const require = createRequire(import.meta.url);
const read = (name: string) => JSON.parse(readFileSync(require.resolve(name), "utf8"));

/**
 * `virtual:countries`: for each ISO 3166-1 alpha-2 code the point that stands for the country,
 * in degrees [east, north]. It is the middle of the largest piece of land, so that France is
 * not put into the Atlantic for French Guiana's sake.
 */
export function countries(): Plugin {
  const id = "virtual:countries";
  return {
    name: "countries",
    resolveId: (wanted) => (wanted === id ? `\0${id}` : undefined),
    load(wanted) {
      if (wanted !== `\0${id}`) return undefined;
      const codes: [string, string, string][] = read("i18n-iso-countries/codes.json");
      const alpha2 = new Map(codes.map(([two, , number]) => [number, two]));
      const world: Topology = read("world-atlas/countries-50m.json");
      const shapes = feature(world, world.objects["countries"] as GeometryCollection);
      const points: Record<string, [number, number]> = {};
      const best: Record<string, number> = {};
      for (const shape of shapes.features as Feature<Polygon | MultiPolygon>[]) {
        const code = alpha2.get(String(shape.id).padStart(3, "0"));
        if (!code) continue;
        const pieces =
          shape.geometry.type === "Polygon" ? [shape.geometry.coordinates] : shape.geometry.coordinates;
        for (const coordinates of pieces) {
          const piece: Polygon = { type: "Polygon", coordinates };
          const area = geoArea(piece);
          if (area <= (best[code] ?? 0)) continue;
          best[code] = area;
          const [east, north] = geoCentroid(piece);
          points[code] = [Math.round(east * 100) / 100, Math.round(north * 100) / 100];
        }
      }
      return `export default ${JSON.stringify(points)};`;
    },
  };
}
