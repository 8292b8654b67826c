"""A third storage form, defined here in two classes and one function, goes the whole road."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional

from soco_export.bench.layer_timing import CopiedLayer, rank_grid
from soco_export.checkpoint.card import summarise_layers
from soco_export.checkpoint.layers import apply_factors
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.export import export_onnx
from soco_export.onnx.emit.linear import FINISH, Linears, finish
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import StoredForm
from soco_export.onnx.write.matrix import Matrix, Order, Part
from soco_export.preflight.cost_shape import measure
from soco_export.recipe.load import load_recipe
from soco_train import method
from soco_train.cost import stacked
from soco_train.errors import DataError, RecipeError
from soco_train.forms.base import FORMS, FactoredLinear, LayerFactors, form, parameter
from soco_train.modules.subject import Session
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import STORAGE, PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.factors import Factors
from tests.support.models import make_model

pytestmark = pytest.mark.transformers

KEEP = 0.6


@dataclass(frozen=True)
class ScaledFactors(LayerFactors):
    """y = up (scale ⊙ (down x)) + bias; rows of `down` have the norm 1."""

    up: torch.Tensor
    scale: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @staticmethod
    def cost(rank: Any, m: Any, n: Any) -> Any:
        return rank * (m + n + 1)

    @classmethod
    def blank(cls, m: int, n: int, rank: int, bias: bool) -> ScaledFactors:
        with torch.device("meta"):
            numbers = torch.empty(m, rank), torch.empty(rank), torch.empty(rank, n)
            return cls(*numbers, torch.empty(m) if bias else None)

    @classmethod
    def of(cls, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> ScaledFactors:
        norms = down.norm(dim=1)
        return cls(up, norms, down / norms[:, None], bias)


class ScaledLinear(FactoredLinear):
    """Computes with ScaledFactors."""

    kind = "scaled"
    height_part = "up"

    @classmethod
    def from_factors(cls, factors: ScaledFactors, dtype: Any = None, device: Any = None) -> ScaledLinear:
        (m, n), rank = factors.shape, len(factors.scale)
        module = cls(n, m, rank, "meta")
        module.weight = parameter(factors.down, dtype, device)
        module.up, module.scale = (parameter(part, dtype, device) for part in (factors.up, factors.scale))
        module.bias = None if factors.bias is None else parameter(factors.bias, dtype, device)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.weight) * self.scale, self.up, self.bias)

    def dense_weight(self) -> torch.Tensor:
        exact = self._product_dtype()
        return (self.up.to(exact) * self.scale.to(exact)) @ self.weight.to(exact)

    def dense_bias(self) -> torch.Tensor | None:
        return self.bias


def nodes(linears: Linears, first: ir.Value, name: str, rows: Order) -> ir.Value:
    scale = linears.graph.weight(f"{name}.scale", linears.source.read(f"{name}.scale"))
    up = Matrix([Part(linears.source.read(f"{name}.up"), rows)])
    return linears.matmul(linears.graph.op("Mul", first, scale), f"{name}.up", up, [name])


@pytest.fixture(autouse=True)
def scaled() -> Iterator[None]:
    form(ScaledFactors)(ScaledLinear)
    yield
    FORMS.pop("scaled")
    STORAGE.discard("scaled")
    FINISH.pop("scaled", None)


@pytest.fixture
def checkpoint(scaled: None, tmp_path: Path) -> tuple[Any, torch.Tensor, Factors, RankPlan]:
    """Return the pruned model, its logits' input, its factors and their plan; its folder is `hf`."""
    model = make_model("llama-tied")
    tokens = torch.randint(4, 250, (4, 16))
    settings = PlanSettings(keep_params=KEEP, storage="scaled", allocation="uniform")
    train = TrainSettings(scorer="singular-values", basis="plain")
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path / "spectrum")
    method.make_spectra(subject, train)
    scores = method.learn_scores(subject, train, settings, Session(tmp_path / "scores"))
    plan = plan_ranks(scores, settings)
    factors = method.cut_factors(subject, scores, plan, RefineSettings(), Session(tmp_path / "work"))
    factors.save(tmp_path / "factors.safetensors")
    apply_factors(model, Factors.load(tmp_path / "factors.safetensors"))
    save_checkpoint(model, None, tmp_path / "hf")
    return model, tokens, factors, plan


def test_plan_cut_files_and_checkpoint_know_it(checkpoint: Any, tmp_path: Path) -> None:
    model, tokens, factors, plan = checkpoint
    assert plan.ratio <= KEEP
    pruned = {name: layer for name, layer in plan.layers.items() if not layer.dense}
    assert pruned
    for name, layer in pruned.items():
        m, n = layer.shape
        assert (
            layer.params == layer.rank * (m + n + 1) == sum(p.numel() for p in model.get_submodule(name).parameters())
        )
        weight = model.get_submodule(name).dense_weight()
        stored = factors.layers[name]
        torch.testing.assert_close(weight.float(), stored.up @ torch.diag(stored.scale) @ stored.down)
    loaded = load_checkpoint(tmp_path / "hf")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert {group.kind for group in summarise_layers(loaded).groups} == {"scaled"}


def test_its_nodes_are_in_the_graph_and_without_them_it_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    model, tokens, _, _ = checkpoint
    with pytest.raises(RecipeError, match="stored scaled have no ONNX nodes"):
        export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings())
    assert not (tmp_path / "onnx").exists()
    finish("scaled")(nodes)
    summary = export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings())
    assert summary.forms["scaled"] == sum(isinstance(module, ScaledLinear) for module in model.modules())
    session = ort.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            _, heads, _, size = entry.shape
            feeds[entry.name] = np.zeros((len(tokens), heads, 0, size), np.float32)
    ids = tokens.numpy()
    plain = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    plain["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    feeds |= {entry.name: plain[entry.name] for entry in session.get_inputs() if entry.name in plain}
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])
    torch.testing.assert_close(logits, model(input_ids=tokens).logits, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_that_lacks_a_number_of_it_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith(".scale"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(DataError, match="scale"):
        load_checkpoint(tmp_path / "hf")


def test_the_cost_card_and_the_layer_timing_ask_it() -> None:
    sizes = {}
    for storage in ("stacked", "scaled"):
        recipe = load_recipe("tiny", [f"storage={storage}", f"keep_params={KEEP}"])
        sizes[storage] = stacked(recipe.plan, measure(recipe))
    assert 0.9 * sizes["stacked"] < sizes["scaled"] < sizes["stacked"]  # a rank costs a number more
    rank = rank_grid((48, 32), "scaled")[0]
    layer = CopiedLayer((48, 32), StoredForm("scaled", rank), 2, bias=True)
    assert {name for name in layer.shapes if name.startswith("copy1.")} == {
        f"copy1.{part}" for part in ("weight", "up", "scale", "bias")
    }


def test_a_name_that_no_form_has_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown storage 'folded'") as refused:
        load_recipe("tiny", ["storage=folded"])
    assert "scaled" in refused.value.message
