"""The verbs, one function each: what the command line calls, and what Python may call instead.

    from soco_export.run.verbs import Request, train_and_export
    outcome = train_and_export(Request(model="tiny", keep_params=0.7))

Each takes the common flags as a Request and `notify` for progress, and returns an Outcome; what is the user's or the
machine's fault is raised as a SocoError.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from soco_export.recipe.difference import differences
from soco_export.recipe.load import list_overlays, list_recipes, load_recipe, lock, read_overlay
from soco_export.recipe.merge import overridden
from soco_export.recipe.yaml import write_yaml
from soco_export.run.folder.allowed import read_lock
from soco_export.run.folder.names import LOCK
from soco_export.run.request import (
    Outcome,
    Request,
    check_no_model,
    check_profile_kept,
    find_run,
    parse_byte_sizes,
    parse_sizes,
)
from soco_train.errors import ExitCode, RecipeError
from soco_train.events import Notify, silent


def train_and_export(request: Request, notify: Notify = silent) -> Outcome:
    """Do everything into one run folder: train, prune, export, prove, judge."""
    from soco_export.run.on_run import whole_road

    return whole_road(request, notify)


def train(request: Request, notify: Notify = silent) -> Outcome:
    """Learn the scores and stop."""
    from soco_export.run.on_run import training

    return training(request, notify)


def plan(
    request: Request,
    run: Path | None = None,
    sizes: str | None = None,
    byte_sizes: str | None = None,
    notify: Notify = silent,
) -> Outcome:
    """Show what `run` gives at each of `sizes` ("0.9,0.8") or `byte_sizes` ("90MB,70MB"); see `request.out`.

    `request.out` receives plan files. Sizes in bytes need a run that was planned so before.
    """
    root = find_run(run, request)
    trained = read_lock(root)
    recipe = trained.override(request.overrides)
    check_profile_kept(recipe)

    from soco_export.run.another_size import check_recut
    from soco_export.run.plan_table import plan_byte_sizes, plan_sizes, scores_of

    check_recut(differences(trained, recipe))
    scores = scores_of(root)
    if byte_sizes is not None or (sizes is None and recipe.keep_bytes is not None):
        from soco_export.run.another_size import check_priced, priced_in

        priced = priced_in(root)
        check_priced(priced, read_lock(priced), recipe)
        wanted_bytes = parse_byte_sizes(byte_sizes, recipe.keep_bytes)
        return plan_byte_sizes(priced, scores, recipe, wanted_bytes, request.out)
    return plan_sizes(root, scores, recipe, parse_sizes(sizes, recipe.keep_params), request.out, notify)


def export(request: Request, folder: Path, notify: Notify = silent) -> Outcome:
    """Write a run or a Hugging Face folder in `request.format`, or a run at another size."""
    if (folder / LOCK).is_file():
        from soco_export.run.another_size import from_run

        return from_run(request, folder, notify)
    from soco_export.run.on_folder import export_folder

    check_no_model(request)
    return export_folder(request, folder, notify)


def sweep(
    request: Request,
    run: Path,
    sizes: str | None = None,
    weights: str | None = None,
    notify: Notify = silent,
) -> Outcome:
    """Make and measure `run` at each of `sizes` ("0.9,0.8") in each type of `weights` ("same,int8"), one training."""
    from soco_export.run.sweep import sweep_run

    return sweep_run(request, run, sizes, weights, notify)


def choose(
    request: Request,
    run: Path,
    prefer: Literal["quality", "bytes", "speed"] = "quality",
    notify: Notify = silent,
    **limits: Any,
) -> Outcome:
    """Pick the point of the sweep of `run` that is best in what is preferred among those within every limit.

    limits: `max_bytes` ("90MB"), `max_ppl_ratio`, `min_recovery`, `max_decode_ms`.
    """
    from soco_export.run.choice import choose_point, parse_limits

    return choose_point(run, parse_limits(**limits), prefer)


def validate(request: Request, folder: Path, against: Path | None = None, notify: Notify = silent) -> Outcome:
    """Measure parity and perplexity of a run, or of `folder` against another one, and judge them."""
    if against is None:
        from soco_export.run.on_run import again

        return again(request, folder, "proof", notify)
    from soco_export.run.on_folder import prove_folders

    check_no_model(request)
    return prove_folders(load_recipe(request.recipe or "base", request.overrides), against, folder, notify)


def bench(request: Request, folder: Path, against: Path | None = None, notify: Notify = silent) -> Outcome:
    """Measure latency and memory of a run, or of one ONNX folder against another."""
    if against is None:
        from soco_export.run.on_run import again

        return again(request, folder, "bench", notify)
    from soco_export.run.on_folder import bench_folders

    check_no_model(request)
    return bench_folders(load_recipe(request.recipe or "base", request.overrides), against, folder, notify)


def compare(request: Request, one: Path, two: Path, notify: Notify = silent) -> Outcome:
    """Compare two results.json (or the runs that hold them)."""
    from soco_export.report.compare import compare_results, render_comparison
    from soco_export.run.folder.results import load_results

    comparison = compare_results(load_results(one), load_results(two))
    names = (one.name, two.name) if one.name != two.name else ("first", "second")
    return Outcome(comparison.document(), render_comparison(comparison, names).rstrip("\n"))


def report(request: Request, run: Path | None = None, notify: Notify = silent) -> Outcome:
    """Judge a run's results.json again by its recipe's gates, and write every report anew."""
    from soco_export.run.on_run import report_again

    return report_again(request, find_run(run, request), notify)


def gate(
    request: Request,
    run: Path,
    baseline: Path | None = None,
    tolerances: list[str] | None = None,
    notify: Notify = silent,
) -> Outcome:
    """Judge a finished run by its gates and, with `baseline`, by what may be worse than in that results.json."""
    from soco_export.run.against import gate_run

    return gate_run(run, baseline, tolerances)


def repair(request: Request, run: Path, notify: Notify = silent) -> Outcome:
    """Make the lost manifest or lock of a run again from what its other files say; see run/repair.py."""
    from soco_export.run.repair import repair_run

    return repair_run(request, run, notify)


def pack(request: Request, folder: Path, notify: Notify = silent) -> Outcome:
    """Write an exported folder as one compressed file for download."""
    from soco_export.files.pack import default_archive, pack_folder

    out = request.out or default_archive(folder)
    contents = pack_folder(folder, out, notify)
    before, after = sum(size for size, _ in contents.values()), out.stat().st_size
    share = f" ({after / before:.1%})" if before else ""
    text = f"{out}\n{len(contents)} files · {before:,} → {after:,} bytes{share}"
    return Outcome({"file": str(out), "files": len(contents), "bytes": before, "packed_bytes": after}, text)


def unpack(request: Request, archive: Path, notify: Notify = silent) -> Outcome:
    """Write the folder that `pack` was given, bit for bit."""
    from soco_export.files.pack import default_folder, unpack_file

    out = request.out or default_folder(archive)
    contents = unpack_file(archive, out, notify)
    size = sum(size for size, _ in contents.values())
    return Outcome(
        {"folder": str(out), "files": len(contents), "bytes": size}, f"{out}\n{len(contents)} files · {size:,} bytes"
    )


def recipes_list(request: Request, methods: bool = False, notify: Notify = silent) -> Outcome:
    """List the package's recipes with their descriptions; with `methods` those that are laid over a model's own."""
    if methods:
        found = {name: read_overlay(name).get("description", "") for name in list_overlays() if "methods/" in name}
    else:
        found = {name: load_recipe(name).description for name in list_recipes()}
    width = max(map(len, found))
    return Outcome({"recipes": found}, "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in found.items()))


def recipes_show(request: Request, name: str, notify: Notify = silent) -> Outcome:
    """Show a recipe with everything resolved; of an overlay what it sets, since the rest is the model's."""
    if name in list_overlays():
        values = overridden(read_overlay(name), request.overrides)[0]
        return Outcome(values, f"# Lay it over a model: --recipe {name}\n{write_yaml(values)}".rstrip("\n"))
    recipe = load_recipe(name, request.overrides)
    return Outcome(recipe.as_values(), lock(recipe).rstrip("\n"))


def recipes_check(request: Request, names: Sequence[str] | None = None, notify: Notify = silent) -> Outcome:
    """Read recipes (default: all of the package) and say what is wrong with each."""
    problems: dict[str, str] = {}
    for name in names or list_recipes():
        try:
            load_recipe(name)
            problems[name] = ""
        except RecipeError as error:
            problems[name] = str(error)
    text = "\n".join(f"{name}: {problem or 'ok'}" for name, problem in problems.items())
    return Outcome({"recipes": problems}, text, ExitCode.USAGE if any(problems.values()) else ExitCode.OK)


def doctor(request: Request, notify: Notify = silent) -> Outcome:
    """Examine the machine."""
    from soco_export.preflight import doctor
    from soco_export.run.request import RUNS

    findings = doctor.examine(RUNS)
    broken = any(finding.level == "problem" for finding in findings)
    return Outcome(doctor.document(findings), doctor.text(findings), ExitCode.MACHINE if broken else ExitCode.OK)
