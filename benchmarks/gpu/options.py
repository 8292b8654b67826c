"""What may be said on the command line, and the key that a section's settings make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from soco_export.files.records import record_file
from soco_export.run.folder.manifest import stage_key

CUDA = torch.cuda.is_available()
KEYS = {  # what a section's figures depend on
    "a": (),
    "b": ("model", "model_path", "set", "calibrate", "evaluate", "tokens"),
    "c": ("shapes",),
    "d": ("threads",),
}


@dataclass(frozen=True)
class Options:
    """The command line, read. `part` and `seconds` are of a process that does one part."""

    out: Path
    work: Path
    minutes: float
    sections: str
    small: bool
    fresh: bool
    model: str
    model_path: Path | None
    set: tuple[str, ...]
    calibrate: tuple[Path, ...]
    evaluate: tuple[str, ...]
    tokens: float
    shapes: tuple[str, ...]
    threads: int
    part: str
    seconds: float

    def key(self, letter: str) -> str:
        """Hash what a section depends on: its options, the texts it reads, and the device."""
        values = {name: value for name, value in asdict(self).items() if name in KEYS[letter]}
        texts = {str(path): record_file(path).sha256 for path in self.calibrate} if letter == "b" else {}
        return stage_key([letter, self.small, values], {**texts, "device": device()})[:16]


def device() -> str:
    """Name the device that everything runs on."""
    return torch.cuda.get_device_name() if CUDA else "cpu"


def parse(argv: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure everything that only a GPU shows, best first."
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON for each section")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="spectra, scores, sampled text, models")
    parser.add_argument("--minutes", type=float, default=12, help="for all sections that are asked for")
    parser.add_argument("--sections", default="abcd", help="letters, for example bc")
    parser.add_argument("--small", action="store_true", help="all of it at tiny sizes, on a CPU too")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--model", help="b: a recipe")
    parser.add_argument("--model-path", type=Path, help="b: the model's folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="b: a recipe key")
    parser.add_argument("--calibrate", type=Path, nargs="+", default=[], metavar="PATH", help="b: texts to learn from")
    parser.add_argument("--evaluate", nargs="+", default=[], metavar="NAME=PATH:BLOCK[:N]", help="b: texts to score")
    parser.add_argument("--tokens", type=float, help="b: of one training; default 5e6")
    parser.add_argument("--shapes", nargs="+", help="c: recipes whose sizes are taken; default mistral-7b")
    parser.add_argument("--threads", type=int, default=2, help="d: ONNX Runtime's on a CPU")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    found = vars(parser.parse_args(argv))
    small = found["small"]
    found["model"] = found["model"] or ("tiny" if small else "smollm2-135m")
    found["tokens"] = found["tokens"] or (512 if small else 5e6)
    found["shapes"] = found["shapes"] or (["small", "tiny"] if small else ["mistral-7b"])
    return Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
