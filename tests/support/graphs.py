"""A one-layer attention decoder, as an ONNX folder and as the torch module it must equal; for tests of the proof."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

VOCABULARY, WIDTH, HEADS, CONTEXT = 23, 8, 2, 64


class ToyModel(nn.Module):
    """x = E[id] + P[position]; keys = values = x in HEADS heads; logits = (x + attention) W. Called like HF."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH, generator=generator))
        self.head = nn.Parameter(torch.randn(WIDTH, VOCABULARY, generator=generator))

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=True):
        x = self.embedding[input_ids] + self.positions[position_ids]
        batch, count, _ = x.shape
        heads = x.view(batch, count, HEADS, -1).transpose(1, 2)
        keys = heads if past_key_values is None else torch.cat([past_key_values, heads], dim=2)
        total = keys.shape[2]
        causal = torch.arange(total)[None, :] <= torch.arange(total - count, total)[:, None]
        allowed = causal & attention_mask.bool()[:, None, None, :]
        scores = (heads @ keys.transpose(2, 3)).masked_fill(~allowed, -1e4)
        mixed = (scores.softmax(-1) @ keys).transpose(1, 2).reshape(batch, count, WIDTH)
        return SimpleNamespace(logits=(x + mixed) @ self.head, past_key_values=keys)


def save_toy(model: ToyModel, folder: Path, dtype: int = TensorProto.FLOAT, last_only: bool = False) -> Path:
    """Write `model` as model.onnx + model.onnx.data with the exported folders' inputs and outputs."""
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    half = WIDTH // HEADS

    def weight(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
        return numpy_helper.from_array(tensor.detach().numpy().astype(numpy_type), name)

    def whole(name: str, *values: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, dtype=np.int64), name)

    constants = [
        weight("E", model.embedding), weight("P", model.positions), weight("W", model.head),
        whole("split", 0, 0, HEADS, half), whole("merge", 0, 0, WIDTH), whole("axis1", 1), whole("axes12", 1, 2),
        whole("one", 1), whole("two", 2), whole("end", 2**31), whole("minus1", -1),
        numpy_helper.from_array(np.array(0, dtype=np.int64), "zero"),
        numpy_helper.from_array(np.array(1, dtype=np.int64), "unit"),
        numpy_helper.from_array(np.array(-1e4, dtype=numpy_type), "low"),
    ]  # fmt: skip
    recipe = [
        ("Gather", "E input_ids", "x0", {}),
        ("Gather", "P position_ids", "x1", {}),
        ("Add", "x0 x1", "x", {}),
        ("Reshape", "x split", "heads0", {}),
        ("Transpose", "heads0", "heads", {"perm": [0, 2, 1, 3]}),
        ("Concat", "past_key_values.0.key heads", "present.0.key", {"axis": 2}),
        ("Concat", "past_key_values.0.value heads", "present.0.value", {"axis": 2}),
        ("Transpose", "present.0.key", "keysT", {"perm": [0, 1, 3, 2]}),
        ("MatMul", "heads keysT", "scores", {}),
        ("Shape", "scores", "total0", {"start": 3, "end": 4}),
        ("Shape", "scores", "count0", {"start": 2, "end": 3}),
        ("Squeeze", "total0", "total", {}),
        ("Squeeze", "count0", "count", {}),
        ("Sub", "total count", "first", {}),
        ("Range", "zero total unit", "keysAt", {}),
        ("Range", "first total unit", "queriesAt0", {}),
        ("Unsqueeze", "queriesAt0 axis1", "queriesAt", {}),
        ("LessOrEqual", "keysAt queriesAt", "causal", {}),
        ("Cast", "attention_mask", "mask0", {"to": TensorProto.BOOL}),
        ("Unsqueeze", "mask0 axes12", "mask", {}),
        ("And", "causal mask", "allowed", {}),
        ("Where", "allowed scores low", "masked", {}),
        ("Softmax", "masked", "weights", {"axis": -1}),
        ("MatMul", "weights present.0.value", "mixed0", {}),
        ("Transpose", "mixed0", "mixed1", {"perm": [0, 2, 1, 3]}),
        ("Reshape", "mixed1 merge", "mixed", {}),
        ("Add", "x mixed", "y0", {}),
        ("Slice", "y0 minus1 end one", "y1", {}) if last_only else ("Identity", "y0", "y1", {}),
        ("MatMul", "y1 W", "logits", {}),
    ]
    nodes = [helper.make_node(op, i.split(), o.split(), name=o, **attrs) for op, i, o, attrs in recipe]
    if last_only:
        nodes[-2].input[3] = "one"
    cache = ["b", HEADS, "past", half]
    new = ["b", HEADS, "total", half]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["b", "t"]),
        *[helper.make_tensor_value_info(f"past_key_values.0.{part}", dtype, cache) for part in ("key", "value")],
    ]
    outputs = [
        helper.make_tensor_value_info("logits", dtype, ["b", "n", VOCABULARY]),
        *[helper.make_tensor_value_info(f"present.0.{part}", dtype, new) for part in ("key", "value")],
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [c for c in constants if c.name in used])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        proto, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data", size_threshold=500
    )
    return folder
