"""Calibration statistics of each layer, streamed: what its inputs look like and what its outputs matter for.

A basis names the statistics it needs (bases.py); one pass over the calibration blocks collects them. Only
sums are kept, in float64, never activations. Layers that read the same tensor (q/k/v, gate/up) share one sum, and the
result holds the same tensor object for each of them, so that whoever factorises it can do so once. A large model's sums
do not fit at one time: `groups` cuts its layers into groups whose sums do, each of which takes a pass of its own.

An expert of a mixture is summed over the tokens that are routed to it, and its sums of inputs are divided by all tokens
of the text: a loss is then one per token of text, whatever the layer, and an expert that is rarely asked counts little.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent
from soco_train.settings.train import SUMS_AT_ONCE

# these take a backward pass
OUTPUT_SIDE = frozenset({"output_curvature", "row_fisher", "column_fisher", "weight_fisher", "column_survivors"})
_BY_NUMBER = frozenset({"weight_fisher", "column_survivors"})  # these take a sum for each number of the weight
TOKENS_AT_ONCE = 2048
_STRIP = 256  # columns of an outer product summed at a time
_DOUBLE_BYTES = 8
EXPERT = re.compile(r"\.experts\.(\d+)\.")  # by name, for a mixture may be open or a list of MLPs


@dataclass(frozen=True)
class LayerStatistics:
    """Means over the calibration text, for a layer with weight [m, n] that `tokens` tokens reach; None: not asked for.

    input_covariance: E[x xᵀ] [n, n]; input_magnitude: E|x| [n]; output_curvature: E[δ δᵀ] [m, m] with δ the gradient of
    the summed cross entropy with respect to the layer's output at one token that reaches it; row_fisher:
    Σ_j E[(δ_i x_j)²] [m], the empirical Fisher information of each row of the weight, token by token; column_fisher:
    Σ_i E[(δ_i x_j)²] [n], that of each column; weight_fisher: E[(δ_i x_j)²] [m, n], that of each number;
    column_survivors: how many numbers of each column [n] are in the half of the weight with the largest
    E[(δ_i x_j)²] W_ij², what first-order pruning would keep. All float64; zeros for an expert that no token reaches.
    """

    input_covariance: torch.Tensor | None = None
    input_magnitude: torch.Tensor | None = None
    output_curvature: torch.Tensor | None = None
    row_fisher: torch.Tensor | None = None
    column_fisher: torch.Tensor | None = None
    weight_fisher: torch.Tensor | None = None
    column_survivors: torch.Tensor | None = None
    tokens: int | None = None


def hardly_seen(name: str, linear: nn.Linear, statistics: LayerStatistics) -> bool:
    """Tell whether the layer is an expert's that fewer tokens reach than it has components to rank."""
    tokens = statistics.tokens
    return EXPERT.search(name) is not None and tokens is not None and tokens < min(linear.weight.shape)


def sums_bytes(shape: tuple[int, int], needs: frozenset[str]) -> int:
    """Return the bytes of the sums behind `needs` of a layer with weight [m, n] that shares none of them."""
    m, n = shape
    sizes = {"input_covariance": n * n, "output_curvature": m * m}
    sizes |= {"row_fisher": m, "column_fisher": n}
    numbers = m * n if needs & _BY_NUMBER else 0
    return _DOUBLE_BYTES * (n + numbers + sum(size for name, size in sizes.items() if name in needs))


def groups(
    linears: Mapping[str, nn.Linear], needs: frozenset[str], budget: int = SUMS_AT_ONCE
) -> list[dict[str, nn.Linear]]:
    """Cut the layers into groups of consecutive ones whose sums take at most `budget` bytes (a larger layer: alone).

    Which layers read the same tensor shows only when the model runs, so each counts as if it shared nothing.
    """
    layers = list(linears.items())
    sizes = [sums_bytes((linear.out_features, linear.in_features), needs) for _, linear in layers]
    return [dict(layers[part]) for part in passes(sizes, budget)]


def passes(sizes: Sequence[int], budget: int) -> list[slice]:
    """Return which layers, of sums of these `sizes`, a pass over the text each collects: a function of memory alone."""
    starts: list[int] = []
    used = 0
    for index, size in enumerate(sizes):
        if not starts or used + size > budget:
            starts.append(index)
            used = 0
        used += size
    return list(map(slice, starts, [*starts[1:], len(sizes)]))


