"""The host's memory while a model is read for a GPU, cut, and written: a few weights, never a model.

Measured in a process of its own, on a model that is stored in bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from soco_export.model.source import BUILTIN_MODEL
from soco_export.model.which import recipe_for
from soco_export.preflight.cost import estimate, measure
from soco_export.preflight.cost_shape import BASE_HOST, WEIGHTS_AT_ONCE
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import select_linears
from soco_train.plan.ranks import plan_ranks
from soco_train.settings import LayerSettings, PlanSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import LayerScores, Scores

HIDDEN, INNER, LAYERS = 512, 16384, 6
LARGEST = 4 * HIDDEN * INNER  # in fp32
# VmHWM is the process's own high-water mark; writing 5 to clear_refs starts it anew.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from soco_export.model.load import load_onto
from soco_export.model.which import recipe_for
from soco_export.run.stages import artefacts
from soco_export.run.context import RunContext
from soco_export.run.folder.held import RunFolder
from soco_train.store.factors import Factors
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum
from soco_train.plan.ranks import plan_ranks
from soco_train.events import silent
from soco_train.refine.cut import make_factors, store_as
from soco_train.modules.layers import select_linears
from soco_train.settings import LayerSettings, PlanSettings
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def peak(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    work()
    return kib("VmHWM") - before
def write(root, dtype):
    recipe = recipe_for(str(root / "model"), overrides=[f"model.dtype={dtype}"])
    (root / dtype).mkdir()
    artefacts.write_checkpoint(RunContext(RunFolder(root, recipe, manifest=None), "hf", silent), root / dtype)
class Spectra:
    def __getitem__(self, name):
        m, n = shapes[name]
        return Spectrum(torch.ones(m, min(m, n)), torch.ones(min(m, n), n), torch.ones(min(m, n)))
def cut(root, storage):
    plan = plan_ranks(scores, PlanSettings(keep_params=0.6, allocation="uniform", storage=storage))
    factors = store_as(make_factors(Spectra(), scores, plan, linears), storage)
    Factors(factors).save(root / f"{storage}.safetensors")
small, large = map(Path, sys.argv[1:])
write(small, "bfloat16")  # all imports are done
found = {dtype: peak(lambda: write(large, dtype)) for dtype in ("bfloat16", "float32")}
# the device stands for the GPU: weights that stay as they are stored stay in their file
found["read"] = peak(lambda: load_onto(recipe_for(str(large / "model")), "cpu", torch.bfloat16))
linears = select_linears(load_onto(recipe_for(str(large / "model")), "cpu", torch.bfloat16), LayerSettings())
shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
ones = {name: torch.ones(min(shape)) for name, shape in shapes.items()}
scores = Scores({name: LayerScores(ones[name], ones[name], None, shape) for name, shape in shapes.items()})
for storage in ("stacked", "pivoted"):
    found[storage] = peak(lambda: cut(large, storage))
print(json.dumps(found))
"""


def store(folder: Path, layers: int, inner: int) -> int:
    """Write a model and factors for all of its layers; return the model's bytes."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 2048}
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, num_attention_heads=8), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="100MB")
    for file in BUILTIN_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    factors, scores = {}, {}
    for name, linear in select_linears(model, LayerSettings()).items():
        m, n = linear.weight.shape
        rank = int(0.6 * m * n / (m + n))
        factors[name] = StackedFactors(torch.randn(m, rank), torch.randn(rank, n), None)
        scores[name] = LayerScores(torch.ones(min(m, n)), torch.ones(min(m, n)), None, (m, n))
    plan = plan_ranks(Scores(scores), PlanSettings(keep_params=0.6, allocation="uniform"))
    (folder / "plan.json").write_text(plan.to_json())
    Factors(factors).save(folder / "factors.safetensors")
    return model.num_parameters() * 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the high-water mark")
def test_neither_reading_nor_rewriting_takes_a_second_model(tmp_path: Path) -> None:
    store(tmp_path / "small", 1, 32)
    model = store(tmp_path / "large", LAYERS, INNER)
    assert model > 2 * WEIGHTS_AT_ONCE * LARGEST, "large enough that another copy would show"
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    # what is freed goes back to the system at once, so that the mark is the same each time
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    for storage in ("stacked", "pivoted"):
        recipe = recipe_for(str(tmp_path / "large" / "model"), overrides=["keep_params=0.6", f"storage={storage}"])
        said = {phase.name: phase.host - BASE_HOST for phase in estimate(recipe, measure(recipe), "hf").phases}
        for work, phase in {"bfloat16": "checkpoint", "float32": "checkpoint", storage: "factors"}.items():
            within = said[phase] / 3 <= found[work] <= said[phase]
            assert within, f"{work}: {found[work] / LARGEST:.2f} of {said[phase] / LARGEST:.2f} × the largest layer"
        factors = (tmp_path / "large" / f"{storage}.safetensors").stat().st_size
        assert factors > found[storage], "large enough that all factors together would show"
    assert found["read"] <= model + LARGEST, "views of the files, and what one weight takes"
