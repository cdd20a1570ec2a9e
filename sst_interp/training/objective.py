"""The training objective: states by the recipe's method, then the loss on the answer's tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.sequential import advance
from sst_interp.stream import Recurrence, stack_pass
from sst_interp.sweeps import solve_by_sweeps
from sst_interp.training.batches import Batch
from sst_interp.training.recipe import Method

ROUND = 128


def last_layer(
    model: Recurrence, batch: Batch, method: Method, sweeps: int = 1, groups: int = 1
) -> Float[Tensor, "row position d_model"]:
    """The last layer's outputs, differentiable through every pass.

    Args:
        method: `two_pass` (a blend-off pass and `sweeps` sweeps over `groups` groups: arXiv 2605.00206,
            training), `exact` (token by token) or `none` (the backbone alone).
    """
    tokens = batch.tokens
    rows, T = tokens.shape
    stream = model.new_stream(torch.zeros(rows, dtype=torch.long, device=tokens.device), T)
    if method == "none":
        columns = torch.arange(T, device=tokens.device)
        return stack_pass(model, stream, tokens, columns, None, None, "write")[0][-1]
    if method == "exact":
        steps = [advance(model, stream, tokens[:, t], 1)[0].resid_post[-1] for t in range(T)]
        return torch.stack(steps, dim=1)
    return solve_by_sweeps(model, stream, tokens, sweeps=sweeps, groups=groups, keep=False).last[:, :, 0]


def answer_loss(model: Recurrence, batch: Batch, last: Float[Tensor, "row position d_model"]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, nats per token, in fp32 or wider."""
    return answer_token_losses(model, batch, last).mean()


def answer_token_losses(
    model: Recurrence, batch: Batch, last: Float[Tensor, "row position d_model"]
) -> Float[Tensor, " token"]:
    """Cross-entropy of every answer token in nats, row by row, in fp32 or wider."""
    row, position = batch.answer.nonzero().unbind(1)
    targets = batch.tokens.roll(-1, dims=1)[row, position]
    # A round number of positions: CPU kernels of the unembedding are compiled per shape.
    rounded = torch.arange(-(-len(row) // ROUND) * ROUND, device=row.device).clamp(max=len(row) - 1)
    logits = model.backbone.unembed(last[row[rounded], position[rounded]])[: len(row)]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), targets, reduction="none")
