"""Fewer numbers a value head, as a rung: every attention's values are projected, and its output refitted to them.

    v_proj → head-rows, o_proj → head-columns      absorb.py: which numbers, and why nothing has to be undone

Attention then caches r numbers of a value in the place of d. Statistics are those of the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from soco_train.cost import DOUBLE_BYTES, Cost, ModelShape, Task, logits, saved_by_the_rest
from soco_train.errors import RecipeError
from soco_train.events import Event, Notify
from soco_train.forms.base import LayerFactors
from soco_train.forms.heads import HeadColumns, HeadRows, fill_rows, first_of_heads
from soco_train.forms.registry import LazyLayers, forms_of
from soco_train.modules.subject import Session, Subject
from soco_train.modules.values import ValueSite, check_mixing, narrowed_sites
from soco_train.plan.values import ValueLosses, numbers_tried
from soco_train.refine.absorb import absorb, value_projections
from soco_train.refine.rungs import rung
from soco_train.settings.refine import ValueSettings
from soco_train.settings.train import SUMS_AT_ONCE
from soco_train.spectra.statistics import TOKENS_AT_ONCE, collect_statistics, groups, sums_bytes

_NEEDS = frozenset({"input_covariance", "output_curvature"})


def narrow_values(
    model: nn.Module, sites: list[ValueSite], tokens: torch.Tensor, settings: ValueSettings, notify: Notify
) -> dict[str, HeadRows | HeadColumns]:
    """Return both projections of every site with fewer numbers a value head, in closed form; tokens: [n, t].

    The model is left as it was. Raises RecipeError where attention is not a mixture of values.
    """
    check_mixing(model, sites, tokens)
    found: dict[str, HeadRows | HeadColumns] = {}
    for site, covariance, curvature in _with_statistics(model, sites, tokens[: settings.blocks], notify):
        value, output = (_linear(model, name) for name in (site.value, site.output))
        numbers = settings.numbers(site.size, site.value)
        weight = output.weight.detach().to(covariance)
        down = value_projections(weight, covariance, curvature, site.groups, site.size, numbers)
        done = absorb(weight, covariance, curvature, down)
        order = first_of_heads(site.groups, site.size, numbers)
        bias = None if value.bias is None else fill_rows(_stored(done.value(value.bias.detach().to(down))), order)
        found[site.value] = HeadRows(_stored(done.value(value.weight.detach().to(down))), order, bias)
        order = first_of_heads(site.heads, site.size, numbers)
        bias = None if output.bias is None else _stored(output.bias)
        found[site.output] = HeadColumns(_stored(done.output), order, bias)
        notify(Event("values", len(found) // 2, len(sites)))
    return found


def value_losses(subject: Subject, blocks: int | None, notify: Notify) -> list[ValueLosses]:
    """Return what each attention that the plan may narrow loses, by the numbers of a value head that stay.

    blocks: of the subject's text, those that its spectra were made from. Errors as its two-sided spectra measure them.
    """
    found = []
    tokens = subject.tokens[:blocks]
    for site, covariance, curvature in _with_statistics(subject.model, subject.narrowable, tokens, notify):
        weight = _linear(subject.model, site.output).weight.detach().to(covariance)
        lost = []
        for numbers in numbers_tried(site.size):
            down = value_projections(weight, covariance, curvature, site.groups, site.size, numbers)
            error = absorb(weight, covariance, curvature, down).lost
            lost.append((numbers, max(0.0, error)))  # nothing may be lost, but for rounding
        found.append(ValueLosses(site.value, site.output, site.size, tuple(lost)))
        notify(Event("values", len(found), len(subject.narrowable)))
    return found


def _with_statistics(
    model: nn.Module, sites: Sequence[ValueSite], tokens: torch.Tensor, notify: Notify
) -> Iterator[tuple[ValueSite, torch.Tensor, torch.Tensor]]:
    """Yield each site with covariance and curvature of its output projection, a group of layers in memory."""
    outputs = {site.output: site for site in sites}
    for group in groups({name: _linear(model, name) for name in outputs}, _NEEDS):
        statistics = collect_statistics(model, group, tokens, _NEEDS, notify)
        for name in group:
            known = statistics.pop(name)
            assert known.input_covariance is not None
            assert known.output_curvature is not None
            yield outputs[name], known.input_covariance, known.output_curvature


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def values_cost(task: Task, shape: ModelShape, width: int) -> Cost:
    """Return the cost of the statistics behind the projections, planned ones twice: sums, and passes with gradients."""
    sums = [sums_bytes((value.outputs, value.heads * value.size), _NEEDS) for value in shape.values]
    if not sums:
        return Cost()
    at_once = min(TOKENS_AT_ONCE, task.data.block * (task.data.blocks or TOKENS_AT_ONCE))
    memory = min(sum(sums), max(SUMS_AT_ONCE, *sums)) + at_once * saved_by_the_rest(shape, width)
    tokens = (task.refine.values.blocks or task.data.blocks or 128) * task.data.block
    tokens *= 2 if task.refine.values.planned else 1  # of what is lost, and of what was chosen
    flops: dict[str, float] = {task.train.factor_dtype: 6.0 * tokens * shape.active}
    flops["float32"] = flops.get("float32", 0) + 2.0 * tokens * sum(sums) / DOUBLE_BYTES
    return Cost(memory + logits(at_once, shape, at_once, width), flops=flops)


@rung("values", on="factors", switch="narrows", cost=values_cost)
def _values(
    subject: Subject, factors: Mapping[str, LayerFactors], settings: ValueSettings, session: Session
) -> Mapping[str, LayerFactors]:
    sites = [
        site for site in narrowed_sites(subject.model, settings) if settings.numbers(site.size, site.value) < site.size
    ]
    taken = [name for site in sites for name in (site.value, site.output) if name in factors]
    if taken:
        raise RecipeError(
            f"{taken[0]} has a rank already, and refine.values takes projections of values apart from the plan",
            fix="learn the scores with the same refine.values, or with layers.exclude for v_proj and o_proj",
            where="recipe: refine.values.keep",
        )
    found = narrow_values(subject.model, sites, subject.tokens, settings, session.notify)
    forms = {**forms_of(factors), **forms_of(found)}
    return LazyLayers(forms, lambda name: found[name] if name in found else factors[name])
