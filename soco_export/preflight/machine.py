"""Whether this machine can do a run: what is installed, and what is free beside the cost card."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from soco_export.files.text import human_bytes
from soco_export.preflight.cost_card import CostCard
from soco_export.recipe.recipe import Recipe
from soco_train.errors import MachineError
from soco_train.installed import install_command, version_of

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Resources:
    """Bytes that are free: host memory, GPU memory (None: no GPU), disk where the run is written."""

    memory: int
    gpu: int | None
    disk: int


def check_onnxruntime(recipe: Recipe) -> None:
    """Raise MachineError if ONNX Runtime is not installed or does not have the provider of the recipe."""
    try:
        from soco_export.evaluate.decoders.session import check_provider, check_rounded_cache
    except ImportError as error:
        raise MachineError(
            f"onnxruntime is not installed ({error})",
            fix=f"{install_command('cpu')} (or [gpu]), or ask for --format hf",
            where="recipe: validate.provider",
        ) from None
    try:
        check_provider(recipe.validation.provider)
        if recipe.export.cache != "same":
            check_rounded_cache(recipe.validation.provider, recipe.export.cache)
    except MachineError as error:
        if version_of("onnxruntime") and version_of("onnxruntime-gpu"):
            raise MachineError(
                f"{error.message}; onnxruntime and onnxruntime-gpu are both installed and write the same folder",
                fix="pip uninstall onnxruntime onnxruntime-gpu, then install one of the extras cpu and gpu",
                where=error.where,
            ) from None
        raise


def check_room(card: CostCard, machine: Resources, already: int = 0) -> None:
    """Raise MachineError if disk or memory will not do. `already`: bytes of the run that are on the disk. Pure."""
    needed = card.disk_total - already
    if needed > machine.disk:
        largest = max(card.disk, key=lambda name: card.disk[name])
        free = f"{human_bytes(machine.disk)} are" if machine.disk else "nothing is"
        raise MachineError(
            f"the run needs about {human_bytes(needed)} of disk, and {free} free",
            fix="free some space, or give --out on a larger disk "
            f"(most of it is {largest}: {human_bytes(card.disk[largest])})",
            where="--out",
        )
    for phase in card.phases:
        if machine.gpu is not None and phase.device > machine.gpu:
            raise _too_small(phase.name, "GPU memory", phase.device, machine.gpu)
        host = phase.alone if machine.gpu is None else phase.host
        if host > machine.memory:
            raise _too_small(phase.name, "memory", host, machine.memory)


def _too_small(phase: str, kind: str, needed: int, free: int) -> MachineError:
    fixes = {
        "statistics": "use a larger machine, or train.basis: plain",
        "scores": "lower train.batch_tokens, set train.checkpoint_activations, or train.factor_dtype: bfloat16",
        "compensation": "lower data.block, or refine.compensate.blocks: 0",
        "distillation": "refine.distill.teacher_top: 512, optimiser: muon, fewer batch_tokens, or steps: 0",
        "proof": "export.weights: int8, or bench.enabled: false on a machine that is larger",
    }
    return MachineError(
        f"{phase} needs about {human_bytes(needed)} of {kind}, and {human_bytes(free)} are free",
        fix=fixes.get(phase, "use a larger machine"),
        where="soco-export train-and-export --dry-run shows all estimates",
    )


def look(root: Path) -> Resources:
    """Return what is free on this machine; `root` is where the run will be written."""
    import psutil
    import torch

    memory = psutil.virtual_memory().available
    # a container may have less than the machine it runs on
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text(encoding="ascii").strip()).isdigit():
        memory = min(memory, int(limit))
    gpu = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    return Resources(memory, gpu, shutil.disk_usage(existing).free)


def bytes_in(root: Path) -> int:
    """Return the bytes of the files in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) if root.is_dir() else 0
