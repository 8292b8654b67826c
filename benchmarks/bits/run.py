"""What a rule of rounding loses: each model in fp32, and in blocks of few bits rounded by each rule.

    python -m benchmarks.bits dense=FOLDER --keep 0.8 --rules nearest calibrated trained --out OUT
    python -m benchmarks.bits dense=FOLDER --calibrate train.raw --evaluate test.raw --block 2048 --blocks 8 --out OUT

`--keep` cuts FOLDER to a low-rank model without training a step: whitened basis, components by their Fisher
information in the whole model, cut by price. `loss` is the mean cross entropy of a token, its excess what rounding adds
to that of the same model in fp32, and a rule has removed the share by which its excess is below nearest's. `trained`
is no rule of rounding: the model was distilled as rounding to nearest leaves it (models.py), and beside it stands the
low-rank model that had the same tokens in fp32. The token table is in int8 everywhere. OUT/bits.json holds every row as
soon as it is measured; a row of the same inputs is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.bits.models import LEARNING, LEARNING_RATES, Found, Subject, tokenizer_of
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.evaluate.settings import CPU
from soco_export.export import export_onnx
from soco_export.files.atomic import write_atomic
from soco_export.files.records import record_file
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_export.run.folder.manifest import stage_key
from soco_train.data.corpus import load_blocks
from soco_train.settings.data import DataSettings
from soco_train.settings.rounding import RoundingSettings

GRIDS = ("int4-32", "int4-64", "int4-128", "int2-32")
RULES = ("nearest", "calibrated", "trained")
_LEARNING = [LEARNING.model_dump(mode="json"), LEARNING_RATES]


@dataclass(frozen=True)
class Row:
    """One model in one form.

    bytes: of model.onnx and its data; seconds: of processor time for training and export; lr: that of a trained one, of
    those in `tried` with the divergence from the dense model that each ended with on held-out blocks.
    """

    model: str
    grid: str
    rule: str
    bytes: int
    loss: float
    perplexity: float
    tokens: int
    seconds: float
    calibration_tokens: int
    layer_error_removed: float | None
    key: str
    lr: float | None = None
    tried: Mapping[str, float] | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing; write bits.json and bits.md."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bits.json"
    known = {_name(row): row for row in _read(path)}
    with tempfile.TemporaryDirectory() as work:
        for model in models(options, Path(work)):
            key = key_of(model.subject.folder, options)
            for grid, rule in forms(options, model.distilled):
                own = stage_key([key, _LEARNING], {})[:16] if rule == "trained" or model.distilled else key
                before = known.get((model.name, grid, rule))
                if before is None or before.key != own:
                    known[model.name, grid, rule] = measure((model.name, grid, rule), model, options, own)
                    rows = [asdict(row) for row in known.values()]
                    write_atomic(path, json.dumps({"setting": setting_of(options), "rows": rows}, indent=1) + "\n")
                    write_atomic(options.out / "bits.md", markdown(list(known.values()), setting_of(options)))
    print(markdown(list(known.values()), setting_of(options)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return make_parser("python -m benchmarks.bits").parse_args(argv)


def make_parser(prog: str, grids: Sequence[str] = GRIDS) -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("models", nargs="+", type=_named, help="NAME=FOLDER, a Hugging Face folder; the first is cut")
    parser.add_argument("--keep", nargs="*", type=float, default=[], help="cut the first model to these sizes as well")
    parser.add_argument("--grids", nargs="+", default=list(grids), help="intBITS-BLOCK")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["nearest", "calibrated"])
    parser.add_argument("--calibrate", nargs="+", type=Path, help="text files; default: the built-in speeches")
    parser.add_argument("--evaluate", type=Path, help="text file; default: the built-in speeches")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def _name(row: Row) -> tuple[str, str, str]:
    return row.model, row.grid, row.rule


def _read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] if path.exists() else []


def setting_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all rows share, in words."""
    return {
        "calibration": [path.name for path in options.calibrate] if options.calibrate else "built-in speeches",
        "calibration_tokens": options.tokens,
        "evaluation": options.evaluate.name if options.evaluate else "built-in speeches",
        "block": options.block,
        "blocks": options.blocks,
    }


