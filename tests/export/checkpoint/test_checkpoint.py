"""The checkpoint folder: round trips, every way of loading, damage, and processes with and without our package.

Runs under transformers 4.57 and 5. With SOCO_EXPORT_OTHER_PYTHON set to an interpreter that has the other version, it
also proves that each version reads what the other wrote.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from soco_export import apply_factors, load_checkpoint, merge_dense, save_checkpoint, save_dense
from soco_export.checkpoint.layers import count_parameters, factored_layers
from soco_export.checkpoint.reader import check_checkpoint
from soco_train.errors import DataError, RecipeError
from soco_train.forms.base import FactoredLinear
from soco_train.forms.pivoted import PivotedLinear
from soco_train.store.factors import Factors
from tests.support.models import ARCHITECTURES, VOCABULARY, logits, make_model, make_tokenizer, prune, random_layer

pytestmark = pytest.mark.transformers

transformers_logging.disable_progress_bar()
OTHER_PYTHON = os.environ.get("SOCO_EXPORT_OTHER_PYTHON")
INSTALLED = any(point.name == "soco_export" for point in importlib.metadata.entry_points(group="torch.backends"))
KINDS = ("stacked", "pivoted", "mixed")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 17))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A pruned model of both kinds and its folder."""
    model = prune(make_model("llama-tied"), "mixed")
    save_checkpoint(model, make_tokenizer(), tmp_path / "hf")
    return model, tmp_path / "hf"


def same_function(a: Any, b: Any, ids: torch.Tensor) -> None:
    """Equal weights, and logits equal but for the order of summation (kernels choose by memory alignment)."""
    weights = [{name: tensor for name, tensor in m.state_dict().items() if not tensor.is_meta} for m in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0].keys() & weights[1].keys())
    expected = logits(b, ids)
    error = (logits(a, ids) - expected).norm() / expected.norm()
    assert error < 1e-5


