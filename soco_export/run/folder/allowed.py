"""Whether a run may be written into a folder: it is new, or holds that run; read before anything is written."""

from __future__ import annotations

import re
from pathlib import Path

from soco_export.files.records import check_apart, record_file
from soco_export.files.safetensors import weight_files
from soco_export.recipe.difference import differences
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.manifest import Manifest, lock_hash
from soco_export.run.folder.names import DAMAGE, HELD, LOCK, MANIFEST, PROFILE, SIZES_FILE, UNFINISHED
from soco_train.bounded import read_text
from soco_train.errors import RecipeError

CONTENT = (
    "spectrum",
    "scores.safetensors",
    DAMAGE,
    "plan.json",
    SIZES_FILE,
    "factors.safetensors",
    *("hf", "dense", "onnx", "onnx-dense"),
    "evidence",
    PROFILE,
    *("results.json", "report.md", "report.html", "comment.md", "junit.xml"),
    *(UNFINISHED, LOCK, MANIFEST),
)
PARTIAL = re.compile(r"\.(manifest\.json|recipe\.lock\.yaml|latency\.json)\.\d+\.partial")
# Sections that say how a result is looked at; changing them in an existing run only repeats the looking.
EVIDENCE_SECTIONS = frozenset({"description", "evaluation", "validate", "bench", "gates"})


def check_place(root: Path) -> None:
    """Raise RecipeError if no run may be written into `root`: a link, a file, or what is no run; reads only."""
    check_apart(root, (), where=str(root))
    if not root.exists():
        return
    if not root.is_dir():
        raise RecipeError(f"{root} is a file", fix="move it away, or give another --out", where=str(root))
    _check_links(root)
    if Manifest.load(root) is None:
        _check_free(root)


def check_folder(root: Path, recipe: Recipe, fresh: bool) -> None:
    """Raise RecipeError if a run of `recipe` must not be written into `root`; reads only."""
    check_place(root)
    manifest = Manifest.load(root)
    if manifest is None:
        return
    if not fresh:
        _check_same_run(root, recipe, manifest)
    else:
        manifest.check_own(root, [name for name in CONTENT if name not in (UNFINISHED, LOCK, MANIFEST, PROFILE)])


def _check_links(root: Path) -> None:
    links = [name for name in (*CONTENT, HELD) if (root / name).is_symlink()]
    if links:
        raise RecipeError(
            f"{root / links[0]} is a link, and links are not written through",
            fix="put the file or folder itself there, or give another --out",
            where=str(root / links[0]),
        )


def _check_free(root: Path) -> None:
    """Raise RecipeError if `root`, which has no manifest, holds more than what a run leaves that dies at its start."""
    held = root / HELD
    ours = {HELD} if held.is_file() and not held.stat().st_size else set()
    names = sorted(path.name for path in root.iterdir())
    strangers = [name for name in names if name not in ours and not PARTIAL.fullmatch(name)]
    if LOCK in strangers:
        raise RecipeError(
            f"{root} holds a run that has lost its {MANIFEST}",
            fix=f"soco-export repair {root}, or put {MANIFEST} back, or give another --out",
            where=str(root / MANIFEST),
        )
    if strangers:
        raise RecipeError(
            f"{root} holds files that are no run of soco-export ({', '.join(strangers[:3])})",
            fix="move them away, or give another --out: nothing is written over them, not even with --fresh",
            where=str(root),
        )


def _check_same_run(root: Path, recipe: Recipe, manifest: Manifest) -> None:
    if not manifest.stages and not (root / LOCK).exists():
        return  # died before it began
    check_lock(root)
    try:
        there = read_lock(root)
    except RecipeError as error:
        if not (root / LOCK).is_file():
            raise
        raise RecipeError(
            f"{root} holds a run that this version cannot read: {error.message}",
            fix="move it away, or give another --out, or --fresh to start over there (its results are then lost)",
            where=error.where,
        ) from error
    changed = [key for key in differences(there, recipe) if key.split(".")[0] not in EVIDENCE_SECTIONS]
    if "model.path" in changed and recipe.model.path is not None:
        _check_moved(recipe.model.path, manifest)
        changed.remove("model.path")
    if changed:
        shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise RecipeError(
            f"{root} holds another run: {shown} differ{'s' if len(changed) == 1 else ''}",
            fix="move it away, or give another --out, or --fresh to start over there (its results are then lost)",
            where=str(root / LOCK),
        )


def _check_moved(folder: Path, manifest: Manifest) -> None:
    """Raise RecipeError unless `folder` holds the files, by name and hash, that the run has read as its dense model."""
    known = {Path(name).name: record.sha256 for name, record in manifest.inputs.items()}
    found = {path.name: path for path in (folder / "config.json", *weight_files(folder)) if path.is_file()}
    other = [
        name for name in {**known, **found} if name not in found or record_file(found[name]).sha256 != known.get(name)
    ]
    if known and other:
        raise RecipeError(
            f"{folder} holds another model than the run was made from: {', '.join(sorted(other)[:3])} differ",
            fix="give the folder to which the run's dense model was moved, or another --out for this model",
            where=str(folder),
        )


def read_lock(root: Path) -> Recipe:
    """Return the recipe of the run in `root`; RecipeError if there is none, or not the one that the run wrote."""
    if not (root / LOCK).is_file() and (root / MANIFEST).is_file():
        raise RecipeError(
            f"{root} holds a run that has lost its {LOCK}",
            fix=f"soco-export repair {root}, or put {LOCK} back from a copy",
            where=str(root / LOCK),
        )
    if not (root / LOCK).is_file():
        raise RecipeError(
            f"{root} holds no run of soco-export",
            fix="give the folder that train or train-and-export wrote (it holds recipe.lock.yaml)",
            where=str(root),
        )
    recipe = load_recipe(root / LOCK)
    check_lock(root)
    return recipe


def check_lock(root: Path) -> None:
    """Raise RecipeError for a lock file that somebody changed: the run was made with other settings."""
    manifest = Manifest.load(root) if (root / LOCK).is_file() else None
    if manifest and manifest.locks and lock_hash(read_text(root / LOCK, "put it back")) not in manifest.locks:
        raise RecipeError(
            f"{root / LOCK} was changed since the run wrote it: what lies there was made with other settings",
            fix=f"move it away and give soco-export repair {root}, which writes it again; --set changes settings",
            where=str(root / LOCK),
        )
