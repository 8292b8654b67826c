"""The cut: factors from the surviving components, and the form they are stored in.

    W' = P_K diag(s_K) B_K = up · down,   up = P_K diag(√s · β),   down = diag(√s / β) B_K

β splits each component's norm evenly between the two factors, so that both have a similar range (quantisation and half
precision want that). The deviation and the layer's bias become the bias of `up`. Pivoted storage is another way to
write the same rank-r matrices, so it is chosen last, when nothing is trained any more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from soco_train.forms.base import LayerFactors
from soco_train.forms.registry import LazyLayers, find_form, forms_of
from soco_train.forms.stacked import StackedFactors, balance
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import kept
from soco_train.settings.plan import Storage
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum


def cut_layers(
    spectra: Mapping[str, Spectrum], scores: Scores, plan: RankPlan, linears: Mapping[str, nn.Linear]
) -> LazyLayers[StackedFactors]:
    """Cut every pruned layer of `plan`: stacked factors, up: [m, r], down: [r, n], bias: [m] or None.

    A layer is cut when it is asked for, so that neither all spectra nor all factors have to be in memory.
    """
    biases = {name: None if linears[name].bias is None else linears[name].bias.detach().cpu() for name in plan.layers}

    def make(name: str) -> StackedFactors:
        layer = scores.layers[name]
        return _cut(spectra[name], layer, plan.layers[name].rank, biases[name])

    forms = {}
    for name, layer in plan.layers.items():
        if not layer.dense:
            biased = biases[name] is not None or scores.layers[name].deviation is not None
            forms[name] = StackedFactors.blank(*scores.layers[name].shape, layer.rank, biased)
    return LazyLayers(forms, make)


Adapter = tuple[torch.Tensor, torch.Tensor]


def _cut(spectrum: Spectrum, layer: LayerScores, rank: int, bias: torch.Tensor | None) -> StackedFactors:
    beside = _adapter(layer, rank)
    survivors = kept(layer.importance, rank - (len(beside[1]) if beside else 0))
    return cut_layer(spectrum, layer, survivors, bias, beside)


def cut_layer(
    spectrum: Spectrum,
    layer: LayerScores,
    survivors: torch.Tensor,
    bias: torch.Tensor | None,
    beside: Adapter | None = None,
) -> StackedFactors:
    """Return the factors of the components `survivors` [r] (indices), in their order, then those of `beside`.

    bias: the dense layer's, [m] or None.
    """
    up, down = layer.components_of(spectrum, survivors)
    scale = layer.scale[survivors].double().clamp(min=0)
    if beside:
        up, down = torch.cat((up, beside[0]), 1), torch.cat((down, beside[1]))
        scale = torch.cat((scale, scale.new_ones(len(beside[1]))))
    root = scale.sqrt()
    evened = balance(up, down)
    up, down = up * (root * evened), down * (root / evened)[:, None]
    if layer.deviation is not None:
        bias = layer.deviation if bias is None else layer.deviation + bias
    return StackedFactors(up.float(), down.float(), None if bias is None else bias.float())


def _adapter(layer: LayerScores, rank: int) -> Adapter | None:
    """Return the adapter that stays beside the components, of at most `rank` ranks: its SVD's largest, in float64."""
    if layer.adapter is None:
        return None
    left, right = (part.double() for part in layer.adapter)
    if len(right) <= rank:
        return left, right
    u, sigma, v = torch.linalg.svd(left @ right, full_matrices=False)
    return u[:, :rank] * sigma[:rank], v[:rank]


def store_as(
    layers: Mapping[str, LayerFactors], storage: Storage, each: Mapping[str, Storage] | None = None
) -> Mapping[str, LayerFactors]:
    """Return stacked factors in the form the plan counted on, lossless, and what is not stacked as it is.

    A layer is converted when it is asked for. `each`: the form of single layers, where it is not `storage`.
    """
    forms = {name: find_form((each or {}).get(name, storage)) for name in layers}
    if all(form is StackedFactors for form in forms.values()):
        return layers

    def make(name: str) -> LayerFactors:
        layer = layers[name]
        return forms[name].of(**vars(layer)) if isinstance(layer, StackedFactors) else layer

    blanks = {
        name: forms[name].blank(*blank.shape, blank.down.shape[0], blank.bias is not None)
        if isinstance(blank, StackedFactors)
        else blank
        for name, blank in forms_of(layers).items()
    }
    return LazyLayers(blanks, make)
