"""What a decoder is made of, as data.

A family is one decorated function from a config to an `Architecture` (families/). Everything else reads the
description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis; `layer` subtracts the mean and has a bias, `rms` does neither."""

    kind: Literal["rms", "layer"]
    epsilon: float


@dataclass(frozen=True)
class Names:
    """Tensor names without `.weight`; those of a layer start with `layer`, where `{}` is the layer's number."""

    embed: str
    final_norm: str
    layer: str
    attention_norm: str
    mlp_norm: str
    query: str
    key: str
    value: str
    output: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    query_norm: str | None = None
    key_norm: str | None = None
    positions: str | None = None
    head: str = "lm_head"


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with a key/value cache.

    `rope`: inverse frequencies [head_dim / 2] or None; `position_offset`: added to positions before the learned
    embedding; `windows`: per layer, how many keys a query sees (itself included) or None for all;
    two entries in `names.mlp_in` mean a gated MLP (gate first).
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm: Norm
    activation: Activation
    windows: tuple[int | None, ...]
    tied: bool
    names: Names
    rope: tuple[float, ...] | None = None
    position_offset: int = 0

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate into the up-projection."""
        return len(self.names.mlp_in) == 2

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return name → (outputs, inputs) of all Linears, layer by layer, the head last."""
        names, hidden = self.names, self.hidden
        attended, kept = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inside = {names.query: (attended, hidden), names.key: (kept, hidden), names.value: (kept, hidden)}
        inside |= {names.output: (hidden, attended)}
        inside |= {name: (self.intermediate, hidden) for name in names.mlp_in}
        inside |= {names.mlp_out: (hidden, self.intermediate)}
        each = range(self.layers)
        shapes = {f"{names.layer.format(i)}.{name}": shape for i in each for name, shape in inside.items()}
        return shapes | {names.head: (self.vocab, hidden)}

    def norms(self) -> dict[str, int]:
        """Return name → size of all normalisations."""
        names = self.names
        inside = {names.attention_norm: self.hidden, names.mlp_norm: self.hidden}
        inside |= {name: self.head_dim for name in (names.query_norm, names.key_norm) if name}
        sizes = {f"{names.layer.format(i)}.{name}": size for i in range(self.layers) for name, size in inside.items()}
        return sizes | {names.final_norm: self.hidden}
