"""The stages that write what ships, from the scores on, as data, with the functions that do their work.

    (training.py) spectrum → scores → plan → factors → checkpoint → onnx ┐
                                                               onnx-dense ┴→ (evidence.py) parity, perplexity, latency

Every function reads through the context and writes into the folder it is given; the pipeline decides whether it runs
and moves what it wrote into place.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from soco_export.recipe.recipe import Recipe
from soco_export.run.context import RunContext
from soco_export.run.folder.allowed import EVIDENCE_SECTIONS
from soco_export.run.folder.names import CARD_FILE, DAMAGE, EXPORT_FILE, FACTORS_CURVE, KEPT_CURVE, SIZES_FILE, Format
from soco_export.run.pipeline import Stage
from soco_export.run.stages.curve import recording
from soco_export.run.stages.training import PLAN_KEYS
from soco_train import parallel
from soco_train.bounded import MADE_ANEW, read_json

if TYPE_CHECKING:
    from soco_export.onnx.settings import ExportSettings
    from soco_train.plan.rank_plan import RankPlan
    from soco_train.settings.refine import RefineSettings


def cut_plan(context: RunContext, out: Path) -> None:
    """Turn the scores into one rank per layer at the recipe's size."""
    from soco_export.run.plans.measured_plan import plan_for
    from soco_train.store.importances import Importances

    scores = Importances.load(context.path("scores", "scores.safetensors"))
    plan = plan_for(context.recipe, scores, context.folder.root, context.notify)
    (out / "plan.json").write_text(plan.to_json(), encoding="utf-8")


def price_layers(context: RunContext, out: Path) -> None:
    """Measure what each layer loses in each size and type: the price list that plans for any number of bytes share."""
    from soco_export.model.file_bytes import BLOCK_SIZES
    from soco_export.run.plans.measured_bytes import hold_out
    from soco_train.scores.damage import RoundedInBlocks, measure_damage
    from soco_train.store.scores import Scores

    subject = context.subject(context.path("spectrum", "spectrum"))
    scores = Scores.load(context.path("scores", "scores.safetensors"))
    quantize = _as_left(context.recipe).quantize
    seen = hold_out(subject.tokens)[0][: context.recipe.train.statistics_blocks]
    blocks = RoundedInBlocks(BLOCK_SIZES, quantize.symmetric, quantize.rule)
    measure_damage(subject, scores, seen, blocks, context.notify).save(out / DAMAGE)


def cut_plan_by_bytes(context: RunContext, out: Path) -> None:
    """Choose for the recipe's bytes, by the price of what each layer loses, and among a few plans by their KL."""
    from soco_export.run.plans.byte_plan import plan_bytes_measured
    from soco_export.run.plans.measured_bytes import PlanLoss, hold_out
    from soco_train.store.damage import Damage
    from soco_train.store.scores import Scores

    subject = context.subject(context.path("spectrum", "spectrum"))
    scores = Scores.load(context.path("scores", "scores.safetensors"))
    texts = hold_out(subject.tokens)
    loss = PlanLoss(subject, scores, _as_left(context.recipe), texts, out / "work")
    damage = Damage.load(context.path("damage", DAMAGE))
    plan = plan_bytes_measured(context.recipe, damage, loss, texts[1].numel())
    (out / "plan.json").write_text(plan.to_json(), encoding="utf-8")


def _as_left(recipe: Recipe) -> ExportSettings:
    """Return the export by the rule that leaves of a layer about what the run will: training leaves little, too."""
    from soco_train.numbers.rules import find_rounding

    trained, export = recipe.refine.distill.rounding, recipe.export
    if trained.weights != "planned":
        return export
    left = {"rule": find_rounding(trained.rule).once_trained}
    return export.model_copy(update={"quantize": export.quantize.model_copy(update=left)})


def make_factors(context: RunContext, out: Path) -> None:
    """Cut the factors of the planned ranks, refine them as the recipe asks, store them in its form."""
    from soco_train import method
    from soco_train.modules.subject import Session
    from soco_train.plan.rank_plan import RankPlan
    from soco_train.store.scores import Scores

    plan = RankPlan.load(context.path("plan", "plan.json"))
    scores = Scores.load(context.path("scores", "scores.safetensors"))
    subject = context.subject(context.path("spectrum", "spectrum"))
    origin = {"calibration": context.blocks("calibration").fingerprint}
    with recording(context.notify, out / KEPT_CURVE, out / FACTORS_CURVE) as notify:
        session = Session(out / "work", notify, fingerprint=out.name, seed=context.recipe.train.seed)
        factors = method.cut_factors(subject, scores, plan, _refine_settings(context.recipe, plan), session, origin)
    if parallel.leading():
        factors.save(out / "factors.safetensors")


