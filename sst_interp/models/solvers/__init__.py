"""The states of given tokens: the exact solver of each kind, reading a prompt, replay with a certificate.

Exact states are solved layer by layer where a layer reads no state but its own (`layerwise`). Else they are
solved by sweeps over the whole stack, if these converge in few: a sweep is a pass over all positions, and one
that mends few of them costs more than visiting each position once, as the definition (`sequential`) does.
Where every iteration keeps its own keys and values, one pass per iteration over all positions is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.choices import MAX_DEPTH, check_iterations, shown, whole
from sst_interp.models.solvers.layerwise import solve_layerwise
from sst_interp.models.solvers.sequential import (
    Certificate,
    Solution,
    advance,
    check_tolerance,
    solve_sequentially,
)
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.models.stream import Recurrence, Stream, stack_pass

FEW = 8
"""Sweeps that are always worth trying."""
SHARE = 8
"""Positions of a longer text per sweep that is worth trying. (On two cores a pass over 128 positions takes
about as long as ten positions one by one.)"""


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
    """States of `tokens` to the dtype's tolerance; the arguments are those of `solve_layerwise`.

    Raises:
        SSTError: a tolerance that is no number from 0 and below 1, or states that overflow.
    """
    how: dict[str, Any] = {"iterations": iterations, "keep": keep, "check": check}
    tolerance = check_tolerance(tolerance)
    if model.kind.layer_by_layer:
        with model.backbone.naming_weights():
            return solve_layerwise(model, stream, tokens, tolerance=tolerance, **how)
    if model.choices.kv == "each":  # nothing crosses positions but entries of the same iteration
        with model.backbone.naming_weights():
            solution = solve_by_sweeps(model, stream, tokens, sweeps=1, **how)
        done = replace(solution.certificate, method="iteration by iteration", converged=True, residual=0.0)
        return replace(solution, certificate=replace(done, residuals=()))
    trial, most = stream.repeat(1), max(FEW, tokens.shape[1] // SHARE)
    with model.backbone.naming_weights():
        solution = solve_by_sweeps(model, trial, tokens, tolerance=tolerance, most=most, **how)
    if not solution.certificate.converged:
        return solve_sequentially(model, stream, tokens, **how)
    for field in fields(Stream):
        setattr(stream, field.name, getattr(trial, field.name))
    return solution


@torch.no_grad()
def prefill(model: Recurrence, stream: Stream, tokens: Int[Tensor, "row position"]) -> Certificate:
    """Read a prompt, or a further piece of one, as `choices.prompt` says; the stream then stands behind it.

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
    solution = solve_exactly(model, stream, tokens, keep=False, check=_spread(tokens.shape[1], 2))
    return spot_check(model, stream, tokens, solution)


@torch.no_grad()
def spot_check(
    model: Recurrence, stream: Stream, tokens: Tensor, solution: Solution, iterations: int = 1
) -> Certificate:
    """The certificate after positions in `solution.incoming` were recomputed by `advance`.

    Each is recomputed from the solution's own state and keys before it: a local check, which together with
    the observed contraction bounds the distance to a sequential run. The stream stands behind `tokens` and
    stays as it was.
    """
    start = stream.column - tokens.shape[1]
    agree, total, worst = 0, 0, 0.0
    for t, state in solution.incoming.items():
        rows = (start + t >= stream.pad).nonzero()[:, 0]
        if not len(rows):
            continue
        saved = stream.kv.save_column(start + t)
        before = Stream(stream.kv, state.clone(), stream.pad, stream.origin, start + t)
        last = advance(model, before, tokens[:, t], iterations)[-1].resid_post[-1]
        stream.kv.restore_column(start + t, saved)
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


def _spread(positions: int, n: int) -> list[int]:
    """`n` evenly spread positions, the first and the last among them."""
    return torch.linspace(0, positions - 1, min(n, positions)).round().long().unique().tolist() if n else []


