"""The last stages of a run: proof, bench, and the report that judges both.

Each measurement is a JSON file in evidence/; the report puts them together as results.json, so that new thresholds or
another look at the figures cost no measuring.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soco_export.files.json import context_length, read_config
from soco_export.run.context import RunContext
from soco_export.run.folder.names import BENCH_FILE, PROOF_FILE, REPORT_FILES, Format
from soco_export.run.pipeline import Stage
from soco_export.run.stages.artefacts import write_evidence


def prove_run(context: RunContext, out: Path) -> None:
    """Measure parity of both steps, perplexity and tasks."""
    from soco_export.evaluate.prove import Questions, prove

    work = out / "work"
    work.mkdir(exist_ok=True)
    longest = context_length(read_config(context.path("checkpoint", "hf")))
    questions = Questions(
        context.recipe.validation, context.blocks("evaluation"), context.tokenizer(), work, context.notify, longest
    )
    proof = prove(_openers(context), questions)
    write_evidence(out / PROOF_FILE, json.dumps(proof, indent=2) + "\n")


def _openers(context: RunContext) -> dict[str, Callable[[], Any]]:
    """Return how to open each form; the dense model is let go of as soon as it has answered."""
    from soco_export.evaluate.figures import DENSE, LOW_RANK, SHIPPED
    from soco_export.runtimes.open import open_decoder, torch_decoder

    settings, trusted = context.recipe.validation, context.recipe.model.trust_remote_code
    openers: dict[str, Callable[[], Any]] = {
        DENSE: lambda: torch_decoder(context.take_model(), DENSE),
        LOW_RANK: lambda: open_decoder(context.path("checkpoint", "hf"), settings, LOW_RANK, trusted),
    }
    if context.format != "hf":
        shipped = context.path(context.format, context.format)
        openers[SHIPPED] = lambda: open_decoder(shipped, settings, context.format, trusted)
    return openers


def bench_run(context: RunContext, out: Path) -> None:
    """Measure latency and memory of the dense ONNX model against the pruned one, in turns."""
    from soco_export.bench.runner import measure_latency, measure_memory

    settings, validation = context.recipe.bench, context.recipe.validation
    found: dict[str, Any] = {"latency": None, "memory": None}
    if settings.enabled:
        folders = (context.path("onnx-dense", "onnx-dense"), context.path("onnx", "onnx"))
        where = (validation.provider, validation.threads)
        found["latency"] = asdict(measure_latency(*folders, settings, *where, context.notify))
        if settings.memory:
            found["memory"] = asdict(measure_memory(*folders, settings, *where))
    write_evidence(out / BENCH_FILE, json.dumps(found, indent=2) + "\n")


def report_run(context: RunContext, out: Path) -> None:
    """Put all figures together, judge them by the gates, and write the reports and the model card."""
    from soco_export.run.stages.report import applicable, collect, write_reports

    results = collect(context).judged(applicable(context.recipe, context.format))
    write_reports(results, context, out)


def _proof(*artefacts: str) -> Stage[RunContext]:
    reads = ("model", "evaluation", "checkpoint", *artefacts)
    return Stage("proof", reads, ("validate",), (PROOF_FILE,), prove_run)


def _report(*measured: str) -> Stage[RunContext]:
    reads = ("scores", "plan", "checkpoint", *measured)
    return Stage("report", reads, ("gates", "description"), REPORT_FILES, report_run)


BENCH = Stage("bench", ("onnx", "onnx-dense"), ("bench", "validate"), (BENCH_FILE,), bench_run)
EVIDENCE: dict[Format, tuple[Stage[RunContext], ...]] = {
    "onnx": (_proof("onnx"), BENCH, _report("proof", "bench", "onnx", "onnx-dense")),
    "hf": (_proof(), _report("proof")),
    "dense": (_proof("dense"), _report("proof", "dense")),
}
