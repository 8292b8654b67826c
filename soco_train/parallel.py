"""Several processes as one: torchrun or accelerate starts them, and each takes its part of every batch.

    torchrun --nproc-per-node 2 -m soco_export train-and-export --model tiny

Process 0 leads: it decomposes, plans, exports and proves alone, and it alone writes results. The others wait until it
calls them to a piece of work that is shared, and read what they need from the run folder, which all of them must see. A
batch is the same one whatever the number of processes: gradients are summed, weighted by the sequences they came from.
Parameters are whole in every process, or divided between them by `shard`.

There is no launcher here. Without one every function below is that of a single process. Importing this is light: the
command line asks `leading` before it imports anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from soco_train.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn

# The others wait this long for their next call: process 0 may be decomposing a large model.
PATIENCE = timedelta(days=7)
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Tell whether a launcher has started several processes, of which this is one."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def leading() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    return int(os.environ["RANK"]) == 0 if launched() else _rank() == 0


@contextmanager
def group() -> Iterator[None]:
    """Within this context the processes that a launcher has started can talk: NCCL between GPUs, gloo between CPUs.

    One that fails does not wait for the others: the launcher ends them when it is gone.
    """
    if not launched():
        yield
        return
    import torch
    from torch import distributed

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    yield
    distributed.destroy_process_group()


def call(text: str) -> None:
    """Call the other processes to the work that `text` names; "" lets them go. Process 0 alone calls."""
    if _processes() == 1:
        return
    import torch
    from torch import distributed

    message = torch.tensor(list(text.encode()), dtype=torch.uint8)
    distributed.broadcast(torch.tensor(len(message)), src=0)
    if text:
        distributed.broadcast(message, src=0)


def called() -> str:
    """Wait for what process 0 calls this one to."""
    import torch
    from torch import distributed

    size = torch.tensor(0)
    distributed.broadcast(size, src=0)
    message = torch.zeros(int(size), dtype=torch.uint8)
    if len(message):
        distributed.broadcast(message, src=0)
    return bytes(message.tolist()).decode()


def share(sequences: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return this process's part of the batch [b, t], and what its mean weighs in that of the whole batch.

    Raises RecipeError if there are fewer sequences than processes.
    """
    processes = _processes()
    if len(sequences) < processes:
        raise RecipeError(
            f"a batch of {len(sequences)} sequences cannot be shared between {processes} processes",
            fix="raise batch_tokens, lower data.block, or start fewer processes",
            where="recipe: batch_tokens",
        )
    own = sequences.tensor_split(processes)[_rank()]
    return own, len(own) / len(sequences)


def combine(tensor: torch.Tensor, weight: float) -> torch.Tensor:
    """Return Σ weight · tensor over the processes, the same bits in each of them; `tensor` is overwritten."""
    if _processes() > 1:
        from torch import distributed

        distributed.all_reduce(tensor.mul_(weight))
    return tensor


def combine_gradients(parameters: Iterable[nn.Parameter], weight: float) -> None:
    """Give every process the gradients of the whole batch; the parameters come in the same order in all of them."""
    if _processes() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                combine(parameter.grad, weight)


def shard(modules: Iterable[nn.Module]) -> None:
    """Divide the parameters of each module, and so their gradients and optimiser state, between the processes (FSDP2).

    A module's parameters are new objects from then on. Alone, a process keeps them whole.
    """
    if _processes() > 1:
        from torch.distributed.fsdp import fully_shard

        # each module is the root of its own tree, and a root stays whole after its forward pass unless told
        for module in modules:
            fully_shard(module, reshard_after_forward=True)


def divide_again(modules: Iterable[nn.Module]) -> None:
    """Divide the parameters of sharded modules that a forward pass has left whole, with the values of that time.

    PyTorch before 2.8 leaves roots so whatever it is told. Without a backward pass, as when measuring, they would be
    read as they were then.
    """
    for module in modules:
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()


def backward(loss: torch.Tensor, parameters: Iterable[nn.Parameter], weight: float) -> None:
    """Give every process the gradients of the whole batch, of whose mean loss `loss` is the part that weighs `weight`.

    A divided parameter gets the mean over the processes from its own backward pass; what it misses to the weighted sum
    is their number.
    """
    whole_ones = [parameter for parameter in parameters if not _divided(parameter)]
    if whole_ones:
        loss.backward()
        combine_gradients(whole_ones, weight)
    else:
        (loss * (weight * _processes())).backward()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor that may be divided. Every process has to ask for it."""
    return tensor.full_tensor() if _divided(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a divided tensor whole, on the host, to process 0, and nothing to the others; any other tensor as it is.

    Every process has to ask for it.
    """
    if not _divided(tensor):
        return tensor
    found = whole(tensor)
    return found.cpu() if leading() else found.new_empty(0)


def divided_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, which is whole, on the device of `parameter` and divided as it is."""
    if not _divided(parameter):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    layout: Any = parameter
    return distribute_tensor(tensor.to(parameter.device), layout.device_mesh, layout.placements)


def _divided(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def agree(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors with those of process 0, so that all start from the same bits."""
    if _processes() > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def several() -> bool:
    """Tell whether several processes compute together, and so must do the same things in the same order."""
    return _processes() > 1


def _processes() -> int:
    distributed = _talking()
    return distributed.get_world_size() if distributed else 1


def _rank() -> int:
    distributed = _talking()
    return distributed.get_rank() if distributed else 0


def _talking() -> Any:
    """Return torch.distributed if processes can talk; who has not imported it has no group either."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None