def collect_statistics(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    tokens: torch.Tensor,
    needs: frozenset[str],
    notify: Notify = silent,
) -> dict[str, LayerStatistics]:
    """Return the statistics named in `needs` (fields of LayerStatistics) for every layer.

    tokens: [b, t] int64, run about 2048 tokens at a time, in eval mode. The input side needs no gradients; the output
    side needs a backward pass of the cross entropy of each next token. The sums live on the layers' device. Raises
    DataError naming the layer where inputs or gradients stop being finite, or that no token reaches though it is no
    expert.
    """
    if not needs:
        return {name: LayerStatistics() for name in linears}
    listeners = _listeners(linears, needs)
    backward = bool(needs & OUTPUT_SIDE)
    device = next(model.parameters()).device
    batches = tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))
    with _at_rest(model), _attached(listeners), torch.set_grad_enabled(backward):
        for step, batch in enumerate(batches, start=1):
            block = batch.to(device)
            if backward:
                logits = model(input_ids=block, use_cache=False).logits[:, :-1].float()
                cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="sum").backward()
            else:
                _trunk(model, linears)(input_ids=block, use_cache=False)
            _refuse_broken(listeners)
            notify(Event("statistics", step, len(batches)))
    return {name: listener.finish(name, tokens.numel()) for name, listener in listeners.items()}


class _InputSums:
    """Σ x xᵀ and Σ |x| of a tensor that one or more layers read."""

    def __init__(self, linear: nn.Linear, needs: frozenset[str]) -> None:
        n = linear.in_features
        self.tokens = 0
        self.magnitude = _zeros(linear, n)  # always summed: it is cheap, and it shows the first NaN
        self.covariance = _zeros(linear, n, n) if "input_covariance" in needs else None
        self._averaged = False

    def add(self, x: torch.Tensor) -> None:
        self.tokens += len(x)
        self.magnitude += x.abs().sum(dim=0, dtype=torch.float64)
        if self.covariance is not None:
            _add_outer(self.covariance, x)

    def average(self, tokens: int) -> None:
        """Turn the sums into means over `tokens` in place, so that every reader holds the same tensor objects."""
        if not self._averaged:
            self.magnitude /= tokens
            if self.covariance is not None:
                _average_outer(self.covariance, tokens)
            self._averaged = True


