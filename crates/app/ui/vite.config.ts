import { defineConfig } from "vite";
import { countries } from "./build/countries.ts";
import { pack } from "./build/pack.ts";

export default defineConfig({
  plugins: [countries(), pack()],
  build: {
    target: "es2022",
    emptyOutDir: true,
    // The policy of the page permits no inline script and no data: URL.
    assetsInlineLimit: 0,
    modulePreload: false,
    rollupOptions: { input: ["index.html", "login.html"] },
  },
});