def _of_positions(depth: Sequence[int], iterations: int, positions: int, pad: Tensor) -> list[int]:
    """The depth of each position; raises SSTError for depths that are not one per position."""
    if iterations != 1:
        raise SSTError("both iterations and depth were given", "leave one of them out")
    depths = check_iterations(depth, "depth")
    if len(depths) != positions:
        raise SSTError(f"{len(depths)} depths for {positions} positions", "give one per position")
    if bool(pad.any()):
        raise SSTError("a depth per position needs questions of equal length", "replay them one by one")
    return depths


@dataclass
class Replay:
    """States and logits of given tokens. Positions are token indices; shorter rows end in zeros."""

    logits: Float[Tensor, "question position iteration vocab"] | None
    resid_post: Float[Tensor, "question position layer iteration d_model"]
    certificate: Certificate
    lengths: Int[Tensor, " question"]
    """Tokens per question."""


@torch.no_grad()
def replay(
    model: Recurrence,
    tokens: Int[Tensor, "row column"],
    pad: Int[Tensor, " row"],
    iterations: int,
    method: Literal["parallel", "sequential"],
    *,
    start: int,
    groups: int | None,
    sweeps: int | None,
    tolerance: float | None,
    logits: bool,
    check: int,
    depth: Sequence[int] | None = None,
) -> Replay:
    """Replay a left-padded batch; the arguments are those of `StateStreamModel.replay`."""
    (iterations,) = check_iterations([iterations])
    tolerance = check_tolerance(tolerance)
    start, check = whole("start", start, 0), whole("check", check, 0)
    most = max(tokens.shape[1], MAX_DEPTH)  # as many sweeps as positions make every position exact
    groups = groups if groups is None else whole("groups", groups, 1)
    sweeps = sweeps if sweeps is None else whole("sweeps", sweeps, 1, most)
    if method not in ("parallel", "sequential"):
        raise SSTError(f"unknown method {shown(method)}", "use 'parallel' or 'sequential'")
    if start >= tokens.shape[1]:
        raise SSTError(f"start = {start} is not a position of {tokens.shape[1]} tokens", "count from 0")
    if start and bool(pad.any()):
        raise SSTError("start needs questions of equal length", "replay them one by one")
    mixed = None if depth is None else _of_positions(depth, iterations, tokens.shape[1] - start, pad)
    stream = model.new_stream(pad, tokens.shape[1])
    if start:
        prefill(model, stream, tokens[:, :start])
        tokens = tokens[:, start:]
    if method == "sequential" or mixed is not None:
        solution = solve_sequentially(model, stream, tokens, iterations if mixed is None else mixed)
        certificate = solution.certificate
    else:
        how: dict[str, Any] = {"iterations": iterations, "tolerance": tolerance}
        how["check"] = _spread(tokens.shape[1], check)
        if groups is None and sweeps is None:
            solution = solve_exactly(model, stream, tokens, **how)
        else:
            with model.backbone.naming_weights():
                solution = solve_by_sweeps(model, stream, tokens, groups=groups or 1, sweeps=sweeps, **how)
        certificate = spot_check(model, stream, tokens, solution, iterations)
    model.backbone.refuse_nonfinite(solution.last)
    resid_post = solution.resid_post
    assert resid_post is not None
    # [layer, question, column, iteration, d] -> [question, position, layer, iteration, d], left-aligned
    resid_post = resid_post.permute(1, 2, 0, 3, 4)
    lengths = tokens.shape[1] - pad
    if bool(pad.any()):
        aligned = torch.zeros_like(resid_post)
        for row, (p, n) in enumerate(zip(pad.tolist(), lengths.tolist(), strict=True)):
            aligned[row, :n] = resid_post[row, p:]
        resid_post = aligned
    out = model.backbone.unembed(resid_post[:, :, -1]) if logits else None
    if out is not None and bool(pad.any()):
        past_end = torch.arange(out.shape[1], device=out.device)[None] >= lengths[:, None]
        out = out.masked_fill(past_end[..., None, None], 0)
    return Replay(out, resid_post, certificate, lengths)
