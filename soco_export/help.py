"""What `--help` shows of a verb: its options in groups, then commands to copy. Plain text, so that help stays quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand

MODEL, RUN, OUTPUT = "Model and recipe", "Run", "Output"
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "train-and-export": (
        "soco-export train-and-export --model tiny",
        "soco-export train-and-export --model smollm2-135m --keep-params 0.8 --dry-run",
        "soco-export train-and-export --model tiny --set train.steps=200 --out runs/long",
    ),
    "train": ("soco-export train --model tiny --seed 1 --out runs/seed-1",),
    "plan": ("soco-export plan runs/tiny --keep-params 0.9,0.8,0.6",),
    "export": (
        "soco-export export runs/tiny --keep-params 0.8",
        "soco-export export runs/tiny --set export.weights=int8 --out runs/tiny-int8",
    ),
    "sweep": ("soco-export sweep runs/tiny --keep-params 0.9,0.8,0.6 --weights same,int8",),
    "choose": ("soco-export choose runs/tiny --max-bytes 8MB --max-ppl-ratio 1.1 --prefer bytes",),
    "validate": (
        "soco-export validate runs/tiny",
        "soco-export validate runs/tiny/onnx --against runs/tiny/hf",
    ),
    "bench": (
        "soco-export bench runs/tiny --set bench.rounds=60",
        "soco-export bench runs/tiny/onnx --against runs/tiny/onnx-dense",
    ),
    "compare": ("soco-export compare runs/tiny runs/tiny/keep-0.8",),
    "report": (
        "soco-export report runs/tiny --set gates.max_ppl_ratio=1.1",
        "soco-export report runs/tiny",
    ),
    "gate": ("soco-export gate runs/tiny --baseline baseline.json --tolerance perplexity.ratio=0.03",),
    "repair": ("soco-export repair runs/tiny",),
    "pack": ("soco-export pack runs/tiny/onnx --out tiny.socopack",),
    "unpack": ("soco-export unpack tiny.socopack --out tiny",),
    "show": ("soco-export recipes show tiny --set keep_params=0.8",),
}


class Verb(TyperCommand):
    """A command whose help shows its options by the panel they name, and its examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then each group of options."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], MODEL: [], RUN: [], OUTPUT: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups[self._group(parameter)].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    @staticmethod
    def _group(parameter: Any) -> str:
        if parameter.param_type_name == "argument":
            return "Arguments"
        return getattr(parameter, "rich_help_panel", None) or (OUTPUT if parameter.name == "help" else RUN)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are to be typed, unwrapped."""
        lines = EXAMPLES.get(self.name or "", ())
        if lines:
            with formatter.section("Examples"):
                for line in lines:
                    formatter.write(f"{' ' * formatter.current_indent}{line}\n")
