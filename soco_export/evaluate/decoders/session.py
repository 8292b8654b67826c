"""An exported ONNX folder as a `Decoder`, opened with proof of where its nodes run.

ONNX Runtime falls back to the CPU in silence, so opening profiles one step and reads from it which provider ran what.

    decoder = OnnxDecoder(Path("run/onnx"))
    tokens = decoder.generate(prompt, 32)
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from soco_export.evaluate.decoders.decoder import Decoder, FloatArray, IntArray
from soco_export.evaluate.settings import CPU
from soco_export.files.machine import is_out_of_memory
from soco_export.files.names import MODEL_FILE, ROUNDED_CACHE
from soco_train.errors import DataError, MachineError, RecipeError
from soco_train.installed import install_command

DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
_PACKAGES = {"CUDAExecutionProvider": "gpu", "TensorrtExecutionProvider": "gpu"}
HALF_TYPES = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}

# Copies between a device and the host, which the runtime puts in itself.
COPIES = frozenset({"MemcpyToHost", "MemcpyFromHost"})
_FLOATS = frozenset({"float", "float16", "bfloat16", "double"})

# Contrib attention counts a row's tokens from its start, whatever the mask says, and writes into the cache it was given
# if past and present are one buffer.
CONTRIB_ATTENTION = frozenset({"GroupQueryAttention"})

LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True)
class Placement:
    """Which provider ran which operators in one profiled step: {provider: {operator: nodes}}.

    `fallen`: the operators {operator: nodes} that computed with floating-point numbers elsewhere. Integers are
    bookkeeping (shapes, masks, positions), which accelerators leave to the CPU on purpose.
    """

    requested: str
    nodes: Mapping[str, Mapping[str, int]]
    fallen: Mapping[str, int]

    def summary(self) -> str:
        """Say it in a line: "420 nodes on CUDAExecutionProvider, 12 on CPUExecutionProvider"."""
        return ", ".join(f"{sum(ops.values())} nodes on {provider}" for provider, ops in sorted(self.nodes.items()))


class OnnxDecoder(Decoder):
    """An exported folder (model.onnx beside its external data) in ONNX Runtime.

    Raises RecipeError for half precision on the CPU provider, MachineError if the provider is absent or nodes fell
    back, DataError if the folder does not load. `placement` says which provider each operator got.
    """

    def __init__(self, folder: Path, provider: str = CPU, threads: int = 2, name: str = "onnx") -> None:
        super().__init__(name)
        self.folder, self.provider = folder, provider
        self._device = DEVICES.get(provider, "cpu")
        check_provider(provider)
        graph = _read_graph(folder / MODEL_FILE)
        _refuse_half_on_cpu(graph, provider, folder)
        self._contrib = any(node.op_type in CONTRIB_ATTENTION for node in graph.node)
        with tempfile.TemporaryDirectory() as profiles:
            self._session = _open_session(folder, provider, threads, Path(profiles) / "step")
            self._inputs = {entry.name: entry for entry in self._session.get_inputs()}
            self._outputs = [entry.name for entry in self._session.get_outputs()]
            self._check_names()
            self._cache_names = [name for name in self._inputs if name.startswith("past_key_values.")]
            self.placement = self._prove_placement()

    def prefill(self, ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Start a new sequence as `Decoder.prefill` does; RecipeError for padding that the graph gets wrong."""
        if mask is not None and self._contrib and (np.diff(mask, axis=1) > 0).any():
            raise RecipeError(
                "this graph's attention takes no padding on the left",
                fix="export.flavour: standard, or one sequence at a time",
                where=str(self.folder / MODEL_FILE),
            )
        return super().prefill(ids, mask)

    def _check_names(self) -> None:
        """Raise DataError for a graph that is no decoder's: without tokens there is nothing to ask."""
        if "input_ids" not in self._inputs or "logits" not in self._outputs:
            raise DataError(
                f"{MODEL_FILE} is no graph from input_ids to logits",
                fix="give a decoder as this program exports it",
                where=str(self.folder / MODEL_FILE),
            )

    def _prove_placement(self) -> Placement:
        self.prefill(np.zeros((1, 1), dtype=np.int64))
        self.release()
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        placement = read_placement(self.provider, events)
        if self.provider not in self._session.get_providers() or placement.fallen:
            fallen = ", ".join(f"{count} {op}" for op, count in sorted(placement.fallen.items())) or "the whole session"
            raise MachineError(
                f"{self.provider} was asked for, but ONNX Runtime ran elsewhere: {fallen}",
                fix="check the provider's libraries with `soco-export doctor`, or set validate.provider to " + CPU,
                where=str(self.folder / MODEL_FILE),
            )
        return placement

    def _forward(self, ids: IntArray, mask: IntArray, positions: IntArray, past: Any) -> tuple[FloatArray, Any]:
        binding = self._bind(ids, mask, positions, past)
        self._run(binding)
        outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        present = {name: outputs[_present_name(name)] for name in self._cache_names}
        return _as_float32(outputs["logits"]), present

    def repeatable(self, ids: IntArray) -> Callable[[], None]:
        """Return a function that runs the same pass behind the present cache again and again; for timing.

        ids: [b, n]. The cache does not move; inputs are bound to the device once. In a contrib graph past and present
        are one buffer, as in onnxruntime-genai: of the cache's size, and not with its values, which cost no time.
        """
        mask, positions = self._continue_mask(ids, None)
        shared = {name: self._buffer(name, *mask.shape) for name in self._cache_names} if self._contrib else None
        binding = self._bind(ids, mask, positions, shared or self._past)
        for name, buffer in (shared or {}).items():
            binding.bind_ortvalue_output(_present_name(name), buffer)

        def run() -> None:
            self._run(binding)
            binding.synchronize_outputs()

        return run

    def _run(self, binding: Any) -> None:
        """Raise DataError where a node cannot compute: a token behind the table, a cache of another size."""
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise DataError(
                f"{MODEL_FILE} does not compute: {_first_line(error)}",
                fix="give the folder with the config.json and tokenizer that it was exported with, or export it again",
                where=str(self.folder / MODEL_FILE),
            ) from error

    def _bind(self, ids: IntArray, mask: IntArray, positions: IntArray, past: Any) -> Any:
        binding = self._session.io_binding()
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name in self._inputs:
            if name in feeds:
                binding.bind_ortvalue_input(name, self._on_device(np.ascontiguousarray(feeds[name])))
        for name in self._cache_names:
            binding.bind_ortvalue_input(name, past[name] if past else self._buffer(name, ids.shape[0], 0))
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        return binding

    def _on_device(self, array: npt.NDArray[Any]) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _buffer(self, name: str, batch: int, length: int) -> Any:
        """Return a cache of `length` slots for the input `name`, with zeros in it unless numpy lacks the type."""
        _, heads, _, width = self._inputs[name].shape
        shape = (batch, heads, length, width)
        kind = NUMPY_TYPES.get(self._inputs[name].type)
        if kind is None:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, onnx.TensorProto.BFLOAT16, self._device, 0)
        return self._on_device(np.zeros(shape, dtype=kind))


