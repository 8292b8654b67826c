"""Every described family computes what transformers computes: a prompt, sixteen cached steps, both paddings.

Errors are relative to the largest logit. transformers decodes with its own cache: frequencies that depend on the length
of the sequence change where they change there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging import version

from soco_export.checkpoint.load import load_checkpoint
from soco_export.export import export_onnx
from soco_export.onnx.check import check_architecture
from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.families import FAMILIES, describe
from soco_export.onnx.rounded import Rounder, round_as_exported
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import MachineError, RecipeError, SocoError
from tests.support import decoders, fresh
from tests.support.decoders import Decoder, factor, save_dense, tiny_model
from tests.support.zoo import BASE, TURNS, ZOO

pytestmark = pytest.mark.transformers

PROMPT, STEPS = 26, 16
TOLERANCE = 1e-5
# Every dense layer of these names is factored as well: rows in another order go through each form.
MIXED = {"q_proj": ("pivoted", 9), "k_proj": ("stacked", 9), "qkv_proj": ("pivoted", 30), "query_key_value":
         ("stacked", 30), "gate_up_proj": ("pivoted", 30), "down_proj": ("stacked", 17), "dense_h_to_4h":
         ("pivoted", 24), "c_fc": ("pivoted", 24), "c_attn": ("stacked", 30), "fc1": ("pivoted", 24), "Wqkv":
         ("pivoted", 30)}  # fmt: skip


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in ZOO.items():
        monkeypatch.setitem(decoders.CONFIGS, name, entry)


def known_here(name: str) -> Any:
    """Return the case, skipped where this transformers lacks the type or does not read how its rope is written."""
    model_type, values = ZOO[name]
    later = "rope_parameters" in values or "qk_layernorm" in values
    old = version.parse(transformers.__version__).major < 5 and later
    missing = old or model_type not in transformers.CONFIG_MAPPING
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="transformers 5 writes and reads it"))


def pieces() -> list[tuple[int, int]]:
    return [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]


@torch.no_grad()
def in_transformers(model: Any, tokens: np.ndarray, mask: np.ndarray, steps: list[tuple[int, int]]) -> np.ndarray:
    model(torch.ones(1, 2, dtype=torch.long))  # dynamic rope keeps the longest length that it saw until a short one
    seen, past, found = torch.from_numpy(mask), None, []
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    for start, stop in steps:
        counted = {} if model.config.model_type in ("bloom", "mpt") else {"position_ids": positions[:, start:stop]}
        ids = torch.from_numpy(tokens[:, start:stop])
        result = model(input_ids=ids, attention_mask=seen[:, :stop], past_key_values=past, use_cache=True, **counted)
        past = result.past_key_values
        found.append(result.logits.numpy())
    return np.concatenate(found, axis=1)


def in_onnx(folder: Path, tokens: np.ndarray, mask: np.ndarray, steps: list[tuple[int, int]]) -> np.ndarray:
    decoder = Decoder(folder)
    return np.concatenate([decoder.step(tokens[:, start:stop], mask[:, :stop]) for start, stop in steps], axis=1)


def error(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    real = mask.astype(bool)
    assert expected[real].std() > 0.1
    return float(np.abs(found - expected)[real].max() / np.abs(expected[real]).max())


@pytest.mark.parametrize("name", map(known_here, ZOO))
def test_a_family_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    folder = factor(model, tmp_path / "hf", MIXED)
    tokens = fresh.rng().integers(3, 90, (2, PROMPT + STEPS))
    whole, left, right = (np.ones_like(tokens) for _ in range(3))
    left[0, :5], right[0, 20:] = 0, 0
    for flavour in ("standard", "contrib"):
        export_onnx(folder, tmp_path / flavour, ExportSettings(flavour=flavour))
    expected = in_transformers(model, tokens, whole, pieces())
    assert error(in_onnx(tmp_path / "standard", tokens, whole, pieces()), expected, whole) < TOLERANCE
    assert error(in_onnx(tmp_path / "contrib", tokens, whole, pieces()), expected, whole) < TOLERANCE
    expected = in_transformers(model, tokens, left, pieces())
    assert error(in_onnx(tmp_path / "standard", tokens, left, pieces()), expected, left) < TOLERANCE
    prompt, padded, once = tokens[:, :PROMPT], right[:, :PROMPT], [(0, PROMPT)]
    expected = in_transformers(model, prompt, padded, once)
    assert error(in_onnx(tmp_path / "contrib", prompt, padded, once), expected, padded) < TOLERANCE


@pytest.mark.parametrize("name", map(known_here, ["bloom", "gemma3_text", "gpt_oss"]))
def test_a_window_counts_tokens_and_not_the_slots_of_padding(name: str, tmp_path: Path) -> None:
    """A batch padded on the right goes on behind the padding as the row alone does; alibi's biases count so too."""
    model = tiny_model(name)
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings())
    tokens = fresh.rng().integers(3, 90, (2, PROMPT + STEPS))
    right, short = np.ones_like(tokens), PROMPT - 6
    right[0, short:PROMPT] = 0
    real = right[0].astype(bool)
    alone = tokens[:1, real]
    steps = [(0, short), *((at, at + 1) for at in range(short, short + STEPS))]
    expected = in_transformers(model, alone, np.ones_like(alone), steps)
    found = in_onnx(tmp_path / "onnx", tokens, right, pieces())[:1, real]
    assert error(found, expected, np.ones_like(alone)) < TOLERANCE


