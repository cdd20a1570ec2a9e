"""The schedules of training: which positions a pass computes, and with which states.

| method | passes | states |
| --- | --- | --- |
| `none` | 1 | none: the backbone (or a memory of zeros) |
| `two_pass` | 1 + `sweeps` | all positions, those of the pass before (in `groups` turns); loss on the last |
| `multi_refine` | 1 + `sweeps` | the same without groups; loss on every pass, weighted |
| `interleaved` | 1 + `groups` | positions p mod `groups` in turn, the newest; loss on every pass |
| `chunked` | T / `chunk` | handed on from the last position of a chunk to the first of the next, no others |
| `exact` | 1 | those that sequential evaluation has, solved layer by layer (`implicit`) |
| `sequential` | T | one position at a time: the definition |

Keys, values and states are shared by all passes of a schedule and are not detached: gradients flow through
every pass (arXiv 2605.26797).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.implicit import Solver, exact_states
from sst_interp.sequential import advance
from sst_interp.stream import Recurrence, Stream, stack_pass
from sst_interp.sweeps import solve_by_sweeps
from sst_interp.training.recipe import Method


class Pass(NamedTuple):
    """What one pass computed."""

    at: Int[Tensor, " position"]
    """The positions that it computed."""
    last: Float[Tensor, "row at d_model"]
    """The last layer's outputs there."""


def run_passes(
    model: Recurrence,
    tokens: Int[Tensor, "row position"],
    method: Method,
    sweeps: int = 1,
    groups: int = 1,
    chunk: int = 1,
    *,
    iterations: int = 1,
    solver: Solver | None = None,
    until: Int[Tensor, " row"] | None = None,
) -> list[Pass]:
    """Every pass of a schedule, in order; a position's newest output is in the last pass that computed it.

    Args:
        sweeps: of `two_pass` and `multi_refine`.
        groups: of `two_pass` and `interleaved`.
        chunk: positions per chunk of `chunked`.
        iterations: depth of every position (`exact`, `sequential`).
        solver, until: see `implicit.exact_states` (`exact`).

    Raises:
        SSTError: more interleaved groups than positions; `exact` with another kind of stream than an SST.
    """
    rows, T = tokens.shape
    stream = model.new_stream(torch.zeros(rows, dtype=torch.long, device=tokens.device), T)
    everywhere = torch.arange(T, device=tokens.device)
    if method == "none":
        return [Pass(everywhere, stack_pass(model, stream, tokens, everywhere, None, None, "write")[0][-1])]
    if method == "exact":
        last = exact_states(model, tokens, solver or Solver(), iterations=iterations, until=until)
        return [Pass(everywhere, last)]
    if method == "sequential":
        steps = [advance(model, stream, tokens[:, t], iterations)[-1].resid_post[-1] for t in range(T)]
        return [Pass(everywhere, torch.stack(steps, dim=1))]
    if method == "chunked":
        return [_chunk(model, stream, tokens[:, at], at) for at in everywhere.split(chunk)]
    if method == "interleaved" and groups > T:
        raise SSTError(
            f"{groups} interleaved groups are more than the {T} positions of a sequence",
            f"groups = {T} already computes one position after the other",
        )
    passes: list[Pass] = []
    solve_by_sweeps(
        model,
        stream,
        tokens,
        sweeps=1 if method == "interleaved" else sweeps,
        groups=1 if method == "multi_refine" else groups,
        keep=False,
        watch=lambda at, last: passes.append(Pass(at, last)),
    )
    return passes


def newest(passes: list[Pass]) -> Float[Tensor, "row position d_model"]:
    """The last layer's outputs after all passes."""
    at = torch.cat([p.at for p in passes])
    last = torch.cat([p.last for p in passes], dim=1)
    latest = torch.empty(int(at.max()) + 1, dtype=torch.long, device=at.device)
    for k, t in enumerate(at.tolist()):
        latest[t] = k
    return last[:, latest]


def _chunk(model: Recurrence, stream: Stream, tokens: Tensor, columns: Tensor) -> Pass:
    """One chunk in one pass: its first position reads what the chunk before handed on."""
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[:, 0] = stream.column > 0
    state = stream.state[:, :, None].expand(-1, -1, len(columns), -1)
    resid_post, carried = stack_pass(model, stream, tokens, columns, state, first, "write")
    stream.state, stream.column = carried[:, :, -1], int(columns[-1]) + 1
    return Pass(columns, resid_post[-1])
