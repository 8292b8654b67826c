"""Closed-form refit of the factors, layer by layer in the order of execution.

A pruned layer was cut to answer well on the inputs that the dense model gives it. In the pruned model its inputs x̃ have
drifted. Each layer in turn is fitted by least squares to

    T = α W x̃ + (1 - α) W x                    x: the same token in the dense model

first `up` with `down` held, then `down` with `up` held, so the learnt subspace is where it starts from. Both solutions
are pulled to the present factors by `ridge` times the mean variance: no data, no change. A deviation is fitted too.

Two flows of hidden states, dense and compressed, go through the decoder block by block, so memory is the hidden states
of the calibration tokens twice, and each block runs about as often as it has different inputs (q/k/v, o, gate/up,
down). The targets' mixture is ours; docs/method.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from soco_train.cost import DENSE_BYTES, DOUBLE_BYTES, Cost, ModelShape, Task, stacked
from soco_train.errors import RecipeError
from soco_train.events import Event, Notify, silent
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.factored import FactorLinear, factored
from soco_train.modules.layers import teaching
from soco_train.modules.subject import Session, Subject
from soco_train.refine.fisher_refit import fisher_refit
from soco_train.refine.rungs import rung
from soco_train.settings.refine import RefitSettings
from soco_train.settings.train import SUMS_AT_ONCE

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Moments:
    """Means over tokens of a layer's inputs in both flows: E[x̃ x̃ᵀ] and E[x x̃ᵀ] [n, n], E[x̃] and E[x] [n]; float64."""

    within: torch.Tensor
    across: torch.Tensor
    mean: torch.Tensor
    dense_mean: torch.Tensor


def refit(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    factors: Mapping[str, StackedFactors],
    tokens: torch.Tensor,
    settings: RefitSettings,
    notify: Notify = silent,
) -> dict[str, StackedFactors]:
    """Return the factors refitted to `settings.blocks` calibration blocks; tokens: [n, t].

    The model is left as it was. Raises RecipeError where the layers are not all in one stack of decoder blocks.
    """
    blocks = decoder_blocks(model, list(factors))
    found: dict[str, StackedFactors] = {}
    model.eval()
    with torch.no_grad(), factored(model, linears, factors) as layers:
        flow = _Flow(model, list(blocks.values()), layers, tokens[: settings.blocks])
        for number, prefix in enumerate(blocks):
            own = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
            for group in flow.readers(number, own):
                moments = flow.moments(number, own[group[0]])
                for name in group:
                    found[name] = solve(own[name].dense, own[name].learnt.numbers(), moments, settings)
                    own[name].learnt.load(found[name])
            flow.advance(number)
            notify(Event("refit", number + 1, len(blocks)))
    return found


def solve(dense: nn.Linear, factors: StackedFactors, moments: Moments, settings: RefitSettings) -> StackedFactors:
    """Return the factors [m, r], [r, n] that answer best for T on inputs with these moments."""
    weight = dense.weight.detach().double()
    up, down = factors.up.to(weight), factors.down.to(weight)
    alpha = settings.own_input
    within, across = moments.within, moments.across
    if factors.bias is not None:  # the deviation takes the means
        within = within - torch.outer(moments.mean, moments.mean)
        across = across - torch.outer(moments.dense_mean, moments.mean)
    target = weight @ (alpha * within + (1 - alpha) * across)
    up = _pulled(target @ down.T, down @ within @ down.T, up, settings.ridge)
    whole = _pulled(target, within, up @ down, settings.ridge)
    gram = up.T @ up
    down = torch.linalg.solve(_damped(gram, _TINY), up.T @ whole + _TINY * _scale(gram) * down)
    bias = factors.bias
    if bias is not None:
        wanted = weight @ (alpha * moments.mean + (1 - alpha) * moments.dense_mean) - up @ (down @ moments.mean)
        bias = (wanted if dense.bias is None else wanted + dense.bias.double()).float().cpu()
    return StackedFactors(up.float().cpu(), down.float().cpu(), bias)


_TINY = 1e-9


