// Generate from an exported folder in JavaScript: onnxruntime-node and a tokenizer, nothing of ours, no Python.
//
//   npm install --prefix examples/node --ignore-scripts     (the script would fetch CUDA libraries)
//   node examples/node/generate.mjs runs/demo/onnx "The state of the Union" --tokens 32

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { tokens: { type: "string", default: "32" }, json: { type: "boolean", default: false } },
});
const [folder, ...prompts] = positionals;
if (!prompts.length) {
  console.error("usage: node generate.mjs FOLDER PROMPT... [--tokens N] [--json]");
  process.exit(2);
}
const read = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));
const readIfThere = (name) => (existsSync(join(folder, name)) ? read(name) : {});
const integers = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);

// What the cache can be made of; float16 travels as its bits.
const arrays = { float32: Float32Array, float16: Uint16Array };

async function openSession(path) {
  try {
    return await ort.InferenceSession.create(path, { intraOpNumThreads: Number(process.env.OMP_NUM_THREADS ?? 0) });
  } catch (error) {
    // No kernel, or no array: 16 is ONNX's number for bfloat16.
    const bfloat16 = /implementation for|data type: 16/.test(error.message);
    console.error(error.message + (bfloat16 ? "\nbfloat16 is not supported here: export float32 or float16" : ""));
    process.exit(1);
  }
}

// Yields up to `count` greedy tokens after `ids`, stopping after one of `ends`.
async function* generate(session, ids, count, ends) {
  // The cache starts empty: [batch 1, key/value heads, 0 tokens so far, head size].
  let cache = {};
  for (const { name, type, shape } of session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."))) {
    cache[name] = new ort.Tensor(type, new arrays[type](0), [1, shape[1], 0, shape[3]]);
  }
  let fresh = ids; // the whole prompt first, then one token at a time
  for (let seen = 0, left = count; left > 0; left--) {
    const total = seen + fresh.length;
    const feeds = {
      ...cache,
      input_ids: integers(fresh, [1, fresh.length]),
      attention_mask: integers(new Array(total).fill(1), [1, total]),
    };
    if (session.inputNames.includes("position_ids")) {
      feeds.position_ids = integers(fresh.map((_, index) => seen + index), [1, fresh.length]);
    }
    const found = await session.run(feeds);
    cache = Object.fromEntries(Object.keys(cache).map((name) => [name, found[name.replace("past_key_values", "present")]]));
    seen = total;
    const { data, dims } = found.logits;
    const last = data.subarray(data.length - dims[2]);
    const token = last.reduce((best, value, index) => (value > last[best] ? index : best), 0);
    yield token;
    if (ends.has(token)) return;
    fresh = [token];
  }
}

const tokenizer = new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json"));
// By path: model.onnx.data is looked for beside model.onnx.
const session = await openSession(join(folder, "model.onnx"));
const ends = new Set(
  [readIfThere("generation_config.json").eos_token_id ?? readIfThere("config.json").eos_token_id ?? []].flat(),
);
for (const prompt of prompts) {
  const ids = tokenizer.encode(prompt).ids;
  const tokens = [];
  for await (const token of generate(session, ids, Number(values.tokens), ends)) tokens.push(token);
  console.log(values.json ? JSON.stringify({ ids, tokens }) : tokenizer.decode([...ids, ...tokens]));
}
