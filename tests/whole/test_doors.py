"""Each file format has one reader: for whatever lies there, its value or our error, at once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from transformers import LlamaConfig

from soco_export.checkpoint.reader import check_layer_tensors, pruned_layers
from soco_export.files.json import making_a_model, plain_floats, read_config
from soco_export.files.records import not_ours, record_file, record_files
from soco_export.files.rope import check_rope
from soco_export.files.safetensors import open_shards, weight_files
from soco_export.files.tokenizer import check_tokenizer_files
from soco_export.model.load import dense_config, load_tokenizer
from soco_export.model.source import BUILTIN_MODEL
from soco_export.model.weights import check_weight_files
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families import describe
from soco_export.preflight.checks import check_dense_export
from soco_export.recipe.load import load_recipe
from soco_export.recipe.yaml import read_yaml, read_yaml_value
from soco_export.report.schema import Results
from soco_export.run import verbs
from soco_export.run.context import RunContext
from soco_export.run.folder.allowed import read_lock
from soco_export.run.folder.held import read_folder
from soco_export.run.folder.manifest import Manifest
from soco_export.run.folder.names import CARD_FILE, PROOF_FILE
from soco_export.run.stages.report import read_material
from soco_export.runtimes.optimum import write_hugging_face_files
from soco_train.bounded import parse_object, read_json
from soco_train.errors import DataError, RecipeError, SocoError
from soco_train.events import silent
from soco_train.plan.left_out import LeftOut, read_left_out
from soco_train.plan.rank_plan import LayerPlan, RankPlan
from soco_train.store.factors import Factors
from soco_train.store.header import MOST_TENSORS, read_header
from soco_train.store.importances import Importances
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum, SpectrumStore
from tests.support.cli import contents

FIX = "mend it"
Made = Callable[[Path], object]


@contextmanager
def refused(words: str | None = None, seconds: float = 20) -> Iterator[None]:
    """What is inside raises our error with `words`, within so many seconds of this process's own time."""
    started = time.process_time()
    with pytest.raises(SocoError, match=words) as raised:
        yield
    assert raised.value.fix
    assert time.process_time() - started < seconds


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")


NO_JSON: dict[str, tuple[Made, str]] = {
    "absent": (lambda path: None, "no such file"),
    "empty": (lambda path: path.touch(), "not JSON"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "a pipe": (lambda path: os.mkfifo(path), "a pipe or a device"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
    "a circle": (lambda path: path.symlink_to(path), "circle"),
    "a pointer": (pointer, "git-lfs pointer"),
    "a list": (lambda path: path.write_text("[]"), "not a JSON object"),
    "null": (lambda path: path.write_text("null"), "not a JSON object"),
    "nested": (lambda path: path.write_text('{"a":' * 100 + "1" + "}" * 100), "nested"),
    "very nested": (lambda path: path.write_text("[" * 200_000), "nested"),
    "latin-1": (lambda path: path.write_bytes(b'{"a": "\xe9"}'), "not JSON"),
    "half a pair": (lambda path: path.write_text('{"a": "\\ud800"}'), "surrogates"),
    "a long number": (lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "not JSON"),
    "large": (lambda path: path.write_text('{"a": "' + "x" * (1 << 20) + '"}'), "larger than"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_what_is_no_json_object_is_refused(tmp_path: Path, case: str) -> None:
    make, words = NO_JSON[case]
    make(tmp_path / "file.json")
    with refused(words):
        read_json(tmp_path / "file.json", FIX, most=1 << 20)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "file.json").touch(mode=0)
    with refused("permissions"):
        read_json(tmp_path / "file.json", FIX)


@given(st.dictionaries(st.text(), st.recursive(st.integers() | st.text() | st.none(), st.lists, max_leaves=5)))
def test_what_is_json_is_read_as_it_is(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value), "it", "here", FIX) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode(), "it", "here", FIX) == value


@pytest.mark.transformers
@given(st.binary())
def test_any_bytes_give_a_value_or_our_error(data: bytes) -> None:
    with suppress(DataError):
        assert isinstance(parse_object(data, "it", "here", FIX), dict)


def test_infinity_in_either_form_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": Infinity, "b": {"__float__": "-Infinity"}, "c": [{"d": 1}]}')
    assert plain_floats(read_config(tmp_path)) == {"a": float("inf"), "b": float("-inf"), "c": [{"d": 1}]}


# (field of a rotary table, value that it cannot have)
_BAD_ROPE: list[tuple[str, Any]] = [
    ("rope_type", 5),
    ("factor", True),
    ("attention_factor", float("nan")),
    ("mscale", -1),
    ("beta_slow", "1"),
    ("truncate", 1),
    ("partial_rotary_factor", 2),
    ("original_max_position_embeddings", 64.5),
    *(("long_factor", value) for value in ("a", ["a", "a"], [[1.0], [1.0]], [1.0, -1.0], [1.0, float("nan")], [1.0])),
]


@pytest.mark.transformers
@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 100_000},
        {"num_hidden_layers": "2"},
        {"num_labels": 10**9},
        {"head_dim": "16"},
        {"hidden_size": 64.5},
        {"vocab_size": True},
        {"text_config": {"num_hidden_layers": -1}},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": -1e-5},
        {"rope_theta": 0},
        {"rope_theta": 10**400},
        {"rope_theta": float("nan")},
        {"rope_local_base_freq": [1e4, -1]},
        {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
        *({"rope_parameters": {"full_attention": {key: value}}} for key, value in _BAD_ROPE),
    ],
)
def test_sizes_beyond_all_models_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with refused("config.json sets"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"long_factor": [1.0] * 3}, "long_factor"),
        ({"low_freq_factor": 4.0, "high_freq_factor": 1.0}, "low_freq_factor"),
    ],
)
def test_fields_of_a_rotary_table_fit_together(changes: dict[str, Any], words: str | None) -> None:
    table = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": None}
    with refused(words) if words else nullcontext():
        check_rope({"rope_scaling": {**table, **changes}, "rope_parameters": None}, "here")