def check_provider(provider: str) -> None:
    """Raise MachineError unless the installed ONNX Runtime knows `provider`; needs no model."""
    available = ort.get_available_providers()
    if provider not in available:
        raise MachineError(
            f"{provider} is not in this onnxruntime {ort.__version__} (it has {', '.join(available)})",
            fix=f"{install_command(_PACKAGES.get(provider, 'cpu'))}, or set validate.provider to {CPU}",
            where="recipe: validate.provider",
        )


def check_rounded_cache(provider: str, cache: str) -> None:
    """Raise MachineError unless the installed ONNX Runtime has an attention with a cache of int8 or int4: one step."""
    stored, width = (onnx.TensorProto.INT8, 16) if cache == "int8" else (onnx.TensorProto.UINT8, 8)
    floats = {"q": (1, 1, 32), "k": (1, 1, 16), "v": (1, 1, 16), "k_scale": (1, 1, 1, 16), "v_scale": (1, 1, 1, 16)}
    kinds = {name: (onnx.TensorProto.FLOAT, shape) for name, shape in floats.items()}
    kinds |= {name: (stored, (1, 1, 0, width)) for name in ("past_k", "past_v")}
    kinds |= {name: (onnx.TensorProto.INT32, shape) for name, shape in {"length": (1,), "total": ()}.items()}
    names = ["q", "k", "v", "past_k", "past_v", "length", "total", *[""] * 5, "k_scale", "v_scale"]
    sizes = {"num_heads": 2, "kv_num_heads": 1, **ROUNDED_CACHE[cache]}
    node = helper.make_node("GroupQueryAttention", names, ["y", "next_k", "next_v"], domain="com.microsoft", **sizes)
    inputs = [helper.make_tensor_value_info(name, *kinds[name]) for name in names if name]
    given = {"y": onnx.TensorProto.FLOAT, "next_k": stored, "next_v": stored}
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in given.items()]
    graph = helper.make_graph([node], "cache", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    feeds = {name: np.ones(shape, helper.tensor_dtype_to_np_dtype(kind)) for name, (kind, shape) in kinds.items()}
    try:
        session = ort.InferenceSession(model.SerializeToString(), session_options(1), providers=[provider])
        session.run(None, feeds | {"length": np.zeros(1, np.int32)})
    except LOAD_ERRORS as error:
        raise MachineError(
            f"onnxruntime {ort.__version__} has no attention with a cache of {cache} on {provider}",
            fix="update onnxruntime (1.32 has it on the CPU), or export.cache: same",
            where="recipe: export.cache",
        ) from error


def _refuse_half_on_cpu(graph: onnx.GraphProto, provider: str, folder: Path) -> None:
    found = _half_precision(graph)
    if found and provider == CPU:
        raise RecipeError(
            f"the graph computes in {found}, which {CPU} runs unfused and slowly, or not at all",
            fix="export.dtype: float32 for the CPU, or validate.provider: CUDAExecutionProvider",
            where=str(folder / MODEL_FILE),
        )


def _read_graph(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise _unreadable(path, error) from error


def _half_precision(graph: onnx.GraphProto) -> str | None:
    types = [entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.output)]
    cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}  # stored in half, computed in full
    types += [tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1 and tensor.name not in cast]
    return next((HALF_TYPES[kind] for kind in types if kind in HALF_TYPES), None)


