"""A checkpoint written a tensor at a time is, byte by byte, the one that is written from a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from soco_export import apply_factors, load_checkpoint, save_checkpoint
from soco_export.checkpoint import stream
from soco_export.checkpoint.layers import stored_factors
from soco_export.checkpoint.stream import stream_checkpoint
from soco_train.errors import DataError
from soco_train.forms.registry import LayerFactors, LazyLayers
from soco_train.modules.layers import select_linears
from soco_train.settings.data import LayerSettings
from soco_train.store.factors import Factors
from soco_train.store.tensorfile import Pending, write_file
from tests.support.models import ARCHITECTURES, VOCABULARY, logits, make_model, make_tokenizer, random_layer

pytestmark = pytest.mark.transformers

transformers_logging.disable_progress_bar()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Stored:
    """A dense model in bfloat16 and factors for most of its layers, as files."""

    folder: Path

    @property
    def layers(self) -> LazyLayers[LayerFactors]:
        return stored_factors(self.folder / "factors.safetensors")

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "dense", dtype=torch.bfloat16)

    def from_memory(self, dtype: torch.dtype, shard: str = "5GB") -> dict[str, bytes]:
        model = self.model()
        apply_factors(model, self.layers, dtype)
        save_checkpoint(model.to(dtype), make_tokenizer(), self.folder / "memory", "# card", shard)
        return contents(self.folder / "memory")

    def streamed(self, dtype: torch.dtype, shard: str = "5GB") -> dict[str, bytes]:
        model = self.model()
        apply_factors(model, self.layers, dtype, "meta")
        stream_checkpoint(model, self.layers, dtype, make_tokenizer(), self.folder / "stream", "# card", shard)
        return contents(self.folder / "stream")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def tensors(folder: Path) -> dict[str, bytes]:
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: tensor.view(torch.uint8).numpy().tobytes() for file in files for name, tensor in file.items()}


def store(model: Any, folder: Path) -> Stored:
    """Both kinds of factors take turns; the first layer has full rank, hence a dense weight of its own."""
    linears = {name: linear for name, linear in select_linears(model, LayerSettings()).items() if "1.mlp" not in name}
    layers = {}
    for index, (name, linear) in enumerate(linears.items()):
        kind, rank = ("stacked", "pivoted")[index % 2], 5 if index else linear.out_features
        layers[name] = random_layer(kind, linear, rank, new_bias=index % 3 == 1)
    Factors(layers).save(folder / "factors.safetensors")
    model.bfloat16().save_pretrained(folder / "dense")
    return Stored(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_the_folder_is_the_same_to_the_byte(architecture: str, shard: str, tmp_path: Path) -> None:
    stored = store(make_model(architecture), tmp_path)
    for dtype in DTYPES:
        expected, found = stored.from_memory(dtype, shard), stored.streamed(dtype, shard)
        assert ("model.safetensors.index.json" in expected) == (shard == "30KB")
        if shard == "5GB" or transformers.__version__ >= "5":
            assert found == expected
        else:  # 4.57 deals them out in another order
            assert tensors(tmp_path / "stream") == tensors(tmp_path / "memory")


def test_a_model_that_is_stored_in_another_form_is_written_in_that(tmp_path: Path) -> None:
    """transformers 5 holds the experts of a mixture as one tensor, and its files hold them one by one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=3, **sizes)
    stored = store(AutoModelForCausalLM.from_config(config), tmp_path)
    assert stored.streamed(torch.float32) == stored.from_memory(torch.float32)
    load_checkpoint(tmp_path / "stream")


def test_a_model_of_no_folder_is_written_from_memory(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    name = "model.layers.0.mlp.up_proj"
    layers = {name: random_layer("stacked", model.get_submodule(name), 5, new_bias=True)}
    apply_factors(model, layers, device="meta")
    stream_checkpoint(model, layers, torch.float32, None, tmp_path / "hf")
    ids = torch.randint(0, VOCABULARY, (2, 9))
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "hf"), ids), logits(model, ids))


@pytest.mark.parametrize("part", ["dense", "factors"])
def test_a_value_that_is_not_finite_leaves_the_old_folder(part: str, tmp_path: Path) -> None:
    stored = store(make_model("llama-tied"), tmp_path)
    before = stored.streamed(torch.float32)
    file = tmp_path / ("dense/model.safetensors" if part == "dense" else "factors.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = "model.norm.weight" if part == "dense" else next(name for name in tensors if name.endswith(":bias"))
    tensors[name][0] = torch.nan
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(DataError, match=r"holds NaN or infinity"):
        stored.streamed(torch.float32)
    assert contents(tmp_path / "stream") == before


def test_only_the_tensor_that_is_written_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store(make_model("mistral"), tmp_path)
    asked = []
    replacement = stream.replacement
    monkeypatch.setattr(
        stream, "replacement", lambda *words, **kind: asked.append(words) or replacement(*words, **kind)
    )
    stored.streamed(torch.bfloat16)
    assert len(stored.layers) <= len(asked) <= 2 * len(stored.layers)


def test_a_file_of_many_dtypes_is_that_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "größe": torch.randn(3, 5),
        "b": torch.randn(7).half(),
        "a.order": torch.arange(4),
        "c": torch.tensor(1.5).bfloat16(),
        "empty": torch.empty(0, 3),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    write_file(tmp_path / "found", {n: Pending.of(t) for n, t in reversed(tensors.items())}, {"format": "pt"})
    found = load_file(tmp_path / "found")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert (tmp_path / "found").stat().st_size == (tmp_path / "expected").stat().st_size
