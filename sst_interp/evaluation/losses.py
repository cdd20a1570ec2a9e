"""Language-model loss by iteration depth: of given answers, solved exactly or as it was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from sst_interp.choices import whole
from sst_interp.exact import solve_exactly
from sst_interp.generation import check_iterations
from sst_interp.model import StateStreamModel
from sst_interp.sweeps import solve_by_sweeps
from sst_interp.training.batches import make_batch
from sst_interp.training.examples import Example
from sst_interp.training.objective import answer_token_losses


@torch.no_grad()
def answer_losses(
    model: StateStreamModel,
    examples: Sequence[Example],
    batch_size: int = 8,
    iterations: int = 1,
    sweeps: int | None = None,
    groups: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Cross-entropy of every example's answer.

    Args:
        model: with a stream; a blend of zero is the plain backbone.
        examples: conversations with an answer.
        batch_size: examples per pass. They are batched by length.
        iterations: depth of every position, the prompt's too.
        sweeps: None solves the states exactly; a number takes that many sweeps over `groups` groups
            (1 and 1: the paper's two-pass training).
        groups: see `sweeps.solve_by_sweeps`.
        progress: called with the number of examples done.

    Returns:
        A row per example in the order given: id, tokens (of the answer), loss (summed, nats).
    """
    (iterations,) = check_iterations([iterations])
    batch_size = whole("batch_size", batch_size, 1)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    rows: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = make_batch([examples[i] for i in chosen]).to(model.backbone.device)
        tokens, device = batch.tokens, batch.tokens.device
        stream = model.new_stream(torch.zeros(len(chosen), dtype=torch.long, device=device), tokens.shape[1])
        if sweeps is None:
            solution = solve_exactly(model, stream, tokens, iterations=iterations, keep=False)
        else:
            solution = solve_by_sweeps(
                model, stream, tokens, iterations=iterations, sweeps=sweeps, groups=groups, keep=False
            )
        losses = answer_token_losses(model, batch, solution.last[:, :, -1])
        summed = losses.new_zeros(len(chosen)).index_add_(0, batch.answer.nonzero()[:, 0], losses)
        for i, loss, count in zip(chosen, summed.tolist(), batch.answer.sum(1).tolist(), strict=True):
            rows[i] = {"id": examples[i].id, "tokens": count, "loss": loss}
        if progress is not None:
            progress(start + len(chosen))
    return pd.DataFrame([rows[i] for i in range(len(examples))])
