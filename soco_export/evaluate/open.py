"""A folder that holds a causal LM, opened for asking: ONNX, a Hugging Face checkpoint of ours, or a dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soco_export.evaluate.decoder import Decoder, TorchDecoder
from soco_export.evaluate.settings import ValidateSettings
from soco_train.errors import RecipeError


def is_onnx(folder: Path) -> bool:
    """Tell an exported folder from a Hugging Face checkpoint."""
    return (folder / "model.onnx").is_file()


def open_decoder(folder: Path, settings: ValidateSettings, name: str) -> Decoder:
    """Open `folder` under `name`; raises RecipeError if it holds no model, and what its reader raises."""
    if is_onnx(folder):
        from soco_export.evaluate.session import OnnxDecoder

        return OnnxDecoder(folder, settings.provider, settings.threads, name)
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"{folder} holds no model", fix="give a Hugging Face or an ONNX folder, or a run", where=str(folder)
        )
    import torch

    from soco_export.checkpoint.load import load_checkpoint

    return torch_decoder(load_checkpoint(folder, dtype=torch.float32), name)


def torch_decoder(model: Any, name: str) -> TorchDecoder:
    """Open a PyTorch model under `name`, on the GPU where there is one."""
    import torch

    return TorchDecoder(model.to("cuda" if torch.cuda.is_available() else "cpu"), name)
