"""Factors → modules in the model, and back to dense.

Both modules keep their first factor in a parameter called `weight`, under the name that the dense weight had, with r
rows where that had m. A program that does not know these modules therefore fails on the shape when it loads such a
checkpoint, instead of running on with random weights. A layer whose rank reaches m would have the dense shape and save
nothing, so `apply_factors` puts a plain nn.Linear there.

    LowRankLinear   x ──weight [r,n]── z ──up [m,r]──(+ bias)── y
    PivotedLinear   x ──weight [r,n]── z ─┬──────────────┐
                                          └─mix [m-r,r]──┴─ concat ── rows put in `order` ──(+ bias)── y
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from soco_train.artifacts import Factors, LayerFactors, LazyLayers, PivotedFactors, StackedFactors, forms_of
from soco_train.errors import DataError
from soco_train.layers import replace_module

QUANT_METHOD = "soco-export"
INSTALL = "pip install soco-export"
FORMAT = 1  # of the record in config.json and the tensor names that go with it


class FactoredLinear(nn.Module):
    """What the two forms share: `weight` [rank, in_features], sizes, and the way back to one dense nn.Linear."""

    kind: ClassVar[str]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))

    @abstractmethod
    def dense_weight(self) -> torch.Tensor:
        """Return the [out_features, in_features] product in float64 (float32 where the factors are half precision)."""

    @abstractmethod
    def dense_bias(self) -> torch.Tensor | None:
        """Return the bias, [out_features], or None."""

    def to_linear(self) -> nn.Linear:
        """Return one dense nn.Linear with the same map, dtype, device and mode."""
        bias = self.dense_bias()
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight().to(self.weight.dtype))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear.train(self.training)

    def _product_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype in (torch.float32, torch.float64) else torch.float32

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(FactoredLinear):
    """y = up(weight x): two MatMuls, r(m + n) numbers. The bias, if there is one, belongs to `up`."""

    kind = "stacked"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        self.up = nn.Linear(rank, out_features, bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls, factors: StackedFactors, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRankLinear:
        """Build from up [m, r], down [r, n] and the complete bias [m] or None."""
        (rank, n), m = factors.down.shape, factors.up.shape[0]
        module = cls(n, m, rank, factors.bias is not None, device="meta")
        module.weight = _parameter(factors.down, dtype, device)
        module.up.weight = _parameter(factors.up, dtype, device)
        if factors.bias is not None:
            module.up.bias = _parameter(factors.bias, dtype, device)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return self.up(F.linear(x, self.weight))

    def dense_weight(self) -> torch.Tensor:
        """Return up @ weight."""
        exact = self._product_dtype()
        return self.up.weight.detach().to(exact) @ self.weight.detach().to(exact)

    def dense_bias(self) -> torch.Tensor | None:
        """Return the bias of `up`."""
        return self.up.bias


class PivotedLinear(FactoredLinear):
    """y[order] = [z ; mix z] with z = weight x: r(m + n - r) numbers. Source: PIFA (arXiv 2501.19090).

    `weight` holds r rows of the dense weight, `mix` expresses the other m - r rows by them, and `order` (int64 [m],
    never cast) says which output row each entry of the concatenation is. As a buffer it needs `offload_buffers=True`
    where transformers 4.57 offloads such a layer to disk.
    """

    kind = "pivoted"
    order: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        self.mix = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(out_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls, factors: PivotedFactors, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> PivotedLinear:
        """Build from pivot [r, n], mix [m - r, r], order [m] and the complete bias [m] or None."""
        (rank, n), m = factors.pivot.shape, factors.order.shape[0]
        module = cls(n, m, rank, factors.bias is not None, device="meta")
        module.weight = _parameter(factors.pivot, dtype, device)
        module.mix.weight = _parameter(factors.mix, dtype, device)
        module.order = factors.order.detach().to(device=device, dtype=torch.int64, copy=True)
        if factors.bias is not None:
            module.bias = _parameter(factors.bias, dtype, device)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        z = F.linear(x, self.weight)
        rows = torch.cat((z, self.mix(z)), dim=-1)
        y = torch.empty_like(rows).index_copy(-1, self.order, rows)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> torch.Tensor:
        """Return the rows [weight ; mix @ weight], each where `order` says."""
        exact = self._product_dtype()
        pivot = self.weight.detach().to(exact)
        rows = torch.cat((pivot, self.mix.weight.detach().to(exact) @ pivot))
        return torch.empty_like(rows).index_copy(0, self.order, rows)

    def dense_bias(self) -> torch.Tensor | None:
        """Return `bias`."""
        return self.bias


FACTORED: dict[str, type[LowRankLinear] | type[PivotedLinear]] = {
    LowRankLinear.kind: LowRankLinear,
    PivotedLinear.kind: PivotedLinear,
}


def from_factors(
    factors: LayerFactors, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> FactoredLinear:
    """Return the module that carries `factors`, in `dtype` on `device` (None: as the factors are)."""
    if isinstance(factors, StackedFactors):
        return LowRankLinear.from_factors(factors, dtype, device)
    return PivotedLinear.from_factors(factors, dtype, device)


def stored_factors(path: Path) -> LazyLayers[LayerFactors]:
    """Return the layers of a `factors.safetensors`, each read when it is asked for."""
    return LazyLayers(forms_of(Factors.load(path).layers), lambda name: Factors.load(path).layers[name])


def apply_factors(
    model: nn.Module,
    factors: Factors | Mapping[str, LayerFactors],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Replace each Linear that `factors` names, keeping its mode, and its dtype and device unless they are given.

    A layer of full rank becomes one dense nn.Linear. On the device `meta` layers have shapes alone; `replacement` gives
    the values. Raises DataError, with the model untouched, if a name is not a Linear of the model or a shape differs.
    """
    layers = factors.layers if isinstance(factors, Factors) else factors
    modules = dict(model.named_modules())
    forms = forms_of(layers)
    for name, form in forms.items():
        _check_same_layer(name, modules.get(name), form)
    del modules  # with it the dense weights, one at a time as they are replaced
    for name, layer in (forms if str(device) == "meta" else layers).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module = replacement(layer, dtype or linear.weight.dtype, device or linear.weight.device)
        replace_module(model, name, module.train(linear.training))
    record_layers(model)