def test_a_config_that_a_family_cannot_be_read_from_is_refused_by_name() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}
    fields = {**LlamaConfig().to_dict(), "rope_parameters": rope}
    with refused("KeyError, 'low_freq_factor'"):
        describe(Config(fields, fields, frozenset(fields), "here"))


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused("PEFT adapter"):
        read_config(tmp_path)
    with refused("PEFT adapter"):
        verbs.export(verbs.Request(), tmp_path)


def header(text: bytes, numbers: bytes = b"") -> Made:
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()


NO_TENSORS: dict[str, tuple[Made, str]] = {
    "empty": (lambda path: path.touch(), "truncated or corrupt"),
    "short": (lambda path: path.write_bytes(b"1234567"), "truncated or corrupt"),
    "cut": (header(entry()), "4 bytes of a are missing"),
    "a longer header than the file": (lambda path: path.write_bytes(b"\xff" * 16), "truncated or corrupt"),
    "no JSON": (header(b"{"), "not JSON"),
    "a list": (header(b"[]"), "not a JSON object"),
    "an entry that is text": (header(b'{"a": "b"}'), "no dtype, shape and place"),
    "negative": (header(entry(shape=[-1]), bytes(4)), "no dtype, shape and place"),
    "shapes as text": (header(entry(shape="1"), bytes(4)), "no dtype, shape and place"),
    "metadata that is a number": (header(b'{"__metadata__": {"a": 1}}'), "metadata"),
    "half a pair": (header(b'{"\\ud800": 1}'), "surrogates"),
    "a type that is none": (header(entry(dtype="Q4"), bytes(4)), "does not have"),
    "another size than its type and shape": (header(entry(shape=[2]), bytes(4)), "has not the bytes of F32"),
    "bytes of no tensor": (header(entry(), bytes(5)), "belong to no tensor"),
    "a hole": (header(entry(data_offsets=[1, 5]), bytes(5)), "does not begin where"),
    "two in one place": (
        header(json.dumps(dict.fromkeys("ab", json.loads(entry())["a"])).encode(), bytes(4)),
        "does not begin where",
    ),
    "blanks": (header(b"{}" + b" " * (40 << 20)), "header"),
    "many": (header(json.dumps(dict.fromkeys(map(str, range(MOST_TENSORS + 1)))).encode()), "names"),
    "a pipe": (lambda path: os.mkfifo(path), "a pipe or a device"),
    "a pointer": (pointer, "git-lfs pointer"),
}


