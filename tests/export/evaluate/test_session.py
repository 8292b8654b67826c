import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, save
from transformers import LlamaConfig, LlamaForCausalLM

from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.decoders.session import OnnxDecoder, _as_float32, read_placement
from soco_train.errors import DataError, ExitCode, MachineError, RecipeError
from tests.support.fresh import SEED
from tests.support.graphs import VOCABULARY, ToyModel, save_toy

pytestmark = pytest.mark.transformers

AZURE = "AzureExecutionProvider"


@pytest.fixture(scope="module")
def model():
    return ToyModel(SEED)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save_toy(model, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def random_ids(*shape):
    return np.random.default_rng(SEED).integers(0, VOCABULARY, shape)


@pytest.mark.parametrize("names", [("ids", "logits"), ("input_ids", "scores")])
def test_a_graph_of_something_else_is_refused(tmp_path, names):
    read, written = (helper.make_tensor_value_info(name, TensorProto.INT64, [1, 1]) for name in names)
    graph = helper.make_graph([helper.make_node("Identity", [names[0]], [names[1]])], "g", [read], [written])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "model.onnx")
    with pytest.raises(DataError, match="no graph from input_ids to logits"):
        OnnxDecoder(tmp_path, threads=1)


def decoders(model, folder):
    return TorchDecoder(model), OnnxDecoder(folder, threads=1)


def test_onnx_and_torch_agree_on_prefill_and_cached_steps(model, folder):
    ids = random_ids(2, 9)
    torch_decoder, onnx_decoder = decoders(model, folder)
    np.testing.assert_allclose(
        onnx_decoder.prefill(ids[:, :5]), torch_decoder.prefill(ids[:, :5]), rtol=1e-4, atol=1e-4
    )
    for column in range(5, 9):
        step = ids[:, column : column + 1]
        np.testing.assert_allclose(onnx_decoder.step(step), torch_decoder.step(step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["toy-torch", "toy-onnx", "llama"])
def test_cached_decoding_equals_one_prefill(kind, model, folder, llama):
    decoder = {"toy-torch": lambda: TorchDecoder(model), "toy-onnx": lambda: OnnxDecoder(folder, threads=1),
               "llama": lambda: TorchDecoder(llama)}[kind]()  # fmt: skip
    ids = random_ids(2, 8)
    whole = decoder.logits(ids)
    pieces = [decoder.prefill(ids[:, :3]), decoder.step(ids[:, 3:4]), decoder.step(ids[:, 4:8])]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["toy-torch", "toy-onnx", "llama"])
