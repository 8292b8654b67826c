"""The seal: what a short run of the built-in model writes, so that moving code about is seen to change nothing.

    python -m tests.whole.seal --write        record it anew, after a change of behaviour that is meant

Three things are recorded in tests/golden/seal.json. Hashes of every file that is a function of recipe and seed: they
hold on one kind of machine and its library versions, which are recorded beside them (floating-point sums are ordered
by the processor's kernels). Names of files, keys and tensors, which hold everywhere. What is left out, and why. The
options of the command line have a file of their own, cli-options.json.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "seal.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "onnx_ir", "onnxruntime")
TIMES = "holds measured times"
LEFT_OUT = {
    "manifest.json": "holds times, the host and paths",
    "evidence/bench.json": TIMES,
    "results.json": TIMES,
    "report.md": TIMES,
    "report.html": TIMES,
    "comment.md": TIMES,
    "junit.xml": TIMES,
    "hf/README.md": TIMES,
    "triton/generate/1/model.py": "is a source file of ours",
    "soco_files.json": "lists the hashes of the files beside it",
}
OF_TRANSFORMERS = "special_tokens_map.json"  # only version 4 writes it
PIVOTED = ("storage=pivoted", "evaluation.blocks=1", "validate.parity.blocks=1", "validate.parity.greedy_prompts=1")
MASKS = ("train.scorer=acip", "train.basis=plain")


def more_runs(run: Path, short: tuple[str, ...], out: Path) -> dict[str, Path]:
    """Make what `run` has not gone through: pivoted factors, int4 weights, every layout, the other trained scorer."""
    from soco_export import export_onnx
    from soco_export.onnx.settings import ExportSettings
    from soco_export.run.verbs import Request, export, train

    made = {name: out / name for name in ("pivoted", "int4", "masks")}
    export(Request(out=made["pivoted"], format="hf", set_=PIVOTED), run)
    settings = ExportSettings(flavour="contrib", weights="int4", layouts=("optimum", "genai", "triton"))
    export_onnx(made["pivoted"] / "hf", made["int4"], settings)
    train(Request(model="tiny", out=made["masks"], set_=(*short, *MASKS)))
    return made


def take(folders: dict[str, Path]) -> dict[str, Any]:
    """Return the seal of these finished folders; the first is a whole run to ONNX."""
    found = {
        f"{name}/{file.relative_to(root).as_posix()}": file for name, root in folders.items() for file in _in(root)
    }
    run = next(iter(folders.values()))
    return {
        "machine": machine(),
        "hashes": _hashes(found),
        "left out": LEFT_OUT,
        "names": _collapsed(name for name in found if not name.endswith(OF_TRANSFORMERS)),
        "tensors": {
            name: _tensors(file)
            for name, file in sorted(found.items())
            if file.suffix == ".safetensors" and "/spectrum/" not in name
        },
        "graphs": {name: _graph(file) for name, file in sorted(found.items()) if file.suffix == ".onnx"},
        "keys": {
            name: _keys(json.loads((run / name).read_text(encoding="utf-8")))
            for name in ("plan.json", "evidence/proof.json", "evidence/card.json")
        },
        "recipe": _recipe_keys(),
        "results": _results_schema(),
    }


def machine() -> dict[str, str]:
    """Return what the numbers depend on beside recipe and seed."""
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # onnxruntime goes by another name where it knows GPUs
        return "another build"


def _processor() -> str:
    """Return the processor's maker, family and model: numbers, since clouds hide the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    fields = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    return " ".join(fields.values()) or platform.processor()


def _hashes(files: dict[str, Path]) -> dict[str, str]:
    """Return the sha256 of each file; of a spectrum, one over its files."""
    digests: dict[str, Any] = {}
    for name, file in sorted(files.items()):
        if not name.endswith(tuple(f"/{left_out}" for left_out in LEFT_OUT)):
            whole = name.partition("spectrum/")
            digests.setdefault("".join(whole[:2]), hashlib.sha256()).update(file.read_bytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def _collapsed(names: Any) -> list[str]:
    """Return the names, with those of all layers as one."""
    return sorted({re.sub(r"\blayers\.\d+", "layers.*", str(name)) for name in names})


def _tensors(file: Path) -> list[str]:
    """Return name, type and number of dimensions: how many rows there are is a rank, which the machine decides."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return _collapsed(f"{name} {part.get_dtype()} {len(part.get_shape())}d" for name, part in slices.items())


def _graph(file: Path) -> dict[str, list[str]]:
    import onnx_ir as ir

    graph = ir.load(file).graph
    return {
        "ports": [f"{value.name} {value.dtype} {value.shape}" for value in (*graph.inputs, *graph.outputs)],
        "nodes": sorted({f"{node.domain}:{node.op_type}".lstrip(":") for node in graph}),
    }


def _keys(value: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a JSON document, with those of all layers as one, without ONNX Runtime's own."""
    if not isinstance(value, dict) or prefix == "placement":
        return [prefix]
    names = {key: "*" if re.search(r"\blayers\.\d", key) else key for key in value}
    return sorted({found for key in value for found in _keys(value[key], f"{prefix}.{names[key]}".lstrip("."))})


def _recipe_keys() -> list[str]:
    from soco_export.recipe.recipe import keys

    return sorted(keys())


def _results_schema() -> list[str]:
    from soco_export.report.schema import Results

    schema = Results.model_json_schema()
    parts = {"Results": schema, **schema["$defs"]}
    return sorted(f"{part}.{name}" for part, told in parts.items() for name in told.get("properties", {}))


def main() -> None:
    """Record the seal anew."""
    from soco_export.run.verbs import Request, train_and_export
    from tests.conftest import SHORT  # first of all: it asks for one thread

    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "tiny"
        train_and_export(Request(model="tiny", out=run, set_=[*SHORT, "gates.max_ppl_ratio=null"]))
        seal = take({"run": run, **more_runs(run, SHORT, Path(folder))})
    GOLDEN.write_text(json.dumps(seal, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
