"""The exact states of given tokens, by the solver that suits the kind of stream and is the fastest there.

Layer by layer where a layer reads no state but its own (`layerwise`). Else by sweeps over the whole stack, as
long as these converge in few: a sweep is a pass over all positions, and one that mends few of them costs more
than visiting each position once, as the definition does.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from jaxtyping import Int
from torch import Tensor

from sst_interp.certificate import Certificate, Solution, check_tolerance
from sst_interp.layerwise import solve_layerwise
from sst_interp.sequential import advance
from sst_interp.stream import Recurrence, Stream
from sst_interp.sweeps import solve_by_sweeps

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
