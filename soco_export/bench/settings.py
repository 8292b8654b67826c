"""What a recipe may set about the benchmark; the provider and its threads are those of `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from soco_train.settings.section import Section


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def _file_name(path: Path) -> Path:
    if not str(path).isprintable():
        raise ValueError(f"{str(path)[:60]!r} is no name of a file")
    return path


class BenchSettings(Section):
    """Dense ONNX against compressed ONNX in strictly interleaved rounds.

    `prefill`: prompt lengths in tokens; `past`: tokens in the cache while decoding, one length or several;
    `decode_samples`: decode steps timed per round, at least. Lengths that the model's context does not hold are skipped
    and named. `seconds`: a workload goes on until it has had its `rounds` and its seconds: what else a machine does
    comes and goes within seconds, and a series that is shorter has seen one such moment only.
    """

    enabled: bool = True
    rounds: int = Field(default=30, ge=2, description="rounds of each workload, at least")
    seconds: float = Field(default=10.0, ge=0, description="length of each workload, at least")
    control: bool = Field(default=True, description="time a second copy of the dense model too: the machine's noise")
    cold_starts: int = Field(
        default=3, ge=0, description="how often to open each model anew, to a prompt's first token"
    )
    warmup: int = Field(default=2, ge=0, description="untimed rounds before the first")
    prefill: tuple[PositiveInt, ...] = Field(default=(128, 512), min_length=1)
    past: Annotated[tuple[PositiveInt, ...], BeforeValidator(_several)] = Field(default=(128, 2048), min_length=1)
    decode_samples: int = Field(default=4, ge=1)
    memory: bool = Field(default=True, description="peak memory, each model in a process of its own")
    roofline: bool = Field(default=True, description="measure the memory bandwidth that bounds decoding")


class LatencySettings(Section):
    """The measured cost of a layer, for `optimise_for: latency`.

    `tokens`: how many go through a layer at once, 1 being a decode step; a pruned layer must be faster than dense at
    each. `profile`: the file that keeps the measurements, for several runs to share; by default each run has its own.
    """

    tokens: tuple[PositiveInt, ...] = Field(default=(1, 512), min_length=1)
    profile: Annotated[Path, AfterValidator(_file_name)] | None = None
