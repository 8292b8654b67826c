"""What this machine can run: versions, devices, execution providers, memory, disk, and what is missing with its fix."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from soco_export.preflight.cuda import cuda_devices
from soco_train.installed import install_command, version_of

Level = Literal["ok", "note", "warning", "problem"]
SUPPORTED_TRANSFORMERS = ((4, 57), (6, 0))
EXTRAS = {
    "gpu": ("onnxruntime-gpu",),
    "eval": ("lm-eval",),
    "data": ("datasets",),
    "report": ("matplotlib",),
}
# by the name of its library, best first
PROVIDERS = {"tensorrt": "Tensorrt", "cuda": "CUDA", "migraphx": "MIGraphX", "openvino": "OpenVINO", "cpu": "CPU"}
_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `fix` says what to do unless `level` is ok."""

    subject: str
    level: Level
    text: str
    fix: str = ""


def examine(folder: Path) -> list[Finding]:
    """Return all findings; `folder` is where runs would be written (its disk is measured)."""
    checks: list[Callable[[], list[Finding]]] = [_python, _torch, _transformers, _runtime, _runtimes, _machine, _extras]
    return [finding for check in checks for finding in check()] + _disk(folder)


def versions() -> dict[str, str]:
    """Return the versions a run depends on, for its manifest."""
    packages = ("soco-export", "torch", "transformers", "tokenizers", "safetensors", "onnx", "onnx-ir")
    optional = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")
    found = {package: version_of(package) for package in (*packages, *optional)}
    installed = {package: version for package, version in found.items() if version}
    return {"python": platform.python_version(), **installed}


def document(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as JSON."""
    return {"versions": versions(), "findings": [asdict(finding) for finding in findings]}


def text(findings: list[Finding]) -> str:
    """Return the findings as a table for reading."""
    marks = {"ok": "✓", "note": "·", "warning": "!", "problem": "✗"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.level]} {finding.subject:<14} {finding.text}")
        if finding.fix:
            lines.append(f"  {'':<14} fix: {finding.fix}")
    return "\n".join(lines)


def _python() -> list[Finding]:
    return [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]


def _torch() -> list[Finding]:
    """Return version, the CUDA it is built for, and the devices that the driver shows; torch is not imported."""
    version, cuda = version_of("torch") or "not installed", _cuda_of_torch()
    found = cuda_devices()
    if cuda is None or not found.names:
        return [Finding("torch", "ok", f"{version}, no CUDA device: training runs on the CPU")]
    if found.version[0] < int(cuda.partition(".")[0]):
        text = f"{version} is built for CUDA {cuda}, and the driver ends at CUDA {'.'.join(map(str, found.version))}"
        return [Finding("torch", "warning", text, "update the driver, or install a torch built for an older CUDA")]
    return [Finding("torch", "ok", f"{version}, CUDA {cuda}: {', '.join(found.names)}")]


def _cuda_of_torch() -> str | None:
    """Return the CUDA version that torch is built for, None if for none: what its file version.py says."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    return runpy.run_path(str(Path(found.origin).with_name("version.py"))).get("cuda")


def _transformers() -> list[Finding]:
    version = version_of("transformers") or "0"
    low, high = SUPPORTED_TRANSFORMERS
    if low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        return [Finding("transformers", "ok", version)]
    return [
        Finding(
            "transformers",
            "problem",
            f"{version} is outside 4.57 … 5, the versions this one is tested with",
            'pip install "transformers>=4.57,<6"',
        )
    ]


def _runtime() -> list[Finding]:
    cpu, gpu = version_of("onnxruntime"), version_of("onnxruntime-gpu")
    if not (cpu or gpu):
        text = "onnxruntime is not installed: export works, validate and bench do not"
        return [Finding("onnxruntime", "problem", text, install_command("cpu"))]
    findings = [Finding("onnxruntime", "ok", f"{gpu or cpu}, built with {', '.join(_providers())}")]
    if cpu and gpu:
        text = f"onnxruntime {cpu} and onnxruntime-gpu {gpu} write the same folder: the one installed last is in use"
        fix = "pip uninstall onnxruntime onnxruntime-gpu, then install one of the extras cpu and gpu"
        findings.append(Finding("onnxruntime", "warning", text, fix))
    return findings


def _providers() -> list[str]:
    """Return the execution providers that the installed onnxruntime has: the CPU's, and one a library beside it."""
    found = find_spec("onnxruntime")
    folder = Path(found.origin).parent / "capi" if found and found.origin else Path()
    libraries = {path.stem.rpartition("_")[2] for path in folder.glob("*onnxruntime_providers_*")}
    return [f"{PROVIDERS[name]}ExecutionProvider" for name in PROVIDERS if name in libraries | {"cpu"}]


def _runtimes() -> list[Finding]:
    """Say which runtimes can start here; an export for the others can be made all the same."""
    from soco_export.runtimes.registry import RUNTIMES

    found = {name: (runtime.here(), runtime.install) for name, runtime in RUNTIMES.items()}
    return [
        Finding(f"target {name}", "ok", here) if here else Finding(f"target {name}", "note", "not here", install)
        for name, (here, install) in found.items()
    ]


def _machine() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    limit = os.environ.get("OMP_NUM_THREADS")
    threads = f"{os.cpu_count()} logical, {psutil.cpu_count(logical=False)} physical"
    return [
        Finding("memory", "ok", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"),
        Finding("cpu", "ok", threads + (f" (OMP_NUM_THREADS={limit})" if limit else "")),
    ]


def _disk(folder: Path) -> list[Finding]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return [Finding("disk", "ok", f"{free / _GIB:.1f} GiB free in {existing}")]


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if version_of(package) is None]
        if missing:
            fix = install_command(extra)
            findings.append(Finding(f"extra {extra}", "note", f"not installed: {', '.join(missing)}", fix))
        else:
            have = ", ".join(f"{package} {version_of(package)}" for package in packages)
            findings.append(Finding(f"extra {extra}", "ok", have))
    return findings
