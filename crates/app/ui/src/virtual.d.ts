declare module "virtual:countries" {
  /** ISO 3166-1 alpha-2 to degrees [east, north]. */
  const points: Record<string, [number, number]>;
  export default points;
}

declare module "world-atlas/countries-110m.json" {
  const world: import("topojson-specification").Topology;
  export default world;
}
