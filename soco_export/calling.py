"""How a verb of the command line is called: its options as a Request, what it returns as output and exit code."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import typer

from soco_export import signals
from soco_export.console import NORMAL, QUIET, VERBOSE, Console
from soco_export.files.machine import machine_limits
from soco_export.files.text import one_line
from soco_export.help import Verb
from soco_export.options import Json, Quiet, Verbose
from soco_train import parallel
from soco_train.errors import ExitCode, RecipeError, SocoError

# what several processes under torchrun do together; any other verb is the leading one's alone
SHARED_VERBS = ("train", "train_and_export", "export")
# what goes on in a run folder where it was stopped
RESUMED_VERBS = (*SHARED_VERBS, "sweep")
# flags that what to do about an error may name, and that not every verb has
_OF_SOME = ("--out", "--fresh", "--format", "--dry-run")
_Declared = Callable[..., None]


def _shown(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Declare the options that end those of every verb."""


def verb(app: typer.Typer, name: str | None = None) -> Callable[[_Declared], _Declared]:
    """Register a verb and return it; it is declared by a function without a body: its options, its words in `--help`.

    What it does is the function of that name in run/verbs.py.
    """

    def register(declared: _Declared) -> _Declared:
        def command(**options: Any) -> None:
            _call(declared.__name__, options)

        own, shown = (inspect.signature(function, eval_str=True) for function in (declared, _shown))
        together = own.replace(parameters=[*own.parameters.values(), *shown.parameters.values()])
        command.__signature__ = together  # type: ignore[attr-defined]
        command.__doc__ = declared.__doc__
        app.command(name or declared.__name__, cls=Verb)(command)
        return command

    return register


def _call(verb: str, options: dict[str, Any]) -> None:
    """Call the verb of that name, the common options as its Request, show what it returns, leave with its code."""
    lacking = [flag for flag in _OF_SOME if flag.strip("-").replace("-", "_") not in options]
    quiet, verbose, as_json = (options.pop(name) for name in ("quiet", "verbose", "json"))
    strict = options.pop("strict", False)
    if not parallel.leading():  # this process is there to help another one, which speaks for all
        if verb not in SHARED_VERBS or options.get("dry_run"):
            raise typer.Exit(0)
        quiet, verbose, as_json = True, False, False
    common: dict[str, Any] = {}
    console = Console(as_json, VERBOSE if verbose else QUIET if quiet else NORMAL)
    try:
        with console.working(), machine_limits():
            verbs = import_module("soco_export.run.verbs")
            known = verbs.Request.__dataclass_fields__
            common = {name: options.pop(name) for name in list(options) if name in known}
            outcome = getattr(verbs, verb)(verbs.Request(**common, argv=sys.argv), notify=console.notify, **options)
    except SocoError as error:
        error.fix = _possible(error.fix, lacking)
        console.error(error)
        raise typer.Exit(error.code) from None
    except KeyboardInterrupt:
        raise typer.Exit(_interrupted(console, verb in RESUMED_VERBS, common)) from None
    if parallel.leading():
        console.result(outcome.document, outcome.text)
        for line in outcome.undecided:
            console.warn(f"{'failed' if strict else 'warning'}: {line}")
    raise typer.Exit(ExitCode.GATE if strict and outcome.undecided else outcome.code)


def _possible(fix: str, lacking: Sequence[str]) -> str:
    """Return a fix without those of its ways that need a flag which the verb lacks; of one way alone nothing goes."""
    ways = re.split("(?=, or |; )", fix)
    own = [way for way in ways if "soco-export " in way or not any(flag in way for flag in lacking)]
    return re.sub("^(, or |; )", "", "".join(own)) or fix


def check_encoding(arguments: Sequence[str]) -> None:
    """Raise RecipeError for a word that is not UTF-8, as the names of files may be: no record could hold it."""
    for word in arguments:
        if re.search("[\ud800-\udfff]", word):
            fix = "rename it, or the folder it lies in: what is written of a run is UTF-8"
            raise RecipeError(f"{one_line(word)} is not UTF-8", fix=fix, where="command line")


def _interrupted(console: Console, resumes: bool, common: Mapping[str, Any]) -> int:
    """Say how to go on, and return the exit code of the signal; a dry run, and what only looks, has no checkpoint."""
    code = signals.code()
    what = "terminated" if code == signals.TERMINATED else "interrupted"
    message = f"{what}: the same command starts again"
    if resumes and not common.get("dry_run"):
        fresh = " without --fresh" if common.get("fresh") else ""
        message = f"{what}: the same command{fresh} goes on from the last checkpoint"
    console.fault("Interrupted", message, code)
    console.warn(message)
    return code
