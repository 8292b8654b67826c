"""A further runtime, defined here in one class, goes the whole road: refusal, export, proof, report, doctor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soco_export.evaluate.decoders.decoder import Decoder
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.onnx.inspect import read_ports
from soco_export.preflight.checks import check_everything, check_recipe
from soco_export.preflight.doctor import examine
from soco_export.recipe.load import load_recipe
from soco_export.run.verbs import Request, export
from soco_export.runtimes.registry import RUNTIMES, Layout, Runtime, runtime
from soco_train.errors import MachineError, RecipeError

SHIFT = 0.5  # what the toy adds to every logit: no figure of parity but the largest difference sees it


class Shifted(OnnxDecoder):
    """ONNX Runtime whose logits are all higher by SHIFT."""

    def _forward(self, *inputs: Any) -> tuple[Any, Any]:
        logits, past = super()._forward(*inputs)
        return logits + np.float32(SHIFT), past


@pytest.fixture(autouse=True)
def toy() -> Iterator[type[Runtime]]:
    @runtime("toy")
    class Toy(Runtime):
        """Runs graphs of one sequence whose cache is float32."""

        target = ("export.layouts=[optimum, toy]", "validate.runtime=toy", "gates.max_export_kl=null")
        install = "pip install toy"
        version: str | None = "1.2"

        def check(self, settings: Any, architecture: Any) -> None:
            if settings.pack or (architecture is not None and architecture.attention.kv_heads > 100):
                raise RecipeError("toy has no packed products", fix="export.pack: false", where="export.pack")

        def write(self, to: Layout) -> None:
            (to.folder / "toy.json").write_text(json.dumps(sorted(read_ports(to.folder).inputs)), encoding="utf-8")

        def open(self, folder: Path, settings: Any, name: str) -> Decoder:
            return Shifted(folder, settings.provider, settings.threads, name)

        def here(self) -> str | None:
            return self.version

    yield Toy
    RUNTIMES.pop("toy")


SETTINGS = ("export.layouts=[optimum, toy]", "validate.runtime=toy", "gates.max_export_kl=null")
FEW = ("bench.enabled=false", "evaluation.blocks=1", "validate.parity.blocks=1", "validate.parity.greedy_prompts=0")


def test_it_writes_runs_the_proof_and_is_in_the_report(tiny_run: Path, tmp_path: Path, short: tuple[str, ...]) -> None:
    run, settings = tmp_path / "run", [*short, *SETTINGS, "gates.max_ppl_ratio=null", *FEW]
    outcome = export(Request(out=run, set_=settings), tiny_run)
    assert outcome.code == 0, outcome.text
    assert "past_key_values.0.key" in json.loads((run / "onnx" / "toy.json").read_text(encoding="utf-8"))
    metadata = json.loads((run / "evidence" / "onnx.json").read_text(encoding="utf-8"))["graph"]["metadata"]
    assert metadata["soco_export.base_model"] == "tiny"
    assert float(metadata["soco_export.keep_params"]) == load_recipe("tiny").keep_params
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["parity"]["export"]["prefill"]["max_logit_difference"] == pytest.approx(SHIFT, abs=0.01)
    assert results["recipe"]["validate"]["runtime"] == "toy"
    assert "toy" in (run / "report.md").read_text(encoding="utf-8")


def test_what_it_cannot_run_is_refused_before_training_and_by_the_export(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no packed products"):
        check_recipe(load_recipe("tiny", [*SETTINGS, "export.pack=true"]), "onnx")
    with pytest.raises(RecipeError, match="no packed products"):
        export(Request(out=tmp_path / "onnx", set_=[*SETTINGS, "export.pack=true"]), tiny_run / "hf")
    assert not (tmp_path / "onnx").exists()


def test_the_doctor_sees_it_and_preflight_asks_whether_it_is_here(toy: Any, monkeypatch: Any, tmp_path: Path) -> None:
    def seen() -> Any:
        return next(finding for finding in examine(tmp_path) if finding.subject == "target toy")

    assert (seen().level, seen().text) == ("ok", "1.2")
    monkeypatch.setattr(toy, "version", None)
    assert (seen().level, seen().fix) == ("note", "pip install toy")
    with pytest.raises(MachineError, match="toy is not installed"):
        check_everything(load_recipe("tiny", SETTINGS), tmp_path / "run", "onnx")


@pytest.mark.parametrize(("name", "message"), [("toyota", "there is no runtime"), ("triton", "cannot be asked")])
def test_a_runtime_that_the_proof_cannot_ask_is_refused_before_training(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        check_everything(load_recipe("tiny", [f"validate.runtime={name}"]), tmp_path / "run", "onnx")
    assert "toy" in str(refused.value.fix)
