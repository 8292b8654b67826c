"""Do the files of a run agree among themselves? One question per stage, for a run that no manifest vouches for.

    model, text ── spectrum ── scores ── plan ── factors ── hf ── onnx        each is held against what it was made from
    figures of proof and bench ── results.json ── reports                     and each report against what it tells

Each answers with nothing where they agree, else with what differs. Files are read; nothing is computed that takes long.
"""

from __future__ import annotations

import html
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from soco_export.files.replacing import LISTING, Listing
from soco_export.recipe.recipe import validated
from soco_export.report.schema import RESULTS_FILE, Results
from soco_export.run.context import RunContext
from soco_export.run.folder.names import REPORT_FILES, SIZES_FILE
from soco_export.run.stages.artefacts import provenance
from soco_export.run.stages.report import collect, write_reports
from soco_train.bounded import MADE_ANEW, read_bytes, read_text
from soco_train.store.scores import Scores

_MEASURED = ("parity", "perplexity", "tasks", "latency", "memory")
COMMAND = re.compile(r'<property name="command" value="([^"]*)" />')


def spectrum(context: RunContext) -> str:
    """A spectrum for each layer that has scores, of its shape."""
    from soco_train.store.header import read_header

    folder, found = context.path("spectrum", "spectrum"), _scores(context).layers
    for name, layer in found.items():
        if not (folder / f"{name}.safetensors").is_file():
            return f"{name} has scores and no spectrum"
        sizes = {
            part: shape for part, (_, shape) in read_header(folder / f"{name}.safetensors", MADE_ANEW).tensors.items()
        }
        m, n = layer.shape
        if sizes != {"P": (m, min(m, n)), "B": (min(m, n), n), "sigma": (min(m, n),)}:
            return f"the spectrum of {name} is no {m} × {n} layer's"
    return ""


def scores(context: RunContext) -> str:
    """Scores say how and on which text they were trained."""
    said = _scores(context).provenance
    expected = {
        "model": context.recipe.name,
        "calibration": context.blocks("calibration").source,
        "train": context.recipe.train.model_dump(mode="json"),
    }
    wrong = [key for key, value in expected.items() if key in said and said[key] != value]
    return f"the scores were learnt with another {wrong[0]} than the recipe's" if wrong else ""


def plan_agrees(context: RunContext) -> str:
    """The plan is what the scores give; where times or bytes chose it too, one of the same layers and size."""
    from soco_train.plan.rank_plan import RankPlan
    from soco_train.plan.ranks import plan_ranks

    recipe, found = context.recipe, RankPlan.load(context.path("plan", "plan.json"))
    if recipe.optimise_for == "params" and recipe.keep_bytes is None:
        same = found.to_json() == plan_ranks(_scores(context), recipe.plan).to_json()
    else:
        shapes = {name: layer.shape for name, layer in _scores(context).layers.items()}
        asked = (recipe.keep_params, recipe.storage, recipe.keep_bytes)
        has = (found.keep_params, found.storage, found.bytes.keep_bytes if found.bytes else None)
        same = {name: layer.shape for name, layer in found.layers.items()} == shapes and has == asked
    return "" if same else "plan.json is not what the scores give at the recipe's size"


def factors(context: RunContext) -> str:
    """The factors have the ranks of the plan, and name the scores and the text that they were made from."""
    from soco_export.checkpoint.layers import stored_factors
    from soco_train.forms.registry import forms_of, from_factors
    from soco_train.plan.rank_plan import RankPlan
    from soco_train.store.factors import Factors

    path = context.path("factors", "factors.safetensors")
    said = Factors.load(path).provenance
    if said.get("calibration") != context.blocks("calibration").fingerprint:
        return "the factors were made with another calibration text"
    if said.get("scores") != _scores(context).provenance:
        return "the factors were cut from other scores"
    forms = forms_of(stored_factors(path))
    for name, layer in RankPlan.load(context.path("plan", "plan.json")).layers.items():
        if layer.dense:
            continue
        if name not in forms or (forms[name].shape, from_factors(forms[name], device="meta").rank) != (
            layer.shape,
            layer.rank,
        ):
            return f"the factors of {name} have not the rank that the plan gives it"
    return ""


