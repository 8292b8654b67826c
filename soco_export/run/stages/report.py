"""Everything a run measured, put together as results.json and written in every form people and programs read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from soco_export.bench.machine import describe_machine
from soco_export.evaluate.figures import DENSE, LOW_RANK, SHIPPED, PerplexityFigures
from soco_export.files.json import read_config
from soco_export.files.names import MODEL_FILE
from soco_export.files.records import folder_bytes
from soco_export.onnx.inspect import cache_bytes
from soco_export.recipe.recipe import Recipe
from soco_export.report.frontier import read_frontier
from soco_export.report.gates import GATES, GateSettings
from soco_export.report.junit import render_junit
from soco_export.report.material import Material, Sample
from soco_export.report.pages.html import render_html
from soco_export.report.pages.markdown import render_comment, render_markdown
from soco_export.report.schema import ModelFigures, PerplexityResults, Results, SizeFigures
from soco_export.run.context import RunContext
from soco_export.run.folder.manifest import digest
from soco_export.run.folder.names import (
    BENCH_FILE,
    CARD_FILE,
    EXPORT_FILE,
    FACTORS_CURVE,
    FRONTIER_FILE,
    PROOF_FILE,
    SCORES_CURVE,
    Format,
)
from soco_export.run.stages.curve import read_curve
from soco_export.run.stages.model_card import model_card, read_summary
from soco_train.bounded import MADE_ANEW, answering, read_json, read_text
from soco_train.plan import left_out
from soco_train.plan.rank_plan import RankPlan
from soco_train.settings.rounding import BITS

FOLDERS = {"hf": "checkpoint", "dense": "dense", "onnx": "onnx", "onnx-dense": "onnx-dense"}
# What can only be measured where an ONNX model was written, and what needs a step after the checkpoint.
ONNX_ONLY = ("latency.", "memory.", "sizes.bytes_ratio")
EXPORT_ONLY = "parity.export."
_NOT_MEASURED = "what was measured is not as a run writes it"


def applicable(recipe: Recipe, format: Format) -> GateSettings:
    """Return the gates that mean something for `format`, with the thresholds of the precision that it is written in.

    Without ONNX nothing is timed, and hf has no export step.
    """
    gates = thresholds(recipe, format)
    off: tuple[str, ...] = {"onnx": (), "dense": ONNX_ONLY, "hf": (*ONNX_ONLY, EXPORT_ONLY)}[format]
    keys = [gate.key for gate in GATES if any(figure.startswith(off) for figure in gate.figures)]
    return gates.model_copy(update={key: None for key in keys})


def thresholds(recipe: Recipe, format: Format) -> GateSettings:
    """Return every gate of the recipe as one number; only ONNX is rounded to `export.weights`, or its cache."""
    weights = _narrowest(recipe) if format == "onnx" else "same"
    return recipe.gates.at(recipe.export.dtype if format == "onnx" else recipe.model.dtype, weights)


def _narrowest(recipe: Recipe) -> str:
    """Return the type whose thresholds are meant: where bytes are the budget any layer may have the narrowest."""
    return recipe.export.rounded_to if recipe.keep_bytes is None else min(BITS, key=lambda weights: BITS[weights])


def collect(context: RunContext) -> Results:
    """Return all figures of the run, not yet judged; DataError for evidence that is not as a run writes it."""
    results: Results = answering(_NOT_MEASURED, _evidence(context), MADE_ANEW, lambda: _collected(context))
    return results.model_copy(update={"notes": (*results.notes, *slower(results))})


def _evidence(context: RunContext) -> str:
    return str(context.path("proof", PROOF_FILE).parent)


def _collected(context: RunContext) -> Results:
    recipe = context.recipe
    proof = _read(context.path("proof", PROOF_FILE))
    bench = _read(context.path("bench", BENCH_FILE)) if context.format == "onnx" else {}
    document = {
        "format": context.format,
        "model": _model(context),
        "recipe": recipe.as_values(),
        "sizes": _sizes(context),
        "parity": proof["parity"],
        "perplexity": _perplexity(context, proof["perplexity"]),
        "tasks": proof["tasks"],
        "forgetting": proof.get("forgetting"),  # a proof of an earlier version has none
        "latency": bench.get("latency"),
        "memory": bench.get("memory"),
        "machine": describe_machine(recipe.validation.threads),
        "placement": proof["placement"],
        "notes": tuple(_notes(context)),
        "provenance": _provenance(context),
    }
    return Results.model_validate(document)


def slower(results: Results) -> Iterator[str]:
    """Yield a note if the export lost to dense by more than noise, and what there is to do."""
    workloads = results.latency.workloads if results.latency else {}
    lost = [f"{name} {work.speedup.value:.2f}×" for name, work in workloads.items() if work.speedup.high < 1]
    if lost:
        known = results.recipe["optimise_for"] == "latency"
        advice = "" if known else "; optimise_for: latency leaves a layer dense where its low-rank form is no faster"
        yield f"slower than dense: {', '.join(lost)}{advice}"


def _model(context: RunContext) -> ModelFigures:
    model = context.recipe.model
    source = model.weights if model.weights != "pretrained" else model.id or (model.path or Path()).resolve().name
    config = read_config(context.path("checkpoint", "hf"))
    return ModelFigures(
        name=context.recipe.name, source=source, architecture=config["architectures"][0], revision=model.revision
    )


def _sizes(context: RunContext) -> SizeFigures:
    from soco_train.store.importances import Importances

    plan = RankPlan.load(context.path("plan", "plan.json"))
    total = Importances.load(context.path("scores", "scores.safetensors")).parameters
    wanted = {"onnx": ("hf", "onnx", "onnx-dense"), "hf": ("hf",), "dense": ("hf", "dense")}[context.format]
    sizes = {name: folder_bytes(context.path(FOLDERS[name], name)) for name in wanted}
    return SizeFigures(
        params_before=total,
        params_after=total - plan.params_before + plan.params_after - plan.dropped,
        selected_before=plan.params_before,
        selected_after=plan.params_after,
        layers=len(plan.layers),
        layers_dense=len(plan.dense_layers),
        keep_params=plan.keep_params,
        storage=plan.storage,
        largest_coefficient=_largest_coefficient(context.path("factors", "factors.safetensors")),
        bytes=sizes,
        cache_bytes={name: cache_bytes(context.path(FOLDERS[name], name)) for name in wanted if "onnx" in name},
        bytes_ratio=sizes["onnx"] / sizes["onnx-dense"] if "onnx-dense" in sizes else None,
        keep_bytes=plan.bytes.keep_bytes if plan.bytes else None,
        file_bytes=_file_bytes(context) if plan.bytes and context.format == "onnx" else None,
    )


def _file_bytes(context: RunContext) -> int:
    folder = context.path(FOLDERS["onnx"], "onnx")
    return sum((folder / name).stat().st_size for name in (MODEL_FILE, f"{MODEL_FILE}.data"))


def _largest_coefficient(factors: Path) -> float | None:
    """Return that of all layers of the file, None if its forms have none; reads a layer at a time."""
    from soco_export.checkpoint.layers import stored_factors

    found = (layer.growth() for layer in stored_factors(factors).values())
    return max((growth for growth in found if growth is not None), default=None)


def _perplexity(context: RunContext, forms: dict[str, Any]) -> PerplexityResults:
    from soco_train.data.corpus import describe_join

    blocks = context.blocks("evaluation")
    join = describe_join(context.recipe.evaluation, "evaluation")
    onnx = PerplexityFigures.from_json(forms[SHIPPED]) if context.format == "onnx" else None
    figures = (PerplexityFigures.from_json(forms[DENSE]), PerplexityFigures.from_json(forms[LOW_RANK]), onnx)
    return PerplexityResults.of(figures, blocks.source, blocks.fingerprint, blocks.tokens.shape[1], join)


def _notes(context: RunContext) -> Iterator[str]:
    """Yield every fallback and every measurement that was left out, with its reason."""
    if context.format == "onnx":
        yield from _export_notes(context)
    yield from distillation_notes(context)
    plan = RankPlan.load(context.path("plan", "plan.json"))
    yield from left_out.notes(plan.params_before, plan.left_out, plan.keep_params)
    if thresholds(context.recipe, context.format) != applicable(context.recipe, context.format):
        yield f"gates on ONNX are not judged: the format is {context.format}"


def distillation_notes(context: RunContext) -> Iterator[str]:
    """Yield what was trained beside the factors, and what it was in for and did not get."""
    from soco_export.checkpoint.layers import stored_factors
    from soco_train.forms.dense import DenseWeight
    from soco_train.forms.registry import forms_of

    if not context.recipe.refine.distill.steps:
        return
    rounding, weights = context.recipe.refine.distill.rounding.weights, context.recipe.export.weights
    trained = forms_of(stored_factors(context.path("factors", "factors.safetensors")))
    dense = sum(isinstance(form, DenseWeight) for form in trained.values())
    if not trained:
        yield "every layer stays dense: there were no factors to distil, and nothing was trained"
        return
    if dense and context.recipe.refine.distill.sizes:
        yield f"{dense} layers are dense at this size, as the product of their distilled factors"
    elif dense:
        yield f"{dense} layers that stay dense were trained as they are once rounded to {rounding}"
    if rounding != "same" and (context.format != "onnx" or weights == "same"):
        yield f"what was trained is meant to be rounded to {rounding}, and here it is not"


def _export_notes(context: RunContext) -> Iterator[str]:
    from soco_export.runtimes.registry import find_runtime
    from soco_train.forms.registry import find_form

    export, weights = _read(context.path("onnx", EXPORT_FILE)), context.recipe.export.weights
    runtime = context.recipe.validation.runtime
    if runtime != "ort":
        yield f"the proof ran the ONNX folder in {runtime} ({find_runtime(runtime, 'validate.runtime').here()})"
    if export["route"] != "builder":
        yield f"the graph was made by {export['route']}: its architecture has no description of ours"
    if context.recipe.keep_bytes is None and (note := find_form(context.recipe.storage).notes.get(weights)):
        yield note
    if note := context.recipe.export.rounding().note:
        yield note
    if rounding := export.get("rounding"):
        yield rounding_note(rounding)
    if not context.recipe.bench.enabled:
        yield "latency was not measured: bench.enabled is false"


def rounding_note(rounding: Mapping[str, Any]) -> str:
    """Return one sentence on calibrated rounding, from the figures of evidence/onnx.json."""
    few = f"; {rounding['few']} layers had fewer than 2 tokens an input" if rounding["few"] else ""
    return (
        f"{rounding['rule']} rounding with {rounding['tokens']} tokens removed {rounding['removed']:.0%} of the error "
        f"that rounding to nearest makes in a layer's output (the median of {len(rounding['layers'])}){few}"
    )


def _provenance(context: RunContext) -> dict[str, Any]:
    manifest, calibration = context.folder.manifest, context.blocks("calibration")
    done = {name: record for name, record in manifest.stages.items() if record.status == "done"}
    return {
        "seed": manifest.seed,
        "model": context.model_hash(),
        "calibration": {"text": calibration.source, "fingerprint": calibration.fingerprint},
        "started": manifest.process.started,
        "seconds": {name: record.seconds for name, record in done.items()},
        "made": {name: digest(record) for name, record in done.items() if name != "report"},
    }


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, MADE_ANEW)


def write_reports(results: Results, context: RunContext, out: Path) -> None:
    """Write results.json, report.md, report.html, comment.md, junit.xml and the model card."""
    (out / "hf").mkdir(exist_ok=True)
    summary, material = read_material(context)
    results.save(out / "results.json")
    for name, text in {
        "report.md": render_markdown(results, material),
        "report.html": render_html(results, material),
        "comment.md": render_comment(results),
        "junit.xml": render_junit(results, material.command),
        "hf/README.md": model_card(results.recipe, summary, results),
    }.items():
        (out / name).write_text(text, encoding="utf-8")


def read_material(context: RunContext) -> tuple[str, Material]:
    """Return the card's summary and what the reports show beside figures; DataError for what no run writes so."""
    summary = read_text(context.path("checkpoint", CARD_FILE), MADE_ANEW)
    read_summary(summary)
    return summary, answering(_NOT_MEASURED, _evidence(context), MADE_ANEW, lambda: gather(context))


def gather(context: RunContext) -> Material:
    """Return what the reports show beside the figures; a run made before curves were kept has none."""
    distilled = "sizes" if context.recipe.refine.distill.sizes else "factors"
    curves = [context.path("scores", SCORES_CURVE), context.path(distilled, FACTORS_CURVE)]
    samples = _read(context.path("proof", PROOF_FILE)).get("samples", [])
    swept = context.folder.root / FRONTIER_FILE
    return Material(
        layers=RankPlan.load(context.path("plan", "plan.json")).layers,
        curves=[row for path in curves if path.exists() for row in read_curve(path)],
        samples=[Sample(**sample) for sample in samples],
        command=context.folder.manifest.command,
        frontier=read_frontier(swept) if swept.exists() else (),
    )
