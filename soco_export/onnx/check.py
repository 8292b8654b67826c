"""What an export cannot do with an architecture, asked before anything is trained, or with the tensors of a folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families import describe
from soco_export.onnx.read import CheckpointWeights
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import Shapes, StoredForm, WeightSource
from soco_export.onnx.trace import check_fallback
from soco_train.errors import DataError, RecipeError
from soco_train.forms.registry import state_of
from soco_train.spectra.statistics import EXPERT

ROWS = 4096  # of two matrices that are compared, at a time


def check_architecture(config: Config, settings: ExportSettings) -> Architecture | None:
    """Return the description that an export will build from, None if the model will be traced.

    Raises RecipeError for a config key that the description does not know, and for settings that a flavour or the
    tracer cannot serve, the rule of rounding or the token table, or of layers that the model lacks; MachineError if the
    tracer is not installed.
    """
    rule = settings.rounding()
    for grid in settings.grids():
        rule.check(grid)
    architecture = describe(config)
    if architecture is not None:
        settings.check_layers([*architecture.linears(), architecture.tensors.embed])
        settings.table_of(architecture.tensors.embed)
    if settings.cache != "same" and (architecture is None or settings.flavour != "contrib"):
        raise RecipeError(
            f"export.cache is {settings.cache}, which only GroupQueryAttention of the flavour contrib keeps",
            fix="export.cache: same" + (", or export.flavour: contrib" if architecture else ""),
            where="export.cache",
        )
    if architecture is None:
        check_fallback(config, settings)
    elif settings.flavour == "contrib":
        check_contrib(architecture, config)
    return architecture


def check_contrib(architecture: Architecture, config: Config) -> None:
    """Raise RecipeError for heads that GroupQueryAttention does not take."""
    size = architecture.attention.head_dim
    if size % 8:
        raise RecipeError(
            f"export.flavour is contrib, whose GroupQueryAttention takes heads of a multiple of 8, not {size} numbers",
            fix="export.flavour: standard",
            where=f"{config.where}: head_dim",
        )


def check_tensors(architecture: Architecture, source: CheckpointWeights) -> None:
    """Raise DataError unless the checkpoint holds exactly the tensors that the description uses, in their shapes.

    A tensor too many is a part of the model that the graph would leave out.
    """
    needed, allowed = expected_tensors(architecture, source)
    where = str(source.folder)
    if missing := sorted(needed.keys() - source.shapes.keys()):
        raise _lacking(missing, architecture, source)
    expected = needed | allowed
    if unknown := sorted(source.shapes.keys() - expected.keys()):
        raise DataError(
            f"the description of {architecture.family} has no place for {unknown[0]} ({len(unknown)} tensors in all)",
            fix="export --format hf or dense instead, or describe it in soco_export/onnx/families",
            where=where,
        )
    for name, shape in source.shapes.items():
        if shape != expected[name]:
            raise DataError(
                f"{name} is {shape}, config.json makes it {expected[name]}",
                fix="give the config.json that belongs to these weights",
                where=where,
            )


def check_stored_biases(architecture: Architecture, source: CheckpointWeights, named: Collection[str]) -> None:
    """Raise DataError for a dense layer that has a bias in the files and not among its class's tensors `named`, or not.

    transformers leaves out the one with a warning, and makes up the other. Experts are called otherwise in files.
    """
    layers = [name for name in architecture.linears() if not EXPERT.search(name) and not source.form(name).rank]
    for bias in (f"{name}.bias" for name in layers):
        if (bias in source) == (bias in named):
            continue
        stored = "in the files, and the model's class has no place for it"
        raise DataError(
            f"{bias} is " + (stored if bias in source else "not in the files, and the model's class reads it"),
            fix="give the config.json that belongs to these weights (attention_bias, mlp_bias)",
            where=str(source.folder),
        )


def _lacking(missing: Sequence[str], architecture: Architecture, source: CheckpointWeights) -> DataError:
    """Return what to say of tensors that are missing: a wrapper's prefix before their names, or a head that is tied."""
    called = next((name for name in sorted(source.shapes) if name.endswith(f".{missing[0]}")), None)
    fix = "give a complete checkpoint of the architecture that config.json names"
    if called is not None:
        fix = f"save the model without what wraps it: take {called.removesuffix(missing[0])} off all names"
    elif missing == [f"{architecture.tensors.head}.weight"]:
        fix += "; tie_word_embeddings: true if the head is the embedding"
    return DataError(
        f"the checkpoint lacks {missing[0]} ({len(missing)} tensors in all)" + (f": it has {called}" if called else ""),
        fix=fix,
        where=str(source.folder),
    )


def check_head(architecture: Architecture, source: CheckpointWeights) -> None:
    """Raise DataError if head and token table are one matrix by config.json and two in the files."""
    head, table = (f"{name}.weight" for name in (architecture.tensors.head, architecture.tensors.embed))
    if not architecture.tied or head not in source:
        return
    one, other = source.read(head), source.read(table)
    starts = range(0, architecture.vocab, ROWS)
    if not all(np.array_equal(one[start : start + ROWS], other[start : start + ROWS]) for start in starts):
        raise tied_apart(head, table)


def tied_apart(head: str, table: str) -> DataError:
    """Return what to say of a head and a token table that should be one matrix and differ."""
    return DataError(
        f"config.json says that head and embedding are one matrix, but {head} and {table} differ",
        fix="tie_word_embeddings: false if the head is its own; else remove it from the files",
        where=head,
    )


def expected_tensors(architecture: Architecture, source: WeightSource) -> tuple[Shapes, Shapes]:
    """Return (needed, allowed besides): biases are used wherever they are stored."""
    names = architecture.tensors
    table = (architecture.vocab, architecture.hidden)
    needed: Shapes = {f"{names.embed}.weight": table, **architecture.norms(), **architecture.corrections()}
    if names.positions:
        needed[f"{names.positions}.weight"] = (architecture.context + names.position_offset, architecture.hidden)
    tied: Shapes = {f"{names.head}.weight": table, f"{names.head}.bias": table[:1]}
    allowed = tied if architecture.tied else {}
    for name, (m, n) in architecture.linears().items():
        if architecture.tied and name == names.head:
            continue
        parts, biases = _parts(source.form(name), m, n)
        needed |= {f"{name}.{part}": shape for part, shape in parts.items()}
        allowed |= {f"{name}.{part}": (m,) for part in biases}
    return needed, allowed


def _parts(form: StoredForm, m: int, n: int) -> tuple[Shapes, tuple[str, ...]]:
    """Return (tensors that a Linear of m × n always stores, names of those that it may store)."""
    if form.rank:
        needed, largest = (state_of(form.kind, m, n, form.rank, bias) for bias in (False, True))
        return {part: tuple(blank.shape) for part, blank in needed.items()}, tuple(largest.keys() - needed.keys())
    return {"weight": (m, n)}, ("bias",)
