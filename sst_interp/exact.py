"""The exact states of all positions at once, by the solver that suits the kind of stream.

Layer by layer where a layer reads no state but its own (`layerwise`), else by sweeps over the whole stack.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sst_interp.certificate import Solution
from sst_interp.layerwise import solve_layerwise
from sst_interp.stream import Recurrence, Stream
from sst_interp.sweeps import solve_by_sweeps


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
    """States of `tokens` to the dtype's tolerance; the arguments are those of both solvers."""
    solve = solve_layerwise if model.kind.layer_by_layer else solve_by_sweeps
    return solve(model, stream, tokens, iterations=iterations, tolerance=tolerance, keep=keep, check=check)
