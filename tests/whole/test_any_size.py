"""One run distilled for a range of sizes: every size is cut from one file, and nothing is distilled anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soco_export.run.verbs import Request, export, train_and_export
from soco_train.errors import RecipeError
from soco_train.events import Event
from soco_train.plan.rank_plan import RankPlan
from soco_train.refine import any_size
from soco_train.store.factors import Factors


def test_two_sizes_from_one_distillation(short: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    given = [*short, "train.deviation=false", "refine.distill.sizes=[0.4, 0.8]", "gates.max_ppl_ratio=null"]
    train_and_export(Request(model="tiny", format="hf", out=run, set_=given))
    whole = Factors.load(run / "any-size.safetensors").layers

    steps: list[Event] = []
    monkeypatch.setattr(any_size, "distill", lambda *_: pytest.fail("distilled anew"))
    for size in (0.4, 0.8):
        export(Request(format="hf", keep_params=size), run, notify=steps.append)
        plan = RankPlan.load(run / f"keep-{size}" / "plan.json")
        cut = Factors.load(run / f"keep-{size}" / "factors.safetensors").layers
        for name, planned in plan.layers.items():
            if not planned.dense:
                assert torch.equal(cut[name].up, whole[name].up[:, : planned.rank])
                assert torch.equal(cut[name].down, whole[name].down[: planned.rank])
        assert len(list(run.rglob("any-size.safetensors"))) == 1
    assert not [event for event in steps if event.stage == "distill"]
    assert "Distilling the factors" in (run / "report.html").read_text()
    with pytest.raises(RecipeError, match="not within"):
        export(Request(format="hf", keep_params=0.3), run)
    with pytest.raises(RecipeError, match="cannot change after training"):
        export(Request(format="hf", keep_params=0.5, set_=["refine.distill.lr=1e-3"]), run)