def to_bfloat16(model: Any) -> Any:
    """Cast the weights only: `model.bfloat16()` also casts the rotary frequencies, which from_pretrained never does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


# --- the round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(architecture: str, kind: str, tmp_path: Path, ids: torch.Tensor) -> None:
    model = prune(make_model(architecture), kind)
    save_checkpoint(model, None, tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    same_function(loaded, model, ids)
    assert not loaded.training
    assert count_parameters(loaded) == count_parameters(model)
    assert [type(layer) for layer in factored_layers(loaded).values()] == [
        type(layer) for layer in factored_layers(model).values()
    ]
    # And what it saves itself is the same again.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    same_function(again, model, ids)
    check_checkpoint(tmp_path / "again")


def test_loaded_model_is_an_ordinary_model(saved: tuple[Any, Path], ids: torch.Tensor) -> None:
    model, folder = saved
    loaded = load_checkpoint(folder)
    loaded.train()
    loaded(ids, labels=ids).loss.backward()
    assert all(
        parameter.grad is not None for layer in factored_layers(loaded).values() for parameter in layer.parameters()
    )
    half = copy.deepcopy(loaded).half().float()  # transformers forbids both on quantised models
    assert next(half.parameters()).dtype == torch.float32
    out = loaded.eval().generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, expected)
    merge_dense(loaded)
    assert not hasattr(loaded.config, "quantization_config")


def test_ties_are_kept_and_stored_once(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    assert "lm_head.weight" not in check_checkpoint(folder)
    loaded = load_checkpoint(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_base_model_loads_alone(saved: tuple[Any, Path], ids: torch.Tensor) -> None:
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


# --- ways of loading --------------------------------------------------------------------------------------------------


def test_bfloat16_leaves_the_row_order_alone(saved: tuple[Any, Path], ids: torch.Tensor) -> None:
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for name, layer in factored_layers(loaded).items():
        if isinstance(layer, PivotedLinear):
            assert layer.order.dtype == torch.int64
            assert torch.equal(layer.order, model.get_submodule(name).order)
    same_function(loaded, to_bfloat16(copy.deepcopy(model)), ids)


def test_a_bfloat16_model_is_saved_as_such(tmp_path: Path, ids: torch.Tensor) -> None:
    model = to_bfloat16(prune(make_model("qwen2"), "mixed"))
    save_checkpoint(model, None, tmp_path / "hf")
    loaded = load_checkpoint(tmp_path / "hf")
    assert loaded.dtype == torch.bfloat16
    same_function(loaded, model, ids)


def test_sharded(tmp_path: Path, ids: torch.Tensor) -> None:
    model = prune(make_model("opt"), "mixed")
    save_checkpoint(model, None, tmp_path / "hf", max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    same_function(load_checkpoint(tmp_path / "hf"), model, ids)


@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_disk_offload(shard: str, tmp_path: Path, ids: torch.Tensor) -> None:
    pytest.importorskip("accelerate")
    model = prune(make_model("llama-scaled"), "mixed")
    save_checkpoint(model, None, tmp_path / "hf", max_shard_size=shard)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    # 4.57 leaves the row order of an offloaded pivoted layer unread, and stops, unless buffers are offloaded too.
    options = {"offload_buffers": True} if transformers.__version__.startswith("4.") else {}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", device_map=places, offload_folder=str(tmp_path / "offload"), **options
    )
    assert loaded.model.layers[0].self_attn.q_proj.weight.is_meta
    same_function(loaded, model, ids)


def test_automatic_device_map(saved: tuple[Any, Path], ids: torch.Tensor) -> None:
    pytest.importorskip("accelerate")
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1GB"})
    same_function(loaded, model, ids)


def test_lora_trains_on_the_factors(saved: tuple[Any, Path], ids: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    _, folder = saved
    adapted = peft.get_peft_model(load_checkpoint(folder), peft.LoraConfig(r=2, target_modules=["up", "mix"]))
    adapted(ids, labels=ids).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any(".up." in name for name in trained)
    assert any(".mix." in name for name in trained)
    assert all("lora" in name for name in trained)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_says_what_it_is(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "soco-export"
    assert config["quantization_config"]["install"] == "pip install soco-export"
    assert config["rope_theta"] == 5000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert "pip install soco-export" in (folder / "README.md").read_text()
    assert (folder / "generation_config.json").exists()
    assert {path.stat().st_mode for path in folder.glob("*.safetensors")} == {(folder / "README.md").stat().st_mode}


def test_the_tokenizer_comes_back(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    before, after = make_tokenizer(), AutoTokenizer.from_pretrained(folder)
    text = "<s>Bäume <|im_start|> and\n  more</s>"
    assert after(text).input_ids == before(text).input_ids
    assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
    assert after.chat_template == before.chat_template
    assert set(after.all_special_tokens) == set(before.all_special_tokens)
    assert after.padding_side == "left"


def test_saving_replaces_a_checkpoint_whole_or_not_at_all(saved: tuple[Any, Path], ids: torch.Tensor) -> None:
    model, folder = saved
    (folder / "notes.txt").write_text("from before")
    with pytest.raises(RecipeError, match=r"notes.txt \(not written by soco-export\)"):
        save_checkpoint(model, None, folder)
    (folder / "notes.txt").unlink()
    save_checkpoint(model, None, folder, card="# mine")
    assert (folder / "README.md").read_text() == "# mine"

    class Broken:
        def save_pretrained(self, folder: str) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, Broken(), folder)
    same_function(load_checkpoint(folder), model, ids)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_foreign_folder_is_left_alone(saved: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"chapter.tex \(not written by soco-export\)"):
        save_checkpoint(saved[0], None, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_model_that_is_not_finite_is_not_written(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = saved
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.up.weight[0, 0] = torch.nan
    for save in (save_checkpoint, save_dense):
        with pytest.raises(DataError, match=r"q_proj\.up\.weight holds NaN"):
            save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- dense ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_is_the_same_function(architecture: str, tmp_path: Path, ids: torch.Tensor) -> None:
    new_bias = architecture.startswith("llama")  # its config can switch biases on
    model = prune(make_model(architecture), "mixed", new_bias)
    save_dense(model, make_tokenizer(), tmp_path / "dense")
    assert factored_layers(model), "the model itself stays pruned"
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, FactoredLinear) for module in loaded.modules())


@pytest.mark.parametrize("save", [save_dense, save_checkpoint])
def test_a_bias_without_a_home_is_refused(save: Any, tmp_path: Path) -> None:
    """Loading would drop it with a warning at most."""
    model = prune(make_model("mistral"), "stacked")
    if save is save_checkpoint:
        merge_dense(model)
    with pytest.raises(RecipeError, match=r"mistral model has no place for .*bias"):
        save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def first(folder: Path, kind: str) -> str:
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return next(name for name, layer in layers.items() if layer["kind"] == kind)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 64)


def lose_the_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_a_factor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(first(folder, "stacked") + ".up.weight"))


def lose_the_order(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(first(folder, "pivoted") + ".order"))


def repeat_a_row(folder: Path) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        order = tensors[first(folder, "pivoted") + ".order"]
        order[0] = order[1]

    rewrite(folder, repeat)


def spoil_a_number(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, torch.inf))


def shorten_a_factor(folder: Path) -> None:
    name = first(folder, "stacked") + ".weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()[:1].repeat(40, 1)}))


def garble_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def lose_a_dense_weight(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))


def shorten_a_dense_weight(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))


def name_a_strange_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.bias": torch.ones(32)}))


DAMAGE = {
    truncate: r"cannot read model\.safetensors",
    garble: r"cannot read the header of model\.safetensors",
    lose_the_file: r"model\.safetensors is missing",
    lose_a_factor: r"up\.weight is in none of model\.safetensors",
    lose_the_order: r"order is in none of model\.safetensors",
    repeat_a_row: r"order in model\.safetensors is not a permutation",
    spoil_a_number: r"model\.norm\.weight in model\.safetensors holds NaN or infinity",
    shorten_a_factor: r"do not make a stacked layer of rank",
    garble_the_config: r"cannot read config\.json",
    lose_a_dense_weight: r"missing keys \['model\.layers\.1\.mlp\.down_proj\.weight'\]",
    shorten_a_dense_weight: r"mismatched keys \['model\.layers\.1\.mlp\.down_proj\.weight'\]",
    name_a_strange_tensor: r"unexpected keys \['model\.layers\.1\.mlp\.down_proj\.bias'\]",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named(damage: Any, saved: tuple[Any, Path]) -> None:
    _, folder = saved
    damage(folder)
    with pytest.raises(DataError, match=DAMAGE[damage]):
        load_checkpoint(folder)


@pytest.mark.parametrize("damage", [truncate, lose_a_factor, lose_the_order, shorten_a_factor])
def test_plain_loading_refuses_a_lost_factor(damage: Any, saved: tuple[Any, Path]) -> None:
    _, folder = saved
    damage(folder)
    with pytest.raises(Exception, match=r"safetensors|lacks|none of|size mismatch|incomplete|HeaderTooLarge"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint(prune(make_model("llama-tied"), "stacked"), None, tmp_path / "hf", max_shard_size="30KB")
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} of \d+ shards is missing"):
        check_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", 0, "it needs kind"),
        ("rank", "6", "it needs kind"),
        ("kind", "toothed", "it needs kind"),
        ("bias", None, "it needs kind"),
        ("rank", 999, "says rank 999 for a layer of 32 outputs"),
    ],
)
def test_a_wrong_record_is_named(key: str, value: Any, message: str, saved: tuple[Any, Path]) -> None:
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_newer_format_is_refused(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="of format 2"):
        AutoModelForCausalLM.from_pretrained(folder)


# --- other processes --------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
from transformers import AutoModelForCausalLM
from transformers.utils import logging
import torch

logging.disable_progress_bar()
outcome = {}
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            outcome[folder] = model(torch.tensor([[5, 9, 77, 2, 0, 31, 8, 8, 120]])).logits.flatten().tolist()
    except (RuntimeError, ValueError) as error:
        outcome[folder] = str(error)
assert "soco_export.run" not in sys.modules
print(json.dumps(outcome))
"""
PROBE = torch.tensor([[5, 9, 77, 2, 0, 31, 8, 8, 120]])


