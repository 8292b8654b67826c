// Serve the page on the loopback interface, and let a headless Chromium (or Node alone) go on with a text.
//
//   npm install --prefix examples/browser --ignore-scripts
//   node examples/browser/run.mjs runs/tiny/onnx/transformers.js --serve           open the address that it prints
//   node examples/browser/run.mjs FOLDER "The state of the Union" --tokens 32      Chromium; prints JSON
//   node examples/browser/run.mjs FOLDER "The state of the Union" --node           transformers.js under Node
//
// CHROMIUM names the browser, /usr/bin/chromium unless it is set.

import { createReadStream, existsSync, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { dirname, extname, join, normalize, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const HERE = dirname(fileURLToPath(import.meta.url));
const MODULES = join(HERE, "node_modules");
const BROWSER = process.env.CHROMIUM ?? "/usr/bin/chromium";
const QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    tokens: { type: "string", default: "32" },
    serve: { type: "boolean", default: false },
    node: { type: "boolean", default: false },
  },
});
const [folder, prompt] = positionals;
if (!folder || (!prompt && !values.serve)) {
  console.error("usage: node run.mjs FOLDER PROMPT [--tokens N] [--node] | FOLDER --serve");
  process.exit(2);
}

// What is served: the page, the library, ONNX Runtime's files, the model; nothing else on the disk.
const ROOTS = {
  "/lib/": join(MODULES, "@huggingface/transformers/dist"),
  "/wasm/": join(MODULES, "onnxruntime-web/dist"),
  "/model/": resolve(folder),
  "/": HERE,
};
const PAGE = new Set(["/index.html", "/page.js", "/generate.mjs"]);

function fileOf(path) {
  const [prefix, root] = Object.entries(ROOTS).find(([prefix]) => path.startsWith(prefix));
  const file = normalize(join(root, path.slice(prefix.length)));
  const allowed = prefix === "/" ? PAGE.has(path) : file.startsWith(root + sep);
  return allowed && existsSync(file) && statSync(file).isFile() ? file : null;
}

function answer(request, response) {
  const { pathname } = new URL(request.url, "http://localhost");
  const path = decodeURIComponent(pathname === "/" ? "/index.html" : pathname);
  const file = fileOf(path);
  if (!file) return void response.writeHead(404).end();
  response.setHeader("Content-Type", TYPES[extname(file)] ?? "application/octet-stream");
  // ONNX Runtime's threads need a page that is isolated from others.
  response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
  response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
  if (path === "/generate.mjs") {
    // In the page the library has an address, not a name.
    return void response.end(readFileSync(file, "utf8").replace('"@huggingface/transformers"', '"/lib/transformers.min.js"'));
  }
  response.setHeader("Content-Length", statSync(file).size);
  createReadStream(file).pipe(response);
}

async function inChromium(address) {
  const { chromium } = await import("playwright-core");
  const profile = mkdtempSync(join(tmpdir(), "chromium-"));
  const context = await chromium.launchPersistentContext(profile, { executablePath: BROWSER, args: QUIET });
  try {
    const page = context.pages()[0] ?? (await context.newPage());
    const elsewhere = [];
    await context.route("**", (route) => {
      const url = route.request().url();
      if (url.startsWith(address) || /^(blob|data):/.test(url)) return route.continue();
      elsewhere.push(url);
      return route.abort();
    });
    const started = performance.now();
    const query = new URLSearchParams({ prompt, tokens: values.tokens });
    await page.goto(`${address}/?${query}`);
    await page.waitForFunction("window.found", undefined, { timeout: 300_000 });
    const found = await page.evaluate("window.found");
    if (found.error) throw new Error(found.error);
    const shown = await page.locator("#status").textContent();
    const seconds = (performance.now() - started) / 1000;
    return { engine: `Chromium ${context.browser()?.version() ?? ""}`.trim(), ...found, shown, seconds, elsewhere };
  } finally {
    await context.close();
    rmSync(profile, { recursive: true, force: true });
  }
}

async function inNode() {
  const { env } = await import("@huggingface/transformers");
  env.allowRemoteModels = false;
  env.localModelPath = join(resolve(folder), "..", "/");
  const { load, generate } = await import("./generate.mjs");
  const loaded = await load(resolve(folder).split(sep).at(-1), "cpu");
  return { engine: `Node ${process.version}`, ...(await generate(loaded, prompt, Number(values.tokens))) };
}

if (values.node) {
  console.log(JSON.stringify(await inNode()));
} else {
  const server = createServer(answer).listen(0, "127.0.0.1");
  await new Promise((listening) => server.once("listening", listening));
  const address = `http://127.0.0.1:${server.address().port}`;
  if (values.serve) console.log(address);
  else {
    try {
      console.log(JSON.stringify(await inChromium(address)));
    } finally {
      server.close();
      server.closeAllConnections();
    }
  }
}
