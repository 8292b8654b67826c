"""What is learnt on a GPU is what the CPU learns, by the calls of the library: scores, distillation, Muon, rounding.

Every test has the CPU in both places; with a GPU (`-m gpu`) it has the GPU in one. Which operator of an export ran
where is proven in every run (docs/onnx.md).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_train import cut_factors, learn_scores, plan_ranks
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.optimiser import optimisers
from soco_train.modules.layers import select_linears
from soco_train.numbers.rounding import rounded
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings, OptimiserName
from soco_train.settings.plan import PlanSettings, Storage
from soco_train.settings.refine import RefineSettings
from soco_train.settings.rounding import RoundingSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from soco_train.store.spectra import SpectrumStore
from tests.support.models import make_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HAS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
TRAIN = TrainSettings(
    basis="two-sided", start="spectrum", steps=12, batch_tokens=64, lr=0.02, checkpoint_activations=True
)
DISTILL = DistillSettings(steps=6, batch_tokens=64, lr=1e-3, teacher_top=32, held_out_blocks=2, evaluate_every=3)


def learn(device: str, storage: Storage, folder: Path, train: TrainSettings) -> tuple[Any, Scores, Factors]:
    torch.manual_seed(3)
    model = make_model("llama-tied").to(device)
    tokens = torch.randint(model.config.vocab_size, (14, 16))
    plan = PlanSettings(keep_params=0.6, storage=storage)
    scores = learn_scores(model, tokens, folder, train, plan)
    ranks = plan_ranks(scores, plan)
    return model, scores, cut_factors(model, tokens, scores, ranks, folder, RefineSettings(distill=DISTILL))


@pytest.mark.parametrize(("storage", "lr_factors"), [("stacked", 0.0), ("stacked", 1e-4), ("pivoted", 0.0)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_learns_what_the_cpu_learns(device: str, storage: Storage, lr_factors: float, tmp_path: Path) -> None:
    train = TRAIN.model_copy(update={"lr_factors": lr_factors})
    _, expected, _ = learn("cpu", storage, tmp_path / "cpu", train)
    model, found, factors = learn(device, storage, tmp_path / "device", train)
    assert {parameter.device.type for parameter in model.parameters()} == {device}, "what was parked is back"
    for name, layer in expected.layers.items():
        assert float((found.layers[name].scale - layer.scale).abs().mean()) < 1e-3
        for own, cpu in zip(found.layers[name].components or (), layer.components or (), strict=True):
            assert float((own - cpu).norm() / cpu.norm()) < 1e-3
    for layer in factors.layers.values():
        assert all(tensor.device.type == "cpu" for tensor in vars(layer).values() if tensor is not None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("basis", ["whitened", "two-sided"])
def test_a_device_decomposes_as_the_cpu_does(device: str, basis: str, tmp_path: Path) -> None:
    train = TrainSettings(scorer="singular-values", basis=basis)
    tokens = torch.randint(250, (8, 16))
    found = {}
    for name in ("cpu", device):
        torch.manual_seed(3)
        model = make_model("llama-tied").to(name)
        learn_scores(model, tokens, tmp_path / name, train)
        store = SpectrumStore(tmp_path / name / "spectrum")
        found[name] = {layer: store[layer] for layer in select_linears(model, LayerSettings())}
    for layer, expected in found["cpu"].items():
        own = found[device][layer]
        assert float((own.sigma - expected.sigma).norm() / expected.sigma.norm()) < 1e-4
        weight = expected.P @ expected.B
        assert float((own.P @ own.B - weight).norm() / weight.norm()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["same", "int4"])
@pytest.mark.parametrize("optimiser", ["adamw", pytest.param("muon", marks=HAS_MUON)])
def test_a_device_distils_the_factors_that_the_cpu_distils(
    device: str, optimiser: OptimiserName, weights: Any, tmp_path: Path
) -> None:
    """The same cut on both; what differs is small beside what the distillation changed."""
    torch.manual_seed(5)
    model = make_model("llama-tied")
    tokens = torch.randint(model.config.vocab_size, (12, 16))
    plan = PlanSettings(keep_params=0.6, allocation="uniform")
    scores = learn_scores(model, tokens, tmp_path / "cpu", TrainSettings(scorer="singular-values", basis="two-sided"))
    shutil.copytree(tmp_path / "cpu", tmp_path / "device")
    ranks = plan_ranks(scores, plan)
    distill = DISTILL.model_copy(
        update={"optimiser": optimiser, "rounding": RoundingSettings(weights=weights), "teacher_top": 0}
    )
    start = cut_factors(model, tokens, scores, ranks, tmp_path / "cpu")
    expected = cut_factors(model, tokens, scores, ranks, tmp_path / "cpu", RefineSettings(distill=distill))
    model.to(device)
    found = cut_factors(model, tokens, scores, ranks, tmp_path / "device", RefineSettings(distill=distill))
    for name in expected.layers:
        first, cpu, own = (product(factors.layers[name]) for factors in (start, expected, found))
        assert float((cpu - first).norm()) > 0
        assert float((own - cpu).norm()) < 0.1 * float((cpu - first).norm())


def product(layer: Any) -> torch.Tensor:
    assert isinstance(layer, StackedFactors)
    return layer.up.double() @ layer.down.double()


@HAS_MUON
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_a_step_of_muon_is_the_cpus(device: str, shape: tuple[int, int]) -> None:
    value, gradient = torch.randn(shape), torch.randn(shape)
    steps = []
    for name in ("cpu", device):
        parameter = nn.Parameter(value.clone().to(name))
        parameter.grad = gradient.to(name)
        (muon,) = optimisers("muon", [parameter], lr=0.01)
        muon.step()
        steps.append(value - parameter.detach().cpu())
    assert float(steps[0].norm()) > 0
    # five iterations in bf16: two ways to add up differ in its last bits
    assert float((steps[1] - steps[0]).norm()) < 0.02 * float(steps[0].norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_device_rounds_to_the_cpus_bits(device: str, weights: Any, symmetric: bool) -> None:
    weight = torch.randn(64, 160) * torch.logspace(-3, 1, 64)[:, None]
    settings = RoundingSettings(weights=weights, symmetric=symmetric)
    assert torch.equal(rounded(weight.to(device), settings).cpu(), rounded(weight, settings))


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_scores_a_text_as_the_cpu_does(device: str) -> None:
    model, tokens = make_model("llama-tied"), torch.randint(250, (3, 24))
    expected = measure_perplexity(TorchDecoder(model), tokens)
    found = measure_perplexity(TorchDecoder(model.to(device)), tokens)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