def _pulled(cross: torch.Tensor, gram: torch.Tensor, present: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return X = argmin ‖X G^½ - cross G^-½‖² + ridge · mean diag G · ‖X - present‖²."""
    right = cross + ridge * _scale(gram) * present
    return torch.linalg.solve(_damped(gram, ridge + _TINY), right, left=False)


def _damped(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    return gram + ridge * _scale(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _scale(gram: torch.Tensor) -> float:
    return float(gram.diagonal().mean()) or 1.0


def decoder_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return, by name prefix, the entries of the module list that holds all of `names`, in order.

    Raises RecipeError if no list does.
    """
    for list_name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(name.startswith(f"{list_name}.") for name in names):
            return {f"{list_name}.{number}.": block for number, block in enumerate(module)}
    raise RecipeError(
        "the pruned layers are not all in one stack of decoder blocks",
        fix="leave out refine.refit, or narrow layers.include",
        where="recipe: refine.refit",
    )


class _Stop(Exception):
    """No error: it ends a forward pass that has shown what it was run for."""


class _Flow:
    """The hidden states of all calibration tokens before one block, in the dense and in the compressed model."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], layers: Mapping[str, FactorLinear], tokens: torch.Tensor
    ) -> None:
        self.blocks, self.layers = blocks, layers
        device = next(model.parameters()).device
        size = max(1, min(len(tokens), _TOKENS_AT_ONCE // tokens.shape[1]))
        # Batches of one shape, so that what goes into a block beside the hidden states is the same for all of them.
        batches = list(tokens.to(device).split(size)[: len(tokens) // size])
        self.extras = _extras(model, blocks, batches[0])
        self.compressed = [_first_input(model, blocks[0], batch) for batch in batches]
        self.dense = list(self.compressed)

    def readers(self, number: int, own: Mapping[str, FactorLinear]) -> list[list[str]]:
        """Return the names of the block's pruned layers, in order of execution, those with one input together."""
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def note(name: str, x: torch.Tensor) -> None:
            if seen and seen[-1][0] is x:
                seen[-1][1].append(name)
            else:
                seen.append((x, [name]))

        with _watching(own, note):
            self._through(number, self.compressed[0])
        return [names for _, names in seen]

    def moments(self, number: int, layer: FactorLinear) -> Moments:
        """Run both flows up to `layer` and return the moments of its input."""
        sums: list[torch.Tensor] = []
        for dense, compressed in zip(self.dense, self.compressed, strict=True):
            with teaching(self.layers.values()):
                x = self._input(number, layer, dense)
            y = self._input(number, layer, compressed)
            new = [part.double() for part in (y.T @ y, x.T @ y, y.sum(0), x.sum(0))]
            sums = new if not sums else [total.add_(part) for total, part in zip(sums, new, strict=True)]
        tokens = sum(hidden.shape[0] * hidden.shape[1] for hidden in self.dense)
        return Moments(*(total.div_(tokens) for total in sums))

    def advance(self, number: int) -> None:
        """Take both flows through block `number`."""
        with teaching(self.layers.values()):
            self.dense = [self._through(number, hidden) for hidden in self.dense]
        self.compressed = [self._through(number, hidden) for hidden in self.compressed]

    def _through(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.extras[number]
        output = self.blocks[number](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _input(self, number: int, layer: FactorLinear, hidden: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def catch(_: str, x: torch.Tensor) -> None:
            caught.append(x)
            raise _Stop

        with _watching({"": layer}, catch), suppress(_Stop):
            self._through(number, hidden)
        return caught[0].detach().flatten(0, -2).float()


@contextmanager
def _watching(layers: Mapping[str, nn.Module], see: Any) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extras(model: nn.Module, blocks: Sequence[nn.Module], tokens: torch.Tensor) -> list[tuple[Any, Any]]:
    """Return what each block gets beside its hidden states: masks, positions."""
    found: list[tuple[Any, Any]] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        getattr(model, "base_model", model)(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first_input(model: nn.Module, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the hidden states that enter the first block: [b, t, d]."""
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    with suppress(_Stop):
        getattr(model, "base_model", model)(input_ids=tokens, use_cache=False)
    handle.remove()
    return caught[0]


def refit_cost(task: Task, shape: ModelShape, width: int) -> Cost:
    """Return the cost of holding all factors, where it fits them and when they are fitted; and of Fisher sums."""
    numbers = shape.selected if task.refine.refit.weights == "fisher" else 0
    sums = min(DOUBLE_BYTES * numbers, max(SUMS_AT_ONCE, DOUBLE_BYTES * shape.largest))
    return Cost(DENSE_BYTES * stacked(task.plan, shape) + sums)


@rung("refit", on="factors", switch="blocks", cost=refit_cost)
def _refit(
    subject: Subject, factors: Mapping[str, StackedFactors], settings: RefitSettings, session: Session
) -> Mapping[str, StackedFactors]:
    if not factors:
        return factors
    fit = fisher_refit if settings.weights == "fisher" else refit
    return fit(subject.model, subject.linears, factors, subject.tokens, settings, session.notify)
