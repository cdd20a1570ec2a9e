"""The logit lens: which tokens a layer's output would lead to if it were the last layer's.

It is the final norm and the unembedding on a layer's `resid_post` (`Backbone.unembed`), and dear: for a small
model one unembedding per layer costs more than the pass that it looks into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.lanes import Cell

LENS_TOP = 5
"""How many leading tokens of every layer a run records."""
ROWS_AT_ONCE = 256
"""States unembedded in one product: enough to be fast, few enough for a large vocabulary."""


def lens_tops(
    unembed: Callable[[Tensor], Tensor],
    states: Mapping[Cell, Float[Tensor, "layer question d_model"]],
    k: int,
) -> dict[Cell, Int[Tensor, "layer question k"]]:
    """The `k` most likely tokens of every state, most likely first (all, if the vocabulary is smaller).

    Args:
        unembed: [..., d_model] to logits [..., vocab].
        states: layer outputs by cell. Where two are bit-identical, as iteration i of every depth is at
            position 0, the first is unembedded for both.
    """
    different: dict[Cell, Tensor] = {}
    same_as: dict[Cell, Cell] = {}
    for cell, state in states.items():
        same_as[cell] = next((c for c, s in different.items() if torch.equal(s, state)), cell)
        different.setdefault(same_as[cell], state)
    rows = torch.cat(list(different.values()), 1)
    step = max(1, ROWS_AT_ONCE // rows.shape[1])
    tops = [_top(unembed(layers), k) for layers in rows.split(step)]
    found = torch.cat(tops).chunk(len(different), 1)
    by_cell = dict(zip(different, found, strict=True))
    return {cell: by_cell[same] for cell, same in same_as.items()}


def _top(logits: Tensor, k: int) -> Tensor:
    return logits.topk(min(k, logits.shape[-1])).indices
