"""The model card of a run's checkpoint: the exact recipe that made it and, once there are any, the measured results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from soco_export.checkpoint.card import CardSummary, render_card, summarise_layers
from soco_export.recipe.load import lock_text
from soco_export.recipe.recipe import Recipe
from soco_export.report.schema import Results
from soco_export.run.folder.names import CARD_FILE
from soco_train.bounded import MADE_ANEW, answering, parse_object

DENSE, LOW_RANK, ONNX = "dense", "low rank", "ONNX"


def summary_json(recipe: Recipe, model: Any, params_before: int) -> str:
    """Return what the card says of `model`, pruned by `recipe`, as JSON, so that later stages need no model.

    params_before: of the dense model; what training added to it (biases) is none of that.
    """
    summary = summarise_layers(model, recipe.model.id or recipe.name, params_before=params_before)
    return json.dumps(asdict(summary), indent=2) + "\n"


def model_card(recipe: Mapping[str, Any], summary: str, results: Results | None = None) -> str:
    """Return README.md; `recipe`: the values of one; `summary` is what `summary_json` wrote."""
    return render_card(lock_text(recipe), _measured(results) if results else None, read_summary(summary))


def read_summary(text: str) -> CardSummary:
    """Return what `summary_json` wrote; DataError if it is something else."""
    found = parse_object(text, CARD_FILE, CARD_FILE, MADE_ANEW)
    made: CardSummary = answering(
        "this is no summary of layers", CARD_FILE, MADE_ANEW, lambda: TypeAdapter(CardSummary).validate_python(found)
    )
    return made


def _measured(results: Results) -> dict[str, dict[str, float | int | str | None]]:
    """Return the table of the card: one row per figure, one column per form of the model."""
    rows: dict[str, dict[str, float | int | str | None]] = {
        "parameters": {DENSE: results.sizes.params_before, LOW_RANK: results.sizes.params_after}
    }
    if results.perplexity:
        text = f"perplexity ({results.perplexity.text}, windows of {results.perplexity.block})"
        forms = {DENSE: results.perplexity.dense, LOW_RANK: results.perplexity.low_rank, ONNX: results.perplexity.onnx}
        rows[text] = {form: figures.value for form, figures in forms.items() if figures}
    steps = {LOW_RANK: results.parity.compression, ONNX: results.parity.export}
    rows["mean KL to the form before it"] = {form: step.prefill.mean_kl for form, step in steps.items() if step}
    for name, task in results.tasks.items():
        rows[f"{name} (accuracy)"] = {DENSE: task.dense.acc, LOW_RANK: task.compressed.acc}
    for name, work in (results.latency.workloads if results.latency else {}).items():
        rows[f"{name}, tokens/s"] = {DENSE: work.dense_tokens_per_s, ONNX: work.compressed_tokens_per_s}
    return rows
