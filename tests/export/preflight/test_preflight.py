"""Whatever stops a run stops it before a weight is loaded or a file is written, with the right exit code."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soco_export.model.which import shrink
from soco_export.onnx.settings import ExportSettings
from soco_export.preflight import checks as preflight
from soco_export.preflight import machine
from soco_export.preflight.checks import check_everything, check_quantisation, check_recipe
from soco_export.preflight.cost_card import CostCard, Phase
from soco_export.preflight.inputs import check_choices, check_lengths, check_scales, check_stack
from soco_export.preflight.machine import Resources, bytes_in, check_onnxruntime, check_room, look
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.run.request import Request
from soco_export.run.verbs import train_and_export
from soco_train.errors import DataError, ExitCode, MachineError, RecipeError, SocoError
from soco_train.numbers.blocks import Grid, nearest
from tests.support.models import make_tokenizer


def card(device: int = 10, host: int = 5, disk: int = 100) -> CostCard:
    phases = (Phase("scores", device, host, 0.0), Phase("export", 0, 3, 0.0))
    return CostCard("m", 10, 8, 4, 2, 6, phases, {"spectrum": disk - 1, "hf": 1}, {}, 0, "")


@settings(deadline=None)
@given(
    memory=st.integers(0, 20), gpu=st.none() | st.integers(0, 20), disk=st.integers(0, 200), there=st.integers(0, 99)
)
def test_a_run_starts_exactly_where_it_fits(memory: int, gpu: int | None, disk: int, there: int) -> None:
    fits = disk >= 100 - there and (memory >= 10 if gpu is None else gpu >= 10 and memory >= 5)
    free = Resources(memory, gpu, disk)
    if fits:
        check_room(card(), free, already=there)
    else:
        with pytest.raises(MachineError):
            check_room(card(), free, already=there)


@pytest.mark.parametrize(
    ("setting", "context", "allowed"),
    [("decode_steps", None, 63), ("greedy_tokens", 40, 39), ("greedy_tokens", None, 10**6)],
)
def test_a_proof_that_would_start_from_nothing_is_refused(setting: str, context: int | None, allowed: int) -> None:
    """It came after the training: blocks of 64 tokens, or positions for 40, leave no token before so many steps."""
    block = 64 if context is None else 16
    words = [f"evaluation.block={block}", f"data.block={block}", "validate.parity.decode_steps=1"]
    check_lengths(load_recipe("tiny", [*words, f"validate.parity.{setting}={allowed}"]), context)
    if allowed < 10**6:
        with pytest.raises(RecipeError, match=f"validate.parity.{setting} is {allowed + 1}"):
            check_lengths(load_recipe("tiny", [*words, f"validate.parity.{setting}={allowed + 1}"]), context)


def test_a_choice_that_no_model_could_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"context": "a", "choices": ["b", "c c c c c c c c"], "label": 0}')
    recipe = load_recipe("tiny", [f"validate.tasks=[{{path: {tmp_path / 't.jsonl'}}}]"])
    check_choices(recipe, make_tokenizer(), None)
    with pytest.raises(DataError, match="positions for 5"):
        check_choices(recipe, make_tokenizer(), 5)
    with pytest.raises(DataError, match="has 0 tokens"):
        check_choices(recipe, lambda texts, **_: {"input_ids": [[] for _ in texts]}, None)


def test_layers_outside_the_stack_cannot_be_refitted() -> None:
    sets = ["model.architecture.tie_word_embeddings=false", "layers.include=['*']", "layers.exclude=[]"]
    sets += ["model.architecture.num_hidden_layers=2"]
    check_stack(load_recipe("mistral-7b", sets))
    with pytest.raises(RecipeError, match="one stack"):
        check_stack(load_recipe("mistral-7b", [*sets, "refine.refit.blocks=4"]))


def test_too_small_a_machine_is_told_what_is_missing() -> None:
    with pytest.raises(
        MachineError, match=r"scores needs about 10\.0 GB of GPU memory, and 8\.0 GB are free"
    ) as caught:
        check_room(card(device=10 * 10**9), Resources(10**12, 8 * 10**9, 10**12))
    assert "train.batch_tokens" in caught.value.fix
    with pytest.raises(MachineError, match=r"needs about 1\.0 TB of disk") as caught:
        check_room(card(disk=10**12), Resources(10**12, None, 10**9))
    assert "most of it is spectrum" in caught.value.fix
    with pytest.raises(MachineError, match="and nothing is free"):
        check_room(card(disk=10**12), Resources(10**12, None, 0))
    assert caught.value.code == ExitCode.MACHINE


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("export.dtype=float16", RecipeError, "export.dtype is float16"),
        ("export.dtype=bfloat16", RecipeError, "export.dtype is bfloat16"),
        ("validate.provider=NoSuchExecutionProvider", MachineError, "NoSuchExecutionProvider is not in"),
        ("data.path=absent.txt", RecipeError, "cannot read absent.txt"),
        ("evaluation.path=latin.txt", DataError, "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
        ("data.path=short.txt", DataError, "and one block needs 256"),
        ("data.hub=wikitext", RecipeError, "cannot read the data set address"),
        ("layers.include=[nothing]", RecipeError, "no Linear of the model matches"),
        ("model.path=absent", RecipeError, "nowhere"),
        ("model.architecture.model_type=lama", RecipeError, "does not know the architecture"),
    ],
)
def test_bad_input_stops_a_run_before_it_starts(
    override: str, kind: type[SocoError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("soco_export.model.weights.read_weights", None)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "short.txt").write_text("not enough of it")
    recipe = load_recipe("tiny", [override, *(["model.weights=pretrained"] if override.startswith("model.") else [])])
    with pytest.raises(kind) as caught:
        check_everything(recipe, tmp_path / "run", "onnx")
    assert message in caught.value.message
    assert caught.value.code == (ExitCode.MACHINE if kind is MachineError else ExitCode.USAGE)
    assert not (tmp_path / "run").exists()


def test_factors_are_not_rounded_where_they_were_not_trained_to_be(tmp_path: Path) -> None:
    def recipe(*settings: str) -> Recipe:
        return load_recipe("tiny", ["refine.distill.steps=4", *settings])

    int4, int8 = (f"refine.distill.rounding.weights={kind}" for kind in ("int4", "int8"))
    kept = "refine.distill.rounding.keep=[lm_head]"
    finer = ([], ["export.weights=int4"], ["export.weights=int8"], ["export.quantize.keep=[lm_head]"])
    for export in finer:
        check_quantisation(recipe(int4, *export))
    for key, *asked in (
        ("export.weights", int8, "export.weights=int4"),
        ("export.quantize.block", int4, "export.weights=int4", "export.quantize.block=64"),
        ("export.quantize.symmetric", int4, "export.weights=int4", "export.quantize.symmetric=false"),
        ("export.quantize.keep", int4, "export.weights=int4", kept),
    ):
        with pytest.raises(RecipeError) as caught:
            check_everything(recipe(*asked), tmp_path / "run", "onnx")
        assert caught.value.where == f"recipe: {key}"
    with pytest.raises(RecipeError, match="storage is pivoted"):
        check_everything(recipe(int4, "storage=pivoted"), tmp_path / "run", "hf")
    with pytest.raises(RecipeError, match="nothing is distilled"):
        check_everything(recipe(int4, "refine.distill.steps=0"), tmp_path / "run", "hf")


@pytest.mark.parametrize("tiny", [False, True])
def test_a_good_recipe_passes_and_nothing_is_written(tiny: bool, tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    check_everything(shrink(recipe) if tiny else recipe, tmp_path / "run", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_precision_and_provider_do_not_matter_without_onnx(tmp_path: Path) -> None:
    check_everything(load_recipe("tiny", ["export.dtype=float16"]), tmp_path / "run", "hf")


@pytest.mark.parametrize(
    ("model", "settings", "fits"),
    [
        ("mistral-7b", [], True),  # nothing that adds a bias
        ("mistral-7b", ["train.scorer=soco"], False),
        ("qwen2.5-7b", ["train.scorer=soco"], False),  # it has some biases of its own, and no switch for the others
        ("mistral-7b", ["train.scorer=soco", "train.deviation=false"], True),
        ("mistral-7b", ["train.scorer=fisher"], True),
        ("llama-3.1-8b", ["train.scorer=soco"], True),
        ("opt-6.7b", ["train.scorer=soco"], True),
    ],
)
def test_a_bias_without_a_place_in_the_dense_form_is_refused_before_training(
    model: str, settings: list[str], fits: bool, tmp_path: Path
) -> None:
    recipe = shrink(load_recipe(model)).override(settings)
    if fits:
        check_everything(recipe, tmp_path / "run", "dense")
        return
    check_everything(recipe, tmp_path / "run", "hf")
    with pytest.raises(RecipeError, match=r"has no place for model\.layers\.0\..*bias") as caught:
        check_everything(recipe, tmp_path / "run", "dense")
    assert "train.deviation: false" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_two_onnxruntimes_are_named_where_a_provider_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version_of", lambda package: "1.32.0")
    with pytest.raises(MachineError, match="both installed") as caught:
        check_onnxruntime(load_recipe("tiny", ["validate.provider=NoSuchExecutionProvider"]))
    assert "pip uninstall" in caught.value.fix


def test_what_no_mixture_can_be_asked_for_is_refused_by_a_dry_run() -> None:
    asked = Request(model="mixtral-8x7b", tiny=True, dry_run=True)
    with pytest.raises(RecipeError, match="mixture") as caught:
        train_and_export(replace(asked, set_=["refine.refit.blocks=2"]))
    assert "refine.refit.blocks" in caught.value.where
    train_and_export(replace(asked, set_=["refine.refit.blocks=2", "layers.exclude=['*experts*']"]))


@pytest.mark.parametrize(("size", "fits"), [(1e6, False), (4e5, True), (0.0, True), (1e-4, True), (1e-9, False)])
def test_a_matrix_without_scales_in_its_type_is_named_before_training(size: float, fits: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 4, bias=True), torch.nn.Linear(64, 4))
    model[1].weight.data.uniform_(-size, size)[0, 0] = size
    model[1].bias.data.fill_(1e9)  # no bias is rounded
    check_scales(model, ExportSettings(weights="same"))
    check_scales(model, ExportSettings(weights="int4", each={"1": "same"}))
    with nullcontext() if fits else pytest.raises(DataError, match=r"1\.weight.*int4"):
        check_scales(model, ExportSettings(weights="int4"))
        assert bool(nearest(model[1].weight.detach(), Grid(4, 32, True)).scales.any()) == (size > 0)


ROUNDED = "refine.distill.rounding"


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("export.each={'*.down_proj': int8}", True),
        ("export.each={'*.down_prj': int8}", False),
        ("export.each={model.layers.0: int8}", False),
        ("export.each={model.layers.9.mlp.up_proj: int8}", False),
        ("export.quantize.keep=[lm_head, '*embed_tokens']", True),
        ("export.quantize.keep=[lm_head, lm_haed]", False),
        ("export.quantize.blocks={model.layers.0.mlp.up_proj: 64}", True),
        ("export.quantize.blocks={'model.layers.*.mlp': 64}", False),
        (f"{ROUNDED}.keep=['*.up_proj']", True),
        (f"{ROUNDED}.keep=['*.up_prj']", False),
        (f"{ROUNDED}.keep=[model.layers.0]", False),
        (f"{ROUNDED}.blocks={{model.layers.0.mlp.up_proj: 64}}", True),
        (f"{ROUNDED}.blocks={{'*.up_proj': 64}}", False),
        (f"{ROUNDED}.each={{model.layers.0.mlp.up_proj: int8}}", False),
    ],
)
def test_a_setting_of_a_layer_that_the_model_lacks_is_refused_by_whatever_looks(setting: str, known: bool) -> None:
    """A run, a dry run and `--tiny` all ask this; a block is no layer."""
    key = setting.partition("=")[0]
    recipe = shrink(load_recipe("tiny", ["export.weights=int4", setting]))
    with nullcontext() if known else pytest.raises(RecipeError, match=key):
        check_recipe(recipe, "hf" if key.startswith(ROUNDED) else "onnx")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMIT", limit)
    free = look(tmp_path / "not" / "there").memory
    for text, expected in (("max\n", pytest.approx(free, rel=0.2)), ("123456\n", 123456)):
        limit.write_text(text)
        assert look(tmp_path).memory == expected


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"12")
    assert bytes_in(tmp_path) == 7
    assert bytes_in(tmp_path / "absent") == 0


def test_contrib_in_float32_is_refused_for_cuda_before_anything_starts():
    recipe = load_recipe("tiny", ["validate.provider=CUDAExecutionProvider", "export.flavour=contrib"])
    with pytest.raises(RecipeError, match="half precision only") as caught:
        preflight.check_precision(recipe)
    assert "standard" in caught.value.fix
    preflight.check_precision(load_recipe("tiny", ["validate.provider=CUDAExecutionProvider"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "optimum caches values as large as keys"),
        (["export.layouts=[ort]", "export.flavour=contrib"], "GroupQueryAttention takes values as large as keys"),
        (["export.layouts=[]", "validate.runtime=openvino"], "openvino caches values as large as keys"),
        (["export.layouts=[]", "keep_bytes=9MB"], "which refine.values does not know"),
        (["export.layouts=[]", "refine.distill.sizes=[0.5, 0.9]"], "leave them off with distill.sizes"),
    ],
)
def test_values_that_nothing_could_cache_so_are_refused_before_training(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        preflight.check_recipe(load_recipe("tiny", ["refine.values.keep=0.5", *overrides]), "onnx")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.scorer=fisher"], "train.scorer: singular-values"),
        (["train.basis=whitened"], "train.basis: two-sided"),
        (["allocation=global"], "allocation: lagrangian"),
        (["refine.values.each={model.layers.0.self_attn.v_proj: 8}"], "leave it out"),
        (["export.flavour=contrib"], "export.flavour: standard"),
        (["keep_bytes=9MB"], "give keep_params"),
    ],
)
def test_values_that_no_plan_could_weigh_are_refused_before_training(overrides: list[str], said: str) -> None:
    weighed = ["train.scorer=singular-values", "train.basis=two-sided", "allocation=lagrangian"]
    planned = [*weighed, "refine.values.keep=planned", "export.layouts=[ort]"]
    preflight.check_recipe(load_recipe("tiny", planned), "onnx")
    with pytest.raises(RecipeError) as caught:
        preflight.check_recipe(load_recipe("tiny", [*planned, *overrides]), "onnx")
    assert said in caught.value.fix


def test_narrow_values_pass_where_the_cache_follows_the_graph_and_in_other_formats() -> None:
    for layout in ("ort", "triton"):
        preflight.check_recipe(load_recipe("tiny", ["refine.values.keep=0.5", f"export.layouts=[{layout}]"]), "onnx")
    for format in ("hf", "dense"):
        preflight.check_recipe(load_recipe("tiny", ["refine.values.keep=0.5", "train.deviation=false"]), format)
