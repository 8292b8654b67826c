"""What cutting and rounding a layer cost, without running the model: ½ tr(G E C Eᵀ) with E = W - Ŵ.

    C = E[x xᵀ] [n, n] of the layer's input      G = E[δ δᵀ] [m, m] of the loss's gradient at its output

That is the second-order loss per token with inputs and gradients taken as independent (a Kronecker-factored Fisher
norm, arXiv 1503.05671), so errors of different layers can be added and compared. With W = P B and û, d̂ the columns and
rows of the factors as they are stored, the error at *every* rank r is read off three k × k products:

    tr(G E C Eᵀ) = ‖P B‖² - 2 Σ_{j<r} Σ_i (PᵀGÛ ∘ B C D̂ᵀ)_ij + Σ_{i,j<r} (ÛᵀGÛ ∘ D̂ C D̂ᵀ)_ij

Û and D̂ are rounded as their rule rounds rows, in blocks of one size. What rounding adds to a cut layer in other blocks,
or by a rule that leaves less of it where it knows the inputs, is that, times what the same change makes of the dense
weight's error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from soco_train.events import Event, Notify, silent
from soco_train.forms.base import LayerFactors
from soco_train.forms.registry import from_factors, planned_forms
from soco_train.forms.stacked import StackedFactors, balance
from soco_train.modules.subject import Subject
from soco_train.numbers.blocks import Grid
from soco_train.numbers.feedback import curvature, row_errors
from soco_train.numbers.rules import Inputs, find_rounding
from soco_train.settings.rounding import BITS, TABLE_TYPES, TYPES, WeightType
from soco_train.spectra.bases import present
from soco_train.spectra.statistics import LayerStatistics, collect_statistics, groups
from soco_train.store.damage import DENSE, Damage, LayerDamage, StorageKind, types_of
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum

NEEDS = frozenset({"input_covariance", "output_curvature"})
_SAMPLED = 4  # ranks at which a form is built whose factors of one rank are no part of those of the next
_ROWS = 64  # of a layer that tell what knowing its inputs leaves
_AT_ONCE = 1024  # tokens in one backward pass
Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RoundedInBlocks:
    """How matrices could be rounded: inputs of a block, zero in the middle or not, by which rule (numbers/rules.py)."""

    sizes: tuple[int, ...] = (32, 64, 128)
    symmetric: bool = True
    rule: str = "nearest"

    @property
    def middle(self) -> int:
        """The size of block that pruned layers are measured in."""
        return self.sizes[len(self.sizes) // 2]

    def kinds(self, types: Sequence[WeightType]) -> list[tuple[WeightType, int]]:
        """Return each (type, block) there is; floats have no blocks."""
        return [(kind, size) for kind in types for size in (self.sizes if kind in BITS else (0,))]

    def rounding(self, weights: WeightType, block: int) -> Round:
        """Return what is left of a matrix in the type `weights`, its rows rounded by their numbers alone."""
        if weights == "same":
            return lambda matrix: matrix
        grid, rule = Grid(BITS[weights], block, self.symmetric), find_rounding(self.rule)
        return lambda matrix: rule.rows(matrix.float(), grid).values().to(matrix.dtype)

    def left(self, weight: torch.Tensor, statistics: LayerStatistics) -> float:
        """Return the share of that error which is left by knowing the inputs: of some rows of `weight`, in int4."""
        rule = find_rounding(self.rule)
        if not rule.calibrates:
            return 1.0
        covariance = present(statistics.input_covariance)
        inputs = Inputs(covariance, curvature(covariance), statistics.tokens or 0)
        rows, grid = weight[:: -(-len(weight) // _ROWS)].float(), Grid(4, self.middle, self.symmetric)
        found = rule.layer([rows], grid, inputs)[0], rule.rows(rows, grid)
        ours, plain = (float(row_errors(rows, part.values(), inputs.known.covariance).sum()) for part in found)
        return ours / plain if plain else 1.0


@dataclass(frozen=True)
class LossNorm:
    """½ tr(G E C Eᵀ) for E [m, n] in its own dtype; what is cut in float64, where it is a small difference."""

    left: torch.Tensor
    right: torch.Tensor

    @staticmethod
    def of(statistics: LayerStatistics) -> LossNorm:
        """Return the norm of one layer."""
        return LossNorm(present(statistics.output_curvature).double(), present(statistics.input_covariance).double())

    def error(self, difference: torch.Tensor) -> float:
        """Return the loss that an error `difference` [m, n] of the weight makes."""
        left, right = self.left.to(difference.dtype), self.right.to(difference.dtype)
        return float(((left @ difference) * (difference @ right)).sum(dtype=torch.float64)) / 2

    def cut(self, exact: Sequence[torch.Tensor], stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the losses [k + 1] of keeping the first r components, as `stored`, of `exact`; each (up, down)."""
        (up, down), (kept_up, kept_down) = exact, stored
        energy = ((up.T @ self.left @ up) * (down @ self.right @ down.T)).sum()
        left, right = self.left @ kept_up, kept_down @ self.right
        crossing = ((up.T @ left) * (down @ right.T)).sum(0).cumsum(0)
        own = ((kept_up.T @ left) * (right @ kept_down.T)).cumsum(0).cumsum(1).diagonal()
        return torch.cat([energy[None], energy - 2 * crossing + own]).clamp_min(0) / 2


