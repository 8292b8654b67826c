"""OpenVINO: reads model.onnx itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.settings import ExportSettings
from soco_export.runtimes.registry import Runtime, runtime
from soco_train.errors import RecipeError
from soco_train.installed import install_command

if TYPE_CHECKING:
    from soco_export.evaluate.decoders.decoder import Decoder
    from soco_export.evaluate.settings import ValidateSettings


@runtime("openvino")
class OpenVino(Runtime):
    """Its MatMulNBits wants a constant weight, which a head that shares a token table in blocks has not."""

    packages = ("openvino",)
    install = install_command("openvino")
    target = (
        "export.flavour=standard",
        "export.quantize.embedding=same",
        "export.layouts=[optimum, openvino]",
        "validate.runtime=openvino",
    )

    def check(self, settings: ExportSettings, architecture: Architecture | None) -> None:
        """Raise RecipeError for what it does not read, or reads wrongly."""
        if settings.flavour == "contrib":
            raise RecipeError(
                "export.flavour is contrib, of whose GroupQueryAttention OpenVINO computes one sequence only",
                fix="export.flavour: standard",
                where="export.flavour",
            )
        refuse_quantised_table(settings, "OpenVINO")

    def open(self, folder: Path, settings: ValidateSettings, name: str) -> Decoder:
        """Return the graph as OpenVINO compiles it; DataError if it does not load."""
        from soco_export.evaluate.decoders.openvino import OpenVinoDecoder

        return OpenVinoDecoder(folder, settings.threads, name)


def refuse_quantised_table(settings: ExportSettings, runtime: str) -> None:
    """Raise RecipeError for a token table in blocks, which `runtime` has no operator for."""
    table = settings.quantize.embedding
    if settings.weights != "same" and table != "same":
        raise RecipeError(
            f"export.quantize.embedding is {table}, and {runtime} does not run a token table in blocks",
            fix="export.quantize.embedding: same",
            where="export.quantize.embedding",
        )
