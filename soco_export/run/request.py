"""What a verb is asked and what it answers: flags → one recipe and one folder; result → document, text, exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.allowed import read_lock
from soco_export.run.folder.names import LOCK, Format
from soco_train.errors import ExitCode, RecipeError
from soco_train.settings.section import as_bytes

RUNS = Path("runs")


@dataclass(frozen=True)
class Request:
    """The common flags of the command line; `set_` are `key=value` settings, `argv` is kept in the manifest."""

    model: str | None = None
    recipe: Path | None = None
    format: Format = "onnx"
    keep_params: float | None = None
    keep_bytes: str | None = None
    optimise_for: str | None = None
    target: str | None = None
    out: Path | None = None
    set_: Sequence[str] | None = None
    dry_run: bool = False
    tiny: bool = False
    fresh: bool = False
    seed: int | None = None
    argv: Sequence[str] = ()

    @property
    def overrides(self) -> list[str]:
        """All settings as `key=value`: a flag goes before a key, and a key before what `--target` chooses."""
        flags = {
            "keep_params": self.keep_params,
            "keep_bytes": self.keep_bytes,
            "optimise_for": self.optimise_for,
            "train.seed": self.seed,
        }
        return [
            *self._of_target(),
            *(self.set_ or ()),
            *(f"{key}={value}" for key, value in flags.items() if value is not None),
        ]

    def _of_target(self) -> tuple[str, ...]:
        """Return the settings of the runtime that `--target` names; RecipeError if there is none, or nothing for it."""
        if self.target is None:
            return ()
        from soco_export.runtimes.registry import find_runtime

        if self.format != "onnx":
            raise RecipeError(
                f"--target {self.target} is a program that runs ONNX, and the format is {self.format}",
                fix="--format onnx, or no --target",
                where="--target",
            )
        return find_runtime(self.target, "--target").target

    def resolve(self) -> Recipe:
        """Return the recipe that the flags mean together; settings go before what `--tiny` shrinks."""
        from soco_export.model.which import recipe_for, shrink

        recipe = recipe_for(self.model, self.recipe, self.overrides)
        return shrink(recipe).override(self.overrides) if self.tiny else recipe

    def folder(self, recipe: Recipe) -> Path:
        """Return where the run goes."""
        return self.out or RUNS / recipe.name


@dataclass(frozen=True)
class Outcome:
    """A verb's result: `document` for programs (--json), `text` for people, `code` for the shell.

    `undecided`: gates that could neither be passed nor failed, a line each: warnings, or failures with `--strict`.
    """

    document: Mapping[str, Any]
    text: str
    code: ExitCode = ExitCode.OK
    undecided: tuple[str, ...] = ()


def find_run(run: Path | None, request: Request) -> Path:
    """Return the run folder that is meant: the one given, the model's own, or the latest under runs/."""
    if run is not None:
        return run
    if request.model is not None:
        return RUNS / request.resolve().name
    locks = sorted(RUNS.glob(f"*/{LOCK}"), key=lambda path: path.stat().st_mtime)
    if not locks:
        raise RecipeError(
            f"there is no run in {RUNS}", fix="give the run's folder, or train one: soco-export train --model tiny"
        )
    return locks[-1].parent


def check_profile_kept(recipe: Recipe) -> None:
    """Raise DataError if `latency.profile` holds something else, read before anything heavy is imported."""
    path = recipe.latency.profile
    if recipe.optimise_for == "latency" and path is not None and path.exists():
        from soco_export.bench.layer_times import Profile

        Profile.load(path)


def run_recipe(run: Path, request: Request) -> Recipe:
    """Return the recipe of the run in `run`, its dense model taken from the folder `--model` to which it was moved.

    Raises RecipeError if there is no such folder. Whether it holds the same model is asked when the run is opened.
    """
    recipe = read_lock(run)
    if request.model is None:
        return recipe
    if recipe.model.weights != "pretrained" or not (Path(request.model) / "config.json").is_file():
        reason = f"{request.model} holds no config.json"
        if recipe.model.weights != "pretrained":
            reason = f"the dense model of {run} lies in no folder: its weights are {recipe.model.weights}"
        raise RecipeError(
            reason, fix="with a run, --model names the folder to which its dense model was moved", where="--model"
        )
    return recipe.replace({"model.path": request.model}, where="--model")


def check_no_model(request: Request) -> None:
    """Raise RecipeError for a `--model` where folders are given that are no runs: it would not be read."""
    if request.model is not None:
        raise RecipeError(
            "--model says where a run's dense model lies, and this folder is no run",
            fix="leave --model out; the dense model to compare with is --against",
            where="--model",
        )


def parse_sizes(text: str | None, default: float) -> list[float]:
    """Return the sizes of `--keep-params 0.9,0.8`, each in (0, 1] and once, in a folder of its own."""
    if text is None:
        return [default]
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = [0.0]
    if not all(0 < size <= 1 for size in sizes):
        raise RecipeError(
            f"keep_params is {text}",
            fix="give fractions in (0, 1], separated by commas: 0.9,0.8",
            where="--keep-params",
        )
    sizes = list(dict.fromkeys(sizes))
    names = Counter(map(size_name, sizes))
    if twice := next((name for name, count in names.items() if count > 1), ""):
        raise RecipeError(
            f"two sizes go by the name {twice}", fix="give sizes that differ in six digits", where="--keep-params"
        )
    return sizes


def size_name(size: float) -> str:
    """Return what a size is called in the names of folders: "0.8"."""
    return f"{size:g}"


def parse_byte_sizes(text: str | None, default: int | None) -> list[int]:
    """Return the sizes of `--keep-bytes 90MB,70MB` in bytes, each above 0 and once."""
    if text is None and default is not None:
        return [default]
    try:
        sizes = [int(as_bytes(part)) for part in (text or "").split(",")]
    except ValueError:
        sizes = [0]
    if not all(size > 0 for size in sizes):
        raise RecipeError(
            f"keep_bytes is {text}", fix="give sizes separated by commas: 90MB,70MB", where="--keep-bytes"
        )
    return list(dict.fromkeys(sizes))
