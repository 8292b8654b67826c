"""What a decoder is made of, as data: attention, MLP, norms, rotation, residual stream, scales and tensor names.

A family (soco_export/onnx/families/) fills these parts in from a config; everything else reads them. What can be folded
into weights, tables or the order of rows has no part of its own: partial and interleaved rotation, fused projections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

Activation = Literal["silu", "relu", "relu2", "gelu", "gelu_tanh"]
_Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis: `rms` divides by the root mean square, `layer` subtracts the mean before.

    The factor is `offset` plus the stored `weight`, 1 where none is stored; `layer` may have a stored `bias`.
    """

    kind: Literal["rms", "layer"]
    epsilon: float
    offset: float = 0.0
    weight: bool = True
    bias: bool = False

    def parts(self) -> tuple[str, ...]:
        """Return which tensors it stores."""
        return ("weight",) * self.weight + ("bias",) * self.bias


@dataclass(frozen=True)
class Rope:
    """Rotary positions: pair i of a head turns by position · frequencies[i]; the other numbers of the head stay.

    Pair i are the numbers (i, i + pairs), or (2i, 2i + 1) where `interleaved`. `magnitude` multiplies cosines and
    sines. Sequences longer than `switch` tokens turn by the frequencies `beyond`. `growth` = (factor, context, width):
    with n > context tokens every frequency is raised as dynamic NTK scaling of `width` rotating numbers says.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    magnitude: float = 1.0
    switch: int | None = None
    beyond: tuple[float, ...] = ()
    growth: tuple[float, int, int] | None = None

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the sequence is, so that no table can hold the angles."""
        return self.switch is not None or self.growth is not None