@pytest.mark.parametrize("case", NO_TENSORS)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, case: str) -> None:
    make, words = NO_TENSORS[case]
    make(tmp_path / "model.safetensors")
    with refused(words):
        read_header(tmp_path / "model.safetensors", FIX)


@given(st.integers(0, 300), st.binary(min_size=1, max_size=3))
def test_what_the_library_refuses_is_refused_before(tmp_path_factory: Any, at: int, instead: bytes) -> None:
    """A file with a few bytes changed is opened by both, or refused by our reader."""
    file = tmp_path_factory.getbasetemp() / "changed.safetensors"
    data = bytearray(save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}, {"k": "v"}))
    data[at : at + len(instead)] = instead
    file.write_bytes(data)
    with suppress(DataError):
        names = read_header(file, FIX).tensors.keys()
        with safe_open(str(file), framework="pt") as opened:
            assert {name: opened.get_tensor(name) for name in opened.keys()}.keys() == names  # noqa: SIM118


def test_a_header_is_what_was_saved(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}, tmp_path / "f", {"k": "v"})
    found = read_header(tmp_path / "f", FIX)
    assert found.tensors == {"a": ("F32", (2, 3)), "b": ("I64", ())}
    assert found.metadata == {"k": "v"}


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        '"text"',
        "{}",
        '{"metadata": {}, "weight_map": []}',
        '{"metadata": {}, "weight_map": {"a": 1}}',
        '{"metadata": {}, "weight_map": {"a": "../x"}}',
        '{"metadata": {}, "weight_map": {"a": "b"}}',
    ],
)
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with refused():
        weight_files(tmp_path)


def test_weights_that_lie_there_twice_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert set(open_shards(weight_files(tmp_path))) == {"a"}
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "model.safetensors"}}')
    with refused("twice"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("model-00001-of-00002.safetensors", "index"), ("consolidated.safetensors", "give"), ("model.Q4.gguf", "give")],
)
def test_weights_by_another_name_are_named(tmp_path: Path, name: str, fix: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"beside {name}") as raised:
        weight_files(tmp_path)
    assert fix in raised.value.fix


def test_an_index_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    """It looks for `metadata` there, which not every program that writes shards has in it."""
    save_file({"a": torch.zeros(1)}, tmp_path / "1")
    index = {"weight_map": {"a": "1"}, "metadata": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_weight_files(tmp_path) == [tmp_path / "1"]
    for without in ({**index, "metadata": None}, {"weight_map": {"a": "1"}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(without))
        with refused("no table metadata"):
            check_weight_files(tmp_path)


@pytest.mark.transformers
def test_a_size_of_null_is_named_where_a_class_does_not_take_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"head_dim": null, "hidden_size": 64}')
    with pytest.raises(DataError, match="null for head_dim"), making_a_model(tmp_path):
        raise TypeError("unsupported operand type(s) for *: 'int' and 'NoneType'")


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "1", "b": "2"}}')
    save_file({"a": torch.zeros(1)}, tmp_path / "1")
    save_file({"b": torch.zeros(1)}, tmp_path / "2")
    assert set(open_shards(weight_files(tmp_path))) == {"a", "b"}
    save_file({"a": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "2")
    with refused("a lies in 1 and in 2"):
        open_shards(weight_files(tmp_path))


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused("beside"):
        weight_files(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    whole, eighth = torch.ones(2, dtype=dtype), torch.ones(2).to(torch.float8_e4m3fn)
    save_file({"a.order": whole, "a.weight": eighth}, tmp_path / "model.safetensors")
    assert set(open_shards(weight_files(tmp_path))) == {"a.order", "a.weight"}
    save_file({"a.weight": whole}, tmp_path / "model.safetensors")
    with refused("whole numbers"):
        open_shards(weight_files(tmp_path))


@pytest.mark.parametrize("layers", [[], "x", {"a": None}, {"a": {}}, {"a": {"kind": [], "rank": 1, "bias": True}}])
@pytest.mark.parametrize("rank", [1, "1", True, -1, None])
def test_a_record_of_layers_that_is_none_is_refused(layers: Any, rank: Any) -> None:
    for found in (layers, {"a": {"kind": "stacked", "rank": rank, "bias": None}}):
        with refused("record"):
            pruned_layers({"quantization_config": {"quant_method": "soco-export", "layers": found}})


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.ones(2, 2, dtype=torch.int64), torch.ones(2)])
@pytest.mark.parametrize("kind", ["stacked", "pivoted"])
def test_tensors_that_make_no_layer_are_refused(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    names = ("a.weight", "a.up.weight", "a.mix.weight", "a.order")
    save_file({name: tensor.clone() for name in names}, tmp_path / "model.safetensors")
    with refused():
        check_layer_tensors(open_shards(weight_files(tmp_path)), {"a": {"kind": kind, "rank": 2, "bias": False}})


def plan(**changes: Any) -> str:
    found = json.loads(RankPlan({"a": LayerPlan((4, 6), 2, False, 20, "")}, 0.8, "stacked", "global").to_json())
    layer = {key: changes.pop(key) for key in ("shape", "rank", "dense", "params") if key in changes}
    found["layers"]["a"].update(layer)
    return json.dumps(found | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        plan(rank=5),
        plan(rank=-1),
        plan(rank="2"),
        plan(rank=1.5),
        plan(dense=True),
        plan(shape=[4]),
        plan(shape="46"),
        plan(layers={}),
        plan(layers=[]),
        plan(storage="else"),
        plan(keep_params=None),
    ],
)
def test_a_plan_that_is_none_is_refused(text: str) -> None:
    assert RankPlan.from_json(plan()).layers["a"].rank == 2
    with refused("rank plan"):
        RankPlan.from_json(text)


