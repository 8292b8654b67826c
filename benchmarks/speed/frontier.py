"""Bytes on disk against perplexity: each Hugging Face folder in fp32, int8, int4 and int4 throughout.

    python -m benchmarks.speed.frontier dense=FOLDER 0.8=RUN/hf 0.6=OTHER/hf --out OUT
    python -m benchmarks.speed.frontier dense=FOLDER 0.8=RUN/hf --evaluate wiki.test.raw --block 2048 --out OUT

`int4-all` is the least that 4 bits come to: blocks of 64, and the token table too, which int4 leaves in int8. A point
is beaten if another one is no larger and no worse. OUT/frontier.json holds every point as soon as it is measured, and
keeps those that a later command does not name.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.evaluate.settings import CPU
from soco_export.export import export_onnx
from soco_export.files.atomic import write_atomic
from soco_export.files.records import record_file
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_export.report.pages.plots import svg
from soco_export.run.folder.manifest import stage_key
from soco_train.data.corpus import load_blocks
from soco_train.settings.data import DataSettings

WEIGHTS = {
    "fp32": ExportSettings(layouts=("optimum",)),
    "int8": ExportSettings(layouts=("optimum",), weights="int8"),
    "int4": ExportSettings(layouts=("optimum",), weights="int4"),
    "int4-all": ExportSettings(
        layouts=("optimum",), weights="int4", quantize=QuantizeSettings(block=64, embedding="int4")
    ),
}
WORST = 4


@dataclass(frozen=True)
class Point:
    """One model in one weight type. `bytes`: of model.onnx and its data; `key`: hash of the weights and the text."""

    model: str
    weights: str
    bytes: int
    perplexity: float
    tokens: int
    text: str
    key: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing; write frontier.json and .md, and the plot if it is asked for."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    known = read(options.out)
    for name, folder in options.models:
        key = _key(folder, options)
        for weights in options.weights:
            before = known.get((name, weights))
            if before is None or before.key != key:
                known[name, weights] = measure(name, folder, weights, options, key)
                write(options.out, list(known.values()))
    print(markdown(list(known.values())))
    if options.plot:
        write_atomic(options.plot, draw(list(known.values())))


def read(out: Path) -> dict[tuple[str, str], Point]:
    """Return the points of `out` by model and weight type."""
    path = out / "frontier.json"
    points = [Point(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    return {(point.model, point.weights): point for point in points}


def write(out: Path, points: Sequence[Point]) -> None:
    """Write frontier.json and .md."""
    write_atomic(out / "frontier.json", json.dumps([asdict(point) for point in points], indent=1) + "\n")
    write_atomic(out / "frontier.md", markdown(points))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.frontier")
    parser.add_argument("models", nargs="*", type=_named, help="NAME=FOLDER, a Hugging Face folder, dense or low rank")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--evaluate", type=Path, help="text file; default: the built-in speeches")
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="draw what is there as SVG; needs matplotlib (the extra `report`)")
    return parser.parse_args(argv)


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def _key(folder: Path, options: argparse.Namespace) -> str:
    """Hash what a point of `folder` depends on beside its weight type."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    texts = [options.evaluate] if options.evaluate else []
    inputs = {path.name: record_file(path).sha256 for path in [*files, *texts]}
    return stage_key([options.block, options.blocks], inputs)[:16]


def measure(name: str, folder: Path, weights: str, options: argparse.Namespace, key: str) -> Point:
    """Export and score one point."""
    from transformers import AutoTokenizer

    source: dict[str, Any] = {"path": options.evaluate} if options.evaluate else {"builtin": "speeches"}
    data = DataSettings(**source, block=options.block, blocks=options.blocks)
    blocks = load_blocks(AutoTokenizer.from_pretrained(folder), data, "evaluation")
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "onnx"
        export_onnx(folder, out, WEIGHTS[weights])
        size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        found = measure_perplexity(OnnxDecoder(out, CPU, options.threads), blocks.tokens)
    return Point(name, weights, size, found.value, found.tokens, blocks.source, key)


def beaten_by(point: Point, points: Sequence[Point]) -> Point | None:
    """Return the best point that is no larger and no worse, and better in one of both; None if there is none."""
    better = [
        other
        for other in points
        if other.bytes <= point.bytes
        and other.perplexity <= point.perplexity
        and (other.bytes, other.perplexity) != (point.bytes, point.perplexity)
    ]
    return min(better, key=lambda other: (other.perplexity, other.bytes), default=None)


def markdown(points: Sequence[Point]) -> str:
    """Return the table, smallest first."""
    lines = ["| model | weights | MB | perplexity | beaten by |", "|---|---|---|---|---|"]
    for point in sorted(points, key=lambda point: point.bytes):
        winner = beaten_by(point, points)
        beaten = f"{winner.model} {winner.weights}" if winner else ""
        lines.append(
            f"| {point.model} | {point.weights} | {point.bytes / 1e6:.1f} | {point.perplexity:.4g} | {beaten} |"
        )
    texts = ", ".join(dict.fromkeys(f"{point.tokens} tokens of {point.text}" for point in points))
    return "\n".join([*lines, "", f"Perplexity over {texts}.", ""])


def draw(points: Sequence[Point]) -> str:
    """Return the plot as SVG, the frontier as a line.

    Points whose perplexity is beyond WORST times the best are in the table alone: they would press all others flat.
    """
    from matplotlib.figure import Figure

    shown = [p for p in points if p.perplexity <= WORST * min(point.perplexity for point in points)]
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    best = sorted((p for p in shown if beaten_by(p, points) is None), key=lambda p: p.bytes)
    axes.plot([p.bytes / 1e6 for p in best], [p.perplexity for p in best], color="0.8", zorder=0, label="frontier")
    for weights in dict.fromkeys(point.weights for point in shown):
        own = [p for p in shown if p.weights == weights]
        axes.scatter([p.bytes / 1e6 for p in own], [p.perplexity for p in own], label=weights)
    for point in shown:
        place = (point.bytes / 1e6, point.perplexity)
        axes.annotate(point.model, place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("bytes on disk (MB)")
    axes.set_ylabel("perplexity")
    axes.legend()
    return svg(figure)


if __name__ == "__main__":
    main()
