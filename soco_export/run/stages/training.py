"""The stages that learn: calibration statistics and spectra, then one score per component."""

from __future__ import annotations

from pathlib import Path

from soco_export.run.context import RunContext
from soco_export.run.folder.names import KEPT_CURVE, SCORES_CURVE
from soco_export.run.pipeline import Stage
from soco_export.run.stages.curve import recording
from soco_train import parallel

PLAN_KEYS = ("keep_params", "storage", "allocation", "multiple")
BASIS_KEYS = ("layers", "refine.values", "train.basis", "train.ridge", "train.statistics_blocks")


def make_spectrum(context: RunContext, out: Path) -> None:
    """Collect calibration statistics and decompose every participating weight; layers already done are kept."""
    from soco_train import method

    method.make_spectra(context.subject(out / "spectrum"), context.recipe.train, context.notify)


def learn_scores(context: RunContext, out: Path) -> None:
    """Give every component its importance with the scorer of the recipe; goes on from its own checkpoint in `out`."""
    from soco_export.checkpoint.layers import count_parameters
    from soco_train import method
    from soco_train.modules.subject import Session
    from soco_train.store.scores import Scores

    recipe, calibration = context.recipe, context.blocks("calibration")
    subject = context.subject(context.path("spectrum", "spectrum"))
    fingerprint = f"{calibration.fingerprint} {context.model_hash()}"
    with recording(context.notify, out / KEPT_CURVE, out / SCORES_CURVE) as notify:
        session = Session(out / "work", notify, fingerprint)
        found = method.learn_scores(subject, recipe.train, recipe.plan, session)
    if not parallel.leading():
        return
    origin = {
        "model": recipe.name,
        "parameters": count_parameters(subject.model),
        "calibration": calibration.source,
    }
    Scores(found.layers, {**found.provenance, **origin}).save(out / "scores.safetensors")


SPECTRUM = Stage("spectrum", ("model", "calibration"), BASIS_KEYS, ("spectrum",), make_spectrum, cache=True)
SCORES = Stage(
    "scores",
    ("model", "calibration", "spectrum"),
    ("layers", "refine.values", "train", *PLAN_KEYS),
    ("scores.safetensors", SCORES_CURVE),
    learn_scores,
    shared=True,
)
TRAINING = (SPECTRUM, SCORES)
