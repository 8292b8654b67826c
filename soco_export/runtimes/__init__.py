"""Where the export runs. Importing this package registers the runtimes in it."""

from soco_export.runtimes import genai, optimum, ort, triton

__all__ = ["genai", "optimum", "ort", "triton"]
