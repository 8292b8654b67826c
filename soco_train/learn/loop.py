"""One training loop for scores, masks and factors: batches shared between processes, steps, checkpoints.

A training names its parameters and optimisers and says what one step is. It goes on from the checkpoint of its own
task, bit for bit, whatever the number of processes that share its batches (parallel.py).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from soco_train import parallel, stopping
from soco_train.data.batches import batch
from soco_train.errors import DataError
from soco_train.events import Event
from soco_train.learn.optimiser import pack_state, unpack_state
from soco_train.learn.postmortem import first_broken
from soco_train.modules.subject import Session
from soco_train.store.tensorfile import read_tensors, write_tensors


class Pace(Protocol):
    """What the loop reads of its recipe section: tokens a step, largest gradient norm, steps between saves."""

    @property
    def batch_tokens(self) -> int: ...  # noqa: D102
    @property
    def clip(self) -> float: ...  # noqa: D102
    @property
    def checkpoint_every(self) -> int: ...  # noqa: D102


class Loop(ABC):
    """The state of one training; `step` steps are done. Subclasses restore theirs with `resume` once they have it.

    tokens: [n, t] int64, in batches ordered by `seed`. Parameter groups keep their peak learning rate in `peak`.
    """

    kind: ClassVar[str]  # of the checkpoint, in its header and its name
    stage: ClassVar[str]  # of the events
    rate: ClassVar[str]  # the recipe key of the learning rate
    model: nn.Module

    def __init__(
        self,
        session: Session,
        pace: Pace,
        tokens: torch.Tensor,
        parameters: Mapping[str, nn.Parameter],
        optimisers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.session, self.pace, self.tokens = session, pace, tokens
        self.parameters, self.optimisers = dict(parameters), list(optimisers)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["peak"] = group["lr"]
        self.device = next(iter(self.parameters.values())).device
        self.step = 0
        self._started, self._tokens_done = time.monotonic(), 0

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps in all."""

    @abstractmethod
    def one_step(self) -> None:
        """Take a step and count it in `step`."""

    @abstractmethod
    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps beside parameters and moments: tensors, and JSON-able values."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""

    def goes_on(self) -> bool:
        """Tell whether there are steps left to take."""
        return self.step < self.steps

    def run(self) -> None:
        """Take the remaining steps, saving between them, and at once where somebody wants this process to stop.

        Several processes do not wait for each other's wishes: a save needs all of them at the same step.
        """
        self._started = time.monotonic()
        with stopping.listening() if not parallel.launched() else nullcontext():
            while self.goes_on():
                self.one_step()
                if stopping.wished() or (self.step % self.pace.checkpoint_every == 0 and self.goes_on()):
                    self.save()
                if stopping.wished():
                    raise KeyboardInterrupt

    def batch(self, step: int) -> torch.Tensor:
        """Return the whole batch [b, t] of a step."""
        return batch(self.tokens, self.pace.batch_tokens, step, self.session.seed)

    def own_part(self) -> tuple[torch.Tensor, float]:
        """Return this process's part of the present step's batch, and what its mean weighs in that of the whole."""
        sequences = self.batch(self.step)
        self._tokens_done += sequences.numel()
        own, weight = parallel.share(sequences)
        return own.to(self.device), weight

    def backward(self, loss: torch.Tensor, figure: torch.Tensor, weight: float) -> float:
        """Leave the gradients of the whole batch; return the mean of `figure` over it; DataError if not finite."""
        parallel.backward(loss, self.parameters.values(), weight)
        value = float(parallel.combine(figure.detach().clone(), weight))
        if not math.isfinite(value):
            raise self._broken(f"the loss is {value}", self.parameters)
        return value

    def clip(self) -> None:
        """Scale the gradients down to the norm `clip`; DataError, naming the layer, if they are not finite."""
        try:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.pace.clip, error_if_nonfinite=True)
        except RuntimeError as error:
            gradients = {name: value.grad for name, value in self.parameters.items() if value.grad is not None}
            raise self._broken("a gradient is not finite", gradients) from error

    def layer_at(self, parameter: str, index: int) -> str:
        """Return the layer to which entry `index` of a parameter belongs; here each parameter is named by its layer."""
        return parameter

    def _broken(self, what: str, values: Mapping[str, torch.Tensor]) -> DataError:
        """Return the error for a step that came to nothing; it names where the first number is that is none.

        Where all of `values` are finite the model is asked once more, module by module.
        """
        bad = {name: (~value.detach().isfinite()).reshape(-1).nonzero() for name, value in values.items()}
        found = [self.layer_at(name, int(indices[0])) for name, indices in bad.items() if len(indices)]
        first = found[0] if found else first_broken(self.model, self.batch(self.step)[:1].to(self.device))
        return DataError(
            f"{what} at step {self.step} of {self.stage}{f', first in {first}' if first else ''}",
            fix=f"lower {self.rate}, and check that the dense model's logits are finite; the last checkpoint stays",
            where=str(self._file),
        )

    def update(self, factor: float = 1.0) -> None:
        """Step every optimiser at `factor` of its peak learning rate, and forget the gradients."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def report(self, values: Mapping[str, float | int]) -> None:
        """Tell the figures of the step that is done, the speed so far and, for the curve, the learning rate."""
        speed = self._tokens_done / max(1e-9, time.monotonic() - self._started)
        record = {"lr": float(self.optimisers[0].param_groups[0]["lr"])} if self.step else {}
        self.session.notify(Event(self.stage, self.step, self.steps, {**values, "tokens/s": speed}, record=record))

    @property
    def _file(self) -> Path:
        return self.session.workdir / f"{self.kind}.safetensors"

    def save(self) -> None:
        """Write the checkpoint. Every process has to call it, process 0 writes."""
        own, values = self.state()
        tensors = pack_state(self.parameters, *self.optimisers) | own
        if parallel.leading():
            header = {"kind": self.kind, "fingerprint": self.session.fingerprint, "step": self.step, **values}
            self.session.workdir.mkdir(parents=True, exist_ok=True)
            write_tensors(self._file, tensors, header)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one of this task."""
        if not self._file.exists():
            return
        tensors, header = read_tensors(self._file, self.kind)
        own = torch.tensor(header["fingerprint"] == self.session.fingerprint)
        parallel.agree([own])  # what was measured on several GPUs may differ in its last bits, and so the fingerprints
        if own:
            unpack_state(tensors, self.parameters, *self.optimisers)
            self.step = header["step"]
            self.restore(tensors, header)
