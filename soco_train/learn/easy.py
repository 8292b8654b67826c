"""Which tokens a bigram table of the calibration text foretells: easy ones, which teach a student the least.

Compressed models lean on shortcuts and lose more on unfamiliar text; weighting down what a far simpler model gets right
is meant against that (arXiv 2110.08419, where whole samples are weighted). Tokens and the table are [ours].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EasyPairs:
    """The pairs (token, next token) that a table foretells, as sorted keys token · size + next, int64 [k]."""

    size: int
    keys: torch.Tensor

    @staticmethod
    def of(tokens: torch.Tensor) -> EasyPairs:
        """Return the pairs of a text, tokens [n, t]: each token's most frequent next one, without the pair in question.

        A pair is left out of the table it is held against, or every pair that is there once would be foretold: with
        counts c it is in if c - 1 is at least 1 and at least that of each other next token.
        """
        size = int(tokens.max()) + 1
        pairs, counts = (tokens[:, :-1].long() * size + tokens[:, 1:]).unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        order = order[(pairs[order] // size).argsort(stable=True)]  # by token, the most frequent next one first
        pairs, counts = pairs[order], counts[order]
        first = pairs // size
        begins = torch.ones_like(first, dtype=torch.bool)
        begins[1:] = first[1:] != first[:-1]
        second = torch.zeros_like(counts)
        second[:-1] = torch.where(begins[1:], 0, counts[1:])
        return EasyPairs(size, pairs[begins & (counts - 1 >= second.clamp(min=1))].sort().values)

    def weights(self, tokens: torch.Tensor, less: float) -> torch.Tensor:
        """Return 1 - `less` where the next of tokens [b, t] is easy, else 1, and 1 at the last: float32 [b, t]."""
        found = torch.ones(tokens.shape, device=tokens.device)
        own, after = tokens[:, :-1].long(), tokens[:, 1:].long()
        easy = (
            torch.isin(own * self.size + after, self.keys.to(tokens.device)) & (own < self.size) & (after < self.size)
        )
        found[:, :-1] -= less * easy
        return found