def checkpoint(context: RunContext) -> str:
    """The Hugging Face folder is as it was written, and holds the factors, rounded to its type."""
    import torch
    from safetensors import safe_open

    from soco_export.checkpoint.layers import replacement, stored_factors
    from soco_export.files.safetensors import open_shards, weight_files

    folder = context.path("checkpoint", "hf")
    if changed := listed(folder, "README.md"):
        return changed
    held, dtype = open_shards(weight_files(folder)), getattr(torch, context.recipe.model.dtype)
    for name, layer in stored_factors(context.path("factors", "factors.safetensors")).items():
        for part, tensor in replacement(layer, dtype).state_dict().items():
            stored = held.get(f"{name}.{part}")
            if stored is None:
                continue  # a stack of experts has another name in the file
            with safe_open(str(stored.file), framework="pt") as file:
                if not torch.equal(file.get_tensor(f"{name}.{part}"), tensor):
                    return f"{name} in hf is not what the factors make"
    return ""


def dense(context: RunContext) -> str:
    """The merged folder is as it was written."""
    return listed(context.path("dense", "dense"))


def onnx(context: RunContext) -> str:
    """The ONNX folder is as it was written, and its graph names this recipe."""
    return _graph(context.path("onnx", "onnx"), provenance(context))


def dense_onnx(context: RunContext) -> str:
    """So is the dense one, and its graph names the model."""
    model = context.recipe.model
    return _graph(context.path("onnx-dense", "onnx-dense"), {"base_model": model.id or context.recipe.name})


def evidence(context: RunContext) -> str:
    """What was measured is what results.json tells."""
    if not (context.folder.root / RESULTS_FILE).is_file():
        return f"{RESULTS_FILE}, which would vouch for it, is not there"
    told, found = (
        results.model_dump(mode="json", include=set(_MEASURED))
        for results in (Results.load(context.folder.root), collect(context))
    )
    wrong = [part for part in _MEASURED if told[part] != found[part]]
    return f"{RESULTS_FILE} tells another {wrong[0]} than was measured" if wrong else ""


def report_agrees(context: RunContext) -> str:
    """results.json is of this recipe and this model, and the reports say what it says, to the letter."""
    root = context.folder.root
    results = Results.load(root)
    if validated(results.recipe, {}) != context.recipe:  # keys that came since have their defaults
        return f"{RESULTS_FILE} was measured with another recipe"
    if results.provenance.get("model") != context.model_hash():
        return f"{RESULTS_FILE} was measured on another model"
    with tempfile.TemporaryDirectory() as work:
        write_reports(results, context, Path(work))
        changed = [
            name for name in REPORT_FILES if read_bytes(root / name, MADE_ANEW) != (Path(work) / name).read_bytes()
        ]
    return f"{changed[0]} is not what {RESULTS_FILE} makes" if changed else ""


def command_of(root: Path) -> list[str]:
    """Return the command that made the run, as its junit.xml has it; one that would make it where that is lost."""
    if (root / "junit.xml").is_file():
        found = COMMAND.search(read_text(root / "junit.xml", MADE_ANEW))
        if found:
            return shlex.split(html.unescape(found[1]))
    return ["soco-export", "train-and-export", "--recipe", str(root / "recipe.lock.yaml"), "--out", str(root)]


def listed(folder: Path, *apart: str) -> str:
    """Hold a folder against the list of hashes that lies in it; `apart`: files that were written later."""
    from soco_export.files.records import record_files

    listing = Listing.load(folder)
    if listing is None:
        return f"{folder.name} has lost its {LISTING}"
    found = {name: file.sha256 for name, file in record_files(folder, ["."]).items()}
    names = (listing.files.keys() | found.keys()) - {LISTING, *apart}
    changed = sorted(name for name in names if listing.files.get(name) != found.get(name))
    return f"{folder.name}/{changed[0]} was changed, added or lost" if changed else ""


def _graph(folder: Path, expected: Mapping[str, str]) -> str:
    from soco_export.onnx.inspect import summarise_graph

    if changed := listed(folder):
        return changed
    said = summarise_graph(folder).metadata
    wrong = [key for key, value in expected.items() if said.get(f"soco_export.{key}") != value]
    return f"the graph in {folder.name} was made for another {wrong[0]}" if wrong else ""


def _scores(context: RunContext) -> Scores:
    return Scores.load(context.path("scores", "scores.safetensors"))


# by the name of the stage whose files are asked
AGREE: Mapping[str, Callable[[RunContext], str]] = {
    "spectrum": spectrum,
    "scores": scores,
    "plan": plan_agrees,
    "sizes": lambda context: "" if context.path("sizes", SIZES_FILE).is_file() else f"{SIZES_FILE} is not there",
    "factors": factors,
    "checkpoint": checkpoint,
    "dense": dense,
    "onnx": onnx,
    "onnx-dense": dense_onnx,
    "proof": evidence,
    "bench": evidence,
    "report": report_agrees,
}
