"""The proof: the dense model, the pruned one and what ships, each asked the same questions, one after the other.

    dense ──compression── low-rank ──export── what ships (ONNX, or the merged dense form)

Only one model is in memory at a time; logits lie in files. A model's long answers (perplexity, tasks) are kept as they
are had, so that a killed proof goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soco_export.evaluate.decoders.decoder import Decoder
from soco_export.evaluate.figures import DENSE, LOW_RANK, SHIPPED, StepParity
from soco_export.evaluate.forgetting import compare_readings, compare_texts
from soco_export.evaluate.items import load_items
from soco_export.evaluate.parity import Observation, compare_observations, observe
from soco_export.evaluate.perplexity import Readings, read_windows, summarise_readings
from soco_export.evaluate.settings import ValidateSettings
from soco_export.evaluate.tasks import TaskAnswers, answer_task, compare_answers
from soco_export.files.atomic import write_atomic
from soco_train.data.corpus import Blocks
from soco_train.events import Notify

_STEPS = {"compression": (DENSE, LOW_RANK), "export": (LOW_RANK, SHIPPED)}
SAMPLES, PROMPT_SHOWN = 3, 48  # texts kept for the reader, and how many tokens of a prompt


@dataclass(frozen=True)
class Questions:
    """What every model is asked: `blocks` of evaluation text, and the tasks of `settings`; answers go to `folder`.

    `context`: the longest text that the model reads, in tokens; None: any.
    """

    settings: ValidateSettings
    blocks: Blocks
    tokenizer: Any
    folder: Path
    notify: Notify
    context: int | None = None


def prove(openers: Mapping[str, Callable[[], Decoder]], questions: Questions) -> dict[str, Any]:
    """Ask the models that `openers` open, by form, two or more; return all figures and the placement as JSON."""
    observations: dict[str, Observation] = {}
    answers: dict[str, dict[str, Any]] = {}
    placement: Mapping[str, Any] = {}
    for form, opener in openers.items():
        decoder, kept = opener(), questions.folder / form
        kept.mkdir(exist_ok=True)
        observations[form] = observe(
            decoder, questions.blocks.tokens, questions.settings.parity, kept, questions.notify
        )
        answers[form] = _answers(form, decoder, questions)
        placed = getattr(decoder, "placement", None)  # a PyTorch model is where it is
        placement = placed.nodes if placed else placement
        del decoder
    return {
        "parity": {step: _parity(observations, *forms) for step, forms in _STEPS.items()},
        "perplexity": {form: answer["perplexity"] for form, answer in answers.items()},
        "tasks": _tasks(answers),
        "placement": placement,
        "forgetting": _forgetting(list(openers), observations, questions),
        "samples": _samples(observations, questions.tokenizer),
    }


def _samples(observations: Mapping[str, Observation], tokenizer: Any) -> list[dict[str, str]]:
    """Return what the models write after the first prompts, greedily: for a reader, not for a figure."""
    if DENSE not in observations or tokenizer is None:
        return []
    dense, final = observations[DENSE], observations[SHIPPED if SHIPPED in observations else LOW_RANK]
    texts = zip(dense.prompts, dense.greedy, final.greedy, strict=True)
    return [
        {
            "prompt": tokenizer.decode(prompt[-PROMPT_SHOWN:]),
            "dense": tokenizer.decode(one),
            "compressed": tokenizer.decode(two),
        }
        for prompt, one, two in list(texts)[:SAMPLES]
    ]


def _parity(observations: Mapping[str, Observation], reference: str, candidate: str) -> dict[str, Any] | None:
    if reference not in observations or candidate not in observations:
        return None
    step: StepParity = compare_observations(observations[reference], observations[candidate])
    return asdict(step)


def _forgetting(forms: Sequence[str], observations: Mapping[str, Observation], questions: Questions) -> dict[str, Any]:
    """Compare what the last form says of each token with what the first does."""
    first, last = forms[0], forms[-1]
    blocks, folder = questions.blocks, questions.folder
    dense, other = _load_readings(folder / f"{first}.npz"), _load_readings(folder / f"{last}.npz")
    domains = blocks.domains or (blocks.source,) * len(blocks.tokens)
    texts = compare_texts(observations[first].greedy, observations[last].greedy)
    return asdict(compare_readings(dense, other, blocks.tokens, domains, texts))


def _load_readings(path: Path) -> Readings:
    with np.load(path) as arrays:
        return Readings(**arrays)


def _answers(form: str, decoder: Decoder, questions: Questions) -> dict[str, Any]:
    """Return a model's perplexity and its answers to the tasks, from the file if it has been asked before."""
    path, readings = questions.folder / f"{form}.json", questions.folder / f"{form}.npz"
    if not (path.exists() and readings.exists()):
        read = read_windows(decoder, questions.blocks.tokens, questions.notify)
        figures = summarise_readings(read)
        tasks = {}
        for task in questions.settings.tasks:
            name = task.called
            answers = answer_task(
                decoder, questions.tokenizer, load_items(task), name, questions.notify, questions.context
            )
            tasks[name] = asdict(answers)
        np.savez(readings, **vars(read))  # whole once the answers beside it are there
        write_atomic(path, json.dumps({"perplexity": asdict(figures), "tasks": tasks}))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _tasks(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare what ships (or the low-rank model, where nothing else was written) with the dense model, task by task."""
    if DENSE not in answers:
        return {}
    final = answers[SHIPPED if SHIPPED in answers else LOW_RANK]["tasks"]
    dense = answers[DENSE]["tasks"]
    return {name: asdict(compare_answers(TaskAnswers(**dense[name]), TaskAnswers(**final[name]))) for name in final}