def broken_scores(path: Path, **changes: Any) -> None:
    whole = {"importance": torch.ones(4), "scale": torch.ones(4), "deviation": None, "shape": (4, 6)}
    with patch("soco_train.store.scores.checked", lambda name, tensor: tensor):  # a file that another program wrote
        Scores({"a": LayerScores(**{**whole, **changes})}).save(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": torch.full((4,), torch.nan)},
        {"scale": torch.ones(3)},
        {"importance": torch.tensor([1, 2, 3, torch.inf])},
        {"deviation": torch.ones(6)},
        {"shape": ("4", "6")},
        {"shape": (4,)},
        {"shape": (-1, 6)},
        {"shape": (4, 6.0)},
        {"correction": (torch.ones(3, 2), torch.ones(2, 6))},
    ],
)
def test_scores_that_are_none_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    broken_scores(tmp_path / "scores.safetensors")
    for read in (Scores.load, Importances.load):
        assert read(tmp_path / "scores.safetensors").layers["a"].shape == (4, 6)
    broken_scores(tmp_path / "scores.safetensors", **changes)
    for read in (Scores.load, Importances.load):
        with refused("no scores"):
            read(tmp_path / "scores.safetensors")


def test_scores_that_say_nothing_of_their_model_are_refused(tmp_path: Path) -> None:
    layer = LayerScores(torch.ones(4), torch.ones(4), None, (4, 6))
    assert Scores({"a": layer}, {"parameters": 24}).importances().parameters == 24
    for said in ({}, {"parameters": "24"}, {"parameters": True}, {"parameters": 0}):
        with refused("parameters"):
            _ = Scores({"a": layer}, said).importances().parameters
    Scores({}).save(tmp_path / "scores.safetensors")
    for read in (Scores.load, Importances.load):
        with refused("no layer"):
            read(tmp_path / "scores.safetensors")


@pytest.mark.parametrize("records", [[1], "x", {"a": 1}, {"a": []}, {"a": [[1], "w"]}, {"a": [["2", 3], "w"]}])
def test_weights_left_out_that_are_none_are_refused(records: Any) -> None:
    left_out = LeftOut((2, 3), "why", 4)
    assert read_left_out({"a": left_out.record()}) == {"a": left_out}
    with refused("take no part"):
        read_left_out(records)


@pytest.mark.parametrize("said", ["", "null", "[]", '{"kind": "factors"}', '{"kind": "factors", "layers": {"a": 1}}'])
def test_stored_tensors_that_say_nothing_of_themselves_are_refused(tmp_path: Path, said: str) -> None:
    save_file({"a:up": torch.ones(2, 2)}, tmp_path / "a.safetensors", {"header": said})
    for read in (Scores.load, Importances.load, Factors.load):
        with refused():
            read(tmp_path / "a.safetensors")
    with refused():
        SpectrumStore(tmp_path)["a"]


def test_a_spectrum_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    store = SpectrumStore(tmp_path)
    store.put("a", Spectrum(torch.ones(4, 3), torch.ones(2, 6), torch.ones(3)))
    with refused("no spectrum"):
        store["a"]