class _Listener:
    """A forward hook on one layer, and the sums that it feeds."""

    def __init__(self, linear: nn.Linear, needs: frozenset[str], readers: _Readers) -> None:
        m = linear.out_features
        self.linear, self.needs, self.readers = linear, needs, readers
        self.inputs: _InputSums | None = None
        self.owner = False
        self.curvature = _zeros(linear, m, m) if "output_curvature" in needs else None
        self.fisher = _zeros(linear, m) if "row_fisher" in needs else None
        self.columns = _zeros(linear, linear.in_features) if "column_fisher" in needs else None
        self.numbers = _zeros(linear, m, linear.in_features) if needs & _BY_NUMBER else None

    def __call__(self, linear: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = _rows(args[0])
        if self.inputs is None:
            self.inputs, self.owner = self.readers.find(args[0], lambda: _InputSums(self.linear, self.needs))
        if self.owner:
            self.inputs.add(x)
        if self.needs & OUTPUT_SIDE:
            # The parameters are frozen: the first layers' outputs are where the graph starts.
            output = output if output.requires_grad else output.detach().requires_grad_()
            energy = x.square().sum(dim=1)
            alone = self.columns is None and self.numbers is None
            held = None if alone else x  # else nothing holds the inputs until the backward pass
            output.register_hook(lambda delta: self._add_gradient(_rows(delta), energy, held))
        return output

    def _add_gradient(self, delta: torch.Tensor, energy: torch.Tensor, x: torch.Tensor | None) -> None:
        if self.curvature is not None:
            _add_outer(self.curvature, delta)
        if self.fisher is not None:
            self.fisher += (delta.square() * energy[:, None]).sum(dim=0, dtype=torch.float64)
        if self.columns is not None and x is not None:
            self.columns += (x.square() * delta.square().sum(dim=1)[:, None]).sum(dim=0, dtype=torch.float64)
        if self.numbers is not None and x is not None:
            self.numbers += delta.square().T @ x.square()

    @property
    def gradients(self) -> torch.Tensor | None:
        """Return sums of Fisher information that there are, of rows, of columns or of numbers, in one dimension."""
        numbers = None if self.numbers is None else self.numbers.sum(dim=1)
        return next((sums for sums in (self.fisher, self.columns, numbers) if sums is not None), None)

    def finish(self, name: str, tokens: int) -> LayerStatistics:
        """Return the means of the layer `name` over a text of `tokens`."""
        inputs = self.inputs or _InputSums(self.linear, self.needs)
        if not inputs.tokens and not EXPERT.search(name):
            raise DataError("no calibration token reaches this layer", fix="add it to layers.exclude", where=name)
        inputs.average(tokens)
        if self.curvature is not None:
            _average_outer(self.curvature, max(1, inputs.tokens))
        return LayerStatistics(
            input_covariance=inputs.covariance,
            input_magnitude=inputs.magnitude if "input_magnitude" in self.needs else None,
            output_curvature=self.curvature,
            row_fisher=None if self.fisher is None else self.fisher / tokens,
            column_fisher=None if self.columns is None else self.columns / tokens,
            weight_fisher=self.numbers / tokens if self.numbers is not None and "weight_fisher" in self.needs else None,
            column_survivors=self._survivors() if "column_survivors" in self.needs else None,
            tokens=inputs.tokens,
        )

    def _survivors(self) -> torch.Tensor:
        assert self.numbers is not None
        saliency = self.numbers * self.linear.weight.detach().double().square()
        half = saliency.flatten().kthvalue(saliency.numel() // 2 + 1).values
        return ((saliency >= half) & (saliency > 0)).sum(0).double()


class _Readers:
    """Knows which layers read the very same tensor object, without keeping any tensor alive."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], _InputSums]] = {}

    def find(self, x: torch.Tensor, make: Callable[[], _InputSums]) -> tuple[_InputSums, bool]:
        """Return the sums for `x`, and whether they are new (then the caller adds to them)."""
        key = (id(x), x._version)  # a tensor changed in place between two readers is another tensor
        if key in self._seen and self._seen[key][0]() is x:
            return self._seen[key][1], False
        sums = make()
        self._seen[key] = (weakref.ref(x), sums)
        return sums, True


def _listeners(linears: Mapping[str, nn.Linear], needs: frozenset[str]) -> dict[str, _Listener]:
    readers = _Readers()
    return {name: _Listener(linear, needs, readers) for name, linear in linears.items()}


def _zeros(linear: nn.Linear, *shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=linear.weight.device)


def _add_outer(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rowsᵀ rows to the lower triangle of `total`, strip by strip: nearly half the work of the whole product."""
    for start in range(0, len(total), _STRIP):
        strip = slice(start, start + _STRIP)
        total[start:, strip] += rows[:, start:].T @ rows[:, strip]


def _average_outer(total: torch.Tensor, tokens: int) -> None:
    """Divide by the tokens and mirror the lower triangle, in place."""
    total.tril_().add_(total.tril(-1).T).div_(tokens)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return activations as [tokens, features], at least float32, outside the graph."""
    return x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))


def _trunk(model: nn.Module, linears: Mapping[str, nn.Linear]) -> nn.Module:
    """Return the model without its head where that holds all the layers: the logits are not needed."""
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    return base if all(id(linear) in inside for linear in linears.values()) else model


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode with frozen parameters, and leave it as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _attached(listeners: Mapping[str, _Listener]) -> Iterator[None]:
    handles = [listener.linear.register_forward_hook(listener) for listener in listeners.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_broken(listeners: Mapping[str, _Listener]) -> None:
    """Raise for the first layer with broken inputs; gradients break from the last layer backwards."""
    for name, listener in listeners.items():
        if listener.inputs is not None:
            _refuse_infinite(name, "input", listener.inputs.magnitude, listener.inputs.covariance)
    for name, listener in reversed(list(listeners.items())):
        _refuse_infinite(name, "output gradient", listener.gradients, listener.curvature)


def _refuse_infinite(name: str, what: str, vector: torch.Tensor | None, matrix: torch.Tensor | None) -> None:
    sums = [part for part in (vector, None if matrix is None else matrix.diagonal()) if part is not None]
    if not all(bool(part.isfinite().all()) for part in sums):
        raise DataError(
            f"the {what} of this layer holds NaN or Inf in calibration",
            fix="check the weights of the layers before it, or run the model in float32 or bfloat16",
            where=name,
        )