def load_elsewhere(python: str, folders: list[Path], cwd: Path, autoload: bool) -> tuple[dict[str, Any], str]:
    """Load `folders` in a process that never imports our package; return logits or error by folder, and stderr."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [python, "-c", LOAD, *map(str, folders)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


@pytest.mark.skipif(not INSTALLED, reason="needs the package installed, for its entry point")
def test_plain_transformers_loads_it_where_the_package_is_installed(tmp_path: Path) -> None:
    models = {tmp_path / kind: prune(make_model("llama-tied"), kind) for kind in KINDS}
    for folder, model in models.items():
        save_checkpoint(model, None, folder)
    outcome, _ = load_elsewhere(sys.executable, list(models), tmp_path, autoload=True)
    for folder, model in models.items():
        torch.testing.assert_close(torch.tensor(outcome[str(folder)]), logits(model, PROBE).flatten())


def test_without_the_package_loading_fails_loudly(tmp_path: Path) -> None:
    """One folder per layer, kind and extreme rank: each alone must stop from_pretrained."""
    folders = []
    for architecture in ("llama-tied", "opt"):
        original = make_model(architecture)
        names = [name for name, module in original.named_modules() if type(module) is torch.nn.Linear]
        names = [name for name in names if ".layers.0." in name]
        for index, name in enumerate(names):
            linear = original.get_submodule(name)
            for kind in ("stacked", "pivoted"):
                model = copy.deepcopy(original)
                most = min(linear.in_features, linear.out_features - 1)
                rank = (most, most - 1, 1)[(index + (kind == "pivoted")) % 3]
                layer = random_layer(kind, linear, rank, new_bias=False)
                apply_factors(model, Factors({name: layer}))
                folders.append(tmp_path / f"{architecture}-{name}-{kind}")
                save_checkpoint(model, None, folders[-1])
    dense = {}
    for kind in ("stacked", "pivoted"):  # of full rank, the shapes would agree: so these are written dense
        model = make_model("llama-tied")
        name = "model.layers.0.self_attn.o_proj"
        apply_factors(model, Factors({name: random_layer(kind, model.get_submodule(name), 32, new_bias=False)}))
        dense[tmp_path / f"full-{kind}"] = model
        save_checkpoint(model, None, tmp_path / f"full-{kind}")
    merged = prune(make_model("llama-tied"), "mixed")
    dense[tmp_path / "merged"] = merged
    save_dense(merged, None, tmp_path / "merged")

    outcome, log = load_elsewhere(sys.executable, [*folders, *dense], tmp_path, autoload=False)
    for folder in folders:
        assert isinstance(outcome[str(folder)], str), f"{folder.name} loaded silently"
        assert "mismatch" in outcome[str(folder)]
    assert "soco-export" in log, "transformers' warning names the package"
    for folder, model in dense.items():
        torch.testing.assert_close(
            torch.tensor(outcome[str(folder)]), logits(model, PROBE).flatten(), atol=1e-4, rtol=1e-4
        )


@pytest.mark.skipif(not OTHER_PYTHON, reason="SOCO_EXPORT_OTHER_PYTHON is not set")
def test_the_other_version_reads_it(tmp_path: Path) -> None:
    assert OTHER_PYTHON
    models = {
        tmp_path / f"{architecture}-{form}": (prune(make_model(architecture), "mixed", form == "hf"), form)
        for architecture in ARCHITECTURES
        for form in ("hf", "dense")
    }
    for folder, (model, form) in models.items():
        (save_checkpoint if form == "hf" else save_dense)(model, make_tokenizer(), folder)
    outcome, _ = load_elsewhere(OTHER_PYTHON, list(models), tmp_path, autoload=True)
    for folder, (model, _form) in models.items():
        assert not isinstance(outcome[str(folder)], str), outcome[str(folder)]
        torch.testing.assert_close(
            torch.tensor(outcome[str(folder)]), logits(model, PROBE).flatten(), atol=1e-4, rtol=1e-4
        )
    text = "<s>Bäume <|im_start|> and\n  more</s>"
    read = f"from transformers import AutoTokenizer as A; print(A.from_pretrained('.')({text!r}).input_ids)"
    run = subprocess.run([OTHER_PYTHON, "-c", read], cwd=next(iter(models)), capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == make_tokenizer()(text).input_ids


def test_copying_the_folder_is_enough(saved: tuple[Any, Path], tmp_path: Path, ids: torch.Tensor) -> None:
    model, folder = saved
    shutil.move(folder, tmp_path / "elsewhere")
    same_function(load_checkpoint(tmp_path / "elsewhere"), model, ids)


@pytest.mark.parametrize("architecture", ["mistral", "llama-scaled"])
def test_a_rotation_in_the_newer_spelling_alone_is_read_by_either_version(architecture: str, tmp_path: Path) -> None:
    """transformers 4.57 passes over `rope_parameters`, which is all that 5 writes, and takes its default."""
    model = make_model(architecture)
    model.save_pretrained(tmp_path)
    config = model.config.to_dict()
    rope = config.pop("rope_parameters", None)
    theta, scaling = config.pop("rope_theta", None), config.pop("rope_scaling", None)
    config["rope_parameters"] = rope or {"rope_type": "default", "rope_theta": theta, **(scaling or {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 64, (1, 30))
    assert torch.equal(logits(load_checkpoint(tmp_path, dtype=torch.float32), ids), logits(model, ids))


@pytest.mark.parametrize(
    "theirs",
    [
        {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
        {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"},
    ],
)
def test_how_somebody_ran_the_model_is_not_asked_of_it(theirs: dict[str, Any], tmp_path: Path) -> None:
    model = make_model("qwen2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **theirs}))
    ids = torch.randint(0, 64, (1, 9))
    assert torch.equal(logits(load_checkpoint(tmp_path, dtype=torch.float32), ids), logits(model, ids))
