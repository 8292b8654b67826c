"""The ONNX folder: whole or absent, equal bytes for equal input, what each runtime wants, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from soco_export.export import export_onnx
from soco_export.onnx.inspect import read_ports, summarise_graph
from soco_export.onnx.read import CheckpointWeights
from soco_export.onnx.settings import ExportSettings, Flavour
from soco_train.errors import DataError, RecipeError
from tests.support.decoders import CONFIGS, factor, save_dense, tiny_model

GOLDEN = Path(__file__).parents[2] / "golden"
PIVOTED, STACKED = {"proj": ("pivoted", 9)}, {"proj": ("stacked", 9)}
MIXED = {"q_proj": ("stacked", 20), "v_proj": ("pivoted", 9), "up_proj": ("pivoted", 24), "fc2": ("stacked", 17)}


def hf_folder(tmp_path: Path, name: str = "llama", factored: bool = True) -> Path:
    model = tiny_model(name)
    return factor(model, tmp_path / "hf", MIXED) if factored else save_dense(model, tmp_path / "hf")


def test_equal_input_gives_equal_bytes_and_no_paths(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    settings = ExportSettings(weights="int4", layouts=("optimum", "genai", "triton"))
    for name in ("one", "two"):
        export_onnx(folder, tmp_path / name / "onnx", settings)
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert len(files) > 6
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes(), file
        assert str(tmp_path).encode() not in content


def test_an_export_that_dies_leaves_nothing_and_keeps_the_last_one(tmp_path: Path) -> None:
    folder, out = hf_folder(tmp_path), tmp_path / "out" / "onnx"

    def die(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(folder, out, ExportSettings(), die)
    assert list((tmp_path / "out").iterdir()) == []
    export_onnx(folder, out, ExportSettings())
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        export_onnx(folder, out, ExportSettings(weights="int8"), die)
    assert (out / "model.onnx").read_bytes() == before
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["onnx"]


KILLED = """
import os, signal, sys
from pathlib import Path
from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings
def kill(event):
    if event.step == event.total:  # every weight is written
        os.kill(os.getpid(), signal.SIGKILL)
export_onnx(Path(sys.argv[1]), Path(sys.argv[2]), ExportSettings(), kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_export_leaves_nothing_that_looks_complete_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    folder, out = hf_folder(tmp_path), tmp_path / "out" / "onnx"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not list((tmp_path / "out").rglob("model.onnx"))
    export_onnx(folder, out, ExportSettings())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["onnx"]


def test_progress_counts_every_layer(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export_onnx(
        hf_folder(tmp_path), tmp_path / "onnx", ExportSettings(), lambda e: seen.append((e.stage, e.step, e.total))
    )
    assert seen == [("export", 1, 3), ("export", 2, 3), ("export", 3, 3)]


def test_a_folder_that_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    for out in (folder, folder / "onnx", folder.parent):
        with pytest.raises(RecipeError, match="that is read"):
            export_onnx(folder, out, ExportSettings())
    assert (folder / "model.safetensors").exists()


def test_an_export_without_the_optimum_layout_can_be_made_again(tmp_path: Path) -> None:
    folder, out = hf_folder(tmp_path), tmp_path / "onnx"
    for weights in ("same", "int8"):
        export_onnx(folder, out, ExportSettings(layouts=("genai",), weights=weights))
    assert not (out / "config.json").exists()


def test_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="torchserve"):
        export_onnx(hf_folder(tmp_path), tmp_path / "onnx", ExportSettings(layouts=("torchserve",)))


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "smollm2", factored=False)
    stored = load_file(folder / "model.safetensors")
    export_onnx(folder, tmp_path / "onnx", ExportSettings())
    numbers = sum(tensor.numel() for tensor in stored.values())
    frequencies = 8
    weights = [t for t in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.initializer]
    assert sum(int(np.prod(t.dims)) for t in weights if t.data_location == t.EXTERNAL) == numbers + frequencies


