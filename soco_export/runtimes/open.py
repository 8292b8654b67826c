"""A folder that holds a causal LM, opened for asking: ONNX in a runtime, a Hugging Face folder in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from soco_export.evaluate.settings import ValidateSettings
from soco_export.files.names import MODEL_FILE
from soco_export.runtimes.registry import check_opens, find_runtime
from soco_train.errors import RecipeError

if TYPE_CHECKING:
    from soco_export.evaluate.decoders.decoder import Decoder, TorchDecoder


def is_onnx(folder: Path) -> bool:
    """Tell an exported folder from a Hugging Face checkpoint."""
    return (folder / MODEL_FILE).is_file()


def check_holds_model(folder: Path) -> None:
    """Raise RecipeError if `folder` is neither an exported folder nor a Hugging Face checkpoint."""
    if not is_onnx(folder) and not (folder / "config.json").is_file():
        raise RecipeError(
            f"{folder} holds no model", fix="give a Hugging Face or an ONNX folder, or a run", where=str(folder)
        )


def open_decoder(folder: Path, settings: ValidateSettings, name: str, trust_remote_code: bool = False) -> Decoder:
    """Open `folder` under `name`; raises RecipeError if it holds no model, and what its reader raises.

    trust_remote_code: whether code that lies in a Hugging Face folder may run.
    """
    if is_onnx(folder):
        check_opens(settings.runtime)
        decoder = find_runtime(settings.runtime, "validate.runtime").open(folder, settings, name)
        if decoder is None:
            raise RecipeError(
                f"{settings.runtime} does not open this export", fix="validate.runtime: ort", where=str(folder)
            )
        return decoder
    check_holds_model(folder)
    import torch

    from soco_export.checkpoint.load import load_checkpoint

    return torch_decoder(load_checkpoint(folder, torch.float32, trust_remote_code=trust_remote_code), name)


def torch_decoder(model: Any, name: str) -> TorchDecoder:
    """Open a PyTorch model under `name`, on the GPU where there is one."""
    import torch

    from soco_export.evaluate.decoders.decoder import TorchDecoder

    return TorchDecoder(model.to("cuda" if torch.cuda.is_available() else "cpu"), name)
