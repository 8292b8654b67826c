"""The stages that learn: calibration statistics and spectra, then one score per component."""

from __future__ import annotations

from pathlib import Path

from soco_export.run.context import RunContext
from soco_export.run.pipeline import Stage
from soco_train import parallel
from soco_train.store.scores import Scores
from soco_train.store.spectra import SpectrumStore

PLAN_KEYS = ("keep_params", "storage", "allocation", "multiple")
BASIS_KEYS = ("layers", "train.basis", "train.ridge", "train.statistics_blocks")


def make_spectrum(context: RunContext, out: Path) -> None:
    """Collect calibration statistics and decompose every participating weight; layers already done are kept."""
    from soco_train.spectra.decompose import decompose_model

    store = SpectrumStore(out / "spectrum")
    linears = {name: linear for name, linear in context.linears().items() if name not in store}
    tokens = context.blocks("calibration").tokens
    decompose_model(context.model(), linears, tokens, context.recipe.train, store, context.notify)


def learn_scores(context: RunContext, out: Path) -> None:
    """Give every component its importance with the scorer of the recipe; goes on from its own checkpoint in `out`."""
    from soco_export.checkpoint.layers import count_parameters
    from soco_train.scores.registry import train_scores
    from soco_train.scores.task import ScoringTask

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


SPECTRUM = Stage("spectrum", ("model", "calibration"), BASIS_KEYS, ("spectrum",), make_spectrum, cache=True)
SCORES = Stage(
    "scores",
    ("model", "calibration", "spectrum"),
    ("layers", "train", *PLAN_KEYS),
    ("scores.safetensors",),
    learn_scores,
    shared=True,
)
TRAINING = (SPECTRUM, SCORES)
