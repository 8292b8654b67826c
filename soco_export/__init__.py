"""Turns learnt spectra into deployable, proven artefacts: low-rank model, HF checkpoint, ONNX, evidence.

Importing it is light, and makes transformers load our checkpoints; the names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from soco_export.autoload import install

if TYPE_CHECKING:
    from soco_export.checkpoint.layers import apply_factors, merge_dense
    from soco_export.checkpoint.load import load_checkpoint
    from soco_export.checkpoint.writer import save_checkpoint, save_dense
    from soco_export.export import export_onnx

__all__ = ["apply_factors", "export_onnx", "load_checkpoint", "merge_dense", "save_checkpoint", "save_dense"]

_HOMES = {
    "apply_factors": "soco_export.checkpoint.layers",
    "export_onnx": "soco_export.export",
    "load_checkpoint": "soco_export.checkpoint.load",
    "merge_dense": "soco_export.checkpoint.layers",
    "save_checkpoint": "soco_export.checkpoint.writer",
    "save_dense": "soco_export.checkpoint.writer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


install()
