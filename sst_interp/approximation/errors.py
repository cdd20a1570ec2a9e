"""Errors of a fixed number of sweeps against the exact states, on given text: what co-training approximates.

Training computes states by a blend-off pass and a few sweeps (`sst_interp.sweeps`). Here the same text is
also solved exactly, and the two are compared position by position. What comes out is a table of sums per
question and bin of positions, from which `sst_interp.analyses.approximation` computes everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.certificate import relative_change
from sst_interp.errors import SSTError
from sst_interp.layerwise import solve_layerwise
from sst_interp.sequential import advance
from sst_interp.stream import Recurrence
from sst_interp.sweeps import solve_by_sweeps
from sst_interp.training.examples import Example

TOLERANCE = 1e-6
"""Of the layerwise solution taken as exact: a unit of float32's rounding."""

SUMS = ("error2", "norm2", "relative", "state", "argmax", "kl", "tokens", "loss", "loss_exact")
"""The columns of the table that are sums over the positions of a bin."""

KEYS = ("method", "groups", "sweeps", "reference", "question", "id", "position", "positions")
"""The other columns of `measure_errors`."""

Reference = Literal["layerwise", "sequential"]


@dataclass(frozen=True, order=True)
class Schedule:
    """A fixed number of sweeps after a blend-off pass. It costs `1 + sweeps` passes over all positions."""

    groups: int
    sweeps: int


SCHEDULES = tuple(Schedule(1, k) for k in (1, 2, 4, 8))
"""Two-pass training is the first."""
CYCLIC = tuple(Schedule(g, k) for g in (2, 4, 8) for k in (1, 2, 4))
"""The same numbers of passes in cyclic groups."""


@dataclass(frozen=True)
class Outputs:
    """What is compared: of one text, position by position."""

    logits: Float[Tensor, "position vocab"]
    states: Float[Tensor, "layer position d_model"]


def measure_errors(
    model: Recurrence,
    examples: Sequence[Example],
    schedules: Sequence[Schedule] = SCHEDULES,
    reference: Reference = "layerwise",
    first_question: int = 0,
) -> pd.DataFrame:
    """Errors of every schedule on every example against the exact states, one iteration per position.

    Args:
        model: with a stream; float32 or wider, or rounding is measured.
        examples: conversations with an answer (`training.examples.encode`).
        schedules: what to compare with the exact states.
        reference: how the exact states are found; `sequential` is the definition and slow, and adds rows
            for the layerwise solution itself (method `layerwise`).
        first_question: number of the first example.

    Returns:
        A row per (schedule, question, bin of positions). `position` is the first position of the bin,
        `positions` how many it has. Sums over them: `error2` and `norm2` (squared L2 of the logits'
        difference and of the exact logits), `relative` (relative L2 of the logits), `state` (relative L2 of
        the layer outputs, mean over layers), `argmax` (most likely tokens that differ), `kl` (of the exact
        next-token distribution from the approximate one, nats); and over the `tokens` of the answer that
        are predicted there `loss` and `loss_exact` (nats).

    Raises:
        SSTError: no examples, or states that overflow.
    """
    if not examples:
        raise SSTError("there are no examples to measure errors on", "give at least one")
    tables = []
    for number, example in enumerate(examples, first_question):
        tokens = torch.tensor([example.tokens], device=model.backbone.device)
        answer = torch.zeros(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        answer[example.prompt - 1 : -1] = True
        exact = exact_outputs(model, tokens, reference)
        for about, found in _solutions(model, tokens, schedules, reference):
            table = compare(exact, found, tokens[0], answer)
            tables.append(table.assign(**about, reference=reference, question=number, id=example.id))
    found = pd.concat(tables, ignore_index=True)[[*KEYS, *SUMS]]
    narrow = {"groups": "int16", "sweeps": "int16", "question": "int32", "position": "int32"}
    return found.astype(narrow | {"positions": "int32", "argmax": "int32", "tokens": "int32"})


@torch.no_grad()
def exact_outputs(
    model: Recurrence, tokens: Int[Tensor, "row position"], reference: Reference, tolerance: float = TOLERANCE
) -> Outputs:
    """The exact states of one text: token by token, or solved layer by layer to a tight tolerance."""
    stream = model.new_stream(_no_pad(tokens), tokens.shape[1])
    if reference == "layerwise":
        solution = solve_layerwise(model, stream, tokens, tolerance=tolerance)
        assert solution.resid_post is not None
        return _outputs(model, solution.resid_post[:, :, :, 0])
    steps = [advance(model, stream, tokens[:, t], 1)[0].resid_post for t in range(tokens.shape[1])]
    return _outputs(model, torch.stack(steps, dim=2))


def compare(
    exact: Outputs, found: Outputs, tokens: Int[Tensor, " position"], answer: Bool[Tensor, " position"]
) -> pd.DataFrame:
    """The sums of `measure_errors` by bin of positions. All are 0 where the two are equal, but `norm2`,
    `tokens`, `loss` and `loss_exact`.

    Args:
        answer: positions whose next token is part of the answer.
    """
    a, b = exact.logits, found.logits
    error2, norm2 = (a - b).double().square().sum(-1), a.double().square().sum(-1)
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    targets = tokens.roll(-1)
    columns = {
        "error2": error2,
        "norm2": norm2,
        "relative": (error2 / norm2).sqrt(),
        "state": relative_change(exact.states, found.states).mean(0),
        "argmax": a.argmax(-1) != b.argmax(-1),
        "kl": (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0),
        "tokens": answer,
        "loss": cross_entropy(b, targets, reduction="none") * answer,
        "loss_exact": cross_entropy(a, targets, reduction="none") * answer,
    }
    bins = position_bins(len(tokens))
    sums = {name: np.bincount(bins, value.double().cpu().numpy()) for name, value in columns.items()}
    return pd.DataFrame({"position": bin_starts(int(bins[-1]) + 1), "positions": np.bincount(bins)} | sums)


def position_bins(positions: int) -> np.ndarray:
    """Bin of every position, int [position]: 0 | 1 | 2, 3 | 4 to 7 | 8 to 15 | ..."""
    return np.frexp(np.arange(positions))[1]


def bin_starts(bins: int) -> np.ndarray:
    """First position of every bin of `position_bins`, int [bin]: 0, 1, 2, 4, 8, ..."""
    return np.append(0, 2 ** np.arange(bins - 1))


@torch.no_grad()
def _solutions(
    model: Recurrence, tokens: Tensor, schedules: Sequence[Schedule], reference: Reference
) -> Iterator[tuple[dict[str, Any], Outputs]]:
    if reference == "sequential":
        yield {"method": "layerwise", "groups": 0, "sweeps": 0}, exact_outputs(model, tokens, "layerwise")
    for schedule in schedules:
        stream = model.new_stream(_no_pad(tokens), tokens.shape[1])
        solution = solve_by_sweeps(model, stream, tokens, groups=schedule.groups, sweeps=schedule.sweeps)
        assert solution.resid_post is not None
        about = {"method": "sweeps", "groups": schedule.groups, "sweeps": schedule.sweeps}
        yield about, _outputs(model, solution.resid_post[:, :, :, 0])


def _no_pad(tokens: Tensor) -> Tensor:
    return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)


def _outputs(model: Recurrence, states: Float[Tensor, "layer row position d_model"]) -> Outputs:
    wide = torch.promote_types(states.dtype, torch.float32)
    return Outputs(model.backbone.unembed(states[-1, 0]).to(wide), states[:, 0])
