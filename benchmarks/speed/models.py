"""Models with random weights, made as they are exported: speed does not ask what a weight is, and disks are small.

smollm2    SmolLM2-135M as published
1b         Llama-3.2-1B's layers, 3 of 16, and 16k of its 128k tokens, so that seven sessions fit 16 GiB
7b         Mistral 7B's layers, 4 of 32; for a GPU
7b-small   the same with small widths, for a test of what is measured on one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from soco_export.bench.layer_times import Profile, limits
from soco_export.onnx.build import write_graph
from soco_export.onnx.check import expected_tensors
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.families.registry import describe
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import StoredForm
from soco_export.onnx.write.matrix import Array
from soco_train.events import silent
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.plan import PlanSettings, Storage
from soco_train.store.scores import LayerScores, Scores

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        **LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 16384,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}
MODELS["7b"] = {
    **MODELS["1b"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MODELS["7b-small"] = {
    **MODELS["7b"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 1000,
}
PLANNED = ("smollm2", "1b")  # of which there are tables
DENSE = StoredForm()
POOL = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)


class RandomModel:
    """A source of weights for an architecture whose Linears have the given forms; `bias`: pruned layers have one."""

    def __init__(self, architecture: Architecture, forms: Mapping[str, StoredForm], bias: bool = False) -> None:
        self._forms = forms
        needed, allowed = expected_tensors(architecture, self)
        biases = {
            name: shape for name, shape in allowed.items() if name.rpartition(".")[0].removesuffix(".up") in forms
        }
        self.shapes = needed | (biases if bias else {})

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def form(self, name: str) -> StoredForm:
        """Return how a Linear is stored."""
        return self._forms.get(name, DENSE)

    def levels(self, name: str) -> None:
        """Return nothing: random weights are rounded to nearest."""

    def read(self, name: str) -> Array:
        """Return a tensor; no two matrices are equal.

        ONNX Runtime packs equal matrices once: a model of equal layers would be read from the cache, not from memory.
        """
        shape = self.shapes[name]
        if name.endswith(".order"):
            return np.random.default_rng(len(name)).permutation(shape[0])
        if len(shape) == 1:
            return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        start = crc32(name.encode()) % len(POOL)
        values = np.resize(np.roll(POOL, -start)[: shape[0] * shape[1]], shape)
        return values / np.float32(shape[1] ** 0.5)


def architecture_of(model: str, folder: Path) -> Architecture:
    """Write config.json of a model into `folder` and return its description."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    found = describe(resolve_config(folder))
    assert found is not None
    return found


def uniform_plan(architecture: Architecture, keep: float, form: Storage, multiple: int) -> RankPlan:
    """Return the same share of every Linear but the head."""
    settings = PlanSettings(keep_params=keep, storage=form, allocation="uniform", multiple=multiple)
    return plan_ranks(_scores(architecture), settings, extra_cost={})


def measured_plan(architecture: Architecture, keep: float, profile: Profile, form: Storage) -> RankPlan:
    """Return a plan of the same size that leaves a layer dense where its low-rank form was measured to be no faster."""
    scores = _scores(architecture)
    shapes = {name: layer.shape for name, layer in scores.layers.items()}
    settings = PlanSettings(keep_params=keep, storage=form, allocation="lagrangian", multiple=profile.multiple)
    ends = limits(profile, shapes, form, settings.multiple)
    return plan_ranks(scores, settings, extra_cost={}, limits=ends)


def forms_of(plan: RankPlan) -> dict[str, StoredForm]:
    """Return the pruned layers' forms."""
    return {name: StoredForm(plan.storage, layer.rank) for name, layer in plan.layers.items() if not layer.dense}


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return the Linears that take part: all but the head."""
    return {name: shape for name, shape in architecture.linears().items() if name != architecture.tensors.head}


def _scores(architecture: Architecture) -> Scores:
    """Importances that fall exponentially, at the same price per parameter in every layer."""
    layers = {}
    for name, (m, n) in linear_shapes(architecture).items():
        k = min(m, n)
        importance = (m + n) * torch.exp(-3 * torch.arange(k, dtype=torch.float64) / k)
        layers[name] = LayerScores(importance, torch.ones(k), None, (m, n))
    return Scores(layers)


def write_model(
    architecture: Architecture,
    forms: Mapping[str, StoredForm],
    folder: Path,
    settings: ExportSettings,
    bias: bool = False,
) -> None:
    """Export a random model, with logits of the last token; `folder` holds its config.json already."""
    settings = settings.model_copy(update={"flavour": "contrib", "last_token_logits": True})
    write_graph(architecture, RandomModel(architecture, forms, bias), settings, folder, silent)
