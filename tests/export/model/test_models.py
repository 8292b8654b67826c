"""Finding, checking and loading dense models, and their tiny variants; no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soco_export.checkpoint.load import load_checkpoint
from soco_export.model.load import check_vocabulary, dense_config, load_model, load_onto, open_model, put_on
from soco_export.model.source import architecture_fields, fetch_folder, find_folder, read_architecture
from soco_export.model.tiny import WINDOW, random_model, shrink_architecture
from soco_export.model.which import recipe_for, shrink
from soco_export.recipe.load import list_recipes, load_recipe, lock
from soco_export.recipe.recipe import Recipe
from soco_train.errors import DataError, RecipeError

pytestmark = pytest.mark.transformers

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def byte_tokenizer(words: int = 256) -> PreTrainedTokenizerFast:
    vocabulary = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))
    vocabulary |= {f"<extra{i}>": i for i in range(256, words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama on disk, with quirks in its rope."""
    config = LlamaConfig(**SIZES, rope_theta=12345.0, tie_word_embeddings=True)
    path = tmp_path / "some-llama"
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def refused(kind: type[Exception], recipe: Recipe) -> Any:
    with pytest.raises(kind) as caught:
        load_model(recipe)
    return caught.value


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace or drop one weight of the folder."""
    weights = load_file(folder / "model.safetensors")
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "text",
    [
        *("null", "[]", "", '{"eos_token_id": "2"}', '{"bos_token_id": [1, -1]}', '{"pad_token_id": 1.5}'),
        *('{"eos_token_id": 1000000}', '{"bos_token_id": true}', '{"max_new_tokens": "2048"}'),
    ],
)
def test_a_generation_config_without_token_ids_is_refused_before_training(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json" in str(refused(DataError, recipe_for(str(folder))).where)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# which recipe --model means


@pytest.mark.parametrize("name", list_recipes())
def test_a_name_and_its_hub_id_mean_the_same_recipe(name: str) -> None:
    recipe = recipe_for(name, overrides=["keep_params=0.5"])
    assert (recipe.name, recipe.keep_params) == (name, 0.5)
    if recipe.model.id:
        assert recipe_for(recipe.model.id, overrides=["keep_params=0.5"]) == recipe


def test_an_unknown_hub_id_gets_the_base_settings() -> None:
    recipe = recipe_for("someone/some-model")
    assert (recipe.name, recipe.model.id, recipe.model.architecture) == ("some-model", "someone/some-model", {})


def test_a_folder_gets_the_settings_of_the_recipe_whose_sizes_agree(tmp_path: Path) -> None:
    fields = {**load_recipe("mistral-7b").model.architecture, "rope_theta": 5e5, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    recipe = recipe_for(str(tmp_path), overrides=["train.steps=3"])
    assert (recipe.name, recipe.model.path, recipe.data.block) == ("mistral-7b", tmp_path, 2048)
    assert recipe.model.architecture["rope_theta"] == 5e5
    assert "torch_dtype" not in recipe.model.architecture
    assert recipe.train.steps == 3


def test_a_folder_of_no_recipe_gets_the_base_settings(folder: Path) -> None:
    recipe = recipe_for(str(folder))
    assert (recipe.name, recipe.model.path) == ("some-llama", folder)
    assert recipe.model.architecture["hidden_size"] == 32


def test_a_recipe_file_lies_over_the_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 3}\n")
    assert recipe_for("opt-6.7b", file).train.steps == 3
    assert recipe_for("opt-6.7b", file).name == "opt-6.7b"


@pytest.mark.parametrize(("model", "hint"), [("mistal-7b", "did you mean mistral-7b?"), (None, "give --model")])
def test_an_unknown_model_is_refused(model: str | None, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_for(model)
    assert hint in caught.value.fix


# where it is


def test_folders_are_looked_for_by_name_and_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOCO_EXPORT_MODELS", str(tmp_path / "store"))
    recipe = load_recipe("smollm2-135m")
    assert find_folder(recipe) is None
    for place in ("SmolLM2-135M-Instruct", "models/SmolLM2-135M-Instruct", "store/smollm2-135m"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
        found = find_folder(recipe)
        assert found is not None
        assert found.resolve() == tmp_path / place


def test_another_models_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCO_EXPORT_MODELS", str(folder.parent))
    folder.rename(folder.parent / "smollm2-135m")
    with pytest.raises(RecipeError, match="hidden_size is 32, not 576"):
        fetch_folder(load_recipe("smollm2-135m"))


def test_offline_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="not on this machine") as caught:
        fetch_folder(load_recipe("mistral-7b"))
    assert "models/mistral-7b" in caught.value.where
    assert "--model FOLDER" in caught.value.fix


def test_a_path_that_is_nothing_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("base", [f"model.path={tmp_path / 'absent'}"])
    with pytest.raises(RecipeError, match="nowhere"):
        fetch_folder(recipe)


def test_rope_reads_the_same_in_either_versions_form(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    old = {**SIZES, "model_type": "llama", "rope_theta": 777.0, "rope_scaling": rope}
    new = {**SIZES, "model_type": "llama", "rope_parameters": {"rope_theta": 777.0, **rope}}
    for fields in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert read_architecture(tmp_path) == old
    config = dense_config(load_recipe("base", model={"architecture": old}))
    read = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta, **config.rope_scaling}
    assert read["rope_theta"] == 777.0
    assert read["factor"] == 8.0


def test_a_rotation_for_each_kind_of_layer_is_read_by_either_version(tmp_path: Path) -> None:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 777.0}
    tables = {"sliding_attention": {"rope_type": "default", "rope_theta": 99.0}, "full_attention": full}
    (tmp_path / "config.json").write_text(
        json.dumps({**SIZES, "model_type": "gemma3_text", "head_dim": 8, "rope_parameters": tables})
    )
    config = dense_config(recipe_for(str(tmp_path)))
    older = {"rope_theta": 777.0, "rope_local_base_freq": 99.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    if hasattr(config, "rope_local_base_freq"):
        assert {key: getattr(config, key) for key in older} == older
    else:
        assert config.rope_parameters == tables


def test_a_class_with_names_of_its_own_for_a_rotation_reads_the_newer_ones(tmp_path: Path) -> None:
    """GPT-NeoX has rotary_emb_base and rotary_pct, and takes its defaults where a file says rope_theta."""
    own = {"rotary_emb_base": 300.0, "rotary_pct": 1.0}
    torch.manual_seed(0)
    fields = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **fields, **own)).float().eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if "rotary" not in key and "rope" not in key}
    (tmp_path / "config.json").write_text(json.dumps({**kept, "rope_parameters": rope}))
    ids = torch.randint(0, 256, (1, 30))
    for read in (load_model(recipe_for(str(tmp_path)))[0], load_checkpoint(tmp_path, torch.float32)):
        torch.testing.assert_close(read(ids).logits, model(ids).logits)


def test_a_compressed_model_is_no_start(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(RecipeError, match="already compressed"):
        recipe_for(str(folder))


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(RecipeError, match="does not know the architecture 'lama'") as caught:
        dense_config(load_recipe("base", model={"architecture": {"model_type": "lama"}}))
    assert "did you mean llama?" in caught.value.fix


# reading it


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    model, tokenizer = load_model(recipe_for(str(folder)))
    original = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.tensor(tokenizer("any text at all")["input_ids"])[None]
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    theta = getattr(model.config, "rope_parameters", None) or {"rope_theta": model.config.rope_theta}
    assert theta["rope_theta"] == 12345.0


def test_half_precision_is_read_as_float32(folder: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(recipe_for(str(folder)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_opened_model_has_the_dtype_of_its_files_or_one_that_holds_it(folder: Path, dtype: torch.dtype) -> None:
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_model(recipe_for(str(folder)))
    assert {p.dtype for p in model.parameters()} == {torch.float32 if dtype == torch.float64 else dtype}
    assert all(torch.equal(model.state_dict()[name], weight.to(model.dtype)) for name, weight in weights.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_of_several_dtypes_are_opened_without_rounding(folder: Path) -> None:
    rewrite(folder, "model.norm.weight", torch.full((32,), 1 + 2**-9, dtype=torch.bfloat16))
    assert {p.dtype for p in open_model(recipe_for(str(folder))).parameters()} == {torch.float32}


def test_constants_of_the_architecture_are_not_rounded_with_the_weights(tmp_path: Path) -> None:
    """Gemma 3 keeps the factor of its embedding in the dtype of the weights."""
    config = AutoConfig.for_model("gemma3_text", **SIZES, head_dim=8)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    recipe = recipe_for(str(tmp_path))
    placed, read = load_onto(recipe, "cpu", torch.float32), load_model(recipe)[0]
    ids = torch.arange(20)[None]
    assert torch.equal(placed(ids).logits, read(ids).logits)


def test_a_broken_value_is_found_where_the_model_goes(folder: Path) -> None:
    rewrite(folder, "model.norm.weight", torch.full((32,), torch.inf))
    with pytest.raises(DataError, match=r"model\.norm\.weight holds NaN or infinity in 32 of 32"):
        load_onto(recipe_for(str(folder)), "cpu", torch.bfloat16)


def test_a_model_placed_in_bfloat16_keeps_its_rotary_frequencies(folder: Path) -> None:
    model, _ = load_model(recipe_for(str(folder)))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    put_on(model, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("keep", [0, 7, 400, -1])
def test_truncated_weights_are_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    error = refused(DataError, recipe_for(str(folder)))
    assert "cannot read model.safetensors: it is truncated or corrupt" in error.message
    assert error.where == str(file)


def test_a_missing_shard_is_named(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(recipe_for(str(folder)))
    shards[1].unlink()
    assert shards[1].name in refused(DataError, recipe_for(str(folder))).message


def test_a_corrupt_index_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json" in refused(DataError, recipe_for(str(folder))).message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    weight[3, 4] = value
    rewrite(folder, name, weight)
    assert refused(DataError, recipe_for(str(folder))).message.startswith(f"{name} holds NaN or infinity in 1 of")


def test_a_missing_weight_is_named(folder: Path) -> None:
    rewrite(folder, "model.layers.0.self_attn.q_proj.weight", None)
    assert "model.layers.0.self_attn.q_proj.weight" in refused(DataError, recipe_for(str(folder))).message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.self_attn.rotary_emb.cos_cached", torch.ones(64, 8)),
        ("model.layers.1.self_attn.attention.bias", torch.ones(1, 1, 64, 64, dtype=torch.bool)),
        ("model.layers.1.self_attn.masked_bias", torch.tensor(-1e9)),
    ],
)
def test_buffers_that_older_files_hold_are_passed_over(folder: Path, name: str, value: torch.Tensor) -> None:
    """GPT-Neo, GPT-J and old Llamas came with masks and angles, which transformers computes."""
    model, _ = load_model(recipe_for(str(folder)))
    rewrite(folder, name, value)
    again, _ = load_model(recipe_for(str(folder)))
    assert set(again.state_dict()) == set(model.state_dict()) == set(load_checkpoint(folder).state_dict())


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, name, torch.zeros(47, 32))
    assert refused(DataError, recipe_for(str(folder))).message.endswith(f"gives them, among them {name}")


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickles" in refused(RecipeError, recipe_for(str(folder))).message


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(DataError, recipe_for(str(folder))).message


@pytest.mark.parametrize("words", [257, 300])
def test_a_tokenizer_with_too_many_ids_is_refused(folder: Path, words: int) -> None:
    byte_tokenizer(words).save_pretrained(folder)
    assert f"go up to {words - 1}, the model has 256" in refused(RecipeError, recipe_for(str(folder))).message


def test_a_tokenizer_of_another_model_is_refused_and_padding_is_not() -> None:
    with pytest.raises(RecipeError, match="go up to 255, the model has 2048"):
        check_vocabulary(byte_tokenizer(), LlamaConfig(**{**SIZES, "vocab_size": 2048}))
    check_vocabulary(byte_tokenizer(), LlamaConfig(**{**SIZES, "vocab_size": 264}))


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refused(RecipeError, recipe_for(str(folder))).message


def test_a_tokenizer_class_of_another_version_is_read_from_its_json(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    changed = {**json.loads(file.read_text()), "tokenizer_class": "SomeFutureBackend", "extra_special_tokens": []}
    file.write_text(json.dumps(changed))
    _, tokenizer = load_model(recipe_for(str(folder)))
    assert tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


# --tiny


@pytest.mark.parametrize("name", list_recipes())
def test_tiny_keeps_the_quirks(name: str) -> None:
    recipe = load_recipe(name)
    fields, small = architecture_fields(recipe), architecture_fields(shrink(recipe))
    assert set(small) == set(fields)
    assert small["num_hidden_layers"] == 2
    for key, value in fields.items():
        # booleans, names and rotations are the quirks; only sizes shrink
        if isinstance(value, bool | str) or key in ("rope_theta", "rms_norm_eps"):
            assert small[key] == value
        assert (small[key] is None) <= (value is None or key == "pad_token_id")
    heads = [
        f["num_attention_heads"] // f.get("num_key_value_heads", f["num_attention_heads"]) for f in (fields, small)
    ]
    assert heads[0] == heads[1]
    if fields.get("sliding_window"):
        assert small["sliding_window"] == WINDOW < shrink(recipe).data.block


@pytest.mark.parametrize("name", list_recipes())
def test_tiny_models_are_seeded_and_their_logits_far_from_flat(name: str) -> None:
    config = dense_config(shrink(load_recipe(name)))
    ids = torch.randint(0, config.vocab_size, (2, 64))
    model = random_model(config, seed=3)
    logits = model(ids).logits
    assert torch.equal(random_model(config, seed=3)(ids).logits, logits)
    assert not torch.equal(random_model(config, seed=4)(ids).logits, logits)
    assert 1.5 < logits.std().item() < 5
    assert sum(p.numel() for p in model.parameters()) < 4e6
    assert config.tie_word_embeddings == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_tiny_sees_the_end_of_its_window() -> None:
    config = dense_config(shrink(load_recipe("mistral-7b")))
    ids = torch.randint(0, config.vocab_size, (1, 64))
    windowed = random_model(config, seed=0)(ids).logits
    config.sliding_window = None
    whole = random_model(config, seed=0)(ids).logits
    assert torch.allclose(windowed[:, : WINDOW - 1], whole[:, : WINDOW - 1], atol=1e-5)
    assert not torch.allclose(windowed[:, WINDOW:], whole[:, WINDOW:], atol=1e-2)


def test_tiny_knows_other_names_for_the_sizes() -> None:
    small = shrink_architecture({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257})
    config = AutoConfig.for_model(**small)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)


def test_tiny_survives_its_lock(tmp_path: Path) -> None:
    recipe = shrink(load_recipe("llama-3.1-8b"))
    (tmp_path / "recipe.lock.yaml").write_text(lock(recipe))
    assert load_recipe(tmp_path / "recipe.lock.yaml") == recipe
    assert recipe.name == "llama-3.1-8b-tiny"
