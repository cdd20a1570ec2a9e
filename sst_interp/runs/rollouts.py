"""Several depths and texts side by side: the passes a capture makes at one generated position.

A **rollout** is one way of going on with every question of a batch: a depth and the text it reads (`own` or
`depth1`). All rollouts advance together, deepest first, so at iteration i the rollouts still iterating are the
first n rows of one batch. The three comparisons are then differences between rollouts at the same moment, and
no state has to be kept for later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.models.choices import Comparison
from sst_interp.models.generation import decode
from sst_interp.models.measures import Readout, read_out, rows_of
from sst_interp.models.stream import Recurrence, Stream


class Rollout(NamedTuple):
    """One depth on one text."""

    text: str
    depth: int


class RolloutCell(NamedTuple):
    """One iteration of one rollout: where a state was read."""

    rollout: Rollout
    iteration: int


class Pair(NamedTuple):
    """Two cells whose states are compared, and how the tables call them."""

    comparison: Comparison
    a: int
    b: int
    cell_a: RolloutCell
    cell_b: RolloutCell


def rollouts_of(depths: Sequence[int]) -> list[Rollout]:
    """Lanes for these depths, deepest first: each depth's own text, and depth 1's text at every other."""
    rollouts = []
    for depth in sorted(depths, reverse=True):
        rollouts.append(Rollout("own", depth))
        if depth > 1:
            rollouts.append(Rollout("depth1", depth))
    return rollouts


def pairs_of(depths: Sequence[int]) -> list[Pair]:
    """What is compared with what (docs/run-format.md, Words)."""
    base = RolloutCell(Rollout("own", 1), 1)
    deeper = [d for d in sorted(depths) if d > 1]
    pairs = [Pair("teacher_forced", 1, d, base, RolloutCell(Rollout("depth1", d), d)) for d in deeper]
    pairs += [Pair("free_running", 1, d, base, RolloutCell(Rollout("own", d), d)) for d in deeper]
    if deeper:
        deepest = Rollout("own", deeper[-1])
        steps = {(1, i) for i in range(2, deepest.depth + 1)} | {
            (i - 1, i) for i in range(2, deepest.depth + 1)
        }
        pairs += [
            Pair("within", a, b, RolloutCell(deepest, a), RolloutCell(deepest, b)) for a, b in sorted(steps)
        ]
    return pairs


class RolloutStep:
    """One generated position of a batch, in all rollouts: states and readouts by cell."""

    def __init__(
        self, rollouts: list[Rollout], batch: int, resid_post: list[Tensor], logits: list[Tensor]
    ) -> None:
        self._resid_post, self._logits = resid_post, logits
        self._read: dict[int, Readout] = {}
        self._rows = {rollout: slice(k * batch, (k + 1) * batch) for k, rollout in enumerate(rollouts)}

    def states(self, cell: RolloutCell) -> Float[Tensor, "layer question d_model"]:
        """Layer outputs of one iteration of one rollout."""
        return self._resid_post[cell.iteration - 1][:, self._rows[cell.rollout]]

    def readout(self, cell: RolloutCell) -> Readout:
        """The next-token distributions of one iteration of one rollout."""
        i = cell.iteration - 1
        if i not in self._read:  # all rollouts at once, when first asked for
            self._read[i] = read_out(self._logits[i])
        return rows_of(self._read[i], self._rows[cell.rollout])


class RolloutDecoder:
    """Decodes all rollouts of a batch of questions, greedily, position by position.

    Args:
        stream: the prompts, read up to their last token; one row per question.
        last_tokens: [question] each prompt's last token: the input of position 0.
        stop: ids that end a text.
    """

    def __init__(
        self,
        model: Recurrence,
        stream: Stream,
        last_tokens: Int[Tensor, " question"],
        depths: Sequence[int],
        stop: Int[Tensor, " stop"],
    ) -> None:
        self.model, self.stop, self.batch = model, stop, len(last_tokens)
        self.rollouts = rollouts_of(depths)
        self._stream = stream.repeat(len(self.rollouts))
        self._depths = torch.tensor([rollout.depth for rollout in self.rollouts]).repeat_interleave(
            self.batch
        )
        self._current = last_tokens.repeat(len(self.rollouts))
        self.alive: dict[int, Bool[Tensor, " question"]] = {
            d: torch.ones_like(last_tokens, dtype=torch.bool) for d in depths
        }
        """By depth: the question's own text has not ended before this position."""
        self.same_prefix = {d: alive.clone() for d, alive in self.alive.items()}
        """By depth: its own text so far is depth 1's."""
        self.emitted: dict[int, Int[Tensor, " question"]] = {}
        """By depth: the token its own text got at the last position."""

    def step(self) -> RolloutStep:
        """Compute the next position. `alive` and `same_prefix` describe it until `finish_step`."""
        iterations, logits, final = decode(self.model, self._stream, self._current, self._depths)
        winners = final.argmax(-1).view(len(self.rollouts), self.batch)
        self.emitted = {
            rollout.depth: winners[k] for k, rollout in enumerate(self.rollouts) if rollout.text == "own"
        }
        return RolloutStep(self.rollouts, self.batch, [it.resid_post for it in iterations], logits)

    def finish_step(self) -> bool:
        """Feed the emitted tokens back; True if any text goes on."""
        self._current = torch.cat(
            [self.emitted[rollout.depth if rollout.text == "own" else 1] for rollout in self.rollouts]
        )
        for depth, tokens in self.emitted.items():
            self.same_prefix[depth] = self.same_prefix[depth] & (tokens == self.emitted[1])
            self.alive[depth] = self.alive[depth] & ~torch.isin(tokens, self.stop)
        return any(bool(alive.any()) for alive in self.alive.values())

    def alive_in(self, rollout: Rollout) -> Bool[Tensor, " question"]:
        """Where the rollout's text has not ended before this position."""
        return self.alive[rollout.depth if rollout.text == "own" else 1]
