"""Does onnxruntime-genai's Engine, which batches, give the tokens that its Generator gives? Both flavours are tried.

    python -m benchmarks.servers.engine --run runs/demo

The Engine pads a batch on the right and leaves the rest to attention that knows every row's length: `contrib` has it,
`standard` has a mask instead. This is why the OpenAI example does not batch (docs/serving.md).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

from benchmarks.servers.prompts import PROMPTS
from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings, Flavour

FLAVOURS: tuple[Flavour, ...] = ("standard", "contrib")


def main() -> None:
    """Print a row per flavour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    print("| flavour | one by one, s | Engine, s | answers that agree |\n|---|---|---|---|")
    for flavour in FLAVOURS:
        with tempfile.TemporaryDirectory() as scratch:
            export_onnx(given.run / "hf", Path(scratch) / "onnx", ExportSettings(flavour=flavour))
            model = genai.Model(str(Path(scratch) / "onnx"))
            tokenizer = genai.Tokenizer(model)
            prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[: given.prompts]]
            start = time.monotonic()
            alone = [one_by_one(model, ids, given.tokens) for ids in prompts]
            middle = time.monotonic()
            together = batched(model, prompts, given.tokens)
            end = time.monotonic()
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        print(f"| {flavour} | {middle - start:.2f} | {end - middle:.2f} | {same}/{len(prompts)} |")


def one_by_one(model: Any, ids: Any, tokens: int) -> list[int]:
    """Return the greedy tokens after `ids` by a Generator."""
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + tokens, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def batched(model: Any, prompts: list[Any], tokens: int) -> list[list[int]]:
    """Return the greedy tokens after each of `prompts` by one Engine."""
    engine = genai.Engine(model)
    events, found, running = engine.create_event_buffer(64), [[] for _ in prompts], []
    for ids in prompts:
        request = engine.create_request()
        options = genai.TurnOptions(request)
        options.set_do_sample(False)
        options.set_max_generated_tokens(tokens)
        request.begin_turn(ids, options)
        running.append(request)
    while engine.has_pending_requests():
        for event in engine.run(events):
            if int(event.flags) & int(genai.EngineEventFlags.TOKEN):
                number = next(i for i, request in enumerate(running) if request is event.request)
                found[number].append(int(event.token))
    return found


if __name__ == "__main__":
    main()
