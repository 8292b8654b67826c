"""Models whose value heads have fewer numbers, at random."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch

from soco_export.checkpoint.layers import apply_factors
from soco_train.forms.heads import HeadColumns, HeadRows, first_of_heads
from soco_train.modules.values import ValueSite, value_sites


def narrow(model: Any, *each: int) -> list[ValueSite]:
    """Give the attentions of `model` random projections with so many numbers in each value head, in turn.

    0 leaves one as it is; biases are drawn too.
    """
    sites, layers = value_sites(model), {}
    for site, numbers in zip(sites, cycle(each), strict=False):
        if not numbers:
            continue
        value, output = model.get_submodule(site.value), model.get_submodule(site.output)
        bias = None if value.bias is None else torch.randn_like(value.bias)
        order = first_of_heads(site.groups, site.size, numbers)
        rows = torch.randn(site.groups * numbers, value.in_features) / value.in_features**0.5
        layers[site.value] = HeadRows(rows, order, bias)
        width = site.heads * numbers
        bias = None if output.bias is None else torch.randn_like(output.bias)
        order = first_of_heads(site.heads, site.size, numbers)
        layers[site.output] = HeadColumns(torch.randn(output.out_features, width) / width**0.5, order, bias)
    apply_factors(model, layers)
    return sites
