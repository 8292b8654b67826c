"""The command line: its verbs with their options. How they are called is in calling.py, what they do in run/verbs.py.

    soco-export train-and-export --model tiny        everything, into runs/tiny
    soco-export --help

Exit codes: 0 fine, 1 crash, 2 usage or recipe, 3 a gate failed, 4 the machine; 130 interrupted, 143 terminated
(both can go on).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from soco_export import signals
from soco_export.calling import check_encoding, verb
from soco_export.console import Console, say, tolerate_streams
from soco_export.help import MODEL
from soco_export.options import (
    Aim,
    ByteSizes,
    DryRun,
    FormatOption,
    Fresh,
    KeepBytes,
    KeepParams,
    Model,
    Moved,
    Out,
    RecipeFile,
    RunArgument,
    Seed,
    Set,
    Sizes,
    Strict,
    Target,
    Tiny,
)
from soco_train.errors import ExitCode, RecipeError
from soco_train.installed import version

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="List, show and check recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes, name="recipes")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version())
        raise typer.Exit(0)


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train SoCo's singular spectrum, prune to low rank, export to ONNX, and prove the result.

    Start with: soco-export train-and-export --model tiny

    Each VERB --help has examples.

    Exit codes: 0 fine, 1 crash, 2 usage or recipe, 3 a gate failed, 4 the machine, 130 interrupted.
    """


@verb(app, "train-and-export")
def train_and_export(
    model: Model = None,
    recipe: RecipeFile = None,
    format: FormatOption = "onnx",
    target: Target = None,
    keep_params: KeepParams = None,
    keep_bytes: KeepBytes = None,
    out: Out = None,
    set_: Set = None,
    dry_run: DryRun = False,
    tiny: Tiny = False,
    fresh: Fresh = False,
    seed: Seed = None,
    strict: Strict = False,
) -> None:
    """Do everything: train, prune, export, prove, judge."""


@verb(app)
def train(
    model: Model = None,
    recipe: RecipeFile = None,
    keep_params: KeepParams = None,
    keep_bytes: KeepBytes = None,
    out: Out = None,
    set_: Set = None,
    dry_run: DryRun = False,
    tiny: Tiny = False,
    fresh: Fresh = False,
    seed: Seed = None,
) -> None:
    """Learn the scores and stop."""


@verb(app)
def plan(
    run: RunArgument = None,
    model: Model = None,
    sizes: Sizes = None,
    byte_sizes: ByteSizes = None,
    optimise_for: Aim = None,
    out: Annotated[Path | None, typer.Option(help="A folder for one plan.json per size.")] = None,
    set_: Set = None,
    tiny: Tiny = False,
) -> None:
    """Show what a run's scores give at one or more sizes."""


@verb(app)
def export(
    folder: Annotated[Path, typer.Argument(help="A run folder or a Hugging Face folder, dense or low rank.")],
    model: Moved = None,
    format: FormatOption = "onnx",
    target: Target = None,
    keep_params: KeepParams = None,
    keep_bytes: KeepBytes = None,
    out: Out = None,
    set_: Set = None,
    fresh: Fresh = False,
    strict: Strict = False,
) -> None:
    """Write a run or a Hugging Face folder in another form.

    A run can be written at another size too, from the same scores.
    """


@verb(app)
def sweep(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    sizes: Sizes = None,
    weights: Annotated[
        str | None,
        typer.Option(help="One or more types: same,int8,int4.", show_default="the recipe's", rich_help_panel=MODEL),
    ] = None,
    model: Moved = None,
    set_: Set = None,
) -> None:
    """Make and measure several sizes and types from one training.

    Each is an ordinary run in a folder of the run; what is done already is not done again.
    """


@verb(app)
def choose(
    run: Annotated[Path, typer.Argument(help="A run that was swept.")],
    max_bytes: Annotated[str | None, typer.Option(help="Largest ONNX folder: 90MB.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Largest perplexity beside the dense model's.")] = None,
    min_recovery: Annotated[
        float | None, typer.Option(help="Least part of the dense model's accuracy, on the worst task.")
    ] = None,
    max_decode_ms: Annotated[float | None, typer.Option(help="Longest decode step, median milliseconds.")] = None,
    prefer: Annotated[
        Literal["quality", "bytes", "speed"], typer.Option(help="What the best of those that fit is best in.")
    ] = "quality",
) -> None:
    """Pick one point of a sweep, with the reason for each that was left.

    Exit code 3 where none fits.
    """


