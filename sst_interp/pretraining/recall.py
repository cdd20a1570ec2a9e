"""In-context recall: pairs of a key and a value, then every key again, each to be answered by its value.

Multi-query associative recall (after Arora et al. 2023, "Zoology", arXiv 2312.04927):

    k1 v1 k2 v2 k3 v3 | k2 v2 k1 v1 k3 v3

Keys and values are drawn anew for every sequence, so that nothing can be learnt but to look back. The loss is
taken where a queried key is read, nowhere else. Every other batch begins with a filler symbol: keys would
else always stand at even positions, which two interleaved groups could use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sst_interp.errors import SSTError
from sst_interp.training.batches import Batch


@dataclass(frozen=True)
class Recall:
    """How sequences are drawn."""

    pairs: tuple[int, ...] = (2, 4, 8)
    """Numbers of pairs; a batch has one of them."""
    symbols: int = 16
    """Keys, and as many values."""

    def __post_init__(self) -> None:
        if not self.pairs or min(self.pairs) < 1 or max(self.pairs) > self.symbols:
            raise SSTError(
                f"{self.pairs} pairs of {self.symbols} different keys cannot be drawn",
                f"give numbers from 1 to {self.symbols}",
            )

    @property
    def vocabulary(self) -> int:
        """Symbols: keys, then values, then the filler."""
        return 2 * self.symbols + 1

    @property
    def positions(self) -> int:
        """Of the longest sequence."""
        return 4 * max(self.pairs) + 1

    def draw(self, sequences: int, seed: int, pairs: int | None = None, filler: bool | None = None) -> Batch:
        """Some sequences, the same for the same seed.

        Args:
            pairs: in every sequence; None draws one of the numbers.
            filler: begin with the filler; None tosses a coin.
        """
        generator = torch.Generator().manual_seed(seed)
        coins = torch.randint(0, len(self.pairs) * 2, (1,), generator=generator).item()
        n = self.pairs[int(coins) // 2] if pairs is None else pairs
        filler = bool(coins % 2) if filler is None else filler
        some = torch.rand(sequences, self.symbols, generator=generator)
        key = some.argsort(dim=1)[:, :n]
        value = self.symbols + torch.randint(0, self.symbols, (sequences, n), generator=generator)
        order = torch.rand(sequences, n, generator=generator).argsort(dim=1)
        shown = torch.stack([key, value], dim=2).flatten(1)
        asked = torch.stack([key.gather(1, order), value.gather(1, order)], dim=2).flatten(1)
        tokens = torch.cat([shown, asked], dim=1)
        if filler:
            tokens = torch.cat([torch.full((sequences, 1), self.vocabulary - 1), tokens], dim=1)
        answer = torch.zeros_like(tokens, dtype=torch.bool)
        answer[:, 2 * n + int(filler) :: 2] = True
        return Batch(tokens, answer)
