"""The quality benchmark's laboratory, with perplexities measured where the model is, as it is and rounded to int4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.quality.cells import DENSE, Perplexity
from benchmarks.quality.laboratory import Laboratory
from soco_train.errors import DataError
from soco_train.events import Event, Notify
from soco_train.numbers.rounding import rounded
from soco_train.settings.rounding import RoundingSettings

INT4 = RoundingSettings(weights="int4")
AT_ONCE = 16384  # tokens of a pass; with a vocabulary of 50k their logits take 3 GB


class DeviceLaboratory(Laboratory):
    """A laboratory whose logits stay on the device: a text of 300k tokens would be 60 GB of them."""

    def perplexities(self) -> dict[str, Perplexity]:
        """Return those of the model as it is at this moment, by text."""
        return self._perplexities(DENSE)

    def _perplexities(self, name: str) -> dict[str, Perplexity]:
        exact = {text: perplexity(self.model, blocks.tokens, self.notify) for text, blocks in self.texts.items()}
        with as_int4(self.model):
            coarse = {
                f"{text} int4": perplexity(self.model, blocks.tokens, self.notify)
                for text, blocks in self.texts.items()
            }
        return {**exact, **coarse}


@torch.inference_mode()
def perplexity(model: Any, blocks: torch.Tensor, notify: Notify) -> Perplexity:
    """As soco_export's measure_perplexity, on the model's device; DataError for a loss that is not finite."""
    total, batches = 0.0, blocks.split(max(1, AT_ONCE // blocks.shape[1]))
    for number, batch in enumerate(batches, start=1):
        tokens = batch.to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += float(functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"))
        notify(Event("perplexity", number, len(batches)))
    scored = blocks[:, 1:].numel()
    loss = torch.tensor(total / scored, dtype=torch.float64)
    if not loss.isfinite():
        raise DataError("the loss on an evaluation text is not finite", fix="lower the learning rate")
    return Perplexity(float(loss.exp()), float(loss), scored)


@contextmanager
def as_int4(model: Any) -> Iterator[None]:
    """Within this context the layers' matrices are as an int4 export stores them, the head's as it is."""
    head = model.get_output_embeddings().weight
    skipped = {id(head), id(model.get_input_embeddings().weight)}
    matrices = [
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 2 and id(parameter) not in skipped
    ]
    before = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(rounded(matrix, INT4))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, own in zip(matrices, before, strict=True):
                matrix.copy_(own)