@verb(app)
def validate(
    folder: Annotated[Path, typer.Argument(help="A run folder, or the Hugging Face or ONNX folder to prove.")],
    against: Annotated[
        Path | None, typer.Option(help="The reference to compare with; needed unless it is a run.")
    ] = None,
    model: Moved = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    strict: Strict = False,
) -> None:
    """Measure parity and perplexity, and judge them by gates."""


@verb(app)
def bench(
    folder: Annotated[Path, typer.Argument(help="A run folder, or an ONNX folder.")],
    against: Annotated[Path | None, typer.Option(help="The ONNX folder to compare with, in turns.")] = None,
    model: Moved = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    strict: Strict = False,
) -> None:
    """Measure latency and memory, both models in turns."""


@verb(app)
def compare(
    one: Annotated[Path, typer.Argument(help="A results.json, or its run folder.")],
    two: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show where two results differ."""


@verb(app)
def report(
    run: RunArgument = None,
    model: Model = None,
    set_: Set = None,
    strict: Strict = False,
) -> None:
    """Judge a run again, and write its reports anew.

    Other gates may be given with --set; the next plain report judges by the run's own.
    """


@verb(app)
def gate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a results.json.")],
    baseline: Annotated[Path | None, typer.Option(help="The results.json to be no worse than, or its run.")] = None,
    tolerances: Annotated[
        list[str] | None, typer.Option("--tolerance", help="How much worse: perplexity.ratio=0.03. Repeatable.")
    ] = None,
    strict: Strict = False,
) -> None:
    """Judge a run by its gates, and against a baseline.

    Measures nothing and writes nothing.
    """


@verb(app)
def repair(
    run: Annotated[Path, typer.Argument(help="A run folder that lost its manifest.json or recipe.lock.yaml.")],
    model: Model = None,
    recipe: RecipeFile = None,
    keep_params: KeepParams = None,
    keep_bytes: KeepBytes = None,
    set_: Set = None,
    tiny: Tiny = False,
    seed: Seed = None,
) -> None:
    """Make a run's lost manifest or lock again from its other files, where these agree.

    A lost lock is taken from results.json, else from the flags that the run was made with. With a lost manifest
    --model says where the dense model lies now, if it was moved.
    """


@verb(app)
def pack(
    folder: Annotated[Path, typer.Argument(help="An exported folder: onnx/ or hf/ of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="RUN-onnx.socopack, beside the run")
    ] = None,
) -> None:
    """Write an export as one compressed file for download."""


@verb(app)
def unpack(
    archive: Annotated[Path, typer.Argument(help="A file that pack made.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write.", show_default="the file's name without .socopack")
    ] = None,
) -> None:
    """Write the folder that was packed, bit for bit."""


@verb(recipes, "list")
def recipes_list(
    methods: Annotated[
        bool, typer.Option("--methods", help="Those that are laid over a model's own with --recipe.")
    ] = False,
) -> None:
    """List the recipes that come with the package."""


@verb(recipes, "show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    set_: Set = None,
) -> None:
    """Print a recipe with everything resolved, or what an overlay sets."""


@verb(recipes, "check")
def recipes_check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or files; default: all that come with the package.")
    ] = None,
) -> None:
    """Read recipes and say what is wrong with them."""


@verb(app)
def doctor() -> None:
    """Say what this machine can run, and what is missing."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; with `--json` a usage error or a crash is a document too."""
    console = Console("--json" in arguments)
    try:
        check_encoding(arguments)
        code = int(app(list(arguments), prog_name="soco-export", standalone_mode=False) or 0)
        return signals.code() if code == signals.INTERRUPTED else code  # typer knows no other interruption
    except (typer.Abort, KeyboardInterrupt):
        return signals.code()
    except RecipeError as error:
        console.error(error)
        return int(error.code)
    except Exception as error:
        if signals.received:  # a library has wrapped the interruption in an error of its own
            return signals.code()
        if hasattr(error, "format_message"):  # the command line was not understood
            console.fault("UsageError", error.format_message(), int(ExitCode.USAGE), fix="soco-export --help")
            error.show(sys.stderr)  # type: ignore[attr-defined]
            return int(ExitCode.USAGE)
        console.fault(type(error).__name__, str(error), int(ExitCode.CRASH), fix="report it: this is a fault of ours")
        say(traceback.format_exc())
        return int(ExitCode.CRASH)


def main() -> None:
    """Run the command line."""
    # before transformers is imported: what matters of its messages is said by our own checks
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    tolerate_streams()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
