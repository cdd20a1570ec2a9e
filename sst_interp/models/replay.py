"""Replaying given tokens: every layer output and logit, sequentially or all positions at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.choices import MAX_DEPTH, shown, whole
from sst_interp.models.generation import check_iterations
from sst_interp.models.solvers.sequential import solve_sequentially
from sst_interp.models.solvers.solution import Certificate, check_tolerance, picks
from sst_interp.models.solvers.solve import prefill, solve_exactly, spot_check
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.models.stream import Recurrence


@dataclass
class Replay:
    """What a model does on given tokens. Positions are token indices; rows shorter than the longest end in
    zeros (`lengths` says where).
    """

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
    stream = model.new_stream(pad, tokens.shape[1])
    if start:
        prefill(model, stream, tokens[:, :start])
        tokens = tokens[:, start:]
    if method == "sequential":
        solution = solve_sequentially(model, stream, tokens, iterations)
        certificate = solution.certificate
    else:
        how: dict[str, Any] = {"iterations": iterations, "tolerance": tolerance}
        how["check"] = picks(tokens.shape[1], check)
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
