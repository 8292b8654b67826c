"""Recipes: extending, overriding, locking, and an error for everything a hand can get wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from soco_export.recipe.load import find_recipe, list_recipes, load_recipe, lock
from soco_export.recipe.recipe import Recipe, keys, schema
from soco_train.errors import ExitCode, RecipeError
from soco_train.settings.plan import PlanSettings
from tests.support.fresh import examples

MINIMAL = "extends: base\nmodel: {id: someone/model}\n"


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(*arguments: object, **options: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments, **options)
    assert caught.value.code == ExitCode.USAGE
    return caught.value


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_parses_and_survives_its_lock(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert load_recipe(written(tmp_path, lock(recipe), "recipe.lock.yaml")) == recipe


def test_the_promised_recipes_are_there() -> None:
    promised = [
        "llama-2-7b",
        "llama-3.1-8b",
        "llama-3.2-1b",
        "llama-3.2-3b",
        "mistral-7b",
        "mixtral-8x7b",
        "qwen2.5-7b",
        "qwen3-0.6b",
        "qwen3-1.7b",
        "qwen3-4b",
        "qwen3-8b",
        "qwen3-30b-a3b",
        "gemma-3-1b",
        "phi-4-mini",
        "smollm2-135m",
        "smollm2-360m",
        "smollm2-1.7b",
        "smollm3-3b",
        "granite-3.3-2b",
        "olmo-2-1b",
        "opt-6.7b",
        "tiny",
    ]
    assert set(promised) <= set(list_recipes())
    assert "base" not in list_recipes()
    assert "base" in list_recipes(abstract=True)


@settings(max_examples=examples(25), deadline=None)
@given(
    keep=st.floats(0, 1, exclude_min=True),
    rate=st.floats(1e-30, 1e3),
    shares=st.tuples(*[st.floats(0, 1)] * 3).filter(any),
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
)
@example(keep=1.0, rate=1.0, shares=(0.0, 0.0, 1.0), text="0E0")  # text that YAML would read as a number
def test_any_value_survives_the_lock(
    tmp_path_factory: pytest.TempPathFactory, keep: float, rate: float, shares: tuple[float, float, float], text: str
) -> None:
    changes = {"keep_params": keep, "train.lr": rate, "train.schedule.shares": shares, "data": {"path": [text, "b"]}}
    recipe = load_recipe("tiny").replace(changes)
    path = written(tmp_path_factory.mktemp("lock"), lock(recipe))
    assert load_recipe(path) == recipe


def test_plan_holds_the_top_level_keys() -> None:
    recipe = load_recipe("tiny", ["keep_params=0.4", "storage=pivoted", "multiple=32"])
    assert recipe.plan == PlanSettings(keep_params=0.4, storage="pivoted", multiple=32, allocation=recipe.allocation)


def test_the_nearer_file_wins_and_the_override_wins_over_all(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL + "train: {steps: 1, lr: 1e-5}\nkeep_params: 0.5\nname: parent\n", "parent.yaml")
    child = written(tmp_path, "extends: parent.yaml\ntrain: {steps: 2}\n", "child.yaml")
    overlay = written(tmp_path, "train: {steps: 3, seed: 7}\n", "overlay.yaml")
    assert load_recipe(child).train.steps == 2
    assert load_recipe(child).train.lr == 1e-5
    assert load_recipe(child).name == "child"
    assert load_recipe(child, overlay=overlay).train.steps == 3
    whole = load_recipe(child, ["train.steps=4"], overlay=overlay, name="other")
    assert (whole.train.steps, whole.train.seed, whole.keep_params, whole.name) == (4, 7, 0.5, "other")


@pytest.mark.parametrize("method", [name for name in list_recipes(abstract=True) if name.startswith("methods/")])
def test_a_method_lies_over_any_model(method: str) -> None:
    plain = load_recipe("opt-6.7b")
    recipe = load_recipe("opt-6.7b", overlay=Path(method), name="opt-6.7b")
    assert (recipe.name, recipe.model, recipe.data) == ("opt-6.7b", plain.model, plain.data)
    assert recipe.description != plain.description


def test_several_parents_are_laid_over_each_other(tmp_path: Path) -> None:
    written(tmp_path, "train: {steps: 5, seed: 1}\n", "method.yaml")
    child = written(tmp_path, "extends: [tiny, method.yaml]\ntrain: {seed: 2}\n")
    recipe = load_recipe(child)
    assert (recipe.train.steps, recipe.train.seed, recipe.model.weights) == (5, 2, "builtin")


def test_another_text_source_displaces_the_inherited_one() -> None:
    recipe = load_recipe("mistral-7b", ["data.path=a.txt"])
    assert (recipe.data.path, recipe.data.hub, recipe.data.block) == (Path("a.txt"), None, 2048)


def test_a_loaded_recipe_takes_overrides_as_a_file_does(tmp_path: Path) -> None:
    overrides = ["data.path=a.txt", "train.steps=3"]
    assert load_recipe("tiny").override(overrides) == load_recipe("tiny", overrides)
    with pytest.raises(RecipeError, match=r"unknown key train\.stepz") as caught:
        load_recipe("tiny").override(["train.stepz=3"])
    assert caught.value.where == "--set train.stepz=3"


def test_model_fields_are_replaced_whole() -> None:
    recipe = load_recipe("llama-3.1-8b", model={"path": "x", "architecture": {"model_type": "llama"}})
    assert recipe.model.architecture == {"model_type": "llama"}
    assert recipe.model.id == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("2E+3", 2000.0), ("1.5e-4", 1.5e-4)])
def test_exponents_are_numbers(text: str, value: float) -> None:
    assert load_recipe("tiny", [f"model.architecture.rms_norm_eps={text}"]).model.architecture["rms_norm_eps"] == value


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.lrr=1", "train.lr"),
        ("keep_param=0.5", "keep_params"),
        ("trian.steps=3", "train"),
        ("steps=3", "train.steps"),
        ("export.flavor=contrib", "export.flavour"),
        ("data.blok=3", "data.block"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_right_one(override: str, meant: str) -> None:
    error = refused("tiny", [override])
    wrong = error.message.removeprefix("unknown key ")
    assert override.startswith(wrong)
    assert error.fix == f"did you mean {meant}?"
    assert error.where == f"--set {override}"


def test_a_misspelt_key_in_a_file_names_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, MINIMAL + "train:\n  steps: 3\n  batch_tokns: 4\n")
    assert refused(path).where == "mine.yaml:5: train.batch_tokns"


@pytest.mark.parametrize("keep", ["0", "-0.1", "1.01", ".nan", "half"])
def test_keep_params_outside_its_range_is_refused(keep: str) -> None:
    assert refused("tiny", [f"keep_params={keep}"]).message.startswith("keep_params cannot be")


@pytest.mark.parametrize(
    "override",
    ["train.steps=abc", "data.path=[a, 3]", "model=3", "train.schedule.shares=[1]", "data={path: a, hub: b}"],
)
def test_a_wrong_value_is_one_clear_error(override: str) -> None:
    error = refused("tiny", [override])
    assert override.partition("=")[0] in error.message
    assert "lax" not in str(error)
    assert error.where == f"--set {override}"


@pytest.mark.parametrize("override", ["train.steps", "=3", "data.block=[1"])
def test_an_unreadable_override_is_refused(override: str) -> None:
    assert "--set" in refused("tiny", [override]).where


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1, steps: 2}\n", "key 'steps' is given twice"),
        ("train: [\n", "not valid YAML"),
        ("- a\n- b\n", "no mapping"),
        ("extends: absent\n", "there is no recipe 'absent'"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(written(tmp_path, text)).message


def test_a_circle_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    written(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "a.yaml → b.yaml → a.yaml" in refused(tmp_path / "a.yaml").message


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    assert "did you mean mistral-7b?" in refused("mistal-7b").fix


def test_keys_and_schema_know_every_section() -> None:
    known = set(keys())
    assert {"keep_params", "train.schedule.reach", "refine.distill.lr", "export.dtype", "validate", "gates"} <= known
    assert set(schema()["properties"]) == {key for key in known if "." not in key}


def test_recipes_need_no_torch() -> None:
    code = "import soco_export.recipe.load, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_is_frozen() -> None:
    recipe: Recipe = load_recipe(find_recipe("tiny"))
    with pytest.raises(ValueError, match="frozen"):
        recipe.keep_params = 0.1  # type: ignore[misc]
