"""The stages of a run as data, and the short functions that do their work.

    spectrum → scores → plan → factors → checkpoint → onnx ┐
                                                 onnx-dense ┴→ (evidence.py) parity, perplexity, latency → report

Every function reads through the context and writes into the folder it is given; the pipeline decides whether it runs
and moves what it wrote into place.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from soco_export.run.context import RunContext
from soco_export.run.names import CARD_FILE, EXPORT_FILE, Format
from soco_export.run.pipeline import Stage
from soco_train import parallel
from soco_train.artifacts import Scores, SpectrumStore

PLAN_KEYS = ("keep_params", "storage", "allocation", "multiple")
BASIS_KEYS = ("layers", "train.basis", "train.ridge", "train.statistics_blocks")


def make_spectrum(context: RunContext, out: Path) -> None:
    """Collect calibration statistics and decompose every participating weight; layers already done are kept."""
    from soco_train.spectrum import decompose_model

    store = SpectrumStore(out / "spectrum")
    linears = {name: linear for name, linear in context.linears().items() if name not in store}
    tokens = context.blocks("calibration").tokens
    decompose_model(context.model(), linears, tokens, context.recipe.train, store, context.notify)


def learn_scores(context: RunContext, out: Path) -> None:
    """Give every component its importance with the scorer of the recipe; goes on from its own checkpoint in `out`."""
    from soco_export.lowrank import count_parameters
    from soco_train.scorers import ScoringTask, train_scores

    calibration = context.blocks("calibration")
    task = ScoringTask(
        model=context.model(),
        linears=context.linears(),
        spectra=SpectrumStore(context.path("spectrum", "spectrum")),
        tokens=calibration.tokens,
        train=context.recipe.train,
        plan=context.recipe.plan,
        workdir=out / "work",
        notify=context.notify,
        data_fingerprint=f"{calibration.fingerprint} {context.model_hash()}",
    )
    found = train_scores(task)
    if not parallel.leading():
        return
    origin = {
        "model": context.recipe.name,
        "parameters": count_parameters(task.model),
        "calibration": calibration.source,
    }
    Scores(found.layers, {**found.provenance, **origin}).save(out / "scores.safetensors")


def cut_plan(context: RunContext, out: Path) -> None:
    """Turn the scores into one rank per layer at the recipe's size."""
    from soco_export.run.planning import plan_for

    scores = Scores.load(context.path("scores", "scores.safetensors"))
    plan = plan_for(context.recipe, scores, context.folder.root, context.notify)
    (out / "plan.json").write_text(plan.to_json(), encoding="utf-8")


def make_factors(context: RunContext, out: Path) -> None:
    """Cut the factors of the planned ranks, refine them as the recipe asks, store them in its form."""
    from soco_train.budget import RankPlan
    from soco_train.refine import RefineTask, refine

    plan = RankPlan.from_json(context.path("plan", "plan.json").read_text(encoding="utf-8"))
    scores = Scores.load(context.path("scores", "scores.safetensors"))
    calibration = context.blocks("calibration")
    task = RefineTask(
        model=context.model(),
        linears=context.linears(),
        spectra=SpectrumStore(context.path("spectrum", "spectrum")),
        tokens=calibration.tokens,
        settings=context.recipe.refine,
        workdir=out / "work",
        notify=context.notify,
        seed=context.recipe.train.seed,
        fingerprint=out.name,
    )
    provenance = {
        "keep_params": plan.keep_params,
        "calibration": calibration.fingerprint,
        "scores": dict(scores.provenance),
    }
    factors = refine(task, scores, plan, provenance)
    if parallel.leading():
        factors.save(out / "factors.safetensors")


def write_checkpoint(context: RunContext, out: Path) -> None:
    """Write the model with the factors in it as a Hugging Face folder, a tensor at a time."""
    import torch

    from soco_export.checkpoint.stream import stream_checkpoint
    from soco_export.lowrank import apply_factors, count_parameters, stored_factors
    from soco_export.run.card import model_card, summary_json

    dtype = getattr(torch, context.recipe.model.dtype)
    model = context.take_stored_model()
    before = count_parameters(model)
    layers = stored_factors(context.path("factors", "factors.safetensors"))
    apply_factors(model, layers, dtype, "meta")
    summary = summary_json(context.recipe, model, before)
    card = model_card(context.recipe, summary)
    stream_checkpoint(model, layers, dtype, context.tokenizer(), out / "hf", card)
    write_evidence(out / CARD_FILE, summary)


def write_dense(context: RunContext, out: Path) -> None:
    """Write the pruned model with every product formed, for programs that know nothing of low rank."""
    from soco_export.checkpoint import load_checkpoint, save_dense

    save_dense(load_checkpoint(context.path("checkpoint", "hf")), context.tokenizer(), out / "dense")


def write_onnx(context: RunContext, out: Path) -> None:
    """Export the checkpoint."""
    from soco_export.onnx.export import export_onnx

    summary = export_onnx(context.path("checkpoint", "hf"), out / "onnx", context.recipe.export, context.notify)
    write_evidence(out / EXPORT_FILE, json.dumps(asdict(summary) | {"folder": "onnx"}, indent=2, default=str) + "\n")


def write_dense_onnx(context: RunContext, out: Path) -> None:
    """Export the model as it was before, by the same route: what the pruned graph is measured against."""
    from soco_export.checkpoint import save_dense
    from soco_export.models import fetch_folder
    from soco_export.onnx.export import export_onnx

    if context.recipe.model.weights == "random":
        source = out / "model"
        save_dense(context.take_stored_model(), context.tokenizer(), source)
    else:
        source = fetch_folder(context.recipe)
    export_onnx(source, out / "onnx-dense", context.recipe.export, context.notify)


def write_evidence(path: Path, text: str) -> None:
    """Write a JSON text under evidence/."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


SPECTRUM = Stage("spectrum", ("model", "calibration"), BASIS_KEYS, ("spectrum",), make_spectrum, cache=True)
SCORES = Stage(
    "scores",
    ("model", "calibration", "spectrum"),
    ("layers", "train", *PLAN_KEYS),
    ("scores.safetensors",),
    learn_scores,
    shared=True,
)
PLAN = Stage("plan", ("scores",), (*PLAN_KEYS, "optimise_for", "latency", "export"), ("plan.json",), cut_plan)
FACTORS = Stage(
    "factors",
    ("model", "calibration", "spectrum", "scores", "plan"),
    ("refine", "train.seed"),
    ("factors.safetensors",),
    make_factors,
    shared=True,
)
CHECKPOINT = Stage("checkpoint", ("model", "factors"), ("model.dtype",), ("hf", CARD_FILE), write_checkpoint)
DENSE = Stage("dense", ("checkpoint",), (), ("dense",), write_dense)
ONNX = Stage("onnx", ("checkpoint",), ("export",), ("onnx", EXPORT_FILE), write_onnx)
DENSE_ONNX = Stage("onnx-dense", ("model",), ("export",), ("onnx-dense",), write_dense_onnx)

TRAINING = (SPECTRUM, SCORES)
ARTEFACTS: dict[Format, tuple[Stage[RunContext], ...]] = {
    "hf": (PLAN, FACTORS, CHECKPOINT),
    "dense": (PLAN, FACTORS, CHECKPOINT, DENSE),
    "onnx": (PLAN, FACTORS, CHECKPOINT, ONNX, DENSE_ONNX),
}