@pytest.mark.parametrize("case", NO_JSON)
def test_results_and_manifests_that_are_none_are_refused(tmp_path: Path, case: str) -> None:
    make, _ = NO_JSON[case]
    make(tmp_path / "results.json")
    with refused():
        Results.load(tmp_path / "results.json")
    if case not in ("absent", "a circle"):  # a folder without a manifest is no run
        make(tmp_path / "manifest.json")
        with refused():
            Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "told", [{"calibration": "x"}, {"calibration": {"text": 1}}, {"made": ["x"]}, {"seconds": {"plan": "1"}}]
)
def test_what_results_tell_of_their_run_is_in_tables(tmp_path: Path, tiny_run: Path, told: dict[str, Any]) -> None:
    found = json.loads((tiny_run / "results.json").read_text())
    found["provenance"] |= told
    (tmp_path / "results.json").write_text(json.dumps(found))
    with refused("is not a table of"):
        Results.load(tmp_path)


def test_evidence_that_no_run_writes_so_is_refused_before_anything_is_written(tmp_path: Path, tiny_run: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(run)
    proof = json.loads((run / PROOF_FILE).read_text())
    for file, text in ((PROOF_FILE, json.dumps(proof | {"samples": [{"a": 1}]})), (CARD_FILE, '{"groups": [5]}')):
        whole = (run / file).read_bytes()
        (run / file).write_text(text)
        with refused("changed since it was written"):
            verbs.report(verbs.Request(), run)
        context = RunContext(read_folder(run, read_lock(run)), "onnx", silent)
        with refused("no summary of layers" if file == CARD_FILE else "not as a run writes it"):
            read_material(context)
        (run / file).write_bytes(whole)
    assert contents(run) == before


def test_what_lies_behind_a_link_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("a")
    known = {"b/a": [record_file(tmp_path / "theirs" / "a")]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "b").symlink_to(tmp_path / "theirs")
    assert not_ours(tmp_path / "run", ["b/a"], known) == ["b/a (in a folder that is a link)"]
    (tmp_path / "run" / "b").unlink()
    (tmp_path / "theirs").rename(tmp_path / "run" / "b")
    assert not not_ours(tmp_path / "run", ["b/a"], known)


def test_a_pipe_among_a_runs_files_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused("is a pipe"):
        record_files(tmp_path, ["."])


@pytest.mark.parametrize("name", ["../theirs", "/theirs", "hf/../../theirs", "a//b", "", ".", "a\0"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, tiny_run: Path, name: str) -> None:
    """What a manifest lists with its hash may be deleted as the run's own, so it lies in the run."""
    found = json.loads((tiny_run / "manifest.json").read_text())
    known = next(iter(found["written"].values()))
    for box in (found["written"], found["earlier"], found["stages"]["plan"]["outputs"]):
        box[name] = known
        (tmp_path / "manifest.json").write_text(json.dumps(found))
        with refused("not a manifest"):
            Manifest.load(tmp_path)
        del box[name]
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    assert Manifest.load(tmp_path) == Manifest.load(tiny_run)


NO_RECIPE = {
    "control characters": "a: \x01",
    "a tag": "a: !!int foo",
    "an object": "a: !!python/object:os.system x",
    "no date": "a: 2026-13-45",
    "a key that is a list": "[1]: 2",
    "a key that is a number": "1: 2",
    "nested": "a: " + "[" * 500 + "]" * 500,
    "an alias of itself": "a: &a [*a]",
    "a bomb": "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(40)),
    "a long integer": "a: " + "9" * 5000,
    "extends a number": "extends: 3",
    "extends nothing": "extends: null",
    "extends numbers": "extends: [3]",
    "extends a long name": "extends: " + "x" * 5000,
    "extends a name with a zero": 'extends: "a\\0b"',
    "many values": "a: [" + "1," * 20_000 + "]",
    "a list": "- a",
}


@pytest.mark.parametrize("case", NO_RECIPE)
def test_what_is_no_recipe_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "r.yaml").write_text(NO_RECIPE[case])
    with refused():
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("case", ["a folder", "a pipe", "a device", "latin-1"])
def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path, case: str) -> None:
    make, _ = NO_JSON[case]
    make(tmp_path / "r.yaml")
    with refused():
        load_recipe(tmp_path / "r.yaml")


