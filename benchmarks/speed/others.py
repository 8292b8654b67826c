"""What others make of the same model: PyTorch, optimum-onnx, onnxruntime-genai and llama.cpp, in turns with ours.

All with logits of every position, on a SmolLM2-135M with random weights, dense and at keep 0.6; in int4 only those that
have it: onnxruntime-genai's builder, and llama.cpp's Q4_0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.speed import llamacpp
from benchmarks.speed.models import MODELS, architecture_of, uniform_plan
from benchmarks.speed.series import Entry, measure
from soco_export.checkpoint.layers import apply_factors
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint, save_dense
from soco_export.evaluate.decoders.decoder import IntArray, TorchDecoder
from soco_export.export import export_onnx
from soco_export.model.load import load_tokenizer
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.load import load_recipe
from soco_train.forms.stacked import StackedFactors
from soco_train.store.factors import Factors

MODEL, KEEP, MULTIPLE = "smollm2", 0.6, 32
SECONDS = 40
ROOT = Path(__file__).parents[2]
OPTIMUM = """
import sys
import soco_export
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past", do_validation=False)
"""


class TimedTorch(TorchDecoder):
    """A PyTorch model whose pass from the present cache can be repeated."""

    def repeatable(self, ids: IntArray) -> Callable[[], None]:
        """Return a function that runs the same pass again and again; the cache is cut back each time."""
        mask, positions = self._continue_mask(ids, None)
        past = self._past

        def run() -> None:
            self._forward(ids, mask, positions, past)
            if past is not None:
                past.crop(-ids.shape[1])

        return run


def series(weights: str, work: Path, optimum_python: Path | None, threads: int) -> list[Entry]:
    """Write everything, then time it; what cannot be made here is left out and named on stderr."""
    folder = work / "others"
    shutil.rmtree(folder, ignore_errors=True)
    dense, low = checkpoints(folder)
    folders = ours(folder, weights, dense, low)
    for name, make in foreign(folder, weights, dense, low, optimum_python).items():
        try:
            folders[name] = with_cache_sizes(make(), MODELS[MODEL])
        except subprocess.CalledProcessError as error:
            print(f"{name} is left out: {(error.stderr or '').strip().splitlines()[-1:]}", file=sys.stderr)
    try:
        return measure(folders, engines(folder, weights, dense, low, threads), threads, SECONDS)
    finally:
        shutil.rmtree(folder)


def engines(folder: Path, weights: str, dense: Path, low: Path, threads: int) -> dict[str, Any]:
    """Return what does not run in ONNX Runtime, as Decoders by name."""
    found: dict[str, Any] = {}
    if llamacpp.installed():
        path = llamacpp.write_gguf(dense, weights, folder / "dense.gguf")
        found[f"dense, llama.cpp {llamacpp.KINDS[weights]}"] = llamacpp.LlamaCpp(path, threads)
    else:
        print("llama.cpp is left out: pip install llama-cpp-python gguf", file=sys.stderr)
    if weights == "same":
        torch.set_num_threads(threads)
        eager = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        found["dense, PyTorch eager"] = TimedTorch(eager)
        found[f"{KEEP:g} stacked, PyTorch eager"] = TimedTorch(load_checkpoint(low))
    return found


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """Write the dense and the low-rank Hugging Face folder."""
    architecture = architecture_of(MODEL, folder / "config")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "config")).float().eval()
    tokenizer = load_tokenizer(load_recipe("tiny"))  # any: what is timed are passes
    save_dense(model, tokenizer, folder / "hf-dense")
    factors = {}
    for name, layer in uniform_plan(architecture, KEEP, "stacked", MULTIPLE).layers.items():
        (m, n), r = layer.shape, layer.rank
        factors[name] = StackedFactors(torch.randn(m, r) / r**0.5, torch.randn(r, n) / n**0.5, None)
    apply_factors(model, Factors(factors))
    save_checkpoint(model, tokenizer, folder / "hf-low")
    return folder / "hf-dense", folder / "hf-low"


def ours(folder: Path, weights: str, dense: Path, low: Path) -> dict[str, Path]:
    """Export both in both flavours; the first is what everything is compared with."""
    found = {}
    for flavour in ("contrib", "standard"):
        settings = ExportSettings(flavour=flavour, weights=weights, layouts=("optimum",))
        for name, source in (("dense", dense), (f"{KEEP:g} stacked", low)):
            out = folder / f"ours-{flavour}-{source.name}"
            found[f"{name}, ours, {flavour}"] = export_onnx(source, out, settings).folder
    return found


def foreign(
    folder: Path, weights: str, dense: Path, low: Path, optimum_python: Path | None
) -> dict[str, Callable[[], Path]]:
    """Return what to call for each export by others."""
    found: dict[str, Callable[[], Path]] = {
        "dense, onnxruntime-genai": lambda: write_genai(dense, weights, folder / "genai")
    }
    if optimum_python is not None and weights == "same":
        found["dense, optimum-onnx"] = lambda: _optimum(optimum_python, dense, folder / "optimum-dense")
        found[f"{KEEP:g} stacked, optimum-onnx"] = lambda: _optimum(optimum_python, low, folder / "optimum-low")
    return found


def with_cache_sizes(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write the cache's sizes, which some exporters leave to names, into the graph's inputs."""
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    sizes = {1: config["num_key_value_heads"], 3: config["head_dim"]}
    for entry in model.graph.input:
        if entry.name.startswith("past_key_values."):
            for axis, size in sizes.items():
                entry.type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(model, str(path))
    return folder


def write_genai(source: Path, weights: str, out: Path) -> Path:
    """Let onnxruntime-genai's builder write a Hugging Face folder for the CPU; CalledProcessError if it fails."""
    precision = "fp32" if weights == "same" else weights
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "smollm2", "-i", str(source)]
    subprocess.run(
        [*builder, "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(out.with_suffix(".cache"))],
        check=True,
        capture_output=True,
        text=True,
    )
    return out


def _optimum(python: Path, source: Path, out: Path) -> Path:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-c", OPTIMUM, str(source), str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return out
