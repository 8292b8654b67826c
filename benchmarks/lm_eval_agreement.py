"""Our task runner against lm-evaluation-harness itself, item by item, on a Hugging Face and on an ONNX folder.

    python -m benchmarks.lm_eval_agreement RUN --tasks FOLDER --out benchmarks/results/lm-eval.json

RUN is a finished run (`hf/`, `onnx/`), FOLDER has the data sets as jsonl files named by task (`piqa.valid.jsonl`). For
the formats that FOLDER lacks, items are made up of words of the built-in text: they ask whether prompts, order and
lengths are the harness's, not whether the model is good. The harness reads the same items with its own task files; per
item its log-likelihoods and its verdicts (acc, acc_norm) are held against ours. Needs `pip install lm-eval`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from soco_export.evaluate.decoders.decoder import Decoder
from soco_export.evaluate.items import load_items
from soco_export.evaluate.settings import TaskSettings, ValidateSettings
from soco_export.evaluate.tasks import answer_task, score_choices
from soco_export.files.json import context_length, read_config
from soco_export.runtimes.open import open_decoder
from soco_train.data.corpus import BUILTIN

MODELS = {"hf": ("hf", "pretrained={},dtype=float32"), "onnx": ("onnxruntime", "pretrained={}")}
# our task → the harness's task file
TASKS = {
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "social_i_qa": "siqa/siqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "blimp": "blimp/_template_yaml",
    "sciq": "sciq/sciq.yaml",
    "mmlu": "mmlu/default/mmlu_abstract_algebra.yaml",
}
Words = Callable[[int], str]


def made_up(task: str, words: Words, chance: random.Random) -> dict[str, Any]:
    """Return a row of `task`'s data set in words that mean nothing; KeyError for a task that is not made up."""
    options = [words(4) for _ in range(4)]
    keyed = {"choices": {"text": options, "label": list("ABCD")}, "answerKey": chance.choice("ABCD")}
    rows: dict[str, dict[str, Any]] = {
        "openbookqa": {"question_stem": words(9), **keyed},
        "boolq": {"passage": words(40), "question": words(6), "label": chance.randrange(2)},
        "winogrande": {
            "sentence": f"{words(6)} _ {words(5)}.", "option1": words(1), "option2": words(1),
            "answer": chance.choice("12"),
        },
        "blimp": {"sentence_good": words(7), "sentence_bad": words(7)},
        "sciq": {
            "support": words(20), "question": words(6), "correct_answer": options[0], "distractor1": options[1],
            "distractor2": options[2], "distractor3": options[3],
        },
        "mmlu": {
            "question": words(12), "choices": options, "answer": chance.randrange(4), "subject": "abstract_algebra",
        },
        "hellaswag": {
            "activity_label": words(2), "ctx_a": f"{words(8)} [title] {words(3)}.", "ctx_b": words(4),
            "endings": [f"{option} [step] {option}" for option in options], "label": str(chance.randrange(4)),
        },
    }  # fmt: skip
    return rows[task]


def write_tasks(folder: Path, out: Path, limit: int) -> Iterator[tuple[str, Path, bool]]:
    """Yield (task, file, whether it is made up) of every task, with `limit` items at most."""
    chance = random.Random(0)
    vocabulary = (BUILTIN / "speeches.evaluation.txt").read_text(encoding="utf-8").split()

    def words(count: int) -> str:
        start = chance.randrange(len(vocabulary) - count)
        return " ".join(vocabulary[start : start + count]).replace("_", "")

    for task in TASKS:
        given = next(iter(sorted(folder.glob(f"{task}.*jsonl"))), None)
        lines = given.read_text(encoding="utf-8").splitlines()[:limit] if given else []
        rows = [json.loads(line) for line in lines] or [made_up(task, words, chance) for _ in range(limit)]
        rows = [as_published(row) for row in rows]
        path = out / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield task, path, given is None


def as_published(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in the columns of its data set: LAMBADA in one text, HellaSwag with its query in parts."""
    if "continuation" in row:
        return {"text": f"{row['context']} {row['continuation']}"}
    if "query" in row:
        activity, _, context = row["query"].partition(": ")
        return {**row, "activity_label": activity, "ctx_a": context, "ctx_b": ""}
    return row


def harness_answers(kind: str, folder: Path, files: dict[str, Path], work: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the harness's samples by task, in the items' order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    home = Path(lm_eval.__file__).parent / "tasks"
    for task, path in files.items():
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(path)}}}
        splits = {"test_split": "test", "validation_split": None, "training_split": None, "fewshot_split": None}
        config = {"include": str(home / TASKS[task]), "task": f"here_{task}", "tag": None, **data, **splits}
        (work / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    name, arguments = MODELS[kind]
    found = lm_eval.simple_evaluate(
        model=name,
        model_args=arguments.format(folder),
        tasks=[f"here_{task}" for task in files],
        task_manager=TaskManager(include_path=str(work), include_defaults=False),
        num_fewshot=0,
        device="cpu",
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = {task: found["samples"][f"here_{task}"] for task in files}
    return {task: sorted(rows, key=lambda row: int(row["doc_id"])) for task, rows in samples.items()}


def agreement(
    decoder: Decoder, tokenizer: Any, path: Path, samples: list[dict[str, Any]], length: int
) -> dict[str, Any]:
    """Hold our answers against the harness's: how many items, the largest difference, and verdicts that differ."""
    items = load_items(TaskSettings(path=path))
    answers = answer_task(decoder, tokenizer, items, path.stem, context=length)
    differences, verdicts = [], {"acc": 0, "acc_norm": 0}
    for index, (item, sample) in enumerate(zip(items, samples, strict=True)):
        theirs = np.array([float(answer[0]) for answer in sample["filtered_resps"]])
        ours, _ = score_choices(decoder, tokenizer, item, length)
        differences.append(float(np.abs(ours - theirs).max()))
        for metric, right in (("acc", answers.right), ("acc_norm", answers.right_norm)):
            verdicts[metric] += metric in sample and bool(sample[metric]) != right[index]
    judged = [metric for metric in verdicts if metric in samples[0]]
    return {
        "items": len(items),
        "largest_difference_nats": max(differences),
        "other_verdicts": {metric: verdicts[metric] for metric in judged},
        "ours": {
            metric: float(np.mean(dict(acc=answers.right, acc_norm=answers.right_norm)[metric])) for metric in judged
        },
        "harness": {metric: float(np.mean([bool(sample[metric]) for sample in samples])) for metric in judged},
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        tasks = list(write_tasks(options.tasks, Path(work), options.limit))
        files = {task: path for task, path, _ in tasks}
        for kind in MODELS:
            folder = options.run.absolute() / kind
            samples = harness_answers(kind, folder, files, Path(work))
            decoder, tokenizer = open_decoder(folder, ValidateSettings(), kind), AutoTokenizer.from_pretrained(folder)
            length = context_length(read_config(folder)) or 2048
            found[kind] = {
                task: {"made_up": invented, **agreement(decoder, tokenizer, path, samples[task], length)}
                for task, path, invented in tasks
            }
    document = {
        "command": f"python -m benchmarks.lm_eval_agreement RUN --tasks FOLDER --limit {options.limit}",
        "versions": {name: version(name) for name in ("lm-eval", "transformers", "onnxruntime", "torch")},
        "folders": found,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
