"""Where the export runs. Importing this package registers the runtimes in it."""

from soco_export.runtimes import browser, genai, openvino, optimum, ort, triton

__all__ = ["browser", "genai", "openvino", "optimum", "ort", "triton"]
