"""The training objective: states by the recipe's method, then the loss on the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.errors import SSTError
from sst_interp.models.solvers.fixed_point import fixed_point_states
from sst_interp.models.solvers.implicit import Solver, exact_states
from sst_interp.models.solvers.sequential import advance
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.models.stream import Recurrence, Stream, stack_pass
from sst_interp.training.data import Batch
from sst_interp.training.recipe import Method, TrainingRecipe

ROUND = 128
"""Logits are computed for a multiple of this many positions: CPU kernels are compiled per shape."""


Looping = Literal["unrolled", "fixed_point"]
"""Methods of small looped models that are trained from scratch: so many iterations, each with keys and values
of its own; or the fixed point of the core (`solvers.fixed_point`)."""


class Pass(NamedTuple):
    """One pass over some positions."""

    at: Int[Tensor, " position"]
    """The positions that it computed."""
    last: Float[Tensor, "row at d_model"]
    """The last layer's outputs there."""


def last_layer(
    model: Recurrence, batch: Batch, method: Method | Looping, *how: Any
) -> Float[Tensor, "row position d_model"]:
    """The last layer's outputs after all passes of a method, differentiable through every pass.

    Args:
        how: the further arguments of `run_passes`.
    """
    passes = run_passes(model, batch.tokens, method, *how)
    return passes[-1].last if len(passes[-1].at) == batch.tokens.shape[1] else newest(passes)


def training_loss(
    model: Recurrence, batch: Batch, recipe: TrainingRecipe, step: int = 0, solver: Solver | None = None
) -> Tensor:
    """The loss that a recipe minimises on a batch, nats per answer token.

    `interleaved` and `multi_refine` take the mean over all passes, weighted by `recipe.loss_weights`. The
    other methods take the loss after the last pass.

    Args:
        step: number of the step, from 0. It decides the depth that the recipe draws.
        solver: of the method `exact`. It records the residuals, the gradient's in the backward pass. None
            makes one from the recipe.
    """
    how = (recipe.method, recipe.sweeps, recipe.groups, recipe.chunk)
    if recipe.method in ("interleaved", "multi_refine"):
        return mean_over_passes(model, batch, run_passes(model, batch.tokens, *how), recipe.loss_weights)
    if recipe.method in ("exact", "sequential"):
        columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        passes = run_passes(
            model, batch.tokens, *how, iterations=recipe.depth(step), solver=solver or recipe.solver(),
            until=(batch.answer * (columns + 1)).amax(1),
        )  # fmt: skip
        return answer_loss(model, batch, passes[0].last)
    return answer_loss(model, batch, last_layer(model, batch, *how))


def mean_over_passes(
    model: Recurrence, batch: Batch, passes: Sequence[Pass], weights: Sequence[float] = ()
) -> Tensor:
    """Weighted mean of the passes' losses. A pass that computed no answer token is left out.

    Args:
        weights: one per pass, the pass without states first; empty for equal weights.

    Raises:
        SSTError: another number of weights than passes.
    """
    if weights and len(weights) != len(passes):
        raise SSTError(f"{len(weights)} loss weights for {len(passes)} passes", "give one per pass")
    losses, counted = [], []
    for weight, done in zip(weights or [1.0] * len(passes), passes, strict=True):
        if weight and bool(batch.answer[:, done.at].any()):
            losses.append(weight * _losses(model, batch, done).mean())
            counted.append(weight)
    if not losses:
        raise SSTError("no pass with a weight computed an answer token", "give the last pass a weight")
    return torch.stack(losses).sum() / sum(counted)


def answer_loss(model: Recurrence, batch: Batch, last: Float[Tensor, "row position d_model"]) -> Tensor:
    """Mean cross-entropy of the answer tokens, nats per token, in fp32 or wider."""
    return answer_token_losses(model, batch, last).mean()


def answer_token_losses(
    model: Recurrence, batch: Batch, last: Float[Tensor, "row position d_model"]
) -> Float[Tensor, " token"]:
    """Cross-entropy of every answer token in nats, row by row, in fp32 or wider."""
    return _losses(model, batch, Pass(torch.arange(batch.tokens.shape[1], device=last.device), last))


def _losses(model: Recurrence, batch: Batch, done: Pass) -> Float[Tensor, " token"]:
    """The same at the positions of one pass."""
    at, last = done
    row, position = batch.answer[:, at].nonzero().unbind(1)
    targets = batch.tokens.roll(-1, dims=1)[row, at[position]]
    rounded = torch.arange(-(-len(row) // ROUND) * ROUND, device=row.device).clamp(max=len(row) - 1)
    logits = model.backbone.unembed(last[row[rounded], position[rounded]])[: len(row)]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), targets, reduction="none")


def run_passes(
    model: Recurrence,
    tokens: Int[Tensor, "row position"],
    method: Method | Looping,
    sweeps: int = 1,
    groups: int = 1,
    chunk: int = 1,
    iterations: int = 1,
    exact_sweeps: tuple[int, int] | None = None,
    *,
    solver: Solver | None = None,
    until: Int[Tensor, " row"] | None = None,
) -> list[Pass]:
    """Every pass of a method, in order. A position's newest output is in the last pass that computed it.

    Args:
        method, sweeps, groups, chunk, exact_sweeps: see `TrainingRecipe`.
        iterations: depth of every position (`exact`, `sequential`, `unrolled`).
        solver, until: see `implicit.exact_states` (`exact`, `fixed_point`).

    Raises:
        SSTError: more interleaved groups than positions; `exact` with another kind of stream than an SST.
    """
    rows, T = tokens.shape
    stream = model.new_stream(torch.zeros(rows, dtype=torch.long, device=tokens.device), T)
    everywhere, passes = torch.arange(T, device=tokens.device), list[Pass]()
    if method == "none":
        return [Pass(everywhere, stack_pass(model, stream, tokens, everywhere, None, None, "write")[0][-1])]
    if method == "unrolled":
        state = None
        for number in range(1, iterations + 1):
            outputs, state = stack_pass(
                model, stream, tokens, everywhere, state, None, "write", iteration=number
            )
            passes.append(Pass(everywhere, outputs[-1]))
        return passes
    if method == "fixed_point":
        solver = solver or Solver(sweeps=exact_sweeps)
        return [Pass(everywhere, fixed_point_states(model, tokens, solver)[0])]
    if method == "exact":
        solver = solver or Solver(sweeps=exact_sweeps)
        last = exact_states(model, tokens, solver, iterations=iterations, until=until)
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
    latest = at.new_zeros(int(at.max()) + 1).scatter_reduce(0, at, torch.arange(len(at)).to(at), "amax")
    return last[:, latest]


def _chunk(model: Recurrence, stream: Stream, tokens: Tensor, columns: Tensor) -> Pass:
    """One chunk in one pass. Its first position reads the last state of the chunk before."""
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[:, 0] = stream.column > 0
    state = stream.state[:, :, None].expand(-1, -1, len(columns), -1)
    resid_post, carried = stack_pass(model, stream, tokens, columns, state, first, "write")
    stream.state, stream.column = carried[:, :, -1], int(columns[-1]) + 1
    return Pass(columns, resid_post[-1])
