"""Plain ONNX Runtime: model.onnx as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from soco_export.runtimes.optimum import write_hugging_face_files
from soco_export.runtimes.registry import Layout, Runtime, runtime
from soco_train.installed import install_command, version_of

if TYPE_CHECKING:
    from soco_export.evaluate.decoders.decoder import Decoder
    from soco_export.evaluate.settings import ValidateSettings


@runtime("ort")
class Ort(Runtime):
    """ONNX Runtime under validate.provider, with proof of where each node ran."""

    reads_cache_sizes = reads_cache_types = True
    target = ("export.flavour=standard", "export.layouts=[optimum]")
    install = install_command("cpu")

    def write(self, to: Layout) -> None:
        """Write config, generation config and tokenizer for whoever runs the graph by hand."""
        write_hugging_face_files(to.source, to.folder)

    def open(self, folder: Path, settings: ValidateSettings, name: str) -> Decoder:
        """Return the graph in a session of ONNX Runtime; raises what OnnxDecoder raises."""
        from soco_export.evaluate.decoders.session import OnnxDecoder

        return OnnxDecoder(folder, settings.provider, settings.threads, name)

    def here(self) -> str | None:
        """Return which of the two packages that bring it are installed."""
        found = {package: version_of(package) for package in ("onnxruntime", "onnxruntime-gpu")}
        return ", ".join(f"{package} {version}" for package, version in found.items() if version) or None
