"""results.json: everything one run measured, with a version of its own, and nothing rounded.

Sections that were not measured are null, so a reader sees the difference between "no" and "not looked at".
The schema is published; a change that breaks readers raises SCHEMA_VERSION.

    python -m soco_export.report.schema > docs/results.schema.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from soco_export.bench.figures import LatencyFigures, Machine, MemoryFigures
from soco_export.evaluate.figures import ForgettingFigures, PerplexityFigures, StepParity, TaskComparison
from soco_export.evaluate.paired import perplexity_ratio
from soco_export.files.atomic import write_atomic
from soco_export.report.gates import GateSettings, Verdict, judge
from soco_train.bounded import read_text
from soco_train.errors import DataError
from soco_train.settings.section import MOST_NUMBER, scalars

SCHEMA_VERSION: Literal[1] = 1
RESULTS_FILE = "results.json"
MEASURED = ("sizes", "parity", "perplexity", "tasks", "forgetting", "latency", "memory")


# of what a run tells of itself, the parts that have parts
_TABLES = {"calibration": (str,), "made": (str,), "seconds": (int, float)}


class _Part(BaseModel):
    """A part of the results: immutable, no stray keys; NaN is written as "NaN", for it must not vanish."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelFigures(_Part):
    """Which model. `source`: hub id, "builtin", "random" or the folder's name, never a path of this machine."""

    name: str
    source: str
    architecture: str
    revision: str | None = None


class SizeFigures(_Part):
    """Parameters in numbers and artifacts in bytes.

    `selected_*`: of the layers that took part; `bytes`: folder → bytes on disk; `bytes_ratio`: what ships / the dense
    model in the same form, None if that form was not written; `largest_coefficient`: of the rows that pivoted storage
    writes as combinations of its pivots, by which rounding of the pivots can grow; None for stacked storage.
    `keep_bytes`: what was asked of model.onnx and its data, None where parameters were the budget; `file_bytes`: what
    they have, None where there is no such file; `cache_bytes`: ONNX folder → bytes of keys and values a token.
    """

    params_before: int
    params_after: int
    selected_before: int
    selected_after: int
    layers: int
    layers_dense: int
    keep_params: float
    storage: str
    largest_coefficient: float | None = None
    bytes: Mapping[str, int] = {}
    bytes_ratio: float | None = None
    keep_bytes: int | None = None
    file_bytes: int | None = None
    cache_bytes: Mapping[str, int] = {}


class ParityResults(_Part):
    """`compression`: dense → low-rank, what pruning cost; `export`: low-rank → ONNX, what the export lost."""

    compression: StepParity | None = None
    export: StepParity | None = None


class PerplexityProtocol(_Part):
    """How perplexity was measured, lengths in tokens: `windows` of `window` tokens, one begun every `stride`.

    `scored`: the last so many tokens of a window are predicted, from all before them in it; `bos`: whether BOS stands
    before each window; `join`: how the parts of the text were put together before it was cut.
    """

    windows: int
    window: int
    stride: int
    scored: int
    bos: bool
    join: str


class PerplexityResults(_Part):
    """Perplexity of each form on the same blocks. `ratio`: what ships (ONNX, else low-rank) / dense.

    `text`: where the blocks come from; `block`: their length in tokens; `fingerprint`: sha256 of the token ids, so of
    text and tokenizer; `ratio_interval`: its 95 % interval, from the blocks' differences; None for a single block.
    """

    text: str
    fingerprint: str
    block: int
    dense: PerplexityFigures
    low_rank: PerplexityFigures
    onnx: PerplexityFigures | None = None
    ratio: float
    ratio_interval: tuple[float, float] | None = None
    protocol: PerplexityProtocol | None = None

    @staticmethod
    def of(
        forms: tuple[PerplexityFigures, PerplexityFigures, PerplexityFigures | None],
        text: str,
        fingerprint: str,
        block: int,
        join: str = "",
    ) -> PerplexityResults:
        """Put (dense, low-rank, ONNX or None) together and take the ratio."""
        dense, low_rank, onnx = forms
        ratio, interval = perplexity_ratio(dense, onnx or low_rank)
        # As measure_perplexity has it: windows that do not overlap, nothing put before them, the first token given.
        protocol = PerplexityProtocol(
            windows=dense.tokens // (block - 1), window=block, stride=block, scored=block - 1, bos=False, join=join
        )
        return PerplexityResults(
            text=text,
            fingerprint=fingerprint,
            block=block,
            dense=dense,
            low_rank=low_rank,
            onnx=onnx,
            ratio=ratio,
            ratio_interval=interval,
            protocol=protocol,
        )


