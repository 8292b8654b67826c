"""What a recipe may set about the benchmark; the provider and its threads are those of `validate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveInt

from soco_train.settings import Section


class BenchSettings(Section):
    """Dense ONNX against compressed ONNX in strictly interleaved `rounds`.

    `prefill`: prompt lengths in tokens; `past`: tokens in the cache while decoding; `decode_samples`: decode steps
    timed per round (30 rounds × 4 admit a p99). Lengths that the model's context does not hold are skipped and named.
    """

    enabled: bool = True
    rounds: int = Field(default=30, ge=2)
    warmup: int = Field(default=2, ge=0, description="untimed rounds before the first")
    prefill: tuple[PositiveInt, ...] = Field(default=(128, 512), min_length=1)
    past: int = Field(default=128, ge=1)
    decode_samples: int = Field(default=4, ge=1)
    memory: bool = Field(default=True, description="peak memory, each model in a process of its own")
    roofline: bool = Field(default=True, description="measure the memory bandwidth that bounds decoding")


class LatencySettings(Section):
    """The measured cost of a layer, for `optimise_for: latency`.

    `tokens`: how many go through a layer at once, 1 being a decode step; a pruned layer must be faster than dense at
    each. `profile`: the file that keeps the measurements, for several runs to share; by default each run has its own.
    """

    tokens: tuple[PositiveInt, ...] = Field(default=(1, 512), min_length=1)
    profile: Path | None = None