def _refine_settings(recipe: Recipe, plan: RankPlan) -> RefineSettings:
    """Return the recipe's, with the plan's types for what is trained as they are rounded."""
    distill = recipe.refine.distill
    rounding = plan.rounding(distill.rounding)
    return recipe.refine.model_copy(update={"distill": distill.model_copy(update={"rounding": rounding})})


def distill_sizes(context: RunContext, out: Path) -> None:
    """Distil the factors of all sizes that the recipe names, in score order; goes on from its own checkpoint."""
    from soco_export.run.plans.measured_plan import plan_for
    from soco_train import method
    from soco_train.modules.subject import Session
    from soco_train.store.scores import Scores

    recipe = context.recipe
    scores = Scores.load(context.path("scores", "scores.safetensors"))
    subject = context.subject(context.path("spectrum", "spectrum"))
    importances = scores.importances()

    def planner(size: float) -> RankPlan:
        sized = recipe.model_copy(update={"keep_params": size})
        return plan_for(sized, importances, context.folder.root, context.notify)

    origin = {"calibration": context.blocks("calibration").fingerprint}
    with recording(context.notify, out / KEPT_CURVE, out / FACTORS_CURVE) as notify:
        session = Session(out / "work", notify, fingerprint=out.name, seed=recipe.train.seed)
        factors = method.distill_sizes(subject, scores, planner, recipe.refine, session, origin)
    if parallel.leading():
        factors.save(out / SIZES_FILE)


def cut_to_size(context: RunContext, out: Path) -> None:
    """Cut the factors that were distilled for all sizes to the planned one."""
    from soco_train.plan.rank_plan import RankPlan
    from soco_train.refine.any_size import cut_to
    from soco_train.store.factors import Factors

    plan = RankPlan.load(context.path("plan", "plan.json"))
    cut_to(Factors.load(context.path("sizes", SIZES_FILE)), plan).save(out / "factors.safetensors")


def write_checkpoint(context: RunContext, out: Path) -> None:
    """Write the model with the factors in it as a Hugging Face folder, a tensor at a time."""
    import torch

    from soco_export.checkpoint.layers import apply_factors, count_parameters, record_types, stored_factors
    from soco_export.checkpoint.stream import stream_checkpoint
    from soco_export.run.stages.model_card import model_card, summary_json
    from soco_train.plan.rank_plan import RankPlan

    dtype = getattr(torch, context.recipe.model.dtype)
    model = context.take_stored_model()
    before = count_parameters(model)
    layers = stored_factors(context.path("factors", "factors.safetensors"))
    apply_factors(model, layers, dtype, "meta")
    plan = RankPlan.load(context.path("plan", "plan.json"))
    record_types(model, plan.weights, plan.blocks)
    summary = summary_json(context.recipe, model, before)
    card = model_card(context.recipe.as_values(), summary)
    stream_checkpoint(model, layers, dtype, context.tokenizer(), out / "hf", card)
    write_evidence(out / CARD_FILE, summary)


def write_dense(context: RunContext, out: Path) -> None:
    """Write the pruned model with every product formed, for programs that know nothing of low rank."""
    from soco_export.checkpoint.load import load_checkpoint
    from soco_export.checkpoint.writer import save_dense

    trusted = context.recipe.model.trust_remote_code
    model = load_checkpoint(context.path("checkpoint", "hf"), trust_remote_code=trusted)
    save_dense(model, context.tokenizer(), out / "dense")


def write_onnx(context: RunContext, out: Path) -> None:
    """Export the checkpoint."""
    from soco_export.export import export_onnx

    summary = export_onnx(
        context.path("checkpoint", "hf"),
        out / "onnx",
        context.recipe.export,
        context.notify,
        context.calibration,
        provenance(context),
        context.recipe.model.trust_remote_code,
    )
    write_evidence(out / EXPORT_FILE, json.dumps(asdict(summary) | {"folder": "onnx"}, indent=2, default=str) + "\n")


