"""One interface for a dense model, a low-rank model and an ONNX graph, so that no measurement branches on what it sees.

`Decoder` keeps the mask, the positions and the cache; its children (`TorchDecoder` here, `OnnxDecoder` in session.py)
only run one forward pass. torch is imported where it runs: what only opens a graph is spared its seconds and memory.

    decoder = TorchDecoder(model)
    tokens = decoder.generate(prompt, 32)
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Decoder(ABC):
    """A causal language model with a key-value cache. Arrays are numpy; logits are float32.

    `name` is what reports and errors call it: "dense", "low-rank", "onnx".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._past: Any = None
        self._mask: IntArray | None = None

    def prefill(self, ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Start a new sequence and keep its cache. ids, mask: [b, t] → logits [b, t, vocabulary].

        `mask` is 1 on real tokens, 0 on padding (left or right). A graph with last-token logits gives [b, 1, v].
        """
        self.release()
        return self._extend(ids, mask)

    def step(self, ids: IntArray) -> FloatArray:
        """Go on from the cache. ids: [b, n], usually n = 1 → logits [b, n, vocabulary]."""
        return self._extend(ids, None)

    def logits(self, ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Return the logits of all positions, [b, t] → [b, t, vocabulary], and keep no cache.

        A graph that only yields the last token's logits is walked token by token: exact, slow.
        """
        found = self.prefill(ids, mask)
        if found.shape[1] != ids.shape[1]:
            found = self._walk(ids, mask)
        self.release()
        return found

    def _walk(self, ids: IntArray, mask: IntArray | None) -> FloatArray:
        self.release()
        columns = (slice(i, i + 1) for i in range(ids.shape[1]))
        return np.concatenate([self._extend(ids[:, c], None if mask is None else mask[:, c]) for c in columns], axis=1)

    def generate(self, ids: IntArray, count: int, mask: IntArray | None = None) -> IntArray:
        """Continue greedily by exactly `count` tokens (no stop token). ids: [b, t] → [b, count]; pad on the left."""
        found = [self.prefill(ids, mask)[:, -1].argmax(-1)]
        while len(found) < count:
            found.append(self.step(found[-1][:, None])[:, -1].argmax(-1))
        self.release()
        return np.stack(found, axis=1)

    def release(self) -> None:
        """Forget the cache."""
        self._past, self._mask = None, None

    def _extend(self, ids: IntArray, mask: IntArray | None) -> FloatArray:
        self._mask, positions = self._continue_mask(ids, mask)
        logits, self._past = self._forward(ids, self._mask, positions, self._past)
        return logits

    def _continue_mask(self, ids: IntArray, mask: IntArray | None) -> tuple[IntArray, IntArray]:
        new = np.ones_like(ids) if mask is None else mask.astype(np.int64)
        whole = new if self._mask is None else np.concatenate([self._mask, new], axis=1)
        positions = np.maximum(whole.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        return whole, positions

    @abstractmethod
    def _forward(self, ids: IntArray, mask: IntArray, positions: IntArray, past: Any) -> tuple[FloatArray, Any]:
        """Run one pass: ids, positions [b, n]; mask [b, past + n] → (logits [b, n, v], new past)."""


class TorchDecoder(Decoder):
    """A Hugging Face causal LM, on whatever device it is."""

    def __init__(self, model: nn.Module, name: str = "dense") -> None:
        super().__init__(name)
        self.model: Any = model.eval()
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def _forward(self, ids: IntArray, mask: IntArray, positions: IntArray, past: Any) -> tuple[FloatArray, Any]:
        import torch

        device = next(self.model.parameters()).device
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = positions
        tensors = {key: torch.from_numpy(np.ascontiguousarray(value)).to(device) for key, value in inputs.items()}
        with torch.inference_mode():
            output = self.model(**tensors, past_key_values=past, use_cache=True)
        return output.logits.float().cpu().numpy(), output.past_key_values