def damage_to(
    linear: nn.Linear, statistics: LayerStatistics, spectrum: Spectrum, scores: LayerScores, blocks: RoundedInBlocks
) -> LayerDamage:
    """Return the errors of one layer dense, stacked and in every other form, in every type and block."""
    norm, weight = LossNorm.of(statistics), linear.weight.detach().double()
    kinds = blocks.kinds(TYPES)
    dense = {kind: norm.error((weight - blocks.rounding(*kind)(weight)).float()) for kind in kinds}
    left = blocks.left(weight, statistics)
    exact, added = _pruned(_components(spectrum, scores, weight.device), norm, blocks)
    curves: dict[StorageKind, torch.Tensor] = {}
    for (weights, block), error in dense.items():
        curves[DENSE, weights, block] = torch.tensor([left * error], dtype=torch.float64)
        measured = dense[weights, blocks.middle if block else 0]
        share = left * error / measured if measured else 1.0
        some = {form: more[weights] for form, more in added.items() if weights in more}
        curves |= {(form, weights, block): exact + share * more for form, more in some.items()}
    biased = scores.deviation is not None and linear.bias is None
    return LayerDamage(scores.shape, {key: curve.cpu() for key, curve in curves.items()}, biased)


def _pruned(
    factors: tuple[torch.Tensor, torch.Tensor], norm: LossNorm, blocks: RoundedInBlocks
) -> tuple[torch.Tensor, dict[str, dict[WeightType, torch.Tensor]]]:
    """Return (what cutting loses [k + 1], by form and type what rounding in blocks of `middle` adds)."""
    roundings = {weights: blocks.rounding(weights, blocks.middle) for weights in TYPES}
    stored = {
        weights: norm.cut(factors, [rounding(part) for part in factors]) for weights, rounding in roundings.items()
    }
    exact = stored["same"]
    added = {"stacked": {weights: curve - exact for weights, curve in stored.items()}}
    for kind, form in planned_forms().items():
        if form is not StackedFactors:
            added[kind] = _sampled(form, factors, norm, {weights: roundings[weights] for weights in types_of(kind)})
    return exact, added