def provenance(context: RunContext) -> dict[str, str]:
    """Return what the pruned graph says of where it comes from; nothing that only measuring and judging read."""
    card = read_json(context.path("checkpoint", CARD_FILE), MADE_ANEW)
    recipe = context.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    made = {key: value for key, value in recipe.items() if key not in EVIDENCE_SECTIONS}
    return {
        "base_model": str(card["base_model"]),
        **_budget(context.recipe),
        "params": f"{card['params_before']} to {card['params_after']}",
        "recipe_sha256": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest(),
    }


def _budget(recipe: Recipe) -> dict[str, str]:
    if recipe.keep_bytes is not None:
        return {"keep_bytes": str(recipe.keep_bytes)}
    return {"keep_params": f"{recipe.keep_params:g}", "storage": recipe.storage}


def write_dense_onnx(context: RunContext, out: Path) -> None:
    """Export the model as it was before, by the same route: what the pruned graph is measured against."""
    from soco_export.checkpoint.writer import save_dense
    from soco_export.export import export_onnx
    from soco_export.model.source import fetch_folder

    if context.recipe.model.weights == "random":
        source = out / "model"
        save_dense(context.take_stored_model(), context.tokenizer(), source)
    else:
        source = fetch_folder(context.recipe)
    base = {"base_model": context.recipe.model.id or context.recipe.name}
    trusted = context.recipe.model.trust_remote_code
    export_onnx(source, out / "onnx-dense", context.recipe.export, context.notify, context.calibration, base, trusted)


def write_evidence(path: Path, text: str) -> None:
    """Write a JSON text under evidence/."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


PRICE = Stage(
    "damage",
    ("model", "calibration", "spectrum", "scores"),
    ("layers", "train.statistics_blocks", "export.quantize", "refine.distill.rounding"),
    (DAMAGE,),
    price_layers,
)
PLAN = Stage("plan", ("scores",), (*PLAN_KEYS, "optimise_for", "latency", "export"), ("plan.json",), cut_plan)
FACTORS = Stage(
    "factors",
    ("model", "calibration", "spectrum", "scores", "plan"),
    ("refine", "train.seed"),
    ("factors.safetensors", FACTORS_CURVE),
    make_factors,
    shared=True,
)
SIZES_STAGE = Stage(
    "sizes",
    ("model", "calibration", "spectrum", "scores"),
    ("refine", "train.seed", "storage", "allocation", "multiple"),
    (SIZES_FILE, FACTORS_CURVE),
    distill_sizes,
    shared=True,
)
CUT = Stage("factors", ("sizes", "plan"), (), ("factors.safetensors",), cut_to_size)
CHECKPOINT = Stage(
    "checkpoint",
    ("model", "factors"),
    ("model.dtype",),
    ("hf", CARD_FILE),
    write_checkpoint,
    cedes=("hf/README.md",),  # the report's, with the results
)
_DENSE = Stage("dense", ("checkpoint",), (), ("dense",), write_dense)
ONNX = Stage("onnx", ("checkpoint", "calibration"), ("export",), ("onnx", EXPORT_FILE), write_onnx)
DENSE_ONNX = Stage("onnx-dense", ("model", "calibration"), ("export",), ("onnx-dense",), write_dense_onnx)
ARTEFACTS: dict[Format, tuple[Stage[RunContext], ...]] = {
    "hf": (PLAN, FACTORS, CHECKPOINT),
    "dense": (PLAN, FACTORS, CHECKPOINT, _DENSE),
    "onnx": (PLAN, FACTORS, CHECKPOINT, ONNX, DENSE_ONNX),
}


def artefacts(recipe: Recipe, format: Format) -> tuple[Stage[RunContext], ...]:
    """Return the stages of a format; where bytes are the budget, the plan asks the model, the checkpoint the plan."""
    if recipe.refine.distill.sizes:
        return (SIZES_STAGE, *(CUT if stage is FACTORS else stage for stage in ARTEFACTS[format]))
    if recipe.keep_bytes is None:
        return ARTEFACTS[format]
    plan = replace(
        PLAN,
        reads=("model", "calibration", "spectrum", "scores", "damage"),
        settings=(*PLAN.settings, "keep_bytes", "layers"),
        work=cut_plan_by_bytes,
    )
    instead = {"plan": plan, "checkpoint": replace(CHECKPOINT, reads=("model", "factors", "plan"))}
    return (PRICE, *(instead.get(stage.name, stage) for stage in ARTEFACTS[format]))