def test_a_head_that_is_tied_by_name_only_is_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "llama-biased", factored=False)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    export_onnx(folder, tmp_path / "one", ExportSettings())
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head.*embed_tokens.* differ"):
        export_onnx(folder, tmp_path / "two", ExportSettings())
    assert not (tmp_path / "two").exists()


@pytest.mark.transformers
def test_a_matrix_of_two_names_is_read_under_either(tmp_path: Path) -> None:
    """`save_model` of safetensors keeps the first of two names in the alphabet: the head's."""
    folder = hf_folder(tmp_path, "smollm2", factored=False)
    export_onnx(folder, tmp_path / "one", ExportSettings())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    export_onnx(folder, tmp_path / "two", ExportSettings())
    files = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "no place"),
        ("llama", lambda tensors: tensors.update({"lm_head.bias": torch.ones(96)}), "no place"),
        ("qwen2", lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.bias"), "class reads it"),
    ],
)
def test_a_bias_that_the_class_does_not_have_or_misses_is_refused(name, change, said, tmp_path: Path) -> None:
    """transformers warns and computes something else than the files say."""
    folder = hf_folder(tmp_path, name, factored=False)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=said):
        export_onnx(folder, tmp_path / "onnx", ExportSettings())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_prefix_of_what_wrapped_the_model_is_named(prefix: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, factored=False)
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=f"it has {prefix}") as caught:
        export_onnx(folder, tmp_path / "onnx", ExportSettings())
    assert f"take {prefix} off" in caught.value.fix


def test_a_head_that_is_missing_may_be_the_embedding(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, factored=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks lm_head") as caught:
        export_onnx(folder, tmp_path / "onnx", ExportSettings())
    assert "tie_word_embeddings" in caught.value.fix


def test_what_lies_beside_the_model(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    out = tmp_path / "onnx"
    export_onnx(folder, out, ExportSettings(layouts=("optimum", "genai", "triton")))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    genai = json.loads((out / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [2, 5]
    assert genai["model"]["pad_token_id"] == 0
    assert genai["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    assert genai["search"]["past_present_share_buffer"] is False
    repository = out / "triton" / "decoder"
    assert {file.name for file in (repository / "1" / "model.onnx").iterdir()} == {"model.onnx", "model.onnx.data"}
    ports, text = read_ports(out), (repository / "config.pbtxt").read_text()
    for name in [*ports.inputs, *ports.outputs]:
        assert f'name: "{name}"' in text
    assert 'name: "past_key_values.1.value" data_type: TYPE_FP32 dims: [ -1, 2, -1, 16 ]' in text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("flavour", ["standard", "contrib"])
def test_half_precision_graphs_are_well_typed(dtype, flavour, tmp_path: Path) -> None:
    export_onnx(hf_folder(tmp_path), tmp_path / "onnx", ExportSettings(dtype=dtype, flavour=flavour))
    path = tmp_path / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=flavour == "standard")
    ports = read_ports(tmp_path / "onnx")
    assert ports.inputs["past_key_values.0.key"].dtype == ports.outputs["present.1.value"].dtype == dtype.upper()
    assert ports.outputs["logits"].dtype == "FLOAT"
    weights = onnx.load(path, load_external_data=False).graph.initializer
    floats = {t.data_type for t in weights if t.data_location == t.EXTERNAL and t.name not in ("rope.frequencies",)}
    assert floats <= {onnx.TensorProto.DataType.Value(dtype.upper()), onnx.TensorProto.INT64}


def test_a_weight_too_large_for_float16_is_named(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, factored=False)
    change(folder, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), 1e5))
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj.*100000"):
        export_onnx(folder, tmp_path / "onnx", ExportSettings(dtype="float16"))
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_whose_blocks_have_no_scale_is_named(tmp_path: Path, dtype: str) -> None:
    """Scales lie in float16 whatever the graph computes in: one that is infinite would make the layer NaN."""
    folder = hf_folder(tmp_path, factored=False)
    change(folder, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), 1e6))
    settings = ExportSettings(dtype=dtype, weights="int4")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj.*float16"):
        export_onnx(folder, tmp_path / "onnx", settings)
    assert not (tmp_path / "onnx").exists()
    kept = settings.quantize.model_copy(update={"keep": ("*layers.1.mlp.up_proj",)})
    export_onnx(folder, tmp_path / "onnx", settings.model_copy(update={"quantize": kept}))