def test_left_padding_changes_nothing(kind, model, folder, llama):
    decoder = {"toy-torch": lambda: TorchDecoder(model), "toy-onnx": lambda: OnnxDecoder(folder, threads=1),
               "llama": lambda: TorchDecoder(llama)}[kind]()  # fmt: skip
    long, short = random_ids(1, 7), random_ids(1, 4)
    batch = np.concatenate([long, np.concatenate([np.zeros((1, 3), dtype=np.int64), short], axis=1)])
    mask = np.array([[1] * 7, [0] * 3 + [1] * 4])
    padded = decoder.generate(batch, 5, mask)
    np.testing.assert_array_equal(padded[:1], decoder.generate(long, 5))
    np.testing.assert_array_equal(padded[1:], decoder.generate(short, 5))
    np.testing.assert_allclose(decoder.logits(batch, mask)[1:, 3:], decoder.logits(short), rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_refused_where_the_graph_gets_it_wrong(model, folder):
    decoder = OnnxDecoder(folder, threads=1)
    decoder._contrib = True  # as for a graph with GroupQueryAttention
    ids = random_ids(2, 4)
    with pytest.raises(RecipeError, match="no padding on the left"):
        decoder.logits(ids, np.array([[0, 1, 1, 1], [1, 1, 1, 1]]))
    right = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(
        decoder.logits(ids, right)[0, :3], TorchDecoder(model).logits(ids[:1, :3])[0], rtol=1e-4, atol=1e-4
    )


def test_generation_takes_the_likeliest_token_each_time(model, folder):
    ids = random_ids(1, 6)
    found = OnnxDecoder(folder, threads=1).generate(ids, 6)
    sequence = ids
    for _ in range(6):
        following = TorchDecoder(model).logits(sequence)[:, -1].argmax(-1)[:, None]
        sequence = np.concatenate([sequence, following], axis=1)
    np.testing.assert_array_equal(found, sequence[:, 6:])


def test_a_graph_with_last_token_logits_is_walked(model, tmp_path):
    decoder = OnnxDecoder(save_toy(model, tmp_path, last_only=True), threads=1)
    ids = random_ids(2, 6)
    assert decoder.prefill(ids).shape == (2, 1, VOCABULARY)
    np.testing.assert_allclose(decoder.logits(ids), TorchDecoder(model).logits(ids), rtol=1e-4, atol=1e-4)


def test_a_repeated_pass_leaves_the_cache_where_it_was(model, folder):
    decoder = OnnxDecoder(folder, threads=1)
    ids = random_ids(1, 6)
    decoder.prefill(ids[:, :5])
    run = decoder.repeatable(ids[:, 5:])
    run()
    run()
    np.testing.assert_allclose(decoder.step(ids[:, 5:])[:, -1], TorchDecoder(model).logits(ids)[:, -1], atol=1e-4)


def test_a_token_that_the_graph_does_not_have_is_named_when_it_is_read_and_when_it_is_timed(folder):
    decoder, beyond = OnnxDecoder(folder, threads=1), np.full((1, 1), VOCABULARY)
    with pytest.raises(DataError, match=r"does not compute: .*out of data bounds"):
        decoder.prefill(beyond)
    decoder.prefill(random_ids(1, 3))
    with pytest.raises(DataError, match="does not compute"):
        decoder.repeatable(beyond)()


def test_placement_is_proven_by_what_ran(folder):
    placement = OnnxDecoder(folder, threads=1).placement
    assert set(placement.nodes) == {"CPUExecutionProvider"}
    assert placement.nodes["CPUExecutionProvider"]["MatMul"] == 2  # the third was fused away
    assert placement.fallen == {}


@pytest.mark.skipif(AZURE not in ort.get_available_providers(), reason=f"this build has no {AZURE}")
def test_a_provider_that_takes_no_node_is_named_with_what_fell_back(folder):
    # Azure's provider never takes a node: the silent fallback in its purest form.
    with pytest.raises(MachineError, match=r"AzureExecutionProvider was asked for.*2 MatMul") as caught:
        OnnxDecoder(folder, provider=AZURE)
    assert caught.value.code == ExitCode.MACHINE


def test_an_absent_provider_is_refused_with_a_fix(folder):
    with pytest.raises(MachineError, match="CUDAExecutionProvider is not in this onnxruntime") as caught:
        OnnxDecoder(folder, provider="CUDAExecutionProvider")
    assert "[gpu]" in caught.value.fix


def test_bfloat16_outputs_are_read():
    bits = np.array([[0x3FC0, 0xC000]], dtype=np.uint16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    np.testing.assert_array_equal(_as_float32(value), [[1.5, -2.0]])


def ran(op: str, provider: str, inputs: str, outputs: str) -> dict:
    shapes = {"input_type_shape": [{inputs: [1, 4]}], "output_type_shape": [{outputs: [1, 4]}]}
    return {"cat": "Node", "args": {"provider": f"{provider}ExecutionProvider", "op_name": op, **shapes}}


def test_integer_arithmetic_on_the_cpu_is_no_fallback_and_floating_point_is():
    events = [
        ran("MatMul", "CUDA", "float16", "float16"),
        ran("Add", "CPU", "int64", "int64"),
        ran("Cast", "CPU", "int64", "float"),
        ran("MemcpyToHost", "CPU", "float", "float"),
        {"cat": "Session", "args": {}},
    ]
    assert read_placement("CUDAExecutionProvider", events).fallen == {}
    # Whatever its name: a residual Add or a pivoted layer's Gather on the CPU is a fallback.
    events += [ran("Add", "CPU", "float16", "float16"), ran("Gather", "CPU", "float", "float")]
    placement = read_placement("CUDAExecutionProvider", events)
    assert placement.fallen == {"Add": 1, "Gather": 1}
    assert placement.summary() == "5 nodes on CPUExecutionProvider, 1 nodes on CUDAExecutionProvider"


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_on_the_cpu_is_refused_before_loading(model, tmp_path, dtype):
    folder = save_toy(model, tmp_path, dtype=dtype)
    (folder / "model.onnx.data").unlink()  # nothing may be read from it
    with pytest.raises(RecipeError, match=r"float16") as caught:
        OnnxDecoder(folder)
    assert "float32" in caught.value.fix


@pytest.mark.parametrize("spoil", ["missing", "garbage", "no data", "name"])
def test_a_broken_folder_is_a_data_error(model, tmp_path, spoil):
    folder = save_toy(model, tmp_path)
    if spoil == "missing":
        (folder / "model.onnx").unlink()
    elif spoil == "garbage":
        (folder / "model.onnx").write_bytes(b"\xff" * 100)
    elif spoil == "name":  # of an operator: ONNX Runtime quotes it, and it is no text
        graph = (folder / "model.onnx").read_bytes()
        (folder / "model.onnx").write_bytes(graph.replace(b"MatMul", b"\xee" * len(b"MatMul")))
    else:
        (folder / "model.onnx.data").unlink()
    with pytest.raises(DataError, match=r"model\.onnx does not load"):
        OnnxDecoder(folder)
