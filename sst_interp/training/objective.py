"""The training objective: states by the recipe's method, then the loss on the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.errors import SSTError
from sst_interp.implicit import Solver
from sst_interp.stream import Recurrence
from sst_interp.training.batches import Batch
from sst_interp.training.recipe import Method, TrainingRecipe
from sst_interp.training.schedules import Pass, newest, run_passes

ROUND = 128


def last_layer(
    model: Recurrence, batch: Batch, method: Method, sweeps: int = 1, groups: int = 1, chunk: int = 1
) -> Float[Tensor, "row position d_model"]:
    """The last layer's outputs after all passes of a schedule (`training.schedules`), differentiable through
    every pass.

    Args:
        method: for example `two_pass` (a blend-off pass and `sweeps` sweeps over `groups` groups: arXiv
            2605.00206, training), `exact` (solved layer by layer), `sequential` (token by token) or `none`
            (the backbone alone).
    """
    passes = run_passes(model, batch.tokens, method, sweeps, groups, chunk)
    return passes[-1].last if len(passes[-1].at) == batch.tokens.shape[1] else newest(passes)


def training_loss(
    model: Recurrence, batch: Batch, recipe: TrainingRecipe, step: int = 0, solver: Solver | None = None
) -> Tensor:
    """The loss that a recipe minimises, nats per token.

    That of the answers' tokens after all passes; with `interleaved` and `multi_refine`, the mean over all
    passes (weighted by `recipe.loss_weights`), each taken where the pass computed anything.

    Args:
        step: number of the step, from 0; it decides the depth that the recipe draws.
        solver: of `exact`. It keeps the residuals (those of the gradient after the backward pass); None
            takes the recipe's.
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
    """Weighted mean of the passes' losses. A pass that computed no answer's token is left out.

    Args:
        weights: one per pass, the first one (without states) included; none for equal weights.

    Raises:
        SSTError: another number of weights than passes.
    """
    if weights and len(weights) != len(passes):
        raise SSTError(f"{len(weights)} loss weights for {len(passes)} passes", "give one per pass")
    losses, counted = [], []
    for weight, found in zip(weights or [1.0] * len(passes), passes, strict=True):
        if weight and bool(batch.answer[:, found.at].any()):
            losses.append(weight * _losses(model, batch, found).mean())
            counted.append(weight)
    if not losses:
        raise SSTError("no pass with a weight computed a token of an answer", "weigh the last pass")
    return torch.stack(losses).sum() / sum(counted)


def answer_loss(model: Recurrence, batch: Batch, last: Float[Tensor, "row position d_model"]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, nats per token, in fp32 or wider."""
    return answer_token_losses(model, batch, last).mean()


def answer_token_losses(
    model: Recurrence, batch: Batch, last: Float[Tensor, "row position d_model"]
) -> Float[Tensor, " token"]:
    """Cross-entropy of every answer token in nats, row by row, in fp32 or wider."""
    return _losses(model, batch, Pass(torch.arange(batch.tokens.shape[1], device=last.device), last))


def _losses(model: Recurrence, batch: Batch, found: Pass) -> Float[Tensor, " token"]:
    """The same at the positions of one pass."""
    last = found.last
    row, position = batch.answer[:, found.at].nonzero().unbind(1)
    targets = batch.tokens.roll(-1, dims=1)[row, found.at[position]]
    # A round number of positions: CPU kernels of the unembedding are compiled per shape.
    rounded = torch.arange(-(-len(row) // ROUND) * ROUND, device=row.device).clamp(max=len(row) - 1)
    logits = model.backbone.unembed(last[row[rounded], position[rounded]])[: len(row)]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), targets, reduction="none")