@pytest.mark.parametrize("flavour", ["standard", "contrib"])
def test_a_factor_may_be_a_whole_number(flavour: Any, tmp_path: Path) -> None:
    """The operators' attributes are floats: with an integer ONNX Runtime does not load the graph."""
    model = tiny_model("granite", attention_multiplier=1, embedding_multiplier=2, logits_scaling=3)
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings(flavour=flavour))
    tokens = fresh.rng().integers(3, 90, (1, PROMPT + STEPS))
    mask = np.ones_like(tokens)
    expected = in_transformers(model, tokens, mask, pieces())
    assert error(in_onnx(tmp_path / "onnx", tokens, mask, pieces()), expected, mask) < TOLERANCE


QUANTISED = ["gemma3_text", "phi4-mini", "cohere", "gpt2", "gpt_neox", "falcon-40b", "bloom", "olmo2", "mixtral"]
HALVED = ["gemma2", "phi4-mini", "cohere", "bloom", "granite", "hunyuan_v1_dense"]


@pytest.mark.parametrize("name", map(known_here, QUANTISED))
def test_quantised_weights_compute_what_the_rounded_model_does(name: str, tmp_path: Path) -> None:
    """And stay close to the model that was not rounded; a mixture in int4 chooses other experts where two are close."""
    model = tiny_model(name)
    folder = save_dense(model, tmp_path / "hf")
    tokens = fresh.rng().integers(3, 90, (1, PROMPT + STEPS))
    mask = np.ones_like(tokens)
    exact = in_transformers(model, tokens, mask, pieces())
    for flavour, weights, closeness in (("standard", "int8", 0.99), ("contrib", "int4", 0.85)):
        settings = ExportSettings(flavour=flavour, weights=weights, pack=True, quantize={"accuracy_level": 1})
        export_onnx(folder, tmp_path / weights, settings)
        found = in_onnx(tmp_path / weights, tokens, mask, pieces())
        rounded = load_checkpoint(folder, dtype=torch.float32)
        round_as_exported(rounded, settings, Rounder(rounded, torch.from_numpy(tokens), tmp_path / "unused"))
        assert error(found, in_transformers(rounded, tokens, mask, pieces()), mask) < TOLERANCE
        by_position = [np.corrcoef(one, other)[0, 1] for one, other in zip(found[0], exact[0], strict=True)]
        if (name, weights) != ("mixtral", "int4"):
            assert np.median(by_position) > closeness


@pytest.mark.parametrize("name", map(known_here, HALVED))
def test_half_precision_stays_close(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings(dtype="float16"))
    tokens = fresh.rng().integers(3, 90, (1, PROMPT + STEPS))
    mask = np.ones_like(tokens)
    expected = in_transformers(model, tokens, mask, pieces())
    assert error(in_onnx(tmp_path / "onnx", tokens, mask, pieces()), expected, mask) < 0.02


def test_experts_in_half_precision_stay_close(tmp_path: Path) -> None:
    """Where two experts are close the choice may fall otherwise: most positions must agree, not all."""
    model = tiny_model("qwen2_moe")
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings(dtype="float16"))
    tokens = fresh.rng().integers(3, 90, (1, PROMPT + STEPS))
    mask = np.ones_like(tokens)
    expected = in_transformers(model, tokens, mask, pieces())
    errors = np.abs(in_onnx(tmp_path / "onnx", tokens, mask, pieces()) - expected).max(-1) / np.abs(expected).max()
    assert np.median(errors) < 0.02


