"""The order of training: every step's examples, known before the first step, and their tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.training.examples import Example

WINDOW = 32
"""Batches that are sorted by length together: enough to waste little on padding, few enough to mix."""
WIDTH = 32
"""Batches are padded to a multiple of this. CPU kernels are compiled per shape, so few shapes are fast."""


@dataclass(frozen=True)
class Batch:
    """Examples of one step, padded on the right: a pad comes after everything that could see it."""

    tokens: Int[Tensor, "row position"]
    answer: Bool[Tensor, "row position"]
    """Positions whose *next* token is part of the answer: the loss is taken there."""

    @property
    def n_tokens(self) -> int:
        """Tokens that the layer stack reads, padding included."""
        return self.tokens.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.tokens.to(device), self.answer.to(device))


def schedule(lengths: Sequence[int], batch_size: int, examples: int | None, seed: int) -> list[list[int]]:
    """Indices of every step's examples: epochs of a seeded shuffle, batched by length.

    Args:
        lengths: tokens per example.
        batch_size: examples per step; the last step of an epoch may have fewer.
        examples: how many in all; None for one epoch.
        seed: of the shuffles.
    """
    n = len(lengths)
    total = n if examples is None else examples
    steps: list[list[int]] = []
    epoch = 0
    while total > 0:
        rng = random.Random(f"order:{seed}:{epoch}")
        order = list(range(n))
        rng.shuffle(order)
        order = order[:total]
        batches = []
        for start in range(0, len(order), WINDOW * batch_size):
            window = sorted(order[start : start + WINDOW * batch_size], key=lambda i: (lengths[i], i))
            batches += [window[k : k + batch_size] for k in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        steps += batches
        total -= len(order)
        epoch += 1
    return steps


def padded(longest: int, width: int = WIDTH) -> int:
    """Positions of a batch whose longest example has this many tokens."""
    return -(-longest // width) * width


def make_batch(examples: Sequence[Example], width: int = WIDTH) -> Batch:
    """Tensors of some examples; the width is the longest's, rounded up to a multiple of `width`."""
    columns = padded(max(len(example.tokens) for example in examples), width)
    tokens = torch.zeros(len(examples), columns, dtype=torch.long)
    answer = torch.zeros(len(examples), columns, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        answer[row, example.prompt - 1 : len(example.tokens) - 1] = True
    return Batch(tokens, answer)


def refuse_short_batches(longest: Sequence[int], groups: int) -> None:
    """Raise SSTError where a batch has fewer positions than interleaved groups, before the first step.

    Args:
        longest: tokens of the longest example of every step.
    """
    shortest = min(longest, default=groups)
    if groups > padded(shortest):
        raise SSTError(
            f"groups = {groups} is more than the {padded(shortest)} positions of the shortest batch "
            f"(step {list(longest).index(shortest) + 1})",
            f"at most {padded(shortest)}: as many groups as positions compute one position after the other",
        )
