"""OpenVINO reads the standard flavour in every type, and says PyTorch's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.settings import ValidateSettings
from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings
from soco_export.runtimes.open import open_decoder
from soco_train.errors import DataError
from tests.support import fresh
from tests.support.decoders import factor, tiny_model

pytest.importorskip("openvino", reason="no openvino here: the extra openvino")

MIXED = {"q_proj": ("stacked", 20), "v_proj": ("pivoted", 9), "up_proj": ("pivoted", 24)}
ASKED = ValidateSettings(runtime="openvino", threads=1)
NEW = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    model = tiny_model("smollm2").float()  # tied
    return factor(model, tmp_path_factory.mktemp("openvino") / "hf", MIXED), model


@pytest.mark.parametrize(
    ("settings", "error"),
    [({}, 1e-4), ({"dtype": "float16"}, 0.05), ({"dtype": "bfloat16"}, 0.3)],
    ids=str,
)
def test_tokens_are_those_of_torch(model: Any, settings: dict[str, Any], error: float, tmp_path: Path) -> None:
    folder, dense = model
    export_onnx(folder, tmp_path / "onnx", ExportSettings.model_validate(settings))
    decoder, torch_decoder = open_decoder(tmp_path / "onnx", ASKED, "openvino"), TorchDecoder(dense)
    ids = fresh.rng().integers(3, 96, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    right = torch_decoder.logits(ids, mask)
    assert np.abs(decoder.logits(ids, mask) - right)[mask.astype(bool)].max() < error * np.abs(right).max()
    if error < 1e-3:
        assert decoder.generate(ids, NEW, mask).tolist() == torch_decoder.generate(ids, NEW, mask).tolist()


@pytest.mark.parametrize("weights", ["int8", "int4", "int2"])
def test_weights_in_blocks_are_read_as_onnx_runtime_reads_them(model: Any, weights: str, tmp_path: Path) -> None:
    table = {"embedding": "same", "accuracy_level": 1}
    settings = ExportSettings.model_validate({"weights": weights, "quantize": table})
    export_onnx(model[0], tmp_path / "onnx", settings)
    ids = fresh.rng().integers(3, 96, (1, 9))
    right = open_decoder(tmp_path / "onnx", ValidateSettings(threads=1), "ort").logits(ids)
    found = open_decoder(tmp_path / "onnx", ASKED, "openvino").logits(ids)
    assert np.abs(found - right).max() < 0.1 * np.abs(right).max()  # its own activations are in int8


def test_a_table_in_blocks_is_said_to_be_what_it_cannot_load(model: Any, tmp_path: Path) -> None:
    export_onnx(model[0], tmp_path / "onnx", ExportSettings(weights="int8"))
    with pytest.raises(DataError, match="does not load") as refused:
        open_decoder(tmp_path / "onnx", ASKED, "openvino")
    assert "--target openvino" in str(refused.value.fix)
