"""Where layers are measured, and what a profile of their times is kept under: known without measuring one."""

from __future__ import annotations

from dataclasses import dataclass

import onnxruntime as ort

from soco_export.bench.layer_times import Conditions
from soco_export.bench.machine import cpu_name, gpu_name
from soco_export.bench.settings import LatencySettings
from soco_export.evaluate.settings import CPU
from soco_export.onnx.settings import ExportSettings

TIMING = 3  # of what is measured and how: a profile of other graphs, or made in another way, is not used again


@dataclass(frozen=True)
class Device:
    """Where and how layers are measured, `tokens` at once; `bias`: a pruned layer adds one."""

    provider: str
    threads: int
    export: ExportSettings
    bias: bool
    tokens: tuple[int, ...] = LatencySettings().tokens

    def conditions(self) -> Conditions:
        """Return what a profile of this device is kept under."""
        how = self.export.quantize
        blocks = f"{how.block} {'symmetric' if how.symmetric else 'asymmetric'} accuracy {how.accuracy_level}"
        return Conditions(
            processor=cpu_name() if self.provider == CPU else gpu_name() or "",
            provider=self.provider,
            threads=self.threads,
            runtime=ort.__version__,
            dtype=self.export.dtype,
            weights=self.export.weights,
            blocks="" if self.export.weights == "same" else blocks,
            bias=self.bias,
            tokens=self.tokens,
            timing=TIMING,
        )
