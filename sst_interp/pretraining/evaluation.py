"""Held-out losses of a decoder with a latent memory, under the definition and under two other readings.

| evaluated | states |
| --- | --- |
| `sequential` | the definition: token by token, every position reads what the one before handed on |
| `zero memory` | the same weights with a memory of zeros everywhere: what public code scores by mistake |
| `own` | as training computes them: after the passes of the schedule |

Without a memory all three are one parallel pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.pretraining.arms import Arm
from sst_interp.stream import Recurrence
from sst_interp.training.batches import Batch
from sst_interp.training.objective import last_layer
from sst_interp.training.recipe import Method

SEQUENTIAL, ZERO, OWN = "sequential", "zero memory", "own"
ROWS = 64
"""Sequences that are read at once."""


def evaluations(arm: Arm) -> dict[str, Method]:
    """Evaluated -> schedule, for one arm."""
    if arm.pathway is None:
        return {SEQUENTIAL: "none"}
    return {SEQUENTIAL: "sequential", ZERO: "none", OWN: arm.method}


@torch.no_grad()
def score(
    model: Recurrence, batch: Batch, method: Method, groups: int = 1
) -> tuple[Float[Tensor, "row next"], Float[Tensor, "row next"]]:
    """(nats, right) of every next token: its cross-entropy, and 1 where it is the most likely one.

    Columns are the positions that predict, 0 to T - 2; those that `batch.answer` leaves out are NaN.

    Args:
        method: how states are computed (`training.schedules`).
        groups: of `interleaved`.
    """
    nats, right = [], []
    for rows in torch.arange(len(batch.tokens)).split(ROWS):
        part = Batch(batch.tokens[rows], batch.answer[rows])
        logits = model.backbone.unembed(last_layer(model, part, method, 1, groups)[:, :-1]).float()
        targets, unasked = part.tokens[:, 1:], ~part.answer[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        nats.append(losses.masked_fill(unasked, torch.nan))
        right.append((logits.argmax(-1) == targets).float().masked_fill(unasked, torch.nan))
    return torch.cat(nats), torch.cat(right)
