"""Train the built-in model: a 2.7 M parameter Llama on public-domain presidential speeches.

What ships in `soco_train/builtin/tiny` comes from this script and nothing else, so anybody can make it again:

    python benchmarks/tiny_model/train.py --text TRAIN.txt --held-out EVAL.txt --out soco_train/builtin/tiny

TRAIN.txt and EVAL.txt are US inaugural and State of the Union addresses (public domain; the `inaugural` and
`state_union` corpora of nltk_data, every tenth file held out). The last 200 kB of TRAIN.txt are not trained on:
they are the built-in calibration text. Everything is seeded; 2 CPU cores need about 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 256
BATCH = 16
PEAK_LEARNING_RATE = 3e-3
CALIBRATION_BYTES = 200_000
EVALUATION_BYTES = 100_000
END_OF_TEXT = "<|endoftext|>"

CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def split_text(path: Path) -> tuple[str, str]:
    """Return (training text, calibration text): the tail of the file is calibration, cut at an empty line."""
    text = path.read_text(encoding="utf-8")
    cut = text.index("\n\n", len(text) - CALIBRATION_BYTES)
    return text[:cut], text[cut:].strip() + "\n"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training text, in the class that both transformers 4.57 and 5 can load."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)


def learning_rate(step: int, steps: int) -> float:
    warmup = steps * 0.05
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """exp(mean negative log-likelihood) over non-overlapping windows; the first token of each is not scored."""
    model.eval()
    blocks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=chunk, labels=chunk).loss.double() * len(chunk) for chunk in blocks.split(BATCH)]
    model.train()
    return math.exp(float(sum(losses)) / len(blocks))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, steps: int, seed: int) -> None:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    for step in range(steps):
        offsets = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([tokens[o : o + CONTEXT] for o in offsets])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            speed = (step + 1) * BATCH * CONTEXT / (time.monotonic() - start)
            held = perplexity(model, held_out[: 40 * CONTEXT])
            print(f"step {step:5d}/{steps}  loss {loss:.4f}  held-out ppl {held:.2f}  {speed:.0f} tokens/s", flush=True)


def amend(path: Path, fields: dict[str, object]) -> None:
    """Set JSON fields that transformers 5 leaves out or names in a way that 4.57 cannot read."""
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    training, calibration = split_text(arguments.text)
    evaluation = arguments.held_out.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(training)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    held_out = tokens_of(tokenizer, evaluation)
    train(model, tokens_of(tokenizer, training), held_out, arguments.steps, arguments.seed)

    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    amend(arguments.out / "config.json", {"rope_theta": CONFIG["rope_theta"]})
    context = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONFIG["max_position_embeddings"]}
    amend(arguments.out / "tokenizer_config.json", context)
    record = {
        "command": "python benchmarks/tiny_model/train.py",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "held_out_perplexity": perplexity(model.float(), held_out),
        "window": CONTEXT,
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    cut = evaluation.index("\n\n", EVALUATION_BYTES)
    texts = arguments.out.parent
    (texts / "speeches.calibration.txt").write_text(calibration, encoding="utf-8")
    (texts / "speeches.evaluation.txt").write_text(evaluation[:cut] + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
