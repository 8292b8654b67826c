"""--target: what each runtime's row sets, what the runtimes refuse, and the folder that transformers.js wants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings
from soco_export.preflight.checks import check_recipe
from soco_export.run.request import Request
from soco_export.runtimes.browser import FILES_BY_TYPE
from soco_export.runtimes.registry import RUNTIMES
from soco_train.errors import RecipeError
from tests.support.decoders import factor, tiny_model

ISSUED = ("ort", "genai", "transformers.js", "openvino", "triton")
MIXED = {"q_proj": ("stacked", 20), "up_proj": ("pivoted", 24)}


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("weights", ["same", "int8", "int4"])
def test_every_row_is_a_recipe_that_its_runtime_takes(target: str, weights: str) -> None:
    recipe = Request(model="tiny", target=target, set_=[f"export.weights={weights}"]).resolve()
    check_recipe(recipe, "onnx")
    assert recipe.export.flavour == ("contrib" if target == "genai" else "standard")
    assert recipe.export.weights == weights
    assert target in (*recipe.export.layouts, "ort")
    assert {*ISSUED} <= {*RUNTIMES}


def test_a_setting_goes_before_what_the_target_chooses_and_the_runtime_judges_it() -> None:
    assert (
        Request(model="tiny", target="genai", set_=["export.flavour=standard"]).resolve().export.flavour == "standard"
    )
    for target in ("openvino", "transformers.js"):
        settings = ["export.weights=int4", "export.quantize.embedding=int8"]
        recipe = Request(model="tiny", target=target, set_=settings).resolve()
        with pytest.raises(RecipeError, match="token table in blocks"):
            check_recipe(recipe, "onnx")


def test_openvino_gets_no_attention_that_it_computes_wrongly() -> None:
    recipe = Request(model="tiny", target="openvino", set_=["export.flavour=contrib"]).resolve()
    with pytest.raises(RecipeError, match="one sequence only"):
        check_recipe(recipe, "onnx")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(model="tiny", target="tensorflow"), "there is no runtime"),
        (Request(model="tiny", target="genai", format="hf"), "the format is hf"),
    ],
)
def test_a_target_that_means_nothing_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        request_.resolve()
    assert refused.value.where == "--target"


@pytest.mark.parametrize(("types", "names"), FILES_BY_TYPE.items(), ids=str)
def test_the_folder_of_transformers_js(types: tuple[str, str], names: tuple[str, str], tmp_path: Path) -> None:
    (dtype, weights), (word, suffix) = types, names
    folder = factor(tiny_model("llama"), tmp_path / "hf", MIXED)
    settings = {"dtype": dtype, "weights": weights, "quantize": {"embedding": "same"}, "layouts": ["transformers.js"]}
    export_onnx(folder, tmp_path / "onnx", ExportSettings.model_validate(settings))
    root = tmp_path / "onnx" / "transformers.js"
    graph = root / "onnx" / f"model{suffix}.onnx"
    data = graph.with_name(f"{graph.name}_data")
    assert {path.name for path in graph.parent.iterdir()} == {graph.name, data.name}
    assert data.samefile(tmp_path / "onnx" / "model.onnx.data")
    shutil.copytree(tmp_path / "onnx", tmp_path / "copy")  # onnx reads no weights that have two names on the disk
    own = onnx.load(tmp_path / "copy" / graph.relative_to(tmp_path / "onnx"))
    assert own == onnx.load(tmp_path / "copy" / "model.onnx")
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    assert config["transformers.js_config"] == {"dtype": word, "use_external_data_format": True}
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": "float16", "weights": "int8"}])
def test_types_that_transformers_js_has_no_name_for_are_refused(settings: dict[str, str]) -> None:
    found = ExportSettings.model_validate({"quantize": {"embedding": "same"}, **settings})
    with pytest.raises(RecipeError, match="no name for weights"):
        RUNTIMES["transformers.js"].check(found, None)
