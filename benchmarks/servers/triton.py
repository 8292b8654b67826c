"""A model repository for the tritonserver inside nvidia-pytriton, which has a Python backend but no ONNX Runtime one.

The repository is the one that `export.layouts: [triton]` writes. Only the line `backend: "onnxruntime"` of `decoder` is
replaced, by a Python model of a few lines that runs the graph (standin.py): configuration, types, shapes, the tokenizer
and the generation are Triton's and ours, and what is not tried here is that backend's own code.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.settings import ExportSettings
from soco_export.runtimes.registry import RUNTIMES, Layout

# numpy 1 because the backend was built for it; packages of the environment that runs this serve for the rest.
INSTALL = "pip install --no-deps --target .venv-triton nvidia-pytriton==0.7.0 'numpy<2'"
PACKAGES = ("tokenizers", "onnxruntime")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def installed(place: Path) -> bool:
    """Whether INSTALL has been done into `place`."""
    return (place / "pytriton" / "tritonserver").is_dir() and (place / "numpy").is_dir()


def command(folder: Path, place: Path, scratch: Path, port: int) -> list[str]:
    """Prepare repository and backend for the ONNX folder under `scratch`; return the command that serves them."""
    server = place.resolve() / "pytriton" / "tritonserver"
    backend = scratch / "backends" / "python"
    backend.mkdir(parents=True)
    stub = server / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    sources = [*(server / "backends" / "python").iterdir(), stub]
    sources += [place.resolve() / name for name in ("numpy", "numpy.libs")]
    sources += [next(Path(entry) / name for entry in sys.path if (Path(entry) / name).is_dir()) for name in PACKAGES]
    for source in sources:
        # The backend's folder is on the path of its Python processes, which see nothing else of this environment.
        (backend / source.name).symlink_to(source)
    options = {
        "model-repository": repository(folder, scratch / "onnx"),
        "backend-directory": backend.parent,
        "http-address": "127.0.0.1",
        "http-port": port,
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    return [str(server / "bin" / "tritonserver"), *(f"--{key}={value}" for key, value in options.items())]


def repository(folder: Path, copy: Path) -> Path:
    """Write the triton layout of `folder` into `copy`, a linked copy of it, with the stand-in; return its path."""
    shutil.copytree(folder, copy, copy_function=_link, ignore=shutil.ignore_patterns("triton"))
    RUNTIMES["triton"].write(Layout(copy, copy, resolve_config(copy), ExportSettings()))
    config = copy / "triton" / "decoder" / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("standin.py"), config.parent / "1" / "model.py")
    return copy / "triton"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
