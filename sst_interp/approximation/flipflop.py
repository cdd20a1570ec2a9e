"""A task in which a carried state can help: flip-flop with a short attention window.

A symbol is either a command that sets one of a few values or noise; the label at every position is the value
set last (after Liu et al. 2023, "Exposing attention glitches with flip-flop language modeling", arXiv
2306.00946). Attention reaches only a few positions back, so that the stack alone can look back
`layers * (window - 1)` positions. What was set earlier can only be known through the carried state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class FlipFlop:
    """How sequences are drawn."""

    positions: int = 16
    values: int = 4
    """Values that can be set, and as many noise symbols."""
    rate: float = 0.15
    """Share of positions that set a value. Position 0 always does."""

    @property
    def vocabulary(self) -> int:
        """Symbols: commands first, then noise."""
        return 2 * self.values

    def draw(
        self, sequences: int, seed: int
    ) -> tuple[Int[Tensor, "row position"], Int[Tensor, "row position"]]:
        """(tokens, labels) of some sequences, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        shape = (sequences, self.positions)
        symbol = torch.randint(0, self.values, shape, generator=generator)
        sets = torch.rand(shape, generator=generator) < self.rate
        sets[:, 0] = True
        tokens = torch.where(sets, symbol, self.values + symbol)
        return tokens, symbol.gather(1, self.last_set(tokens))

    def last_set(self, tokens: Int[Tensor, "row position"]) -> Int[Tensor, "row position"]:
        """The position that set the value which holds at each position."""
        at = torch.arange(tokens.shape[1]).expand_as(tokens)
        return torch.where(tokens < self.values, at, 0).cummax(dim=1).values

    def distance(self, tokens: Int[Tensor, "row position"]) -> Int[Tensor, "row position"]:
        """How many positions ago the value was set."""
        return torch.arange(tokens.shape[1]) - self.last_set(tokens)