def session_options(threads: int) -> Any:
    """Return the options under which every session of this package is opened and timed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what matters is raised or proven; the rest would litter stderr
    # Two sessions take turns in the benchmark: one must not spin on the other's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _open_session(folder: Path, provider: str, threads: int, profile: Path) -> Any:
    if provider in DEVICES:
        import torch  # noqa: F401 - loads the CUDA libraries it was installed with, for ONNX Runtime's provider too
    options = session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(profile)
    providers = [provider] if provider == CPU else [provider, CPU]
    path = folder / MODEL_FILE
    try:
        # By path, not by bytes: external data is looked for beside the file.
        return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except (*LOAD_ERRORS, UnicodeDecodeError) as error:  # the latter where it quotes a damaged name
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name} does not load: {_first_line(error)}", fix="export it again", where=str(path))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_placement(requested: str, events: list[dict[str, Any]]) -> Placement:
    """Count the nodes of an ONNX Runtime profile by provider and operator (pure)."""
    nodes: dict[str, Counter[str]] = {}
    fallen: Counter[str] = Counter()
    for event in events:
        details = event.get("args", {})
        if event.get("cat") == "Node" and (provider := details.get("provider")):
            op = details["op_name"]
            nodes.setdefault(provider, Counter())[op] += 1
            if provider != requested and op not in COPIES and _computes_floats(details):
                fallen[op] += 1
    return Placement(requested, nodes, fallen)


def _computes_floats(details: Mapping[str, Any]) -> bool:
    """Whether a profiled node takes and gives floating-point tensors: a Cast of positions does not."""
    return all(
        any(not _FLOATS.isdisjoint(tensor) for tensor in details.get(side, ()))
        for side in ("input_type_shape", "output_type_shape")
    )


def _present_name(past_name: str) -> str:
    return past_name.replace("past_key_values.", "present.")


def _as_float32(value: Any) -> FloatArray:
    if value.data_type() == "tensor(bfloat16)":  # numpy has no bfloat16
        import torch.utils.dlpack

        return torch.utils.dlpack.from_dlpack(value).float().numpy()
    return np.asarray(value.numpy(), dtype=np.float32)
