"""The training half in three calls, on a model in memory; the command line's stages do the same with files.

scores = learn_scores(model, tokens, workdir, train, plan)      once
plan = plan_ranks(scores, PlanSettings(keep_params=0.8))        any size, at once
factors = cut_factors(model, tokens, scores, plan, workdir)     for soco_export.apply_factors(model, factors)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from soco_train.data.corpus import fingerprint
from soco_train.events import Notify, silent
from soco_train.modules.layers import select_linears
from soco_train.plan.ranks import RankPlan
from soco_train.refine.ladder import RefineTask
from soco_train.refine.ladder import refine as run_ladder
from soco_train.scores.registry import train_scores
from soco_train.scores.task import ScoringTask
from soco_train.settings import LayerSettings, PlanSettings, RefineSettings, TrainSettings
from soco_train.spectra.decompose import decompose_model
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from soco_train.store.spectra import SpectrumStore


def learn_scores(
    model: nn.Module,
    tokens: torch.Tensor,
    workdir: Path,
    train: TrainSettings | None = None,
    plan: PlanSettings | None = None,
    layers: LayerSettings | None = None,
    notify: Notify = silent,
) -> Scores:
    """Decompose the model's Linears and learn which components matter, heading for the size of `plan`.

    model: a causal LM, left as it was; tokens: calibration blocks [n, block] int64. `workdir` receives the spectrum,
    which `cut_factors` reads, and checkpoints, from which an interrupted training goes on. Raises RecipeError if no
    Linear matches or a name is unknown, DataError for weights or losses that are not finite.
    """
    train, plan = train or TrainSettings(), plan or PlanSettings()
    linears = select_linears(model, layers or LayerSettings())
    store = _spectra(workdir)
    decompose_model(model, linears, tokens, train, store, notify)
    return train_scores(
        ScoringTask(
            model=model,
            linears=linears,
            spectra=store,
            tokens=tokens,
            train=train,
            plan=plan,
            workdir=workdir / "scores",
            notify=notify,
            data_fingerprint=_digest([fingerprint(tokens), *(store[name].sigma.tolist() for name in linears)]),
        )
    )


def cut_factors(
    model: nn.Module,
    tokens: torch.Tensor,
    scores: Scores,
    plan: RankPlan,
    workdir: Path,
    refine: RefineSettings | None = None,
    notify: Notify = silent,
) -> Factors:
    """Cut every pruned layer of `plan`, refine the factors as `refine` asks, and store them as planned.

    model: the dense model that `scores` were learnt on, left as it was; `workdir`: the one of `learn_scores`.
    The seed that trained the scores orders the batches here too. The layers that `plan` leaves dense are not in the
    result. Raises RecipeError for what distillation cannot do, DataError for a loss that is not finite.
    """
    linears = {name: model.get_submodule(name) for name in plan.layers}
    dense = {name: linear for name, linear in linears.items() if isinstance(linear, nn.Linear)}
    task = RefineTask(
        model=model,
        linears=dense,
        spectra=_spectra(workdir),
        tokens=tokens,
        settings=refine or RefineSettings(),
        workdir=workdir / "factors",
        notify=notify,
        seed=int(scores.provenance.get("train", {}).get("seed", 0)),
        fingerprint=fingerprint(tokens),
    )
    provenance = {"keep_params": plan.keep_params, "scores": dict(scores.provenance)}
    return run_ladder(task, scores, plan, provenance).made()


def _spectra(workdir: Path) -> SpectrumStore:
    return SpectrumStore(workdir / "spectrum")


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
