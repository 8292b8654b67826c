"""The method from end to end, written once: model and text → spectra → scores → plan → factors.

    subject = open_subject(model, layers, tokens, folder)      what it works on
    make_spectra(subject, train, notify)                       P, B, σ by layer, into `folder`
    scores = learn_scores(subject, train, plan, session)       once
    factors = cut_factors(subject, scores, ranks, refine, session)    for each `ranks = plan_ranks(scores, plan)`
    or once whole = distill_sizes(subject, scores, planner, refine, session), then cut_to(whole, ranks) for each

The Python API (api.py), the stages of a run and the benchmarks call these; each decides alone where files lie and what
is done already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from soco_train.events import Notify, silent
from soco_train.modules.participation import left_out
from soco_train.modules.sites import open_sites
from soco_train.modules.subject import Session, Subject
from soco_train.modules.values import check_mixing, narrowed_sites, planned_sites, ranked_linears
from soco_train.plan.left_out import HARDLY_VISITED, LeftOut
from soco_train.plan.rank_plan import RankPlan
from soco_train.refine.any_size import Planner, distill_any_size
from soco_train.refine.ladder import refine
from soco_train.refine.values import value_losses
from soco_train.scores.registry import train_scores
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings, ValueSettings
from soco_train.settings.train import TrainSettings
from soco_train.spectra.decompose import decompose_model
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from soco_train.store.spectra import SpectrumStore


def open_subject(
    model: nn.Module,
    layers: LayerSettings,
    tokens: torch.Tensor,
    spectra: Path,
    values: ValueSettings | None = None,
) -> Subject:
    """Return the layers of `model` that take part, with calibration tokens [n, t] and the folder of their spectra.

    values: `refine.values`, whose projections take no part. The spectra need not be there yet. The model's sites stay
    open (modules/sites.py). Raises RecipeError if no layer matches, or for values that cannot be projected.
    """
    values = values or ValueSettings()
    open_sites(model)
    check_mixing(model, narrowed_sites(model, values), tokens)
    linears = ranked_linears(model, layers, values)
    rest = left_out(model, linears, layers, values)
    return Subject(model, linears, SpectrumStore(spectra), tokens, rest, planned_sites(model, linears, values))


def make_spectra(subject: Subject, train: TrainSettings, notify: Notify = silent, afresh: bool = False) -> Subject:
    """Decompose every layer that has no spectrum in the subject's folder yet, or, `afresh`, all of them.

    Returns the subject without the layers that the calibration text hardly visits.
    """
    store = subject.spectra
    assert isinstance(store, SpectrumStore)
    missing = {name: linear for name, linear in subject.linears.items() if afresh or not store.decided(name)}
    if missing:
        decompose_model(subject.model, missing, subject.tokens, train, store, notify)
    return seen(subject)


def seen(subject: Subject) -> Subject:
    """Return the subject without the layers that its spectra leave out; these are named among what takes no part."""
    store = subject.spectra
    assert isinstance(store, SpectrumStore)
    unseen = {name: linear for name, linear in subject.linears.items() if store.left_out(name)}
    linears = {name: linear for name, linear in subject.linears.items() if name not in unseen}
    rest = {f"{name}.weight": LeftOut(tuple(linear.weight.shape), HARDLY_VISITED) for name, linear in unseen.items()}
    return replace(subject, linears=linears, left_out={**subject.left_out, **rest})


def learn_scores(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
    """Give every component its importance with `train.scorer`, heading for the size of `plan`; see `train_scores`.

    What takes no part, and why, joins the provenance, if there is anything, and what attentions lose with fewer
    numbers a value head, where the plan may choose that.
    """
    scores = train_scores(subject, train, plan, session)
    known = {
        "left_out": {name: weight.record() for name, weight in subject.left_out.items()},
        "values": [site.record() for site in value_losses(subject, train.statistics_blocks, session.notify)],
    }
    return Scores(scores.layers, {**scores.provenance, **{name: found for name, found in known.items() if found}})


def cut_factors(
    subject: Subject,
    scores: Scores,
    plan: RankPlan,
    settings: RefineSettings,
    session: Session,
    origin: Mapping[str, object] | None = None,
) -> Factors:
    """Cut every pruned layer of `plan` and refine the factors; see `refine`. `origin` joins their provenance."""
    provenance = {"keep_params": plan.keep_params, **(origin or {}), "scores": dict(scores.provenance)}
    return refine(subject, scores, plan, settings, session, provenance)


def distill_sizes(
    subject: Subject,
    scores: Scores,
    planner: Planner,
    settings: RefineSettings,
    session: Session,
    origin: Mapping[str, object] | None = None,
) -> Factors:
    """Distil the factors of all `refine.distill.sizes` at once; `planner`: size → plan. `cut_to` cuts one."""
    return distill_any_size(subject, scores, planner, settings.distill, session, origin or {})
