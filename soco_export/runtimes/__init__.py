"""What each runtime wants beside model.onnx. Importing this package registers the layouts in it."""

from soco_export.runtimes import genai, optimum, triton

__all__ = ["genai", "optimum", "triton"]
