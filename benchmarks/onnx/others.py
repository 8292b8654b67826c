"""What others make of the same model: PyTorch, optimum-onnx and onnxruntime-genai, in turns with ours.

All in fp32 with logits of every position, on a SmolLM2-135M with random weights, dense and at keep 0.6.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import onnx
from benchmarks.onnx.models import MODELS, architecture_of, uniform_plan
from benchmarks.onnx.series import Entry, measure
from soco_export.checkpoint import load_checkpoint, save_checkpoint, save_dense
from soco_export.lowrank import apply_factors
from soco_export.models import load_tokenizer
from soco_export.onnx.export import export_onnx
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe import load_recipe
from soco_export.validate.decoder import IntArray, TorchDecoder
from soco_train.artifacts import Factors, StackedFactors

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


def series(work: Path, optimum_python: Path | None, threads: int) -> list[Entry]:
    """Write everything, then time it; what cannot be made here is left out and named on stderr."""
    folder = work / "others"
    shutil.rmtree(folder, ignore_errors=True)
    dense, low = checkpoints(folder)
    folders = ours(folder, dense, low)
    for name, make in foreign(folder, dense, low, optimum_python).items():
        try:
            folders[name] = with_cache_sizes(make())
        except subprocess.CalledProcessError as error:
            print(f"{name} is left out: {(error.stderr or '').strip().splitlines()[-1:]}", file=sys.stderr)
    torch.set_num_threads(threads)
    eager = {
        "dense, PyTorch eager": TimedTorch(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)),
        f"{KEEP:g} stacked, PyTorch eager": TimedTorch(load_checkpoint(low)),
    }
    try:
        return measure(folders, eager, threads, SECONDS)
    finally:
        shutil.rmtree(folder)


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


def ours(folder: Path, dense: Path, low: Path) -> dict[str, Path]:
    """Export both in both flavours; the first is what everything is compared with."""
    found = {}
    for flavour in ("contrib", "standard"):
        settings = ExportSettings(flavour=flavour, layouts=("optimum",))
        for name, source in (("dense", dense), (f"{KEEP:g} stacked", low)):
            out = folder / f"ours-{flavour}-{source.name}"
            found[f"{name}, ours, {flavour}"] = export_onnx(source, out, settings).folder
    return found


def foreign(folder: Path, dense: Path, low: Path, optimum_python: Path | None) -> dict[str, Callable[[], Path]]:
    """Return what to call for each export by others."""
    found: dict[str, Callable[[], Path]] = {"dense, onnxruntime-genai": lambda: _genai(dense, folder / "genai")}
    if optimum_python is not None:
        found["dense, optimum-onnx"] = lambda: _optimum(optimum_python, dense, folder / "optimum-dense")
        found[f"{KEEP:g} stacked, optimum-onnx"] = lambda: _optimum(optimum_python, low, folder / "optimum-low")
    return found


def with_cache_sizes(folder: Path) -> Path:
    """Write the cache's sizes, which some exporters leave to names, into the graph's inputs."""
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    sizes = {1: MODELS[MODEL]["num_key_value_heads"], 3: MODELS[MODEL]["head_dim"]}
    for entry in model.graph.input:
        if entry.name.startswith("past_key_values."):
            for axis, size in sizes.items():
                entry.type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(model, str(path))
    return folder


def _genai(source: Path, out: Path) -> Path:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "smollm2", "-i", str(source)]
    subprocess.run(
        [*builder, "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(out.with_suffix(".cache"))],
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
