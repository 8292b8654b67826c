"""Download sizes of exported folders: `pack` beside plain zstd -19 and ZipNN, file by file, in bytes.

    python -m benchmarks.packing runs/demo/onnx runs/demo/hf … --out benchmarks/packing/results.json

ZipNN (pip install zipnn) is asked with each type that it knows and its shortest answer counts, for the weights alone;
what else lies in the folder is counted as zstd -19 has it. It is left out where it is not installed. Seconds are one
call's, on one thread. A Hugging Face folder behind --bfloat16 is measured once more with its weights in that type.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zstandard
from safetensors.torch import load_file, save_file

from soco_export.files.pack import pack_folder, unpack_file
from soco_export.files.replacing import LISTING

WEIGHTS = (".safetensors", ".data")
LEVEL = 19
ZIPNN_TYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bfloat16", type=Path, nargs="*", default=[], help="Hugging Face folders")
    arguments = parser.parse_args()
    command = f"python -m benchmarks.packing {' '.join(sys.argv[1:])}"
    rows = {str(folder): measure(folder) for folder in arguments.folders}
    for folder in arguments.bfloat16:
        with tempfile.TemporaryDirectory() as work:
            rows[f"{folder} in bfloat16"] = measure(rounded(folder, Path(work) / "model"))
    arguments.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


def rounded(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    for path in to.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return to


def measure(folder: Path) -> dict[str, object]:
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LISTING}
    plain = {path: len(zstandard.compress(data, LEVEL)) for path, data in files.items()}
    row: dict[str, object] = {"bytes": sum(map(len, files.values())), "zstd_19": sum(plain.values())}
    with tempfile.TemporaryDirectory() as work:
        archive, began = Path(work) / "a.socopack", time.perf_counter()
        pack_folder(folder, archive)
        packed = time.perf_counter()
        unpack_file(archive, Path(work) / "back")
        row |= {
            "pack": archive.stat().st_size,
            "pack_seconds": round(packed - began, 2),
            "unpack_seconds": round(time.perf_counter() - packed, 2),
        }
        same = all((Path(work) / "back" / path.relative_to(folder)).read_bytes() == files[path] for path in files)
        row["bit_identical"] = same
    coded = zipnn()
    if coded:
        row["zipnn"] = sum(coded(data) if path.suffix in WEIGHTS else plain[path] for path, data in files.items())
    print(f"{folder}: {row}")
    return row


def zipnn() -> Callable[[bytes], int] | None:
    try:
        from zipnn import ZipNN
    except ImportError:
        return None
    return lambda data: min(
        len(ZipNN(input_format="byte", bytearray_dtype=dtype).compress(bytearray(data))) for dtype in ZIPNN_TYPES
    )


if __name__ == "__main__":
    main()