def test_every_described_type_is_in_the_zoo() -> None:
    tried = {model_type for model_type, _ in (ZOO | decoders.CONFIGS).values()}
    assert set(FAMILIES) <= tried


@pytest.mark.parametrize("name", map(known_here, ZOO))
def test_a_key_that_no_description_knows_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model_type, values = ZOO[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **values}))
    config = resolve_config(tmp_path)
    assert check_architecture(config, ExportSettings(flavour="contrib")) is not None
    changed = replace(config, values={**config.values, "attention_twist_factor": 0.5})
    with pytest.raises(RecipeError, match="attention_twist_factor"):
        check_architecture(changed, ExportSettings())


def config_of(folder: Path, **values: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(values))
    return resolve_config(folder)


def test_what_a_flavour_cannot_do_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    odd = config_of(tmp_path, model_type="llama", **{**BASE, "head_dim": 20})
    assert check_architecture(odd, ExportSettings()) is not None
    with pytest.raises(RecipeError, match="multiple of 8"):
        check_architecture(odd, ExportSettings(flavour="contrib"))


# Of published config.json files: what their classes do not read, and a value that would be another model.
PUBLISHED = {
    "phi4-mini": ({"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}, {"interpolate_factor": 2}),
    "cohere2": ({"rotary_pct": 1.0, "layer_switch": 4, "position_embedding_type": "rope_gptj"}, {"rotary_pct": 0.5}),
    "stablelm": ({"norm_eps": 1e-5, "rotary_scaling_factor": 1.0}, {"rotary_scaling_factor": 2.0}),
    "hunyuan_v1_dense": (
        {"attention_head_dim": 16, "cla_share_factor": 2, "use_cla": False, "use_qk_norm": True, "norm_type": "rms"},
        {"use_cla": True},
    ),
    "falcon-11b": ({"ff_factor": 4}, {"alibi": True}),
    "gpt_neox": ({"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}, {"rope_parameters": {"type": "?"}}),
}


@pytest.mark.parametrize("name", map(known_here, PUBLISHED))
def test_keys_that_publishers_write_are_understood(name: str, tmp_path: Path) -> None:
    model_type, values = ZOO[name]
    written, other = PUBLISHED[name]
    found = [{"model_type": model_type, **values}, {"model_type": model_type, **values, **written}]
    plain, published = (check_architecture(config_of(tmp_path, **one), ExportSettings()) for one in found)
    assert plain is not None
    assert plain == published
    with pytest.raises(SocoError):
        check_architecture(config_of(tmp_path, **found[1] | other), ExportSettings())


OLD = version.parse(transformers.__version__).major < 5
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_parameters": LINEAR | {"factor": 4.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "twice"),
        pytest.param({"rope_theta": None}, "base", marks=pytest.mark.skipif(OLD, reason="takes its default")),
        ({"layer_types": TURNS, "sliding_window": None}, "sliding_window"),
        # a table of each spelling, of which transformers takes the older one and forgets the base in the newer
        ({"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": LINEAR}, "twice"),
        *(({"model_type": "mistral", "sliding_window": size}, "sliding_window") for size in (0, -1)),
        # what these classes pass over, and others would read
        *(
            ({"model_type": kind, "sliding_window": 5, "layer_types": TURNS}, "all layers are")
            for kind in ("mixtral", "phi3", "starcoder2", "phimoe")
        ),
        *(({"model_type": kind, "rope_parameters": {"full_attention": LINEAR}}, "one") for kind in ("llama", "glm")),
        *(({"model_type": kind, "partial_rotary_factor": 0.5}, "whole heads") for kind in ("llama", "cohere", "olmo3")),
        ({"model_type": "llama", "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"model_type": "phi", "partial_rotary_factor": 0.33}, "5 numbers of each head"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 9}, "9 of 4 experts"),
        *(({"model_type": kind, "rope_parameters": LINEAR}, "table of a kind") for kind in ("gemma3_text", "olmo3")),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SocoError, match=said):
        check_architecture(config_of(tmp_path, **{**BASE, "model_type": "qwen2", **values}), ExportSettings())


@pytest.mark.skipif(OLD, reason="transformers 5 writes and reads it")
def test_a_rotation_without_its_base_has_the_one_of_its_class(tmp_path: Path) -> None:
    model_type, values = ZOO["gemma3_text"]
    tables = [{"sliding_attention": {"rope_type": "default", **one}, "full_attention": {"rope_type": "default", **two}}
              for one, two in (({}, {}), ({"rope_theta": 1e4}, {"rope_theta": 1e6}))]  # fmt: skip
    found = [{"model_type": model_type, **values, "rope_parameters": table} for table in tables]
    one, other = (check_architecture(config_of(tmp_path, **each), ExportSettings()) for each in found)
    assert one is not None
    assert one == other


def test_what_says_nothing_of_the_model_is_passed_over(tmp_path: Path) -> None:
    """How somebody ran or made it, and a rotation that is written twice in the same way."""
    notes = {"use_flash_attention_2": True, "_flash_attn_2_enabled": True, "initializer_cutoff_factor": 2.0}
    rope = {"rope_parameters": LINEAR | {"rope_theta": 9.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    kinds = {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0}
    config = config_of(tmp_path, **BASE, model_type="llama", **notes, **rope, **kinds, rope_theta=9.0)
    assert check_architecture(config, ExportSettings()) is not None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"flavour": "contrib"}, "flavour"),
        ({"weights": "int4"}, "weights"),
        ({"pack": True}, "pack"),
        ({"each": {"*": "int8"}}, "each"),
    ],
)
def test_the_traced_route_says_what_it_lacks_before_anything_is_trained(settings, key, tmp_path: Path) -> None:
    unknown = config_of(tmp_path, model_type="xglm")
    with pytest.raises(RecipeError, match=f"export.{key}"):
        check_architecture(unknown, ExportSettings(**settings))


def test_a_model_with_another_state_than_keys_and_values_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mamba"):
        check_architecture(config_of(tmp_path, model_type="falcon_h1"), ExportSettings())


@pytest.fixture
def toy_family() -> Iterator[None]:
    """What a file in soco_export/onnx/families would hold: Llama whose sublayers' outputs are halved."""
    from soco_export.onnx.describe.architecture import Architecture
    from soco_export.onnx.describe.config import Config
    from soco_export.onnx.families.parts import COMMON, decoder
    from soco_export.onnx.families.registry import family

    @family("granite_toy", keys=f"{COMMON} halved")
    def toy(config: Config) -> Architecture:
        base = decoder(config)
        return replace(base, residual=replace(base.residual, scale=0.5 if config["halved"] else 1.0))

    yield
    del FAMILIES["granite_toy"]


@pytest.mark.usefixtures("toy_family")
def test_a_further_family_is_one_function(tmp_path: Path) -> None:
    """The toy's weights and mathematics are Granite's with one multiplier: transformers' Granite is the witness."""
    decoders.CONFIGS["toy"] = ("granite", {**ZOO["helium"][1], "residual_multiplier": 0.5,
                                              "attention_multiplier": 0.25})  # fmt: skip
    model = tiny_model("toy")
    folder = save_dense(model, tmp_path / "hf")
    config = resolve_config(folder)
    ours = {key: config.values[key] for key in ZOO["helium"][1]} | {"rms_norm_eps": config["rms_norm_eps"]}
    found = describe(
        replace(config, values={**ours, "model_type": "granite_toy", "hidden_act": "silu", "halved": True})
    )
    assert found is not None
    from soco_export.onnx.build import write_graph
    from soco_export.onnx.check import check_tensors
    from soco_export.onnx.read import open_weights
    from soco_train.events import silent

    source = open_weights(folder, found)
    check_tensors(found, source)
    (tmp_path / "onnx").mkdir()
    write_graph(found, source, ExportSettings(), tmp_path / "onnx", silent)
    tokens = fresh.rng().integers(3, 90, (1, PROMPT + STEPS))
    mask = np.ones_like(tokens)
    expected = in_transformers(model, tokens, mask, pieces())
    assert error(in_onnx(tmp_path / "onnx", tokens, mask, pieces()), expected, mask) < TOLERANCE


def test_the_missing_tracer_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soco_export.onnx.trace.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="onnxscript"):
        check_architecture(config_of(tmp_path, model_type="xglm"), ExportSettings())
