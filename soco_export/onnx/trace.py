"""Architectures without a description: the PyTorch model, traced by torch's own exporter, behind one function.

The graph has the inputs and outputs of the builder's. It is slower than one from a description (traced attention, no
quantised weights), and the whole model is in memory while it is made: a description is worth writing for a model in
use. torch.onnx is used directly because transformers' wrapper of it (`transformers.exporters`) still changes between
releases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from soco_export.files.names import MODEL_FILE
from soco_export.onnx.describe.config import Config
from soco_export.onnx.inspect import BATCH, CACHE, PAST, SEQUENCE, TOTAL
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.write.graph import stamp
from soco_train.errors import MachineError, RecipeError
from soco_train.events import Event, Notify

OPSET = 20
# Keys of state space models, linear attention and short convolutions.
RECURRENT = re.compile(
    r"^(mamba|ssm_|state_size|lru_width|linear_conv|linear_num|conv_L_cache|time_step|conv_kernel|rescale_every)"
)
# Keys of a model that reads images or sounds beside text.
_SEVERAL = ("vision_config", "audio_config", "text_config")
_Pair = tuple[torch.Tensor, torch.Tensor]


class CachedDecoder(nn.Module):
    """A causal LM whose cache comes and goes as plain tensors."""

    def __init__(self, model: Any, last_token_logits: bool) -> None:
        super().__init__()
        self.model = model
        self.start = -1 if last_token_logits else 0

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: list[_Pair]
    ) -> tuple[torch.Tensor, list[_Pair]]:
        """Return (float32 logits, key and value of each layer) for the tokens after `past`."""
        result = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=_cache(past),
            use_cache=True,
        )
        present = [(layer.keys, layer.values) for layer in result.past_key_values.layers]
        return result.logits[:, self.start :].float(), present


def _cache(past: list[_Pair]) -> Any:
    """Return transformers' cache with all slots kept: windows are the mask's business."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (key, value) in enumerate(past):
        cache.update(key, value, index)
    return cache


def check_fallback(config: Config, settings: ExportSettings) -> None:
    """Raise unless a traced graph can be what the settings ask for, and the tracer is installed."""
    if several := next((key for key in _SEVERAL if config.get(key)), None):
        raise RecipeError(
            f"{config['model_type']} is several models in one folder, and the decoder among them is not known alone",
            fix="save the decoder as a model of its own (save_pretrained of its language model, with a head)",
            where=f"{config.where}: {several}",
        )
    if keys := sorted(key for key in config.values if RECURRENT.search(key) and config.get(key)):
        raise RecipeError(
            f"{config['model_type']} keeps a state beside keys and values ({keys[0]}): no graph can be made of it",
            fix="export --format hf or dense instead",
            where=f"{config.where}: {keys[0]}",
        )
    for key, value in (("flavour", "standard"), ("weights", "same"), ("each", {}), ("pack", False)):
        if getattr(settings, key) != value:
            raise RecipeError(
                f"export.{key} is {getattr(settings, key)!r}, but {config['model_type']} has no description for the "
                "graph builder and is traced",
                fix=f"set export.{key} to {value!r}, or describe it in soco_export/onnx/families",
                where=f"export.{key}",
            )
    if find_spec("onnxscript") is None:
        raise MachineError(
            f"{config['model_type']} has no description for the graph builder, and tracing it needs onnxscript",
            fix="pip install onnxscript, or describe it in soco_export/onnx/families",
            where=config.where,
        )


def export_traced(model: Any, out: Path, settings: ExportSettings, notify: Notify, metadata: Mapping[str, str]) -> None:
    """Write `out`/model.onnx by tracing, with `metadata` in it; RecipeError where torch cannot trace the model."""
    notify(Event("export", 0, 1))
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "batched_mm"  # the default, grouped_mm, cannot be traced
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        program = _traced(model, settings)
    except Exception as error:  # whatever a model's own code raises under the tracer
        raise RecipeError(
            f"torch cannot trace {model.config.model_type}: {_cause(error)}",
            fix="export --format hf or dense instead, or describe it in soco_export/onnx/families",
            where=str(model.name_or_path),
        ) from error
    if program is None:
        raise AssertionError("torch.onnx.export(dynamo=True) returns a program")
    _forget_origin(program.model)
    _name_sizes(program.model.graph)
    stamp(program.model, metadata)
    ir.save(program.model, out / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    notify(Event("export", 1, 1))


def _traced(model: Any, settings: ExportSettings) -> Any:
    """Return torch's ONNX program of `model` with its cache as inputs and outputs."""
    past = _example_cache(model)
    batch = torch.export.Dim.DYNAMIC
    rows = {0: batch, 1: batch}
    cache = [({0: batch, 2: batch}, {0: batch, 2: batch}) for _ in past]
    parts = [f"{index}.{part}" for index in range(len(past)) for part in ("key", "value")]
    return torch.onnx.export(
        CachedDecoder(model, settings.last_token_logits).eval(),
        (*_example_tokens(4), past),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=(rows, rows, rows, cache),
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)],
        output_names=["logits", *(f"present.{part}" for part in parts)],
    )


def _cause(error: BaseException) -> str:
    """Return the first line of what went wrong first: torch wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _example_cache(model: Any) -> list[_Pair]:
    """Return a cache of four tokens for a batch of two, in the model's own shapes."""
    tokens = torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad():
        result = model(input_ids=tokens, past_key_values=_cache([]), use_cache=True)
    return [(layer.keys, layer.values) for layer in result.past_key_values.layers]


def _example_tokens(past: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, mask and positions of three more tokens; no two sizes are equal, so none are taken for one."""
    new = 3
    positions = torch.arange(past, past + new).repeat(2, 1)
    return torch.ones(2, new, dtype=torch.long), torch.ones(2, past + new, dtype=torch.long), positions


def _names(port: str) -> dict[int, str]:
    """Return what the sizes of an input or output that vary are called, by axis."""
    if port.startswith((CACHE, "present")):
        return {0: BATCH, 2: PAST if port.startswith(CACHE) else TOTAL}
    return {0: BATCH, 1: TOTAL if port == "attention_mask" else SEQUENCE}


def _name_sizes(graph: ir.Graph) -> None:
    """Give the sizes that vary the names that they have in the builder's graphs, wherever they occur.

    The tracer may take the lengths of two layers' caches for two sizes, and writes a sum for past and new.
    """
    names: dict[str, str] = {}
    for port in (*graph.inputs, *graph.outputs):
        sizes = list(port.shape or ())
        varying = ((str(sizes[axis]), name) for axis, name in _names(str(port.name)).items())
        names |= {size: name for size, name in varying if not size.isdigit()}
    produced = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *produced):
        if value.shape is not None:
            value.shape = ir.Shape([names.get(str(size), size) for size in value.shape])


def _forget_origin(model: ir.Model) -> None:
    """Remove stack traces: they name files of this machine and make equal exports differ."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for function in model.functions.values():
        function.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
