"""A file per family of models. Importing this package registers the families in it."""

from soco_export.onnx.families import llama, opt

__all__ = ["llama", "opt"]