def key_of(folder: Path, options: argparse.Namespace) -> str:
    """Return a hash over the folder, the texts and how they are cut."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    texts = [*(options.calibrate or []), *([options.evaluate] if options.evaluate else [])]
    inputs = {path.name: record_file(path).sha256 for path in [*files, *texts]}
    return stage_key([options.block, options.blocks, options.tokens], inputs)[:16]


@dataclass(frozen=True)
class Model:
    """What is rounded: a subject as it is cut, or `distilled` in fp32."""

    name: str
    subject: Subject
    distilled: bool = False

    @cached_property
    def found(self) -> Found:
        """The model before it is rounded."""
        if self.distilled:
            return self.subject.trained(RoundingSettings())
        return Found(self.subject.folder if self.subject.keep == 1 else self.subject.cut(), None, None)


def forms(options: argparse.Namespace, distilled: bool) -> list[tuple[str, str]]:
    """Return (grid, rule) of every row of a model; fp32 has no rule, and what is distilled is not trained again."""
    rules = [rule for rule in options.rules if rule != "trained" or not distilled]
    return [("fp32", ""), *((grid, rule) for grid in options.grids for rule in rules)]


def models(options: argparse.Namespace, work: Path) -> Iterator[Model]:
    """Yield the models, and the first at the sizes that it is cut to, untrained and distilled."""
    sizes = [(name, folder, 1.0) for name, folder in options.models]
    for name, folder, keep in [*sizes, *((f"{keep:g}", options.models[0][1], keep) for keep in options.keep)]:
        subject = Subject(folder, keep, blocks_of(folder, options, "calibration"), options.tokens, work / name)
        yield Model(name, subject)
        if keep < 1 and "trained" in options.rules:
            yield Model(f"{name} distilled", subject, distilled=True)


def measure(name: tuple[str, str, str], model: Model, options: argparse.Namespace, key: str) -> Row:
    """Train if asked, export and score one row."""
    _, grid, rule = name
    started = time.process_time()
    found = model.subject.trained(rounding(grid)) if rule == "trained" else model.found
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "onnx"
        summary = export_onnx(
            found.folder,
            out,
            settings(grid, "nearest" if rule == "trained" else rule, options.tokens),
            calibration=lambda: model.subject.text,
        )
        seconds = time.process_time() - started
        size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        scored = measure_perplexity(
            OnnxDecoder(out, CPU, options.threads), blocks_of(model.subject.folder, options, "evaluation")
        )
    return Row(
        *name,
        bytes=size,
        loss=scored.loss,
        perplexity=scored.value,
        tokens=scored.tokens,
        seconds=round(seconds, 1),
        calibration_tokens=summary.rounding.tokens if summary.rounding else 0,
        layer_error_removed=summary.rounding.removed if summary.rounding else None,
        key=key,
        lr=found.lr,
        tried=found.divergences,
    )


def rounding(grid: str) -> RoundingSettings:
    """Return what a row is trained for."""
    weights, _, block = grid.partition("-")
    return RoundingSettings.model_validate({"weights": weights, "block": int(block)})


def settings(grid: str, rule: str, tokens: int) -> ExportSettings:
    """Return how a row is exported."""
    if grid == "fp32":
        return ExportSettings(layouts=("optimum",))
    weights, _, block = grid.partition("-")
    how = QuantizeSettings.model_validate({"block": int(block), "rule": rule, "calibration_tokens": tokens})
    return ExportSettings.model_validate({"layouts": ("optimum",), "weights": weights, "quantize": how})


def blocks_of(folder: Path, options: argparse.Namespace, purpose: Any) -> Any:
    """Return the token blocks [n, t] of `calibration` or `evaluation`."""
    paths = options.calibrate if purpose == "calibration" else options.evaluate and [options.evaluate]
    source: Mapping[str, Any] = {"path": tuple(paths)} if paths else {"builtin": "speeches"}
    blocks = options.blocks if purpose == "evaluation" else None
    data = DataSettings(**source, block=options.block, blocks=blocks)
    return load_blocks(tokenizer_of(folder), data, purpose).tokens


def markdown(rows: Sequence[Row], setting: Mapping[str, Any]) -> str:
    """Return the table, a model's rows together."""
    known = {_name(row): row for row in rows}
    lines = [
        "| model | weights | rule | MB | perplexity | excess loss | removed | lr | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact, plain = known.get((row.model, "fp32", "")), known.get((row.model, row.grid, "nearest"))
        excess = f"{row.loss - exact.loss:.4f}" if exact and row.rule else ""
        removed = ""
        if exact and plain and row.rule not in ("", "nearest"):
            removed = f"{1 - (row.loss - exact.loss) / (plain.loss - exact.loss):.0%}"
        cells = (row.model, row.grid, row.rule, f"{row.bytes / 1e6:.1f}", f"{row.perplexity:.5g}", excess, removed)
        rate = f"{row.lr:g}" if row.lr else ""
        lines.append(f"| {' | '.join(cells)} | {rate} | {row.seconds:.0f} |")
    said = f"{rows[0].tokens} tokens of {setting['evaluation']} in windows of {setting['block']}"
    calibrated = f"calibrated with {setting['calibration_tokens']} tokens of {setting['calibration']}"
    tokens = LEARNING.steps * LEARNING.batch_tokens
    learnt = f"trained with {tokens} tokens at the best learning rate of those in `tried` (bits.json)"
    return "\n".join([*lines, "", f"Perplexity over {said}; {calibrated}; {learnt}. Seconds of processor time.", ""])


if __name__ == "__main__":
    main()
