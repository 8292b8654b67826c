"""A mixture of experts opened: three Linears an expert, where the model stores all experts of a layer in two stacks.

    experts.gate_up_proj [E, 2·inner, hidden]        experts.N.gate_proj, experts.N.up_proj [inner, hidden]
    experts.down_proj    [E, hidden, inner]          experts.N.down_proj [hidden, inner]

transformers 5 says of such a module how its stacks are laid out and what joins gate and up, and that is asked here and
not written again. The Linears are views of the stacks: nothing is copied. transformers 4.57 has most mixtures as lists
of MLPs under the same names, which need no opening.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from soco_train import parallel

_STACKS = ("gate_up_proj", "down_proj")


def is_stack(module: nn.Module) -> bool:
    """Tell whether a module holds the gated experts of a layer in two stacks that can be opened."""
    stacks = [getattr(module, name, None) for name in _STACKS]
    known = getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", False)
    return known and all(isinstance(stack, nn.Parameter) and stack.ndim == 3 for stack in stacks)


class Expert(nn.Module):
    """One gated MLP as three Linears; `number` in the stacks of a module."""

    def __init__(self, stack: Any, number: int) -> None:
        super().__init__()
        inner = stack.down_proj.shape[1 if stack.is_transposed else 2]
        halves = (
            (slice(0, inner), slice(inner, None)) if stack.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        )
        self.gate_proj, self.up_proj = (_view(stack, "gate_up_proj", number, rows) for rows in halves)
        self.down_proj = _view(stack, "down_proj", number, slice(None))

    def forward(self, x: torch.Tensor, layout: Any) -> torch.Tensor:
        """Input and output [t, hidden]; `layout`: the module of the stacks, which joins gate and up."""
        parts = (self.gate_proj(x), self.up_proj(x))
        both = torch.cat(parts, -1) if layout.is_concatenated else torch.stack(parts, -1).flatten(-2)
        y: torch.Tensor = self.down_proj(layout._apply_gate(both))
        return y


def _view(stack: Any, name: str, number: int, rows: slice) -> nn.Linear:
    """Return the Linear of `rows` of one matrix of a stack; its numbers stay the stack's."""
    stored: nn.Parameter = getattr(stack, name)
    matrix = stored.detach()[number]
    weight = (matrix.T if stack.is_transposed else matrix)[rows]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=stored.requires_grad)
    if stack.has_bias:
        bias = getattr(stack, f"{name}_bias").detach()[number][rows]
        linear.bias = nn.Parameter(bias, requires_grad=stored.requires_grad)
    return linear.train(stack.training)


class OpenExperts(nn.ModuleList):
    """The experts of a layer, one after the other; `layout` is the module that they were, without its stacks."""

    layout: Any

    def __init__(self, stack: Any) -> None:
        super().__init__(Expert(stack, number) for number in range(len(stack.down_proj)))
        # no submodule: it holds nothing that is trained, moved or saved
        self.__dict__["layout"] = _with_parameters(stack, dict.fromkeys(stack._parameters))
        self.train(stack.training)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden: [t, n]; experts chosen for each token, and their weights: [t, k] → [t, n]."""
        total = torch.zeros_like(hidden)
        for number in self._called(chosen):
            if torch.compiler.is_exporting():  # a graph of fixed nodes: every expert computes every token
                weight = (weights * (chosen == number)).sum(-1, keepdim=True)
                total = total + self[number](hidden, self.layout) * weight
                continue
            token, place = torch.where(chosen == number)
            output = self[number](hidden[token], self.layout) * weights[token, place, None]
            total = total.index_add(0, token, output.to(total.dtype))
        return total

    def _called(self, chosen: torch.Tensor) -> Iterable[int]:
        """Return the experts that compute.

        Several processes call the same ones, if with no token: gradients and divided parameters wait for each other.
        """
        everyone = torch.compiler.is_exporting() or parallel.several()
        return range(len(self)) if everyone else chosen.unique().tolist()


def _with_parameters(stack: Any, parameters: dict[str, Any]) -> Any:
    """Return a module like `stack` but for its own parameters."""
    other = copy.copy(stack)
    other.__dict__["_parameters"] = parameters
    return other


def open_experts(model: nn.Module, names: Iterable[str]) -> bool:
    """See that every mixture of `model` is open if one of `names` is a layer inside an expert's; tell whether one is.

    All or none: then a file has all experts in one way.
    """
    mixtures = {name: m for name, m in model.named_modules() if is_stack(m) or isinstance(m, OpenExperts)}
    inside = tuple(f"{name}." for name in mixtures)
    if not any(name.startswith(inside) for name in names):
        return False
    open_stacks(model)
    return True


def open_stacks(model: nn.Module) -> None:
    """Open every mixture of `model` that is not open yet."""
    for name, module in list(model.named_modules()):
        if is_stack(module):
            model.set_submodule(name, OpenExperts(module))


def open_mixtures(model: nn.Module) -> Iterator[tuple[str, OpenExperts]]:
    """Yield the mixtures of a model that are open, by name."""
    for name, module in model.named_modules():
        if isinstance(module, OpenExperts):
            yield name, module


def stacked_tensors(layout: Any, state: dict[str, torch.Tensor], name: str, count: int) -> dict[str, torch.Tensor]:
    """Take the dense experts of the mixture `name` out of `state`, and return them as the stacks of `layout`.

    A tensor that the stacks have no place for, a bias, stays in `state`.
    """

    def taken(projection: str, part: str) -> torch.Tensor:
        return torch.stack([state.pop(f"{name}.{number}.{projection}.{part}") for number in range(count)])

    found: dict[str, torch.Tensor] = {}
    for part in ("weight", "bias") if layout.has_bias else ("weight",):
        gate, up, down = (taken(projection, part) for projection in ("gate_proj", "up_proj", "down_proj"))
        both = torch.cat((gate, up), 1) if layout.is_concatenated else torch.stack((gate, up), 2).flatten(1, 2)
        for stack, matrices in zip(_STACKS, (both, down), strict=True):
            turned = matrices.transpose(1, 2).contiguous() if layout.is_transposed and part == "weight" else matrices
            found[f"{name}.{stack}" + ("_bias" if part == "bias" else "")] = turned
    return found


def close_experts(model: nn.Module) -> bool:
    """Put the stacks back in the place of every open mixture of plain experts; tell whether there was one.

    One stays open if an expert is pruned, or has a bias that the stacks have no place for.
    """
    closed = False
    for name, experts in list(open_mixtures(model)):
        linears = [module for expert in experts for module in expert.children()]
        if not all(
            isinstance(module, nn.Linear) and (module.bias is None or experts.layout.has_bias) for module in linears
        ):
            continue
        state = {f"{name}.{key}": tensor for key, tensor in experts.state_dict().items()}
        stacks = stacked_tensors(experts.layout, state, name, len(experts))
        parameters = {key.rpartition(".")[2]: nn.Parameter(tensor) for key, tensor in stacks.items()}
        model.set_submodule(name, _with_parameters(experts.layout, parameters).train(experts.training))
        closed = True
    return closed
