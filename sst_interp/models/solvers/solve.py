"""The exact states of given tokens, by the solver that suits the kind of stream and is the fastest there.

Layer by layer where a layer reads no state but its own (`layerwise`). Else by sweeps over the whole stack, as
long as these converge in few: a sweep is a pass over all positions, and one that mends few of them costs more
than visiting each position once, as the definition does.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from jaxtyping import Int
from torch import Tensor

from sst_interp.models.solvers.layerwise import solve_layerwise
from sst_interp.models.solvers.sequential import advance, solve_sequentially
from sst_interp.models.solvers.solution import Certificate, Solution, check_tolerance, picks
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.models.stream import Recurrence, Stream, stack_pass

FEW = 8
"""Sweeps that are always worth trying."""
SHARE = 8
"""... and of longer texts, one for so many positions. (On two cores a pass over 128 positions takes about as
long as ten positions one by one.)"""


@torch.no_grad()
def solve_exactly(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, "row position"],
    *,
    iterations: int = 1,
    tolerance: float | None = None,
    keep: bool = True,
    check: list[int] | None = None,
) -> Solution:
    """States of `tokens` to the dtype's tolerance; the arguments are those of both solvers.

    Raises:
        SSTError: a tolerance that is no number from 0 and below 1, or states that overflow.
    """
    tolerance = check_tolerance(tolerance)
    if model.kind.layer_by_layer:
        with model.backbone.naming_weights():
            return solve_layerwise(
                model, stream, tokens, iterations=iterations, tolerance=tolerance, keep=keep, check=check
            )
    trial = stream.repeat(1)
    with model.backbone.naming_weights():
        solution = solve_by_sweeps(
            model, trial, tokens, iterations=iterations, tolerance=tolerance,
            most=max(FEW, tokens.shape[1] // SHARE), keep=keep, check=check,
        )  # fmt: skip
    if not solution.certificate.converged:
        return solve_sequentially(model, stream, tokens, iterations, keep, check)
    for field in fields(Stream):
        setattr(stream, field.name, getattr(trial, field.name))
    return solution


@torch.no_grad()
def prefill(model: Recurrence, stream: Stream, tokens: Int[Tensor, "row position"]) -> Certificate:
    """Read a prompt, or a further piece of one; the stream then stands behind it.

    `exact` is solved to the dtype's tolerance, and two positions are rechecked one by one.
    `two_pass` is one sweep. `blend_off` leaves the stream empty: the recurrence starts at the next token.
    """
    how = model.choices.prompt
    if tokens.shape[1] == 0:
        return Certificate("sequential" if how == "exact" else how)
    if how == "blend_off":
        columns = torch.arange(tokens.shape[1], device=tokens.device) + stream.column
        stack_pass(model, stream, tokens, columns, None, None, "write")
        stream.column += tokens.shape[1]
        stream.origin = torch.full_like(stream.origin, stream.column)
        return Certificate("blend_off")
    if how == "two_pass":
        solution = solve_by_sweeps(model, stream, tokens, sweeps=1, keep=False)
        return replace(solution.certificate, method="two_pass")
    solution = solve_exactly(model, stream, tokens, keep=False, check=picks(tokens.shape[1], 2))
    return spot_check(model, stream, tokens, solution)


@torch.no_grad()
def spot_check(
    model: Recurrence, stream: Stream, tokens: Tensor, solution: Solution, iterations: int = 1
) -> Certificate:
    """The certificate with the positions in `solution.incoming` recomputed by `sequential.advance`, each from
    the solution's state and keys before it. The stream is left as it was.

    Args:
        stream: as the solver left it, standing behind `tokens`.
    """
    T = tokens.shape[1]
    base = stream.column - T
    agree, total, worst = 0, 0, 0.0
    for t, state in solution.incoming.items():
        rows = (base + t >= stream.pad).nonzero()[:, 0]
        if not len(rows):
            continue
        saved = stream.kv.save_column(base + t)
        probe = Stream(stream.kv, state.clone(), stream.pad, stream.origin, base + t)
        last = advance(model, probe, tokens[:, t], iterations)[-1].resid_post[-1]
        stream.kv.restore_column(base + t, saved)
        alone = model.backbone.unembed(last[rows]).float()
        together = model.backbone.unembed(solution.last[rows, t, -1]).float()
        agree += int((alone.argmax(-1) == together.argmax(-1)).sum())
        total += len(rows)
        worst = max(worst, float(((alone - together).norm(dim=-1) / alone.norm(dim=-1)).max()))
    return replace(
        solution.certificate,
        checked=total,
        argmax_agreement=agree / total if total else float("nan"),
        logit_error=worst if total else float("nan"),
    )
