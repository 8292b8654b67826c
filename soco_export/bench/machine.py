"""What machine and which versions a figure was measured on: without it a latency means nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from soco_export.bench.figures import Machine

PACKAGES = ("soco-export", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")


def describe_machine(threads: int) -> Machine:
    """Look at this machine."""
    return Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpu=gpu_name(),
        platform=f"{platform.system()} {platform.machine()}",
        threads=threads,
        versions={"python": platform.python_version(), **_versions()},
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def gpu_name() -> str | None:
    """Return what CUDA calls the first GPU, None if there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def cpu_name() -> str:
    """Return what the system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
