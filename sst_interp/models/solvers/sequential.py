"""Sequential evaluation: the definition. One position at a time, each iterated to its depth.

Generation runs on it; the parallel solvers are tested against it and recheck some of their positions with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.models.cache import put
from sst_interp.models.hooks import Visit, unhooked
from sst_interp.models.solvers.solution import Certificate, Solution
from sst_interp.models.stream import Recurrence, Stream, stack_pass


class Iteration(NamedTuple):
    """One run of the layer stack at one position."""

    number: int
    """1-based iteration."""
    resid_post: Float[Tensor, "layer row d_model"]
    """Each layer's output, for the rows that are still iterating: the first n of the batch."""


def advance(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, " row"],
    depths: int | Int[Tensor, " row"],
    hook: Callable[[int], Visit] | None = None,
) -> list[Iteration]:
    """Read one token per row, iterating row `r` `depths[r]` times; the stream moves on by one column.

    Args:
        tokens: the token at column `stream.column` of every row.
        depths: iterations per row, >= 1 and in descending order, so that the rows still iterating are
            always the first n of the batch and no row is copied.
        hook: iteration -> what its pass asks (`sst_interp.models.hooks`).

    While gradients are enabled nothing is written in place: the result can be differentiated through every
    earlier position (exact back-propagation through time).

    Returns:
        The iterations 1 to max(depths), each with the rows that took part in it.
    """
    rows, column = stream.rows, stream.column
    per_row = torch.full((rows,), depths) if isinstance(depths, int) else depths.cpu()
    columns = torch.tensor([column], device=tokens.device)
    iterations = []
    for number in range(1, int(per_row[0]) + 1):
        n = int((per_row >= number).sum())
        has_state = model.kind.has_state(column, stream.origin[:n], number)
        resid_post, carried = stack_pass(
            model,
            stream,
            tokens[:n, None],
            columns,
            stream.state[:, :n, None],
            None if bool(has_state.all()) else has_state[:, None],
            "write" if number == 1 or model.choices.kv == "last" else "read",
            unhooked if hook is None else hook(number),
            number,
        )
        stream.state = put(stream.state, slice(0, n), carried[:, :, 0], dim=1)
        iterations.append(Iteration(number, resid_post[:, :, 0]))
    stream.column += 1
    return iterations


def solve_sequentially(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, "row position"],
    iterations: int = 1,
    keep: bool = True,
    check: list[int] | None = None,
) -> Solution:
    """The definition, position by position, in the form of a solution."""
    outputs, incoming = [], {}
    for t in range(tokens.shape[1]):
        if t in (check or []):
            incoming[t] = stream.state.clone()
        steps = advance(model, stream, tokens[:, t], iterations)
        outputs.append(torch.stack([s.resid_post if keep else s.resid_post[-1:] for s in steps], dim=2))
    resid_post = torch.stack(outputs, dim=2)
    return Solution(resid_post if keep else None, resid_post[-1], incoming, Certificate("sequential"))