class Results(_Part):
    """One run's results.

    `recipe`: all settings, resolved; `placement`: provider → operators → nodes of the ONNX graph; `notes`: every
    fallback and skipped measurement, with its reason; `provenance`: fingerprints, seeds, dates, as the run has them.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    format: Literal["onnx", "hf", "dense"]
    model: ModelFigures
    recipe: Mapping[str, Any]
    sizes: SizeFigures
    parity: ParityResults = ParityResults()
    perplexity: PerplexityResults | None = None
    tasks: Mapping[str, TaskComparison] = {}
    forgetting: ForgettingFigures | None = None
    latency: LatencyFigures | None = None
    memory: MemoryFigures | None = None
    machine: Machine
    placement: Mapping[str, Mapping[str, int]] = {}
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = {}
    verdicts: tuple[Verdict, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _countable(cls, told: Any) -> Any:
        """Refuse a whole number that no float holds exactly: figures are weighed as floats."""
        if any(isinstance(number, int) and abs(number) > MOST_NUMBER for number in scalars(told)):
            raise ValueError("a whole number goes up to 2^53")
        return told

    @field_validator("provenance")
    @classmethod
    def _check_tables(cls, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Refuse what is no table where reports look one up; the rest of what a run tells is shown as it is."""
        for key, kinds in _TABLES.items():
            table = told.get(key) or {}
            if not isinstance(table, Mapping) or not all(isinstance(value, kinds) for value in table.values()):
                raise ValueError(f"{key} is not a table of {'numbers' if float in kinds else 'texts'}")
        return told

    @property
    def passed(self) -> bool:
        """True if no gate failed (also where none was set, or where one could not be decided)."""
        return not any(verdict.state == "failed" for verdict in self.verdicts)

    @property
    def undecided(self) -> tuple[str, ...]:
        """What is to be said of the gates whose figures are too uncertain, a line each."""
        return tuple(f"{verdict.name}: {verdict.message}" for verdict in self.verdicts if verdict.inconclusive)

    def figures(self) -> dict[str, float | None]:
        """Return every measured number by dotted name: "parity.export.decode.mean_kl" → 3e-10."""
        measured = self.model_dump(include=set(MEASURED))
        nodes = sum(count for operators in self.placement.values() for count in operators.values())
        return {**dict(_numbers(measured, "")), "graph.nodes": nodes or None}

    def judged(self, gates: GateSettings) -> Results:
        """Return a copy with the verdicts of `gates`."""
        return self.model_copy(update={"verdicts": judge(self.figures(), gates)})

    def save(self, path: Path) -> None:
        """Write results.json, whole or not at all."""
        write_atomic(path, self.model_dump_json(indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        """Read results.json (or the run folder that holds it); raises DataError if it is not one of this version."""
        file = path / RESULTS_FILE if path.is_dir() else path
        try:
            text = read_text(file, "give the folder of a finished run, or its results.json")
            _check_version(text, file)
            return Results.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"these are no results of schema version {SCHEMA_VERSION}: {place}: {first['msg']}",
                fix="give a results.json that this version of soco-export wrote",
                where=str(file),
            ) from error


def _check_version(text: str, file: Path) -> None:
    """Raise DataError for results of another version, before their fields are looked at."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return  # what is no JSON, or nested beyond reading, is refused by the fields
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version is not None and version != SCHEMA_VERSION:
        raise DataError(
            f"these are no results of schema version {SCHEMA_VERSION} but of version {version}",
            fix="read them with the soco-export that wrote them (machine.versions names it), or measure again",
            where=str(file),
        )


def schema_text() -> str:
    """Return the JSON Schema of results.json, as docs/results.schema.json has it."""
    schema = Results.model_json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float | None]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield name, value


if __name__ == "__main__":
    sys.stdout.write(schema_text())