def test_a_chain_of_thousands_is_refused(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml, {number + 1}.yaml]")
    (tmp_path / "50.yaml").write_text("extends: base")
    with refused("deep"):
        load_recipe(tmp_path / "0.yaml")


@pytest.mark.parametrize(
    "setting",
    [
        "train.steps=true",
        "keep_params=true",
        "train.schedule.phases=[]",
        "train.schedule.phases=[3,3,3]",
        "train.schedule.shares=[0,0,0]",
        "train.schedule.shares=[-1,1,1]",
        "train.temperature=[0,0]",
        f"train.seed={2**70}",
        "train.seed=-1",
        "name=../../x",
        "name=..",
        f"name={'x' * 256}",
        'name="a\\nb"',
        "train.steps=!!int x",
        "train.lr=.inf",
        "data.path=[]",
        "train.schedule.shares=[true, 1, 1]",
        "gates.max_export_kl={int8: true}",
        "evaluation.builtin=[]",
        'latency.profile="a\\0b"',
        "multiple=9999999999999999999999",
        "bench.prefill=[9999999999999999999999]",
        "export.quantize.blocks={x: 9999999999999999999999}",
    ],
)
def test_values_that_mean_nothing_are_refused(setting: str) -> None:
    with refused():
        load_recipe("tiny", [setting])


@given(st.text(max_size=200))
def test_any_text_is_a_value_or_our_error(text: str) -> None:
    with suppress(RecipeError):
        read_yaml_value(text, "--set a")


@given(st.binary(max_size=300))
def test_any_file_is_a_mapping_or_our_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(data)
    with suppress(RecipeError):
        assert isinstance(read_yaml(file)[0], dict)


BEFORE_TRAINING = {
    "a layout that nobody writes": ("export.layouts=[optimum,nothing]", "no runtime"),
    "a task that is not there": ('validate.tasks=[{"path": "absent.jsonl"}]', "absent"),
    "a multiple above all budgets": ("multiple=4096", "keep_params|budget|multiple|smallest"),
    "a budget below rank 1": ("keep_params=0.001", "keep_params|budget|smallest"),
    "blocks beyond the context": ("evaluation.block=100000", "positions"),
    "all blocks held out": ("refine.distill.held_out_blocks=100000", "held_out_blocks"),
    "a table in a type without a lookup": ("export.each={'*': int2}", "token table"),
    "more decode steps than a block has tokens": ("validate.parity.decode_steps=4000", "decode_steps"),
    "a million threads": ("validate.threads=1000000", "threads"),
    "two tasks of one name": ('validate.tasks=[{"path": "a.jsonl"}, {"path": "b/a.jsonl"}]', "2 tasks are called 'a'"),
}


@pytest.mark.transformers
@pytest.mark.parametrize("case", BEFORE_TRAINING)
def test_what_can_be_known_is_said_before_a_folder_is_made(tmp_path: Path, case: str) -> None:
    from soco_export.run.verbs import Request, train_and_export

    setting, words = BEFORE_TRAINING[case]
    with refused(words, seconds=200):
        train_and_export(Request(model="tiny", out=tmp_path / "run", set_=[setting]))
    assert not (tmp_path / "run").exists()