def change(folder: Path, name: str, how: object) -> None:
    """Replace one tensor of the checkpoint; None takes it out."""
    tensors = load_file(folder / "model.safetensors")
    changed = how(tensors.get(name))  # type: ignore[operator]
    tensors.pop(name, None)
    save_file(tensors if changed is None else {**tensors, name: changed}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("model.layers.0.self_attn.k_proj.weight", lambda t: None, "lacks"),
        ("model.layers.0.self_attn.sinks", lambda t: torch.ones(4), "no place for"),
        ("model.layers.0.mlp.down_proj.weight", lambda t: t[:, :-1].contiguous(), "config.json makes it"),
        ("model.layers.0.self_attn.q_proj.up.weight", lambda t: t[:, :-1].contiguous(), "q_proj"),
        ("model.layers.1.mlp.down_proj.weight", lambda t: t * float("nan"), "NaN"),
    ],
)
def test_a_checkpoint_that_is_not_what_its_config_says(name, how, message, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    change(folder, name, how)
    with pytest.raises(DataError, match=message):
        export_onnx(folder, tmp_path / "onnx", ExportSettings())
    assert not (tmp_path / "onnx").exists()


def test_names_without_their_first_part_are_the_same_model(tmp_path: Path) -> None:
    """A base model saved without its head: transformers reads it, and so does the graph."""
    folder = hf_folder(tmp_path, factored=False)
    export_onnx(folder, tmp_path / "whole", ExportSettings())
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export_onnx(folder, tmp_path / "bare", ExportSettings())
    files = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("whole", "bare")]
    assert files[0] == files[1]


