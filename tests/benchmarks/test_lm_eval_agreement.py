import json
import random
from pathlib import Path

import pytest

from benchmarks import lm_eval_agreement
from soco_export.evaluate.items import load_items
from soco_export.evaluate.settings import TaskSettings

RECORDED = Path(lm_eval_agreement.__file__).parent / "results" / "lm-eval.json"


@pytest.mark.parametrize("task", ["openbookqa", "boolq", "winogrande", "blimp", "sciq", "mmlu", "hellaswag"])
def test_items_that_are_made_up_are_items(tmp_path, task):
    row = lm_eval_agreement.made_up(task, lambda count: " ".join("word" for _ in range(count)), random.Random())
    (tmp_path / "it.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert len(load_items(TaskSettings(path=tmp_path / "it.jsonl"))) == 1


def test_the_recorded_comparison_has_no_other_verdict():
    folders = json.loads(RECORDED.read_text(encoding="utf-8"))["folders"]
    for tasks in folders.values():
        assert set(tasks) == set(lm_eval_agreement.TASKS)
        for found in tasks.values():
            assert found["largest_difference_nats"] < 1e-3
            assert not any(found["other_verdicts"].values())
            assert found["ours"] == found["harness"]


def test_the_harness_itself_says_the_same(tiny_run, tmp_path):
    pytest.importorskip("lm_eval")
    from transformers import AutoTokenizer

    from soco_export.evaluate.settings import ValidateSettings
    from soco_export.runtimes.open import open_decoder

    rows = [{"goal": f"Go {n}", "sol1": "by the long road", "sol2": "home", "label": n % 2} for n in range(3)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"piqa": tmp_path / "piqa.jsonl"}
    for kind in lm_eval_agreement.MODELS:
        folder = tiny_run / kind
        samples = lm_eval_agreement.harness_answers(kind, folder, files, tmp_path)["piqa"]
        decoder, tokenizer = open_decoder(folder, ValidateSettings(), kind), AutoTokenizer.from_pretrained(folder)
        found = lm_eval_agreement.agreement(decoder, tokenizer, files["piqa"], samples, 1024)
        assert found["largest_difference_nats"] < 1e-3
        assert not any(found["other_verdicts"].values())
