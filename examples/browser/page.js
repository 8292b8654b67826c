// The page: loads the folder behind /model/, shows progress, the text as it grows, and tokens per second.

import { env } from "/lib/transformers.min.js";
import { load, generate } from "/generate.mjs";

// Nothing but this page's own origin is asked: neither for the model nor for ONNX Runtime's files.
[env.allowRemoteModels, env.allowLocalModels] = [false, true];
env.localModelPath = "/";
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = {
  mjs: "/wasm/ort-wasm-simd-threaded.asyncify.mjs",
  wasm: "/wasm/ort-wasm-simd-threaded.asyncify.wasm",
};

const form = document.querySelector("form");
const bar = document.querySelector("progress");
const status = document.querySelector("#status");
const output = document.querySelector("output");
const asked = new URLSearchParams(location.search);
form.prompt.value = asked.get("prompt") ?? "My fellow citizens of the Senate";
form.tokens.value = asked.get("tokens") ?? 32;

try {
  const loaded = await load("model", "wasm", ({ status: what, progress, file }) => {
    if (what === "progress") [bar.value, status.textContent] = [progress / 100, `${file}: ${Math.round(progress)} %`];
  });
  status.textContent = `ready: ${loaded.dtype}`;
  form.querySelector("button").disabled = false;

  async function goOn() {
    const count = Number(form.tokens.value);
    bar.value = 0;
    const found = await generate(loaded, form.prompt.value, count, (text, tokens) => {
      output.textContent = form.prompt.value + text;
      bar.value = tokens / count;
    });
    status.textContent = `${found.tokens.length} tokens, ${found.tokensPerSecond.toFixed(1)} tokens/s`;
    return found;
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    goOn();
  });
  if (asked.has("prompt")) window.found = await goOn();
} catch (error) {
  status.textContent = error.message;
  window.found = { error: error.message };
}
