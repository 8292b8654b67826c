"""Verbs on folders that are no run: export a Hugging Face folder, prove or time one folder against another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soco_export.bench.figures import LatencyFigures
from soco_export.bench.stats import render_percentile
from soco_export.evaluate.figures import PerplexityFigures
from soco_export.evaluate.paired import perplexity_ratio
from soco_export.files.json import context_length, read_config
from soco_export.files.records import check_apart
from soco_export.files.replacing import check_replaceable
from soco_export.files.text import aligned, one_line
from soco_export.files.wrapped import left_behind
from soco_export.recipe.difference import flatten
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.report.gates import GATES, GateSettings, Verdict, judge
from soco_export.report.rendering import ratio, ratio_text
from soco_export.report.words import verdict_terminal
from soco_export.run.context import quiet_transformers
from soco_export.run.fitting import evaluation_text, fit_to_context, folder_tokenizer
from soco_export.run.request import Outcome, Request
from soco_export.runtimes.open import check_holds_model, is_onnx, open_decoder
from soco_train.errors import ExitCode, RecipeError
from soco_train.events import Notify

if TYPE_CHECKING:
    import torch

    from soco_train.data.corpus import Blocks


def export_folder(request: Request, folder: Path, notify: Notify) -> Outcome:
    """Write a Hugging Face folder, dense or low rank, as ONNX (proven against the folder) or in merged dense form."""
    recipe = load_recipe(request.recipe or "base", request.overrides)
    out = request.out or folder.absolute().with_name(f"{folder.resolve().name}-{request.format}")
    if request.format == "hf" or not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(
            f"{folder} is no run" + (", and a Hugging Face folder already" if request.format == "hf" else ""),
            fix="give a run folder, or a Hugging Face folder with --format onnx or dense",
            where=str(folder),
        )
    _check_out(out, folder, request.fresh)
    quiet_transformers()
    notes = left_behind(read_config(folder))
    if request.format == "dense":
        _write_dense(recipe, folder, out)
        return Outcome({"folder": str(out), "notes": notes}, "\n".join([str(out), *notes]))
    from soco_export.export import export_onnx

    recipe, fitted = fit_to_context(recipe, folder)
    notes = [*notes, *fitted]
    text = evaluation_text(recipe, folder)  # what is wrong with it is said before anything is written
    trusted = recipe.model.trust_remote_code
    calibration = partial(_calibration, recipe, folder)
    summary = export_onnx(folder, out, recipe.export, notify, calibration, trust_remote_code=trusted)
    proof = _prove(recipe, text, (folder, out), notes, notify)
    document = {"folder": str(out), "route": summary.route, "bytes": summary.bytes, "notes": notes, **proof.document}
    if summary.rounding:
        document["rounding"] = asdict(summary.rounding)
    return Outcome(document, f"{out}\n{proof.text}", proof.code)


def _calibration(recipe: Recipe, folder: Path) -> torch.Tensor:
    from soco_train.data.corpus import load_blocks

    return load_blocks(folder_tokenizer(recipe, folder), recipe.data, "calibration").tokens


def _check_out(out: Path, folder: Path, fresh: bool) -> None:
    """Raise RecipeError unless `out` is free, or holds an earlier export and is to be replaced; reads only."""
    check_apart(out, [folder])
    if out.is_dir() and any(out.iterdir()) and not fresh:
        raise RecipeError(
            f"{out} holds something already",
            fix="give another --out, or --fresh to replace an earlier export there",
            where="--out",
        )
    check_replaceable(out)


def _write_dense(recipe: Recipe, folder: Path, out: Path) -> None:
    from soco_export.checkpoint.load import load_checkpoint
    from soco_export.checkpoint.writer import save_dense

    tokenizer = folder_tokenizer(recipe, folder)  # what is wrong with it is said before weights are read
    save_dense(load_checkpoint(folder, trust_remote_code=recipe.model.trust_remote_code), tokenizer, out)


def prove_folders(recipe: Recipe, reference: Path, candidate: Path, notify: Notify) -> Outcome:
    """Measure parity and perplexity of `candidate` against `reference`, and judge them by the gates of that step.

    ONNX beside a checkpoint is its export, held to be the same; two of a kind are a model and what became of it.
    """
    for folder in (reference, candidate):
        check_holds_model(folder)
    quiet_transformers()
    for folder in (reference, candidate):
        _check_opens(recipe, folder)
    recipe, notes = fit_to_context(recipe, reference)
    return _prove(recipe, evaluation_text(recipe, reference), (reference, candidate), notes, notify)


def _prove(
    recipe: Recipe, text: tuple[Any, Blocks], pair: tuple[Path, Path], notes: Sequence[str], notify: Notify
) -> Outcome:
    """Measure a `pair` of reference and candidate on a `text` that was fitted to them; `notes` are told with it."""
    from soco_export.evaluate.figures import DENSE, LOW_RANK, SHIPPED
    from soco_export.evaluate.prove import Questions, prove

    (tokenizer, blocks), (reference, candidate) = text, pair
    exported = is_onnx(candidate) and not is_onnx(reference)
    step, forms = ("export", (LOW_RANK, SHIPPED)) if exported else ("compression", (DENSE, LOW_RANK))
    with tempfile.TemporaryDirectory() as work:
        longest = context_length(read_config(reference)) if recipe.validation.tasks else None
        questions = Questions(recipe.validation, blocks, tokenizer, Path(work), notify, longest)
        folders = dict(zip(forms, pair, strict=True))
        trusted = recipe.model.trust_remote_code
        openers = {form: partial(open_decoder, folders[form], recipe.validation, form, trusted) for form in forms}
        proof = prove(openers, questions)
    figures = [PerplexityFigures.from_json(proof["perplexity"][form]) for form in forms]
    ratio, interval = perplexity_ratio(*figures)
    perplexity = {
        "text": blocks.source,
        "fingerprint": blocks.fingerprint,
        "reference": asdict(figures[0]),
        "candidate": asdict(figures[1]),
        "ratio": ratio,
        "ratio_interval": interval,
    }
    measured = {"parity": {step: proof["parity"][step]}, "perplexity": perplexity, "forgetting": proof["forgetting"]}
    gates = recipe.gates.at(recipe.export.dtype, recipe.export.rounded_to)
    verdicts = judge(flatten(measured), _measurable(gates, (f"parity.{step}.", "perplexity.", "forgetting.")))
    return _proof_outcome(measured, step, verdicts, notes)


def _check_opens(recipe: Recipe, folder: Path) -> None:
    """Raise what opening `folder` would, as far as its small files tell: before the other one is measured."""
    from soco_export.files.safetensors import open_shards, weight_files
    from soco_export.onnx.describe.config import resolve_config

    if not is_onnx(folder):
        resolve_config(folder, recipe.model.trust_remote_code)
        open_shards(weight_files(folder))


def _measurable(gates: GateSettings, wanted: tuple[str, ...]) -> GateSettings:
    """Return the gates on figures whose names begin as `wanted`; the others need a run."""
    off = [gate.key for gate in GATES if not all(figure.startswith(wanted) for figure in gate.figures)]
    return gates.model_copy(update={key: None for key in off})


def _proof_outcome(
    measured: Mapping[str, Any], step: str, verdicts: tuple[Verdict, ...], notes: Sequence[str]
) -> Outcome:
    parity, perplexity = measured["parity"][step], measured["perplexity"]
    rows = [
        (
            part,
            f"{parity[part]['mean_kl']:.3g}",
            f"{parity[part]['token_agreement']:.1%}",
            f"{parity[part]['max_logit_difference']:.3g}",
        )
        for part in ("prefill", "decode")
    ]
    values = f"{perplexity['reference']['value']:.4g} → {perplexity['candidate']['value']:.4g}"
    lines = [
        *notes,
        *aligned((step, "mean KL", "same token", "max logit difference"), rows),
        f"perplexity: {values} ({ratio_text(perplexity['ratio'], perplexity['ratio_interval'], 4)}, "
        f"{one_line(perplexity['text'])}, {len(perplexity['reference']['blocks'])} windows)",
    ]
    return _judged(measured, lines, verdicts)


def _judged(measured: Mapping[str, Any], lines: Sequence[str], verdicts: tuple[Verdict, ...]) -> Outcome:
    """Return what was measured and found, with the judgements and the exit code they give."""
    failed = any(verdict.state == "failed" for verdict in verdicts)
    document = {**measured, "verdicts": [asdict(verdict) for verdict in verdicts]}
    text = "\n".join([*lines, *map(verdict_terminal, verdicts)])
    undecided = tuple(f"{verdict.name}: {verdict.message}" for verdict in verdicts if verdict.inconclusive)
    return Outcome(document, text, ExitCode.GATE if failed else ExitCode.OK, undecided)


def bench_folders(recipe: Recipe, reference: Path, candidate: Path, notify: Notify) -> Outcome:
    """Time two ONNX folders in turns and judge the gates on speed; the speed-up is reference / candidate."""
    for folder in (reference, candidate):
        if not is_onnx(folder):
            raise RecipeError(f"{folder} holds no model.onnx", fix="export it first", where=str(folder))
    from soco_export.bench.runner import measure_latency

    settings = recipe.validation
    figures = measure_latency(reference, candidate, recipe.bench, settings.provider, settings.threads, notify)
    measured = {"latency": asdict(figures)}
    verdicts = judge(flatten(measured), _measurable(recipe.gates, ("latency.",)))
    return _judged(measured, _latency_lines(figures), verdicts)


def _latency_lines(figures: LatencyFigures) -> list[str]:
    rows = []
    for name, work in figures.workloads.items():
        one, two, speed = work.dense, work.compressed, work.speedup
        times = (render_percentile(value, n) for value, n in ((one.p50, one.n), (two.p50, two.n), (two.p95, two.n)))
        rows.append((name, *times, ratio(speed), ratio(work.control) if work.control else "not timed"))
    lines = aligned(("", "reference p50", "p50", "p95", "speed-up", "reference / itself"), rows)
    return [*lines, *(f"{name} was skipped: {reason}" for name, reason in figures.skipped.items())]
