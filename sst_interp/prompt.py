"""Reading a prompt: one iteration per token, as `choices.prompt` says."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from sst_interp.certificate import Certificate, picks, spot_check
from sst_interp.exact import solve_exactly
from sst_interp.stream import Recurrence, Stream, stack_pass
from sst_interp.sweeps import solve_by_sweeps


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
