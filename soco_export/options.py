"""The options that verbs share, each said once: its type, its words in `--help`, and the group it is shown in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from soco_export.help import MODEL, OUTPUT, RUN
from soco_export.run.folder.names import Format

Model = Annotated[str | None, typer.Option(help="Recipe name, hub id or folder.", rich_help_panel=MODEL)]
Moved = Annotated[
    str | None,
    typer.Option("--model", help="Where a run's dense model lies now, if it was moved.", rich_help_panel=MODEL),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe file, laid over the model's own.", rich_help_panel=MODEL)
]
FormatOption = Annotated[
    Format,
    typer.Option(help="ONNX, Hugging Face low rank, or merged dense.", rich_help_panel=MODEL),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="What will run it: ort, genai, transformers.js, openvino or triton; sets flavour, types and files.",
        rich_help_panel=MODEL,
    ),
]
KeepParams = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the selected layers' parameters to keep, in (0, 1].",
        show_default="the recipe's",
        rich_help_panel=MODEL,
    ),
]
KeepBytes = Annotated[
    str | None,
    typer.Option(
        help="Size of the ONNX file: 90MB; ranks, forms and types of weights are chosen for it.", rich_help_panel=MODEL
    ),
]
ByteSizes = Annotated[
    str | None, typer.Option("--keep-bytes", help="One or more file sizes: 90MB,70MB.", rich_help_panel=MODEL)
]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--keep-params",
        help="One or more sizes: 0.9,0.8,0.6.",
        show_default="the recipe's",
        rich_help_panel=MODEL,
    ),
]
Aim = Annotated[
    Literal["params", "latency"] | None,
    typer.Option(
        help="latency: layers that were measured to be no faster at their rank stay dense.",
        show_default="the recipe's",
        rich_help_panel=MODEL,
    ),
]
Out = Annotated[Path | None, typer.Option(help="Where to write.", show_default="runs/NAME", rich_help_panel=RUN)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any recipe key: key=value. Repeatable.", rich_help_panel=MODEL),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what it would cost; no network, no weights.", rich_help_panel=RUN),
]
Tiny = Annotated[
    bool,
    typer.Option("--tiny", help="The same architecture with 2 layers and random weights.", rich_help_panel=MODEL),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; what the run folder holds is lost.", rich_help_panel=RUN)
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the training.", show_default="the recipe's", rich_help_panel=MODEL)
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="A gate that noise leaves undecided counts as failed.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON document on stdout.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=OUTPUT)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Every step, and tracebacks of errors.", rich_help_panel=OUTPUT)
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(help="A run folder.", show_default="the model's, or the latest in runs/"),
]
