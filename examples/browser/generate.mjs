// Greedy tokens with transformers.js, in a page and under Node alike: nothing of ours is needed.

import { AutoModelForCausalLM, AutoTokenizer, TextStreamer } from "@huggingface/transformers";

// Opens a model folder; its config.json names the type and where the weights lie.
export async function load(folder, device, progress_callback) {
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModelForCausalLM.from_pretrained(folder, { device, progress_callback });
  return { tokenizer, model, dtype: model.config["transformers.js_config"].dtype };
}

// Continues a text; `show` gets what has come so far, as text and as a count.
export async function generate({ tokenizer, model, dtype }, prompt, count, show = () => {}) {
  const inputs = tokenizer(prompt);
  const times = [];
  let text = "";
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    callback_function: (part) => show((text += part), times.length),
    token_callback_function: () => times.push(performance.now()),
  });
  const whole = await model.generate({ ...inputs, max_new_tokens: count, do_sample: false, streamer });
  const ids = inputs.input_ids.tolist()[0].map(Number);
  const tokens = whole.tolist()[0].slice(ids.length).map(Number);
  // The first token is the prompt's; speed is that of the others.
  const seconds = (times.at(-1) - times[0]) / 1000;
  return { dtype, ids, tokens, text, tokensPerSecond: (tokens.length - 1) / seconds };
}
