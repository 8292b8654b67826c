"""The training half in three calls, on a model in memory; the command line's stages do the same with files.

scores = learn_scores(model, tokens, workdir, train, plan)      once
plan = plan_ranks(scores, PlanSettings(keep_params=0.8))        any size, at once
factors = cut_factors(model, tokens, scores, plan, workdir)     for soco_export.apply_factors(model, factors)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from soco_train import method
from soco_train.data.corpus import fingerprint
from soco_train.events import Notify, silent
from soco_train.modules.sites import opened
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import TrainSettings
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
    with opened(model):
        subject = method.open_subject(model, layers or LayerSettings(), tokens, _spectra(workdir))
        subject = method.make_spectra(subject, train, notify, afresh=True)
        found = [fingerprint(tokens), *(subject.spectra[name].sigma.tolist() for name in subject.linears)]
        named = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        return method.learn_scores(subject, train, plan, Session(workdir / "scores", notify, named))


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
    result, unless they were trained as rounded. Raises RecipeError for what distillation cannot do, DataError for a
    loss that is not finite.
    """
    seed = int(scores.provenance.get("train", {}).get("seed", 0))
    session = Session(workdir / "factors", notify, fingerprint(tokens), seed)
    with opened(model):
        layers = {name: model.get_submodule(name) for name in plan.layers}
        linears = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        subject = Subject(model, linears, SpectrumStore(_spectra(workdir)), tokens)
        return method.cut_factors(subject, scores, plan, refine or RefineSettings(), session).made()


def _spectra(workdir: Path) -> Path:
    return workdir / "spectrum"