@contextmanager
def changed_model(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Iterator[Path]:
    """Yield the built-in model's folder with `change` made to its tensors and config.json."""
    shutil.copytree(BUILTIN_MODEL, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    yield folder


@pytest.mark.parametrize("case", ["a pipe", "a device", "a folder"])
def test_a_file_beside_the_model_that_is_none_is_refused(tmp_path: Path, case: str) -> None:
    shutil.copytree(BUILTIN_MODEL, tmp_path / "model")
    (tmp_path / "out").mkdir()
    make, words = NO_JSON[case]
    make(tmp_path / "model" / "chat_template.jinja")
    with refused(words):
        write_hugging_face_files(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("case", ["a pipe", "a folder", "latin-1"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja", "merges.txt"])
def test_a_tokenizers_file_that_is_none_is_refused(tmp_path: Path, case: str, name: str) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    NO_JSON[case][0](tmp_path / name)
    with refused(NO_JSON[case][1].replace("not JSON", "not UTF-8")):
        check_tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    ("each", "steps", "held"), [("▁▁▁", 2, True), ("e" * 10, 2, True), ("e" * 10, 4, False), ("e" * 5000, 1, False)]
)
def test_a_normalizer_that_lets_a_text_grow_without_end_is_refused(
    tmp_path: Path, each: str, steps: int, held: bool
) -> None:
    """Its library ends the process where memory ends: four replacements made 10,000 characters of one."""
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": each}
    fields = {"normalizer": {"type": "Sequence", "normalizers": [step] * steps}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with nullcontext() if held else refused("characters of one"):
        check_tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        *(5, True, [1], ["a"], [{"template": "a"}], [{"name": "a", "template": 1}], {"a": None}, {"../a": "b"}),
        *([{"name": name, "template": "a"}] for name in ("/a", "..", "", "a/b", ["a"], "a\nb")),
    ],
)
def test_a_chat_template_that_is_none_is_refused(tmp_path: Path, template: Any) -> None:
    """The name of a template becomes that of a file: transformers 4.57 writes it wherever it leads."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with refused("chat template"):
        check_tokenizer_files(tmp_path)


@pytest.mark.parametrize("template", [None, "a", {"default": "a"}, [{"name": "tool_use", "template": "a"}]])
def test_a_chat_template_in_any_form_is_taken(tmp_path: Path, template: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    check_tokenizer_files(tmp_path)


def test_named_chat_templates_go_along(tmp_path: Path) -> None:
    (tmp_path / "model" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "model" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    write_hugging_face_files(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "q_proj" in name)


def untie(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


BAD_MODELS: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], object], str]] = {
    "a NaN": (lambda tensors, config: tensors[first(tensors)].fill_(torch.nan), "NaN"),
    "a scale that nobody reads": (
        lambda tensors, config: tensors.update({f"{first(tensors)}_scale_inv": torch.ones(1)}),
        "not read by the model's class",
    ),
    "a value head": (lambda tensors, config: tensors.update({"v_head.weight": torch.ones(1)}), "v_head"),
    "a layer too many": (
        lambda tensors, config: tensors.update({"model.layers.99.mlp.up_proj.weight": torch.ones(1, 1)}),
        "layers.99",
    ),
    "two matrices that are said to be one": (untie, "differ"),
    "text where a number belongs": (lambda tensors, config: config.update(rms_norm_eps="small"), ""),
    "rope that is none": (lambda tensors, config: config.update(rope_parameters="nan"), ""),
    "heads that do not divide": (lambda tensors, config: config.update(num_attention_heads=7, head_dim=None), ""),
    "fields without end": (
        lambda tensors, config: config.update(x={str(n): n for n in range(20_001)}),
        "20,000 values",
    ),
    "more layers than tensors": (lambda tensors, config: config.update(num_hidden_layers=900), "900 layers"),
    "an end that no model has": (lambda tensors, config: config.update(eos_token_id=[1, 10**6]), "eos_token_id"),
    "a kind that is a list": (lambda tensors, config: config.update(model_type=["llama"]), "architecture"),
}


@pytest.mark.transformers
@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_is_not_whole_is_refused_before_a_folder_is_made(tmp_path: Path, case: str) -> None:
    from soco_export.run.verbs import Request, train_and_export

    change, words = BAD_MODELS[case]
    with changed_model(tmp_path / "model", change) as folder, refused(words or None, seconds=200):
        train_and_export(Request(model=str(folder), format="hf", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "nope"), ("dtype", ["float16"]), ("soco_export", {"weights": 5})]
)
def test_what_the_export_of_the_dense_model_refuses_is_said_before_training(
    tmp_path: Path, field: str, value: Any
) -> None:
    """Fields that say how a model was made are passed over by the training, and read by that export after it."""
    with changed_model(tmp_path / "model", lambda tensors, config: config.update({field: value})) as folder:
        recipe = load_recipe("base", model={"path": str(folder), "weights": "pretrained"})
        dense_config(recipe)
        with refused():
            check_dense_export(recipe)


GOOD_CONFIGS: dict[str, dict[str, Any]] = {
    "no quantisation": {"quantization_config": None},
    "another's answers": {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
    "another's attention": {"_attn_implementation_autoset": True, "attn_implementation": "flash_attention_2"},
}


@pytest.mark.parametrize("case", GOOD_CONFIGS)
def test_leftovers_of_others_are_passed_over(tmp_path: Path, case: str) -> None:
    plain = load_recipe("base", model={"path": str(BUILTIN_MODEL), "weights": "pretrained"})
    with changed_model(tmp_path / "model", lambda tensors, config: config.update(GOOD_CONFIGS[case])) as folder:
        recipe = load_recipe("base", model={"path": str(folder), "weights": "pretrained"})
        assert dense_config(recipe).to_dict() == dense_config(plain).to_dict()


def test_layers_with_a_window_of_no_size_are_refused(tmp_path: Path) -> None:
    kinds = ["sliding_attention", *["full_attention"] * 5]
    with changed_model(tmp_path / "model", lambda tensors, config: config.update(layer_types=kinds)) as folder:
        recipe = load_recipe("base", model={"path": str(folder), "weights": "pretrained"})
        with refused("no sliding_window"):
            dense_config(recipe)


def test_a_tokenizer_that_its_library_panics_at_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BUILTIN_MODEL, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    fields = json.loads(file.read_text()) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    file.write_text(json.dumps(fields))
    with refused("charsmap"):
        load_tokenizer(load_recipe("base", model={"path": str(tmp_path / "model"), "weights": "pretrained"}))


@pytest.mark.parametrize("name", ["save_pretrained", "validate", "__init__", "to_dict"])
def test_a_field_that_is_a_method_is_refused(tmp_path: Path, name: str) -> None:
    """It was called where hf/ is written, after the training: an int is not callable."""
    with changed_model(tmp_path / "model", lambda tensors, config: config.update({name: 1})) as folder:
        recipe = load_recipe("base", model={"path": str(folder), "weights": "pretrained"})
        with refused(f"field '{name}'"):
            dense_config(recipe)


@pytest.mark.parametrize("model", ["x.gguf", "./nowhere/x", "/nowhere", "a/b/c"])
def test_a_model_that_is_no_folder_is_said_to_be_none(tmp_path: Path, monkeypatch: Any, model: str) -> None:
    from soco_export.model.which import recipe_for

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").touch()
    with refused("is a GGUF file|there is no folder"):
        recipe_for(model)


@pytest.mark.parametrize(("edited", "verb"), [("scores.safetensors", "plan"), ("results.json", "compare")])
def test_what_was_edited_is_not_read(tmp_path: Path, tiny_run: Path, edited: str, verb: str) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    ask = {
        "plan": lambda: verbs.plan(verbs.Request(), run),
        "compare": lambda: verbs.compare(verbs.Request(), tiny_run, run),
    }[verb]
    ask()
    with (run / edited).open("ab") as file:
        file.write(b" ")
    with refused("changed since it was written"):
        ask()


def test_a_changed_recipe_or_a_shortened_model_is_not_taken_for_what_was_measured(
    tmp_path: Path, tiny_run: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert verbs.gate(verbs.Request(), run).code == 0
    lock, before = run / "recipe.lock.yaml", contents(run)
    (run / "hf" / "README.md").write_text("a card of the user's own")
    assert verbs.gate(verbs.Request(), run).code == 0
    (run / "hf" / "README.md").write_bytes(before["hf/README.md"])
    whole = lock.read_text()
    lock.write_text(whole.replace("keep_params: 0.6", "keep_params: 0.5"))
    assert lock.read_text() != whole
    again = verbs.Request(model="tiny", out=run)
    for ask in (verbs.gate, verbs.report, verbs.validate, verbs.plan, verbs.repair):
        with refused("recipe.lock.yaml was changed"):
            ask(verbs.Request(), run)
    with refused("recipe.lock.yaml was changed"):
        verbs.train_and_export(again)
    lock.write_text(whole)
    with (run / "onnx" / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    with refused("onnx/model.onnx.data has 1,000 bytes"):
        verbs.gate(verbs.Request(), run)
    (run / "onnx" / "model.onnx.data").write_bytes(before["onnx/model.onnx.data"])
    assert verbs.gate(verbs.Request(), run).code == 0
    assert contents(run) == before


@pytest.mark.parametrize("lost", ["manifest.json", "recipe.lock.yaml"])
def test_a_run_that_lost_what_says_what_it_is_is_named(tmp_path: Path, tiny_run: Path, lost: str) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / lost).unlink()
    with refused(f"lost its {lost}"):
        verbs.report(verbs.Request(), run)
