"""Granite: Llama with four factors."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, Scales
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, decoder
from soco_export.onnx.families.registry import family


@family("granite", keys=f"{COMMON} embedding_multiplier logits_scaling residual_multiplier attention_multiplier")
def granite(config: Config) -> Architecture:
    """Of embeddings, scores, what a sublayer adds, and logits."""
    base = decoder(config)
    return replace(
        base,
        attention=replace(base.attention, scale=config["attention_multiplier"]),
        residual=replace(base.residual, scale=config["residual_multiplier"]),
        scales=Scales(embedding=config["embedding_multiplier"], logits=1 / config["logits_scaling"]),
    )
