"""How fast sweeps find the states of a model: the residual after every sweep, on text that it is asked.

A sweep is a parallel pass over all positions and iterations (`sst_interp.sweeps`). Where every sweep shrinks
the residual by a factor below 1, all positions converge together; else one more position is exact after each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch

from sst_interp.certificate import TOLERANCE
from sst_interp.model import StateStreamModel
from sst_interp.sweeps import solve_by_sweeps

COLUMNS = ["text", "tokens", "depth", "sweep", "residual", "settled"]
SWEEPS = 12
"""At most so many: far fewer than positions, by when everything is exact whatever the factor."""
TOKENS = 48
"""Of each text, from its start."""


@torch.no_grad()
def sweep_residuals(
    model: StateStreamModel,
    texts: Sequence[Sequence[int]],
    depths: Sequence[int] = (1, 4),
    each: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """A row per text, depth and sweep: the largest relative change of a carried state in that sweep.

    Args:
        model: in float32 or wider: bf16 states do not settle far enough to see a factor.
        texts: token ids; the first `TOKENS` of each are read, alone.
        depths: of every position.
        each: called after each text and depth.

    Returns:
        Columns `COLUMNS`; text counts from 0, sweeps from 1. A text's rows end where it has settled (the
        residual is below the dtype's tolerance), or after `SWEEPS`.

    Raises:
        SSTError: the states overflow.
    """
    rows, tolerance = [], TOLERANCE[model.backbone.dtype]
    for number, text in enumerate(texts):
        tokens = torch.tensor([list(text)[:TOKENS]], device=model.backbone.device)
        for depth in depths:
            pad = torch.zeros(1, dtype=torch.long, device=tokens.device)
            stream = model.new_stream(pad, tokens.shape[1])
            found = solve_by_sweeps(model, stream, tokens, iterations=depth, sweeps=SWEEPS, keep=False)
            for sweep, residual in enumerate(found.certificate.residuals, 1):
                settled = residual < tolerance
                rows.append((number, tokens.shape[1], depth, sweep, residual, settled))
                if settled:
                    break
            if each is not None:
                each()
    return pd.DataFrame(rows, columns=COLUMNS)
