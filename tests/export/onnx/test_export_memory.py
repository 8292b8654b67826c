"""Exporting needs memory for one layer, whatever is done to it: measured on a model whose MLP is most of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from soco_export.onnx.write.matrix import Matrix, Part
from tests.support import fresh
from tests.support.decoders import CONFIGS, factor, tiny_model

HIDDEN, INNER = 256, 49152
LARGEST = 4 * HIDDEN * INNER
# down_proj stays dense and takes its columns in the order that the pivoted gate gives them.
FORMS = {"low rank": {"gate_proj": ("pivoted", 64), "up_proj": ("stacked", 64)}, "dense": {}}
CASES = {
    "fp32": {},
    "fp32-packed": {"pack": True},
    "int4-packed": {"weights": "int4", "pack": True, "quantize": {"symmetric": False}},
}
# VmHWM is the process's own high-water mark; writing 5 to clear_refs starts it anew.
MEASURE = """
import json, sys
from pathlib import Path
from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
small, large, out, cases = sys.argv[1:]
export_onnx(Path(small), Path(out) / "first", ExportSettings(weights="int4"))  # all imports are done
found = {}
for name, settings in json.loads(cases).items():
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    export_onnx(Path(large), Path(out) / name, ExportSettings(**settings))
    found[name] = kib("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the high-water mark")
@pytest.mark.parametrize(("forms", "dtype"), [("low rank", torch.bfloat16), ("dense", torch.float32)])
def test_peak_memory_is_at_most_one_and_a_half_times_the_largest_layer(
    forms: str, dtype: torch.dtype, tmp_path: Path, monkeypatch
) -> None:
    wide = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1}
    monkeypatch.setitem(CONFIGS, "wide", ("llama", {**CONFIGS["llama"][1], **wide}))
    folder = factor(tiny_model("wide"), tmp_path / "hf", FORMS[forms])
    tensors = load_file(folder / "model.safetensors")
    stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    small = factor(tiny_model("llama"), tmp_path / "small", {})
    command = [sys.executable, "-c", MEASURE, str(small), str(folder), str(tmp_path / "out"), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == CASES.keys()
    for name, peak in found.items():
        assert peak <= 1.5 * LARGEST, f"{name}: {peak / LARGEST:.2f} × the largest layer"


@pytest.mark.parametrize("ordered", [True, False])
def test_pieces_are_the_matrix(ordered, monkeypatch) -> None:
    random = fresh.rng()
    monkeypatch.setattr("soco_export.onnx.write.matrix.CHUNK", 4 * 11 * 3)
    arrays = [random.standard_normal((m, 11)).astype(np.float32) for m in (7, 1, 5)]
    rows = [random.permutation(7) if ordered else None, None, None]
    columns = random.permutation(11) if ordered else None
    whole = np.concatenate([a if order is None else a[order] for a, order in zip(arrays, rows, strict=True)])
    whole = whole if columns is None else whole[:, columns]
    matrix = Matrix([Part(a, order) for a, order in zip(arrays, rows, strict=True)], columns)
    assert matrix.shape == (13, 11)
    assert (np.concatenate(list(matrix.pieces())) == whole).all()
    assert (np.concatenate(list(matrix.transposed())) == whole.T).all()
    assert max(map(len, matrix.pieces())) <= 3