def replacement(layer: LayerFactors, dtype: torch.dtype, device: torch.device | str | None = None) -> nn.Module:
    """Return what `apply_factors` puts in the place of a Linear; a product is formed before anything is rounded."""
    sizes = from_factors(layer, device="meta")
    if sizes.rank < sizes.out_features:
        return from_factors(layer, dtype, device)
    return from_factors(layer, device=device).to_linear().to(dtype)


def _check_same_layer(name: str, module: nn.Module | None, layer: LayerFactors) -> None:
    if isinstance(layer, StackedFactors):
        m, n = layer.up.shape[0], layer.down.shape[1]
    else:
        m, n = layer.order.shape[0], layer.pivot.shape[1]
    if not isinstance(module, nn.Linear) or module.weight.shape != (m, n):
        raise DataError(
            f"the factors of {name} make a Linear of {m} × {n}, the model has {module or 'nothing'} there",
            fix="use the factors of this model's own run",
            where=name,
        )


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """Return the pruned modules by qualified name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def merge_dense(model: nn.Module) -> None:
    """Replace each pruned module by one nn.Linear with the same map; the product is formed in float32 or float64."""
    for name, module in factored_layers(model).items():
        replace_module(model, name, module.to_linear())
    record_layers(model)


def record_layers(model: nn.Module) -> None:
    """Write which layers are pruned into `model.config`, if there is one, so that `save_pretrained` keeps it.

    The record is the config's `quantization_config`; a model without pruned layers has none.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    layers = {
        name: {"kind": module.kind, "rank": module.rank, "bias": module.dense_bias() is not None}
        for name, module in factored_layers(model).items()
    }
    if layers:
        config.quantization_config = quantization_record(layers)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def quantization_record(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint with these `layers`: name → kind, rank, bias."""
    kinds = {str(layer["kind"]) for layer in layers.values()}
    return {
        "quant_method": QUANT_METHOD,
        "install": INSTALL,
        "format": FORMAT,
        "storage": kinds.pop() if len(kinds) == 1 else "mixed",
        "layers": layers,
    }


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the model's parameters hold; a tied parameter counts once, `order` not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def _parameter(tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device=device, dtype=dtype, copy=True).contiguous())