def test_a_foreign_quantisation_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, factored=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(RecipeError, match="awq"):
        CheckpointWeights(folder)
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(DataError):
        export_onnx(folder, tmp_path / "onnx", ExportSettings())


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, monkeypatch) -> None:
    peaks = []
    for layers in (1, 1, 5):
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": layers}
        monkeypatch.setitem(CONFIGS, "deep", ("llama", {**CONFIGS["llama"][1], **shape}))
        folder = save_dense(tiny_model("deep"), tmp_path / f"hf{layers}")
        tracemalloc.start()
        export_onnx(folder, tmp_path / "onnx", ExportSettings(weights="int8"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The first export also imports; int8 of one layer is a million bytes, nodes are some kilobytes.
    assert peaks[2] - peaks[1] < 1024 * 1024, "four layers more must cost less than the weights of one"


GRAPHS = {
    "llama-standard": ("llama", {}),
    "llama-contrib": ("llama", {"flavour": "contrib"}),
    "llama-contrib-packed": ("llama", {"flavour": "contrib", "pack": True}),
    "llama-standard-int8": ("llama", {"weights": "int8"}),
    "smollm2-contrib-int4": ("smollm2", {"flavour": "contrib", "weights": "int4"}),
    "mistral-standard-float16": ("mistral", {"dtype": "float16"}),
    "qwen3-standard": ("qwen3", {}),
    "opt-standard": ("opt", {}),
    "opt-contrib": ("opt", {"flavour": "contrib"}),
    "llama-biased-contrib": ("llama-biased", {"flavour": "contrib"}),
    "llama-standard-int4": ("llama", {"weights": "int4"}),
    "llama-contrib-packed-int4": ("llama", {"flavour": "contrib", "pack": True, "weights": "int4"}),
    "llama-standard-packed-int8": ("llama", {"pack": True, "weights": "int8"}),
    "llama-contrib-bfloat16-int4": ("llama", {"flavour": "contrib", "dtype": "bfloat16", "weights": "int4"}),
}
FORMS = {
    f"llama-contrib-{form}{ending}": ("llama", {"flavour": "contrib", **settings}, kinds)
    for form, kinds in (("dense", {}), ("stacked", STACKED), ("pivoted", PIVOTED))
    for ending, settings in (
        ("", {}),
        ("-float16", {"dtype": "float16"}),
        ("-bfloat16", {"dtype": "bfloat16"}),
        ("-int8", {"weights": "int8"}),
        ("-int4", {"weights": "int4"}),
        ("-packed-int8", {"pack": True, "weights": "int8"}),
    )
}


@pytest.mark.parametrize(("kinds", "splits"), [({}, 0), ({"gate_proj": ("stacked", 9), "up_proj": ("stacked", 7)}, 2)])
def test_what_is_cut_again_is_packed_only_where_it_is_short(kinds, splits, tmp_path: Path) -> None:
    """Of two layers: q, k and v go into GroupQueryAttention whole; dense gate above up would be 8 numbers an input."""
    folder = factor(tiny_model("llama", intermediate_size=256), tmp_path / "hf", kinds)
    export_onnx(folder, tmp_path / "onnx", ExportSettings(flavour="contrib", pack=True))
    ops = summarise_graph(tmp_path / "onnx").ops
    products = 2 * 5 + splits + 1  # q+k+v, o, gate, up, down (one for both firsts and an up each where stacked), head
    assert (ops.get("Split", 0), ops["MatMul"]) == (splits, products)


def test_a_norm_writes_nothing_that_nobody_reads(tmp_path: Path) -> None:
    export_onnx(hf_folder(tmp_path), tmp_path / "onnx", ExportSettings(flavour="contrib"))
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    norms = [node for node in graph.node if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert [list(map(bool, node.output)) for node in norms] == [[True, False, False, True]] * 4


@pytest.mark.transformers
@pytest.mark.parametrize("case", [*GRAPHS, *FORMS])
def test_graph_is_the_golden_one(case, tmp_path: Path) -> None:
    """Delete a golden file and run this to write it anew; say in the commit why the graph changed."""
    name, settings, kinds = FORMS.get(case) or (*GRAPHS[case], MIXED)
    folder = factor(tiny_model(name), tmp_path / "hf", kinds)
    export_onnx(folder, tmp_path / "onnx", ExportSettings(**settings))
    found = {key: value for key, value in vars(summarise_graph(tmp_path / "onnx")).items() if key != "metadata"}
    golden = GOLDEN / f"onnx-{case}.json"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps(found, indent=2) + "\n")
        pytest.fail(f"{golden.name} was not there and has been written: look at it")
    assert found == json.loads(golden.read_text())


@pytest.mark.parametrize("flavour", ["standard", "contrib"])
def test_sizes_have_the_names_that_runtimes_look_for_and_the_file_says_where_it_comes_from(
    flavour: Flavour, tmp_path: Path
) -> None:
    folder = factor(tiny_model("llama"), tmp_path / "hf", MIXED)
    settings = ExportSettings(flavour=flavour, weights="int8")
    export_onnx(folder, tmp_path / "onnx", settings, provenance={"base_model": "someone/something"})
    ports = read_ports(tmp_path / "onnx")
    assert ports.inputs["input_ids"].shape == ("batch_size", "sequence_length")
    assert ports.inputs["attention_mask"].shape == ("batch_size", "total_sequence_length")
    assert ports.inputs["past_key_values.1.value"].shape[::2] == ("batch_size", "past_sequence_length")
    assert ports.outputs["present.1.value"].shape[::2] == ("batch_size", "total_sequence_length")
    assert ports.outputs["logits"].shape[:2] == ("batch_size", "sequence_length")
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    told = {entry.key.removeprefix("soco_export."): entry.value for entry in model.metadata_props}
    assert model.producer_name == "soco-export"
    assert model.producer_version
    assert (told["base_model"], told["model_type"], told["flavour"]) == ("someone/something", "llama", flavour)
    assert told["weights"] == "int8, blocks of 32, nearest"
    assert "stacked" in told["layers"]
    assert "pivoted" in told["layers"]
