"""What a run costs, as a value: parameters, memory and GPU-hours by phase, disk and outputs; and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from soco_export.files.text import human_bytes


@dataclass(frozen=True)
class Phase:
    """Peak memory of one phase in bytes, where there is a GPU: on it, and on the host; and of the work on the CPU."""

    name: str
    device: int
    host: int
    gpu_hours: float
    on_cpu: int = 0

    @property
    def alone(self) -> int:
        """Host memory of the phase where there is no GPU."""
        return self.on_cpu or max(self.device, self.host)


@dataclass(frozen=True)
class CostCard:
    """All estimates for one recipe; bytes, parameters, tokens and GPU-hours.

    `core_hours`: of one CPU core, for all of it, where there is no GPU. `dropped`: parameters that go with numbers of
    value heads; `cached`: bytes of keys and values a token, before and after, where the recipe makes them fewer.
    """

    model: str
    parameters: int
    selected: int
    kept: int
    layers: int
    components: int
    phases: tuple[Phase, ...]
    disk: Mapping[str, int]
    outputs: Mapping[str, int]
    training_tokens: int
    assumption: str
    core_hours: float = 0.0
    dropped: int = 0
    cached: tuple[int, int] = (0, 0)

    @property
    def parameters_after(self) -> int:
        """Parameters of the compressed model."""
        return self.parameters - self.selected + self.kept - self.dropped

    @property
    def peak_device(self) -> int:
        """Largest device memory over the phases."""
        return max(phase.device for phase in self.phases)

    @property
    def peak_host(self) -> int:
        """Largest host memory over the phases, beside a GPU."""
        return max(phase.host for phase in self.phases)

    @property
    def peak_alone(self) -> int:
        """Largest host memory over the phases, where there is no GPU."""
        return max(phase.alone for phase in self.phases)

    @property
    def disk_total(self) -> int:
        """Bytes of a whole run folder."""
        return sum(self.disk.values())

    @property
    def gpu_hours(self) -> float:
        """Hours of all phases."""
        return sum(phase.gpu_hours for phase in self.phases)

    def document(self) -> dict[str, Any]:
        """Return the card as JSON values."""
        totals = {
            "parameters_after": self.parameters_after,
            "peak_device": self.peak_device,
            "peak_host": self.peak_host,
            "peak_host_without_gpu": self.peak_alone,
            "disk_total": self.disk_total,
            "gpu_hours": self.gpu_hours,
        }
        return asdict(self) | totals

    def lines(self) -> list[str]:
        """Return the card as text, one line each."""
        keep = self.kept / self.selected
        rows = [
            f"{self.model}: {count(self.parameters)} → {count(self.parameters_after)} parameters "
            f"(selected {count(self.selected)} → {count(self.kept)}, keep {keep:.2f})",
            f"{self.layers} layers · {self.components:,} scores · {count(self.training_tokens)} training tokens",
            f"{'phase':<14}{'GPU memory':>12}{'host memory':>13}{'GPU time':>11}",
        ]
        rows += [_row(phase.name, phase.device, phase.host, phase.gpu_hours) for phase in self.phases]
        rows.append(_row("in all", self.peak_device, self.peak_host, self.gpu_hours))
        alone = f"{human_bytes(self.peak_alone)} of host memory, {rough_time(self.core_hours)} of a CPU core"
        rows.append(f"without a GPU: {alone}")
        rows.append(f"assumed: {self.assumption}")
        rows.append(f"disk {human_bytes(self.disk_total)}: {_listed(self.disk)}")
        rows.append(f"outputs: {_listed(self.outputs)}")
        if self.cached[0] > self.cached[1]:
            rows.append(f"cache: {self.cached[0]:,} → {self.cached[1]:,} bytes a token")
        return rows


def count(number: float) -> str:
    """Return a count as people say it: 7.24B, 134.5M, 2,048."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,.0f}"


def _row(name: str, device: float, host: float, gpu_hours: float) -> str:
    return f"{name:<14}{human_bytes(device):>12}{human_bytes(host):>13}{rough_time(gpu_hours):>11}"


def _listed(sizes: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {human_bytes(number)}" for name, number in sizes.items())


def rough_time(hours: float) -> str:
    """Return a time with two digits or more: 1.5 h, 12 min, 3 s."""
    if not hours:
        return "–"
    value, unit = next(
        (hours * each, name) for each, name in ((1, "h"), (60, "min"), (3600, "s")) if hours * each >= 1 or name == "s"
    )
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}" if value >= 0.1 else "< 0.1 s"
