"""PyTorch beside ONNX Runtime: the same random shapes as modules, their passes replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.options import CUDA
from benchmarks.speed.others import TimedTorch
from soco_export.checkpoint.layers import apply_factors
from soco_export.evaluate.decoders.decoder import IntArray
from soco_train.forms.pivoted import PivotedFactors
from soco_train.forms.registry import LayerFactors
from soco_train.forms.stacked import StackedFactors
from soco_train.plan.rank_plan import RankPlan
from soco_train.store.factors import Factors

WARM_UP = 3


class GraphedTorch(TimedTorch):
    """A model whose repeated pass is one CUDA graph: no launch from Python is in its time."""

    def repeatable(self, ids: IntArray) -> Callable[[], None]:
        """Capture the pass behind the present cache; without CUDA, return it as it is."""
        if not CUDA:
            return super().repeatable(ids)
        tokens, past = torch.from_numpy(ids).cuda(), self._past

        def forward() -> torch.Tensor:
            return last_logits(self.model, tokens, past)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        read = [] if past is None else [(layer.keys, layer.values) for layer in past.layers]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward()

        def run() -> None:
            assert read is not None  # the cache that the graph reads must outlive it
            graph.replay()
            logits.cpu()  # as ONNX Runtime hands them over; waits for the device

        return run


@torch.inference_mode()
def last_logits(model: Any, tokens: torch.Tensor, past: Any) -> torch.Tensor:
    """Return the logits of the last of tokens [1, n] behind a cache, which is left as it was.

    Neither mask nor positions are given: from those transformers asks the device whether sequences are packed or
    padded, and a graph cannot be captured across such a question.
    """
    logits: torch.Tensor = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1).logits
    if past is not None:
        past.crop(-tokens.shape[1])
    return logits


def torch_decoders(config: Path, plans: Mapping[str, RankPlan | None], dtype: torch.dtype) -> dict[str, GraphedTorch]:
    """Return the models by name, on the GPU if there is one. config: a folder with config.json; plan None: dense."""
    found = {}
    for name, plan in plans.items():
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda" if CUDA else "cpu"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        if plan is not None:
            apply_factors(model, Factors(_factors(plan)), dtype)
        title = f"{name}, PyTorch {'CUDA graph' if CUDA else 'eager'}"
        found[title] = GraphedTorch(model, title)
    return found


def _factors(plan: RankPlan) -> dict[str, LayerFactors]:
    """Return random factors of the plan's forms; what they hold costs no time."""
    found: dict[str, LayerFactors] = {}
    for name, layer in plan.layers.items():
        (m, n), r = layer.shape, layer.rank
        if layer.dense:
            continue
        first = torch.randn(r, n).div_(n**0.5)
        if plan.storage == "stacked":
            found[name] = StackedFactors(torch.randn(m, r).div_(r**0.5), first, None)
        else:
            found[name] = PivotedFactors(first, torch.randn(m - r, r).div_(r**0.5), torch.randperm(m), None)
    return found
