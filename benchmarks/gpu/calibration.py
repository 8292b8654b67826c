"""b's text: what was carried along, and as much again as wanted, sampled from the dense model itself.

A sample begins with a few tokens of the carried text and goes on at temperature 1 without an end, by transformers'
`generate` with its key/value cache. Batches are files in `work`, so that a command that goes on has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.box import TimeBox
from benchmarks.gpu.choices import Effort, Text
from soco_train.data.corpus import Blocks, fingerprint, turns
from soco_train.store.tensorfile import read_tensors, write_tensors

KIND = "sampled text"


@dataclass(frozen=True)
class Calibration:
    """carried, sampled: token blocks [n, block]; held_out: blocks that nothing is trained on."""

    carried: torch.Tensor
    sampled: torch.Tensor
    held_out: torch.Tensor

    def blocks(self, text: Text) -> Blocks:
        """Return one of the texts; mixed: both, block by block in turns."""
        tokens: Mapping[str, torch.Tensor] = {
            "carried": self.carried,
            "sampled": self.sampled,
            "mixed": torch.cat([self.carried, self.sampled])[turns([len(self.carried), len(self.sampled)])],
        }
        return Blocks(tokens[text], text, fingerprint(tokens[text]))


def split(carried: torch.Tensor, held_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide blocks into those to train on and the last ones."""
    return carried[:-held_out], carried[-held_out:]


def sampled(model: Any, carried: torch.Tensor, effort: Effort, folder: Path, box: TimeBox) -> torch.Tensor:
    """Return the sampled blocks [batches · sequences, block], those from `folder` that are there; raises TimeUp."""
    batches, sequences = effort.sampled
    found = []
    for number in range(batches):
        path = folder / f"{fingerprint(carried)[:12]}-{sequences}-{number}.safetensors"
        if not path.exists():
            box.check()
            folder.mkdir(parents=True, exist_ok=True)
            tokens = sample(model, prompts(carried, sequences, effort.prompt, number), effort.block, number)
            write_tensors(path, {"tokens": tokens}, {"kind": KIND})
        found.append(read_tensors(path, KIND)[0]["tokens"])
    return torch.cat(found)


def prompts(carried: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """Return `count` pieces [count, length] of the carried text, from random places."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(carried), (count,), generator=generator)
    starts = torch.randint(carried.shape[1] - length + 1, (count,), generator=generator)
    return torch.stack([carried[row, start : start + length] for row, start in zip(rows, starts, strict=True)])


@torch.inference_mode()
def sample(model: Any, given: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """Continue prompts [n, p] to [n, length] by drawing from the model's own distribution; int64 on the CPU."""
    torch.manual_seed(seed)
    start = given.to(model.device)
    more = length - given.shape[1]
    found: torch.Tensor = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=more,
        min_new_tokens=more,
        pad_token_id=0,
    )
    return found.cpu()
