"""Where attention makes and reads its values: which projections may have fewer numbers a head, and that they may.

The numbers of a value head may be exchanged and scaled, and put back before the output projection reads them, if
attention does nothing to values but mix tokens. `check_mixing` tries that, so no list of architectures is needed: a
gate, a norm or a bound in between, or heads in another order, would show.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from soco_train.errors import RecipeError
from soco_train.modules.layers import select_linears
from soco_train.plan.left_out import few_numbers
from soco_train.settings.data import LayerSettings
from soco_train.settings.refine import HEAD_STEP, ValueSettings

_VALUES, _OUTPUTS = "v_proj", ("o_proj", "out_proj", "dense")
_TRIED = 16  # tokens: more than a group of heads needs to show another order
_TOLERANCE = 1e-3  # of the largest logit; the scales are powers of two, which no float rounds


@dataclass(frozen=True)
class ValueSite:
    """The projections of one attention, by name: `groups` value heads of `size` numbers, read by `heads` heads."""

    value: str
    output: str
    groups: int
    heads: int
    size: int


def value_sites(model: nn.Module) -> list[ValueSite]:
    """Return the attentions of `model` (open: sites.py) with value and output projections of their own, in order."""
    found = (
        _site(model, name)
        for name, module in model.named_modules()
        if isinstance(getattr(module, _VALUES, None), nn.Linear)
    )
    return [site for site in found if site is not None]


def _site(model: nn.Module, place: str) -> ValueSite | None:
    attention: Any = model.get_submodule(place)
    size, value = getattr(attention, "head_dim", None), attention.get_submodule(_VALUES)
    output = next((name for name in _OUTPUTS if isinstance(getattr(attention, name, None), nn.Linear)), None)
    if output is None or not isinstance(size, int):
        return None
    groups, heads = value.out_features // size, attention.get_submodule(output).in_features // size
    exact = (value.out_features, attention.get_submodule(output).in_features) == (groups * size, heads * size)
    if not exact or not groups or heads % groups:
        return None
    return ValueSite(f"{place}.{_VALUES}", f"{place}.{output}", groups, heads, size)


def narrowed_sites(model: Any, settings: ValueSettings) -> list[ValueSite]:
    """Return the attentions whose values get fewer numbers, or may get them by a plan to come; none while that is off.

    Raises RecipeError where the model has none, or where a head would keep all its numbers.
    """
    if not settings.narrows:
        return []
    sites = value_sites(model)
    where = "recipe: refine.values.keep"
    clipped = getattr(model.config, "clip_qkv", None) is not None
    if clipped or not sites:
        apart = f"it has no attention with {_VALUES} and {', '.join(_OUTPUTS[:-1])} or {_OUTPUTS[-1]} of their own"
        raise RecipeError(
            f"the values of {type(model).__name__} cannot be projected: {'it clips them' if clipped else apart}",
            fix="leave out refine.values",
            where=where,
        )
    for site in sites:
        least = HEAD_STEP if settings.planned else settings.numbers(site.size)
        if least >= site.size:
            raise RecipeError(
                f"keep {settings.keep} of a value head of {site.size} is all of it, in steps of {HEAD_STEP}",
                fix=f"give {(site.size - HEAD_STEP) / site.size:g} or less, or leave out refine.values"
                if site.size > HEAD_STEP
                else "leave out refine.values",
                where=where,
            )
    return sites


def ranked_linears(model: nn.Module, layers: LayerSettings, values: ValueSettings) -> dict[str, nn.Linear]:
    """Return the Linears that get a rank: those selected, without the projections whose values get fewer numbers.

    Raises RecipeError if none is left, or no attention of which a plan could decide.
    """
    apart = narrowed_names(model, values)
    chosen = {name: linear for name, linear in select_linears(model, layers).items() if name not in apart}
    if not chosen:
        raise RecipeError(
            "layers.include matches only projections of values, which refine.values takes apart from the plan",
            fix="include other layers; with keep_params: 1 they stay dense",
            where="recipe: layers.include",
        )
    if values.planned and not planned_sites(model, chosen, values):
        raise RecipeError(
            "refine.values.keep is planned, and of no attention both projections of values take part in the plan",
            fix="include v_proj and o_proj in layers, or leave out refine.values",
            where="recipe: layers",
        )
    return chosen


def planned_sites(model: nn.Module, chosen: Collection[str], values: ValueSettings) -> tuple[ValueSite, ...]:
    """Return the attentions of which a plan decides: both projections are among the `chosen` layers."""
    sites = narrowed_sites(model, values) if values.planned else []
    return tuple(site for site in sites if site.value in chosen and site.output in chosen)


def narrowed_names(model: nn.Module, values: ValueSettings) -> dict[str, tuple[str, float]]:
    """Return the projections that `refine.values` takes, by name: what it does to them, and the share that stays.

    What a plan decides on has a rank like any other layer until it does.
    """
    if values.planned:
        return {}
    return {
        name: (few_numbers(values.numbers(site.size), site.size), values.numbers(site.size) / site.size)
        for site in narrowed_sites(model, values)
        for name in (site.value, site.output)
    }


@torch.no_grad()
def check_mixing(model: nn.Module, sites: list[ValueSite], tokens: torch.Tensor) -> None:
    """Raise RecipeError unless attention at all `sites` does nothing to values but mix tokens, head by head.

    tokens: [b, t], of which a few are run, once as the model is and once with other values.
    """
    if not sites:
        return
    few = tokens[:1, :_TRIED].to(next(model.parameters()).device)
    expected = model(input_ids=few, use_cache=False).logits.float()
    with _exchanged(model, sites):
        found = model(input_ids=few, use_cache=False).logits.float()
    if not float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max()):
        raise RecipeError(
            f"the attention of {type(model).__name__} does more to values than to mix tokens: they cannot be projected",
            fix="leave out refine.values",
            where="recipe: refine.values.keep",
        )


@contextmanager
def _exchanged(model: nn.Module, sites: list[ValueSite]) -> Iterator[None]:
    """Within this context the numbers of a value change places and size, and back before it is read."""
    handles = []
    for number, site in enumerate(sites):
        drawn = torch.Generator().manual_seed(number)
        scale = 2.0 ** torch.randint(-1, 2, (site.groups, site.size), generator=drawn)
        place = torch.stack([torch.randperm(site.size, generator=drawn) for _ in range(site.groups)])
        shared = site.heads // site.groups
        scales = scale.flatten(), scale.repeat_interleave(shared, 0).flatten()
        places = _in_heads(place), _in_heads(place.argsort(1).repeat_interleave(shared, 0))

        def made(_: Any, args: Any, y: torch.Tensor, by: Any = scales[0], at: Any = places[0]) -> torch.Tensor:
            return y[..., at.to(y.device)] * by.to(y)

        def read(_: Any, args: Any, by: Any = scales[1], at: Any = places[1]) -> tuple[torch.Tensor]:
            return ((args[0] / by.to(args[0]))[..., at.to(args[0].device)],)

        handles.append(model.get_submodule(site.value).register_forward_hook(made))
        handles.append(model.get_submodule(site.output).register_forward_pre_hook(read))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_heads(places: torch.Tensor) -> torch.Tensor:
    """Return places within heads [heads, size] as places among all numbers."""
    return (places + places.shape[1] * torch.arange(len(places))[:, None]).flatten()