def _components(spectrum: Spectrum, scores: LayerScores, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up [m, k], down [k, n]), the components that live longest first, each with its norm shared evenly."""
    order = torch.sort(scores.importance, descending=True, stable=True).indices
    up, down = scores.components_of(spectrum, order)
    evened = balance(up, down)
    return (up * evened).to(device), (down / evened[:, None]).to(device)


def _sampled(
    form: type[LayerFactors], factors: Sequence[torch.Tensor], norm: LossNorm, roundings: Mapping[WeightType, Round]
) -> dict[WeightType, torch.Tensor]:
    """Return what rounding adds in another form [k + 1] by type, measured at a few ranks, in between by a line."""
    up, down = factors
    k = up.shape[1]
    ranks = sorted({max(1, k * (2 * step + 1) // (2 * _SAMPLED)) for step in range(_SAMPLED)} - {k})
    found: dict[WeightType, list[float]] = {weights: [] for weights in roundings}
    for rank in ranks:
        exact = up[:, :rank] @ down[:rank]
        numbers = form.of(up[:, :rank].float(), down[:rank].float(), None)
        for weights, rounding in roundings.items():
            parts = {name: _rounded(part, rounding) for name, part in vars(numbers).items()}
            stored = from_factors(type(numbers)(**parts)).dense_weight().to(exact.device)
            found[weights].append(norm.error((exact - stored).float()) if weights != "same" else 0.0)
    return {weights: _between(ranks, values, k) for weights, values in found.items()}


def _rounded(part: torch.Tensor | None, rounding: Round) -> torch.Tensor | None:
    whole = part is None or part.ndim < 2 or not part.numel() or not part.is_floating_point()
    return part if whole or part is None else rounding(part)


def _between(ranks: Sequence[int], values: Sequence[float], k: int) -> torch.Tensor:
    """Return [k + 1] values on the lines between those known, level before the first and behind the last."""
    if not ranks:
        return torch.full((k + 1,), torch.inf, dtype=torch.float64)
    at, known = torch.arange(k + 1).double(), torch.tensor(values, dtype=torch.float64)
    places = torch.tensor(ranks).double()
    high = torch.searchsorted(places, at).clamp(1, max(1, len(ranks) - 1)) if len(ranks) > 1 else torch.zeros_like(at)
    if len(ranks) == 1:
        return known.expand(k + 1).clone()
    high = high.long()
    share = ((at - places[high - 1]) / (places[high] - places[high - 1])).clamp(0, 1)
    return known[high - 1] + share * (known[high] - known[high - 1])


def measure_damage(
    subject: Subject, scores: Scores, tokens: torch.Tensor, blocks: RoundedInBlocks, notify: Notify = silent
) -> Damage:
    """Return the damage to all layers of `subject`, token table and head; tokens: calibration blocks [b, t].

    Two passes over the text with a backward pass each, as many more as the layers' covariances need to fit in memory.
    """
    layers = damage_to_tables(subject.model, tokens, blocks)
    for part in groups(subject.linears, NEEDS):
        statistics = collect_statistics(subject.model, part, tokens, NEEDS, notify)
        for name, linear in part.items():
            layers[name] = damage_to(linear, statistics[name], subject.spectra[name], scores.layers[name], blocks)
            done = sum(other in layers for other in subject.linears)
            notify(Event("damage", done, len(subject.linears), {"layer": name}))
    return Damage(layers)


def damage_to_tables(model: nn.Module, tokens: torch.Tensor, blocks: RoundedInBlocks) -> dict[str, LayerDamage]:
    """Return the errors of the token table and of the head, each under its module's name; a tied head has its own.

    table: Σ_v f_v e_vᵀ G e_v, f_v how often token v is read, G the curvature where it is; head: Σ_v E[δ_v²] e_vᵀ C e_v.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    weight = table.weight.detach().double()
    curvature = _curvature_behind(table, model, tokens)
    often = frequencies(tokens, len(weight)).to(weight)

    def lost(error: torch.Tensor) -> float:
        return float((often * ((error @ curvature) * error).sum(1)).sum()) / 2

    found = {
        names[id(table)]: _whole(weight, TABLE_TYPES, replace(blocks, symmetric=True), lost),
    }
    if head is not None:
        name = next(name for name, module in model.named_modules() if module is head)
        known = collect_statistics(model, {name: head}, tokens, frozenset({"input_covariance", "row_fisher"}))[name]
        covariance = present(known.input_covariance)
        rows = present(known.row_fisher) / covariance.diagonal().sum().clamp_min(1e-30)

        def missed(error: torch.Tensor) -> float:
            return float((rows * ((error @ covariance) * error).sum(1)).sum()) / 2

        found[name] = _whole(head.weight.detach().double(), TYPES, blocks, missed)
    return found


def _whole(
    weight: torch.Tensor, types: Sequence[WeightType], blocks: RoundedInBlocks, error: Callable[[torch.Tensor], float]
) -> LayerDamage:
    curves: dict[StorageKind, torch.Tensor] = {}
    for kind, block in blocks.kinds(types):
        rounding = blocks.rounding(kind, block)
        curves[DENSE, kind, block] = torch.tensor([error(weight - rounding(weight))], dtype=torch.float64)
    return LayerDamage((weight.shape[0], weight.shape[1]), curves)


def frequencies(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return how often each token is read [vocabulary], summing to 1; those never seen share what Good and Turing say.

    That share is the part of the text made of tokens seen once (Good, Biometrika 40, 1953).
    """
    counts = torch.bincount(tokens.flatten().cpu(), minlength=vocabulary).double()
    unseen = int((counts == 0).sum())
    share = float((counts == 1).sum() / counts.sum()) if unseen else 0.0
    return counts / counts.sum() * (1 - share) + (counts == 0) * (share / max(1, unseen))


def _curvature_behind(table: nn.Module, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return E[δ δᵀ] [hidden, hidden], δ the gradient of the summed cross entropy at one row that the table gives."""
    width = table.weight.shape[1]  # type: ignore[index]
    total = torch.zeros(width, width, dtype=torch.float64, device=table.weight.device)  # type: ignore[arg-type]
    rows: list[torch.Tensor] = []

    def catch(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        rows.append(output.detach().requires_grad_())
        return rows[-1]

    handle = table.register_forward_hook(catch)
    try:
        for batch in tokens.split(max(1, _AT_ONCE // tokens.shape[1])):
            block = batch.to(total.device)
            with torch.enable_grad():
                logits = model(input_ids=block, use_cache=False).logits[:, :-1].float()
                loss = cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, rows.pop())
            flat = gradient.flatten(0, 1).double()
            total += flat.T @ flat
    finally:
        handle.remove()
    return total / tokens.numel()
