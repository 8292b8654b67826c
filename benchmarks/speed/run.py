"""The benchmark's command line; resumable series by series.

    python -m benchmarks.speed                                   everything that this environment can run
    python -m benchmarks.speed --model smollm2 --weights int4    a part of it
    python -m benchmarks.speed --optimum-python .venv-optimum/bin/python
    python -m benchmarks.speed --table                           the page again from the series at hand

All models of a series are open at once and take turns; only ratios inside one such series mean anything. Models have
random weights (benchmarks/speed/models.py), contrib operators with one buffer for past and present, and logits of the
last token. `planned` rows are of the measured plan: dense wherever low rank was timed to be no faster. The others have
one share of every layer, their ranks rounded down to multiples of 32, which is less than was asked for where layers are
narrow.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.speed import others
from benchmarks.speed.models import (
    PLANNED,
    architecture_of,
    forms_of,
    linear_shapes,
    measured_plan,
    uniform_plan,
    write_model,
)
from benchmarks.speed.series import Entry, measure
from benchmarks.speed.table import markdown
from soco_export.bench.device import Device
from soco_export.bench.layer_times import Profile
from soco_export.bench.machine import describe_machine
from soco_export.bench.roofline import measure_bandwidth
from soco_export.evaluate.settings import CPU
from soco_export.files.atomic import write_atomic
from soco_export.onnx.settings import ExportSettings
from soco_export.run.plans.measured_plan import read_or_measure
from soco_train.errors import RecipeError
from soco_train.events import silent
from soco_train.plan.rank_plan import RankPlan
from soco_train.settings.plan import Storage

RESULTS = Path(__file__).parent / "results"
WEIGHTS = {"fp32": "same", "int8": "int8", "int4": "int4"}
KEEPS = (0.8, 0.6)
FORMS: tuple[Storage, ...] = ("stacked", "pivoted")
MULTIPLE = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the page."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, piece in pieces(options):
        path = options.out / f"{name}.json"
        if (path.exists() and not options.fresh) or options.table:
            continue
        started = time.monotonic()
        entries = piece()
        document = {
            "command": f"python -m benchmarks.speed {_asked(name, options)}",
            "machine": asdict(describe_machine(options.threads)),
            "bandwidth": measure_bandwidth(options.threads),
            "entries": [asdict(entry) for entry in entries],
        }
        write_atomic(path, json.dumps(document, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        print(markdown(name, document["entries"], document["bandwidth"]), flush=True)
    write_atomic(options.out / "results.md", page(options.out))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    parser.add_argument("--model", nargs="+", choices=PLANNED, default=list(PLANNED))
    parser.add_argument("--weights", nargs="*", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="for one workload of one series")
    parser.add_argument("--pack", action="store_true", help="q/k/v and gate/up share their first product, dense too")
    parser.add_argument("--bias", action="store_true", help="every pruned layer has one, as train.deviation leaves it")
    parser.add_argument("--others", action="store_true", help="PyTorch, optimum-onnx, genai and llama.cpp beside ours")
    parser.add_argument("--optimum-python", type=Path, help="interpreter of an environment with soco-export[optimum]")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-onnx"))
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--table", action="store_true", help="only write the page")
    return parser.parse_args(argv)


def pieces(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[Entry]]]]:
    """Yield every series that was asked for: its name and how it is measured."""
    kind = ("-packed" if options.pack else "") + ("-biased" if options.bias else "")
    for model in options.model:
        for weights in options.weights:
            yield f"{model}-{weights}{kind}", lambda m=model, w=weights: floor_series(m, w, options)
    for weights in ("fp32", "int4") if options.others else ():
        yield (
            f"others-smollm2-{weights}",
            lambda w=WEIGHTS[weights]: others.series(w, options.work, options.optimum_python, options.threads),
        )


def _asked(name: str, options: argparse.Namespace) -> str:
    """Return the arguments that measure this one series; where files lie is nobody else's business."""
    if name.startswith("others"):
        return "--weights --others" + (" --optimum-python PYTHON" if options.optimum_python else "")
    model, weights, *_ = name.split("-")
    more = (" --pack" if options.pack else "") + (" --bias" if options.bias else "")
    return f"--model {model} --weights {weights} --seconds {options.seconds:g}{more}"


def floor_series(model: str, weights: str, options: argparse.Namespace) -> list[Entry]:
    """Measure dense against every size and form of one model in one weight type."""
    work = options.work / f"{model}-{weights}"
    shutil.rmtree(work, ignore_errors=True)
    architecture = architecture_of(model, work / "dense")
    profile = _profile(model, weights, set(linear_shapes(architecture).values()), options)
    forms = {"dense": {}}
    for keep in KEEPS:
        for form in FORMS:
            plan = uniform_plan(architecture, keep, form, MULTIPLE)
            forms[row_name(keep, form, plan)] = forms_of(plan)
            try:
                plan = measured_plan(architecture, keep, profile, form)
                forms[row_name(keep, f"{form}, planned", plan)] = forms_of(plan)
            except RecipeError as error:
                print(f"{model} {weights} keep {keep:g} {form}: no measured plan; {error.fix}", file=sys.stderr)
    folders = {}
    for index, (name, kinds) in enumerate(forms.items()):
        folders[name] = work / f"{index}"
        folders[name].mkdir()
        shutil.copyfile(work / "dense" / "config.json", folders[name] / "config.json")
        settings = ExportSettings(weights=WEIGHTS[weights], pack=options.pack)
        write_model(architecture, kinds, folders[name], settings, options.bias)
    try:
        return measure(folders, {}, options.threads, options.seconds)
    finally:
        shutil.rmtree(work)


def row_name(keep: float, form: str, plan: RankPlan) -> str:
    """Return what was asked for, what rounded ranks keep of it, and how many layers the plan left dense."""
    dense = f", {len(plan.dense_layers)} of {len(plan.layers)} dense" if plan.dense_layers else ""
    return f"{keep:g} {form} ({plan.ratio:.2f} kept{dense})"


def _profile(model: str, weights: str, shapes: set[tuple[int, int]], options: argparse.Namespace) -> Profile:
    """Return the measured times of the model's layers, kept beside the results."""
    device = Device(CPU, options.threads, ExportSettings(weights=WEIGHTS[weights]), bias=options.bias)
    biased = "-biased" if options.bias else ""
    path = options.out / f"profile-{model}-{weights}{biased}.json"
    if options.fresh and not options.pack:  # packing is not seen by one layer: the series share the profile
        path.unlink(missing_ok=True)
    read_or_measure(path, shapes, "stacked", device, silent)
    return read_or_measure(path, shapes, "pivoted", device, silent)  # of both: each adds to the file


def page(folder: Path) -> str:
    """Return the page of all series in `folder`."""
    parts = ["# Low rank against dense in ONNX Runtime\n"]
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("profile-"):
            continue
        found = json.loads(path.read_text())
        machine = found["machine"]
        parts.append(markdown(path.stem, found["entries"], found["bandwidth"]))
        rounds = "".join(f"{work} {count} rounds, " for work, count in found["entries"][0].get("rounds", {}).items())
        parts.append(
            f"`{found['command'].strip()}` on {machine['cores']} cores of {machine['cpu']}, ONNX Runtime "
            f"{machine['versions'].get('onnxruntime', '')}, {machine['threads']} threads, "
            f"{rounds}{found['bandwidth'] / 2**30:.1f} GiB/s\n"
        )
    return "\n".join(parts)
