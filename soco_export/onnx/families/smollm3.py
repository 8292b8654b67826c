"""SmolLM3: Llama without rotation in every fourth layer."""

from __future__ import annotations

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, WINDOWS, decoder, layers
from soco_export.onnx.families.registry import family


@family("smollm3", keys=f"{COMMON} {WINDOWS} no_rope_layers no_rope_layer_interval")
def smollm3(config: Config) -> Architecture:
    """`no_rope_layers` is 1 where a layer does turn."""
    return decoder(config, each=layers(config, turning=[bool(turns) for turns in config["no_rope_layers"]]))
