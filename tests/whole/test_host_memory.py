"""The host's memory while a model is read for a GPU, cut, and written: a few weights, never a model.

Of a mixture that is a few experts, never the stack that transformers has of all experts of a layer. Measured in a
process of its own, on models that are stored in bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from soco_export.model.source import BUILTIN_MODEL
from soco_export.model.which import recipe_for
from soco_export.preflight.cost import estimate, measure
from soco_export.preflight.cost_shape import BASE_HOST, WEIGHTS_AT_ONCE
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import select_linears
from soco_train.modules.sites import open_sites
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import LayerScores, Scores

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the high-water mark")

HIDDEN, INNER, LAYERS = 256, 16384, 6
LARGEST = 4 * HIDDEN * INNER  # in fp32
NARROW, WIDE, EXPERTS = 128, 1024, 40
EXPERT = 3 * 4 * NARROW * WIDE  # in fp32
AT_ONCE = 8  # experts; a stack of gates and ups is as large as two thirds of all of them
# VmHWM is the process's own high-water mark; writing 5 to clear_refs starts it anew.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from soco_export.export import export_onnx
from soco_export.model.load import load_model, load_onto
from soco_export.model.which import recipe_for
from soco_export.run.stages import artefacts
from soco_export.run.context import RunContext
from soco_export.run.folder.held import RunFolder
from soco_export.onnx.settings import ExportSettings
from soco_train import method
from soco_train.store.factors import Factors
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum
from soco_train.plan.ranks import plan_ranks
from soco_train.events import silent
from soco_train.refine.cut import cut_layers, store_as
from soco_train.modules.layers import select_linears
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.train import TrainSettings
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
    factors = store_as(cut_layers(Spectra(), scores, plan, linears), storage)
    Factors(factors).save(root / f"{storage}.safetensors")
small, large, mixture = map(Path, sys.argv[1:])
write(small, "bfloat16")  # all imports are done
export_onnx(small / "bfloat16/hf", small / "onnx", ExportSettings())
def learn():
    subject = method.open_subject(model, LayerSettings(), torch.zeros(1, 8, dtype=torch.long), mixture / "spectra")
    method.make_spectra(subject, TrainSettings(basis="plain"))
def export():
    export_onnx(mixture / "bfloat16/hf", mixture / "onnx", ExportSettings())
found = {dtype: peak(lambda: write(large, dtype)) for dtype in ("bfloat16", "float32")}
# the device stands for the GPU: weights that stay as they are stored stay in their file
found["read"] = peak(lambda: load_onto(recipe_for(str(large / "model")), "cpu", torch.bfloat16))
linears = select_linears(load_onto(recipe_for(str(large / "model")), "cpu", torch.bfloat16), LayerSettings())
shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
ones = {name: torch.ones(min(shape)) for name, shape in shapes.items()}
scores = Scores({name: LayerScores(ones[name], ones[name], None, shape) for name, shape in shapes.items()})
for storage in ("stacked", "pivoted"):
    found[storage] = peak(lambda: cut(large, storage))
recipe = recipe_for(str(mixture / "model"))
found["experts read"] = peak(lambda: load_onto(recipe, "cpu", torch.bfloat16))
found["experts written"], found["experts exported"] = peak(lambda: write(mixture, "bfloat16")), peak(export)
found["experts read in fp32"] = peak(lambda: load_model(recipe))
model = load_model(recipe)[0]
found["experts decomposed"] = peak(learn)
print(json.dumps(found))
"""


def store(folder: Path, kind: str, layers: int, inner: int, **sizes: int) -> int:
    """Write a model and factors for all of its layers; return the model's bytes."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2048} | sizes
    config = AutoConfig.for_model(kind, intermediate_size=inner, num_hidden_layers=layers, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="100MB")
    for file in BUILTIN_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    open_sites(model)
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


@dataclass
class Measured:
    """Bytes that were taken at most, by what was done; and what the large model and the mixture have in bfloat16."""

    folder: Path
    peaks: dict[str, int]
    model: int
    mixture: int


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    root = tmp_path_factory.mktemp("memory")
    store(root / "small", "llama", 1, 32)
    model = store(root / "large", "llama", LAYERS, INNER)
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDE}
    mixture = store(root / "mixture", "qwen3_moe", 1, WIDE, hidden_size=NARROW, **experts)
    command = [sys.executable, "-c", MEASURE, *(str(root / name) for name in ("small", "large", "mixture"))]
    # what is freed goes back to the system at once, so that the mark is the same each time
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return Measured(root, json.loads(done.stdout.splitlines()[-1]), model, mixture)


def test_neither_reading_nor_rewriting_takes_a_second_model(measured: Measured) -> None:
    found, folder = measured.peaks, measured.folder / "large"
    assert measured.model > 2 * WEIGHTS_AT_ONCE * LARGEST, "large enough that another copy would show"
    for storage in ("stacked", "pivoted"):
        recipe = recipe_for(str(folder / "model"), overrides=["keep_params=0.6", f"storage={storage}"])
        said = {phase.name: phase.host - BASE_HOST for phase in estimate(recipe, measure(recipe), "hf").phases}
        for work, phase in {"bfloat16": "checkpoint", "float32": "checkpoint", storage: "factors"}.items():
            within = said[phase] / 3 <= found[work] <= said[phase]
            assert within, f"{work}: {found[work] / LARGEST:.2f} of {said[phase] / LARGEST:.2f} × the largest layer"
        factors = (folder / f"{storage}.safetensors").stat().st_size
        assert factors > found[storage], "large enough that all factors together would show"
    assert found["read"] <= measured.model + LARGEST, "views of the files, and what one weight takes"


def test_a_mixture_takes_the_memory_of_a_few_experts(measured: Measured) -> None:
    """Beside pages of the model's files where it is read, and its weights where that is in fp32."""
    models = {"read": 1, "read in fp32": 3, "decomposed": 0, "written": 1, "exported": 0}
    for work, times in models.items():
        taken = (measured.peaks[f"experts {work}"] - times * measured.mixture) / EXPERT
        assert taken <= AT_ONCE, f"{work}: {taken:.1f} of {EXPERTS} experts at one time"