@dataclass(frozen=True)
class HeadNorm:
    """Normalisation of queries and keys, before or after they are rotated.

    `span`: over each head with one factor [head_dim], over each head with a factor per head [heads, head_dim] (`each`;
    a `{}` in the names stands for the head where these are stored apart), or over all heads at once (`whole`).
    """

    query: str
    key: str
    norm: Norm
    span: Literal["head", "each", "whole"] = "head"
    rotated: bool = False


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention.

    `inputs`: names of the query, key and value projections, or of one that holds all three in `groups` blocks of
    [queries, keys, values]. `scale` of the scores, 1/√head_dim where None; `cap`: scores become cap · tanh(score/cap);
    `clip`: bound on the projections' outputs; `alibi`: slopes [heads] of a bias by distance; `sinks`: name of a score a
    head [heads] that takes part in the softmax and has no value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    inputs: tuple[str, ...]
    output: str
    groups: int = 1
    norm: HeadNorm | None = None
    scale: float | None = None
    cap: float | None = None
    clip: float | None = None
    alibi: tuple[float, ...] | None = None
    sinks: str | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Outputs of query, key and value projection."""
        kept = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kept, kept


@dataclass(frozen=True)
class Mlp:
    """out(activation(in x)), or where `gated` out(activation(gate x) · up x).

    `inputs`: (in,), (gate, up), or one name that holds gate above up. `clamp` = (α, limit): gated by g σ(α g) (u + 1)
    instead, with g at most the limit and u within it on both sides.
    """

    inner: int
    inputs: tuple[str, ...]
    output: str
    activation: Activation
    gated: bool = False
    clamp: tuple[float, float] | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture: each token goes through those `chosen` of `count` MLPs that score highest, weighed by their scores.

    `name`: prefix of an expert, `{}` its number; `each`: one of them; `router`: projection [count, hidden]. Scores are
    a softmax of the router's output, its sigmoid, or sparsemixer's: two experts chosen in turn, each weighed
    against those whose score is within 2 · `jitter` of its own. `correction` [count] is added for the choice alone. The
    weights are `normalised` to sum 1, then multiplied by `scale`. `shared`: an MLP that every token goes through,
    multiplied by the sigmoid of the projection `shared_gate` [1, hidden] where there is one.
    """

    count: int
    chosen: int
    name: str
    each: Mlp
    router: str
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    jitter: float = 0.0
    normalised: bool = True
    scale: float = 1.0
    correction: str | None = None
    shared: Mlp | None = None
    shared_gate: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a choice that cannot be made."""
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"{self.chosen} of {self.count} experts cannot be chosen")


@dataclass(frozen=True)
class Residual:
    """Names of the norms in a layer, where they stand; None: there is none.

    `parallel`: attention and MLP both read the stream as it entered the layer, the MLP through attention's norm where
    it has none of its own. `scale` multiplies what either adds.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None
    parallel: bool = False
    scale: float = 1.0

    def norms(self) -> tuple[str, ...]:
        """Return the names that are there."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name)


@dataclass(frozen=True)
class Scales:
    """Factors of embeddings and logits, and `cap`: logits become cap · tanh(logit/cap)."""

    embedding: float = 1.0
    logits: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class Tensors:
    """Names without `.weight` of what is not inside a layer; `layer`: prefix of those that are, `{}` its number.

    `positions`: learned position embedding, read at position + `position_offset`; `embedding_norm` follows it.
    `transposed`: dense projections inside layers are stored [inputs, outputs]. `stored`: (part of a name in the file,
    what it is called here) where these differ; several names, or one with a `{}`, stand for a stack taken apart, whose
    matrices are [inputs, outputs] with the names' outputs in turn where `turned`.
    """

    embed: str
    final_norm: str
    layer: str
    head: str = "lm_head"
    positions: str | None = None
    position_offset: int = 0
    embedding_norm: str | None = None
    transposed: bool = False
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()
    turned: bool = False


@dataclass(frozen=True)
class Layer:
    """What may differ from one layer to the next.

    `window`: how many keys a query sees, itself included; None: all. `mixture`: experts stand in the MLP's place.
    `values`: numbers of a value head; None: as many as a key has.
    """

    window: int | None = None
    rope: Rope | None = None
    mixture: bool = False
    values: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder with a key/value cache; `context` is the number of positions that it can tell apart."""

    family: str
    hidden: int
    vocab: int
    context: int
    tied: bool
    norm: Norm
    attention: Attention
    mlp: Mlp
    residual: Residual
    tensors: Tensors
    each: tuple[Layer, ...]
    scales: Scales = field(default_factory=Scales)
    experts: Experts | None = None

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.each)

    @property
    def small_values(self) -> bool:
        """Whether attention caches fewer numbers of a value than of a key."""
        return any(layer.values is not None for layer in self.each)

    def value_size(self, layer: Layer) -> int:
        """Return the numbers of a value head."""
        return layer.values or self.attention.head_dim

    @property
    def cached(self) -> int:
        """Numbers that attention caches of a token, in all layers."""
        sizes = sum(self.attention.head_dim + self.value_size(layer) for layer in self.each)
        return self.attention.kv_heads * sizes

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return name → (outputs, inputs) of all projections, layer by layer, the head last."""
        found: dict[str, tuple[int, int]] = {}
        for index, layer in enumerate(self.each):
            inside = self._attention_linears() | (
                self._expert_linears() if layer.mixture else self._mlp_linears(self.mlp)
            )
            found |= {f"{self.tensors.layer.format(index)}.{name}": shape for name, shape in inside.items()}
        return found | {self.tensors.head: (self.vocab, self.hidden)}

    def _attention_linears(self) -> dict[str, tuple[int, int]]:
        attention, hidden = self.attention, self.hidden
        sizes = attention.sizes if len(attention.inputs) > 1 else (sum(attention.sizes),)
        inside = {name: (size, hidden) for name, size in zip(attention.inputs, sizes, strict=True)}
        return inside | {attention.output: (hidden, attention.sizes[0])}

    def _mlp_linears(self, mlp: Mlp, prefix: str = "") -> dict[str, tuple[int, int]]:
        both = mlp.inner * 2 if mlp.gated and len(mlp.inputs) == 1 else mlp.inner
        inside = {f"{prefix}{name}": (both, self.hidden) for name in mlp.inputs}
        return inside | {f"{prefix}{mlp.output}": (self.hidden, mlp.inner)}

    def _expert_linears(self) -> dict[str, tuple[int, int]]:
        experts = self.experts
        assert experts is not None
        found = {experts.router: (experts.count, self.hidden)}
        for index in range(experts.count):
            found |= self._mlp_linears(experts.each, f"{experts.name.format(index)}.")
        found |= self._mlp_linears(experts.shared) if experts.shared else {}
        return found | ({experts.shared_gate: (1, self.hidden)} if experts.shared_gate else {})

    def transposed(self) -> list[str]:
        """Return the projections that are stored [inputs, outputs]."""
        return [name for name in self.linears() if self.tensors.transposed and name != self.tensors.head]

    def corrections(self) -> dict[str, _Shape]:
        """Return name → shape of what corrects the choice of experts, and of attention's sinks."""
        experts, sinks = self.experts, self.attention.sinks
        found: dict[str, _Shape] = dict(self._everywhere({sinks: (self.attention.heads,)})) if sinks else {}
        if experts is not None and experts.correction is not None:
            mixed = [index for index, layer in enumerate(self.each) if layer.mixture]
            found |= {f"{self.tensors.layer.format(index)}.{experts.correction}": (experts.count,) for index in mixed}
        return found

    def norms(self) -> dict[str, _Shape]:
        """Return name → shape of all stored tensors of normalisations."""
        inside = {f"{name}.{part}": (self.hidden,) for name in self.residual.norms() for part in self.norm.parts()}
        outside = [self.tensors.final_norm, *([self.tensors.embedding_norm] if self.tensors.embedding_norm else [])]
        found: dict[str, _Shape] = dict(self._everywhere(inside | self._head_norms()))
        return found | {f"{name}.{part}": (self.hidden,) for name in outside for part in self.norm.parts()}

    def _head_norms(self) -> dict[str, _Shape]:
        norm, shape = self.attention.norm, self.attention
        if norm is None:
            return {}
        found: dict[str, _Shape] = {}
        for name, heads in ((norm.query, shape.heads), (norm.key, shape.kv_heads)):
            size = {"head": (shape.head_dim,), "each": (heads, shape.head_dim), "whole": (heads * shape.head_dim,)}
            stored = {name.format(head): (shape.head_dim,) for head in range(heads)}
            each = stored if "{}" in name else {name: size[norm.span]}
            found |= {f"{one}.{part}": each[one] for one in each for part in norm.norm.parts()}
        return found

    def _everywhere(self, inside: dict[str, T]) -> dict[str, T]:
        prefixes = [self.tensors.layer.format(index) for index in range(self.layers)]
        return {f"{prefix}.{name}": value for prefix in prefixes for name, value in inside.items()}
