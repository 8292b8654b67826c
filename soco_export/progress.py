"""How progress looks: one line per stage, bars on a terminal and plain lines elsewhere, as wide as there is room.

    scores       ━━━━━━━━────────   31/60  ETA 0:32  phase 3 · KL 0.1771 · tokens/s 1,020
    spectrum     ━━━━━━━━━━━━━━━━    done      0:22  layer model.layers.5.mlp.down_proj

What a stage consists of (statistics, fisher, …) shows in the stage's own line. The line of a narrow terminal first
gives up its bar, then the figures; what is left to do and how long it takes stays.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from soco_export.files.text import one_line, visible
from soco_train.events import Event

if TYPE_CHECKING:
    from rich.live import Live

SECONDS_BETWEEN_LINES = 60.0
NAME, COUNT, CLOCK = 12, 9, 11  # columns of a stage's name, of n/N, of the time left or taken
BAR_FROM, WIDEST_BAR = 72, 24  # columns of the narrowest terminal that has a bar, and of the longest bar
BETWEEN = " · "
_WORDS = {"kl": "KL", "soft": "soft size", "hard": "size"}  # figures of a training, in words


@dataclass
class StageLine:
    """What is known of one stage: its part that runs (`part`, "" for itself), how far that is, its last figures."""

    name: str
    begun: float
    part: str = ""
    step: int = 0
    total: int = 1
    values: Mapping[str, float | int | str] = field(default_factory=dict)
    state: str = "running"
    seconds: float = 0.0
    first: tuple[int, float] = (0, 0.0)

    def update(self, event: Event, now: float) -> None:
        """Take in one event of this stage."""
        part = "" if event.stage == self.name else event.stage
        if part != self.part or event.step < self.step or self.first[1] == 0.0:
            self.part, self.first = part, (event.step, now)
        self.step, self.total = event.step, event.total
        self.values = event.values or self.values

    def end(self, state: str, now: float) -> None:
        """Note that the stage is over."""
        self.state, self.seconds = state, now - self.begun

    @property
    def share(self) -> float:
        """How much of what runs is done, in [0, 1]."""
        if self.state != "running":
            return 1.0
        return min(1.0, self.step / self.total) if self.total else 0.0

    def left(self, now: float) -> float | None:
        """Return the seconds until what runs is done, at its pace so far; None before there is one."""
        done = self.step - self.first[0]
        return (now - self.first[1]) / done * (self.total - self.step) if done > 0 else None


def draw_line(line: StageLine, width: int, now: float) -> str:
    """Return a stage's line of at most `width` columns; figures that do not fit are left out whole."""
    parts = [f"{_cut(line.name, NAME):<{NAME}}"]
    if width >= BAR_FROM:
        bar = min(WIDEST_BAR, 8 + (width - BAR_FROM) // 2)
        full = round(bar * line.share)
        parts.append("━" * full + "─" * (bar - full))
    parts.append(f"{_count(line):>{COUNT}}")
    parts.append(f"{_clock(line, now):>{CLOCK}}")
    text = " ".join(parts)
    figures = _fit(_figures(line), width - len(text) - 2)
    return f"{text}  {figures}".rstrip()[:width]


def _count(line: StageLine) -> str:
    if line.state != "running":
        return line.state
    counted = f"{line.step}/{line.total}"
    if line.total <= 1:
        return "running"
    return counted if len(counted) <= COUNT else f"{line.share:.0%}"


def _clock(line: StageLine, now: float) -> str:
    if line.state != "running":
        return duration(line.seconds)
    left = line.left(now)
    return duration(now - line.begun) if left is None else f"ETA {duration(left)}"


def _figures(line: StageLine) -> list[str]:
    shown = [text for text in (render_value(name, value) for name, value in line.values.items()) if text]
    return [one_line(line.part), *shown] if line.part and line.state == "running" else shown


def _fit(parts: list[str], width: int) -> str:
    """Join the first parts that fit into `width` columns."""
    text = ""
    for part in parts:
        longer = f"{text}{BETWEEN}{part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def render_values(values: Mapping[str, float | int | str]) -> str:
    """Return figures as `phase 2 · KL 0.0312 · tokens/s 5120`; a value without a name is a remark of its own."""
    return BETWEEN.join(render_value(name, value) for name, value in values.items())


def render_value(name: str, value: float | int | str) -> str:
    """Return one figure with its name."""
    return one_line(f"{_WORDS.get(name, name)} {_figure(value)}".strip())


def _figure(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def duration(seconds: float) -> str:
    """Return a time for people: 1:02, or 1:02:03 with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Stages:
    """The stages that have reported, in order; what is told between "begun" and "done" belongs to that stage."""

    def __init__(self) -> None:
        self.lines: dict[str, StageLine] = {}
        self.open = ""

    def take(self, event: Event, now: float) -> StageLine:
        """Take in an event and return the line that it changed."""
        name = self.open or event.stage
        if event.mark == "begun":
            name = self.open = event.stage
            self.lines.pop(name, None)
        line = self.lines.setdefault(name, StageLine(name, now))
        if event.mark in ("done", "skipped"):
            line.end("done" if event.mark == "done" else "as it was", now)
            self.open = ""
        elif event.mark == "progress":
            line.update(event, now)
            if not self.open and event.step >= event.total:
                line.end("done", now)
        return line


class Lines:
    """A line when a stage begins and one when it ends; in between one a minute (`every_step`: all): for logs and CI."""

    def __init__(self, every_step: bool) -> None:
        self.stages = Stages()
        self.every_step = every_step
        self.last = 0.0

    def show(self, event: Event) -> None:
        """Print what is worth a line."""
        now = time.monotonic()
        known = event.stage in self.stages.lines or self.stages.open
        line = self.stages.take(event, now)
        due = self.every_step or now - self.last >= SECONDS_BETWEEN_LINES
        at_once = not known or self._resumed(event, line, now) or (line.state != "running" and not self.stages.open)
        if event.mark == "progress" and not (due or at_once):
            return
        self.last = now
        print(visible(self._text(event, line, now)), file=sys.stderr, flush=True)

    @staticmethod
    def _resumed(event: Event, line: StageLine, now: float) -> bool:
        """Tell whether this is the first that is heard of a part that goes on from a checkpoint."""
        return line.first == (event.step, now) and 1 < event.step < event.total

    @staticmethod
    def _text(event: Event, line: StageLine, now: float) -> str:
        parts = [f"{line.name:<{NAME}}"]
        if event.mark == "progress":
            parts += [line.part, f"{line.step}/{line.total}" if line.total > 1 else "", render_values(line.values)]
            left = line.left(now) if line.state == "running" else None
            parts.append("" if left is None else f"ETA {duration(left)}")
        else:
            result = {name: value for name, value in line.values.items() if event.mark == "done" and name != "layer"}
            parts.append(BETWEEN.join(filter(None, (render_values(event.values), render_values(result)))))
        return "  ".join(filter(None, parts))


class Bars:
    """A line per stage that is drawn anew as it changes; what is over stays on the screen."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self.stages = Stages()
        self.console = RichConsole(stderr=True)
        self.live: Live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=4)
        self.live.start()

    def show(self, event: Event) -> None:
        """Take in an event; the screen follows a few times a second."""
        self.stages.take(event, time.monotonic())

    def _draw(self) -> Any:
        from rich.text import Text

        now, width = time.monotonic(), self.console.width
        styles = {"running": "bold", "done": "green", "as it was": "dim"}
        lines = [
            Text(draw_line(line, width, now), style=styles[line.state], no_wrap=True)
            for line in self.stages.lines.values()
        ]
        return Text("\n").join(lines)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.live.refresh()
        self.live.stop()
