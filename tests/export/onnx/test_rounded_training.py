"""Dense weights trained as rounded: the gradient, what it is worth, and its way into the ONNX file."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from soco_export.checkpoint.layers import apply_factors, stored_factors
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_train.forms.dense import DenseWeight
from soco_train.learn.divergence import divergence
from soco_train.modules.factored import TrainedLinear, deployed
from soco_train.modules.layers import select_linears
from soco_train.modules.subject import Session, Subject
from soco_train.numbers.rounding import rounded
from soco_train.plan.ranks import plan_ranks
from soco_train.refine.ladder import refine
from soco_train.scores.registry import train_scores
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.rounding import RoundingSettings
from soco_train.settings.train import TrainSettings
from soco_train.spectra.decompose import decompose_model
from soco_train.store.spectra import SpectrumStore
from tests.support import fresh
from tests.support.decoders import Decoder, tiny_model, torch_logits

INT4 = RoundingSettings(weights="int4", block=32)
PLAN = PlanSettings(keep_params=1.0)
TRAIN = TrainSettings(scorer="singular-values", basis="plain")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = tiny_model("llama-biased")
    linears = select_linears(model, LayerSettings())
    tokens = torch.randint(3, 96, (40, 24))
    store = SpectrumStore(tmp_path_factory.mktemp("spectrum"))
    decompose_model(model, linears, tokens, TRAIN, store)
    return Subject(model, linears, store, tokens)


def rounded_copy(subject: Subject, weights: dict[str, DenseWeight], dtype: torch.dtype) -> torch.nn.Module:
    """The model with these weights, or its own, as rounding leaves them."""
    model = copy.deepcopy(subject.model)
    for name, linear in subject.linears.items():
        layer = weights.get(name, DenseWeight(linear.weight.detach(), linear.bias))
        model.get_submodule(name).weight.data = rounded(layer.weight, INT4)
        model.get_submodule(name).bias.data = layer.bias.detach().clone()
    return model.to(dtype)


def kl(student: torch.nn.Module, teacher: torch.nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (model(input_ids=tokens).logits.double().log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_gradient_is_that_of_the_rounded_weights_in_float64(subject: Subject) -> None:
    tokens = subject.tokens[:3]
    exact = rounded_copy(subject, {}, torch.float64)
    p = copy.deepcopy(subject.model).double()(input_ids=tokens).logits.log_softmax(-1).detach()
    q = exact(input_ids=tokens).logits.log_softmax(-1)
    (p.exp() * (p - q)).sum(-1).mean().backward()
    with deployed(subject.model, subject.linears, {}, INT4) as layers:
        teacher = p.float()
        loss, _ = divergence(subject.model(input_ids=tokens).logits, teacher, tokens)
        loss.backward()
        for name, layer in layers.items():
            assert isinstance(layer, TrainedLinear)
            for part in ("weight", "bias"):
                expected = getattr(exact.get_submodule(name), part).grad
                found = getattr(layer.learnt, part).grad
                off = (found - expected).norm() / expected.norm().clamp(min=1e-6)
                assert off < 1e-3, f"{name}.{part}"
    assert all(parameter.grad is None for parameter in subject.model.parameters())


@pytest.fixture(scope="module")
def trained(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """factors.safetensors of a run that keeps everything and trains it as int4 will leave it."""
    work = tmp_path_factory.mktemp("work")
    settings = RefineSettings(distill=DistillSettings(steps=40, batch_tokens=192, lr=7e-4, rounding=INT4))
    scores = train_scores(subject, TRAIN, PLAN, Session(work))
    before = {name: linear.weight.clone() for name, linear in subject.linears.items()}
    refine(subject, scores, plan_ranks(scores, PLAN), settings, Session(work), {}).save(work / "factors.safetensors")
    assert all(torch.equal(before[name], linear.weight) for name, linear in subject.linears.items())
    return work / "factors.safetensors"


def test_a_model_of_full_size_is_better_rounded_once_it_was_trained_so(subject: Subject, trained: Path) -> None:
    layers = dict(stored_factors(trained))
    assert set(layers) == set(subject.linears)
    for tokens, least in ((subject.tokens, 0.6), (torch.randint(3, 96, (8, 24)), 0.9)):  # what it learnt from, and not
        losses = [kl(rounded_copy(subject, own, torch.float32), subject.model, tokens) for own in ({}, layers)]
        assert losses[1] < least * losses[0]


def test_dense_layers_stay_as_they_were_unless_asked_for(subject: Subject, tmp_path: Path) -> None:
    scores = train_scores(subject, TRAIN, PLAN, Session(tmp_path))
    for rounding in (RoundingSettings(), INT4.model_copy(update={"dense": False})):
        settings = RefineSettings(distill=DistillSettings(steps=2, rounding=rounding))
        assert not refine(subject, scores, plan_ranks(scores, PLAN), settings, Session(tmp_path), {}).layers


def test_the_onnx_file_has_the_levels_that_were_trained(subject: Subject, trained: Path, tmp_path: Path) -> None:
    layers = dict(stored_factors(trained))
    model = copy.deepcopy(subject.model)
    apply_factors(model, stored_factors(trained))
    save_checkpoint(model, None, tmp_path / "hf")
    how = QuantizeSettings(block=32, accuracy_level=1, embedding="same", keep=("lm_head",))
    export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings(weights="int4", quantize=how))
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    arrays |= {node.output[0]: arrays[node.input[0]] for node in graph.node if node.input[0].endswith("_scales")}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == len(layers)
    written = [dequantized(*(arrays[name] for name in node.input[1:3])) for node in products]
    for layer in layers.values():
        expected = rounded(layer.weight, INT4).numpy()
        assert any(expected.shape == found.shape and np.array_equal(expected, found) for found in written)

    tokens = fresh.rng().integers(3, 96, (2, 12))
    mask = np.ones_like(tokens)
    expected = torch_logits(rounded_copy(subject, layers, torch.float32), tokens, mask)
    assert np.abs(Decoder(tmp_path / "onnx").step(tokens, mask) - expected).max() < 1e-3


def dequantized(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int4 in blocks of 32 as MatMulNBits has it, two to a byte: the matrix [m, n], n a multiple of 32."""
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1, 32).astype(np.float32)
    values: np.ndarray = (levels - 8) * scales.reshape(len(packed), -1, 1)
    return values.reshape(len(packed), -1)
