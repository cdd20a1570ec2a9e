"""Sequential evaluation: the definition. One position at a time, each iterated to its depth.

Generation runs on it, and the parallel solvers are tested against it. All solvers return a `Solution`, whose
`Certificate` says how far it can be from this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.cache import put
from sst_interp.models.choices import shown
from sst_interp.models.hooks import Visit, unhooked
from sst_interp.models.stream import Recurrence, Stream, access_of, stack_pass

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Default tolerance by dtype: relative change of a state in the last sweep, at the worst (row, layer,
position). A few units of the dtype's rounding, measured on SmolLM2 (docs/measurements.md)."""


class Iteration(NamedTuple):
    """One run of the layer stack at one position."""

    number: int
    """1-based iteration."""
    resid_post: Float[Tensor, "layer row d_model"]
    """Each layer's output, for the rows that are still iterating: the first n of the batch."""


def advance(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, " row"],
    depths: int | Int[Tensor, " row"],
    hook: Callable[[int], Visit] | None = None,
) -> list[Iteration]:
    """Read one token per row, iterating row `r` `depths[r]` times; the stream moves on by one column.

    While gradients are enabled nothing is written in place: the result can be differentiated through every
    earlier position (exact back-propagation through time).

    Args:
        tokens: the token at column `stream.column` of every row.
        depths: iterations per row, >= 1 and in descending order, so that the rows still iterating are
            always the first n of the batch and no row is copied.
        hook: iteration -> the `Visit` of its pass (`sst_interp.models.hooks`).

    Returns:
        The iterations 1 to max(depths), each with the rows that took part in it.
    """
    rows, column = stream.rows, stream.column
    per_row = torch.full((rows,), depths) if isinstance(depths, int) else depths.cpu()
    columns = torch.arange(column, column + 1, device=tokens.device)
    latest, iterations = torch.tensor(stream.latest), []
    for number in range(1, int(per_row[0]) + 1):
        n = int((per_row >= number).sum())
        has_state = model.kind.has_state(column, stream.origin[:n], number)
        resid_post, carried = stack_pass(
            model,
            stream,
            tokens[:n, None],
            columns,
            stream.state[:, :n, None],
            None if bool(model.kind.has_state(column, latest, number)) else has_state[:, None],
            access_of(model.choices.kv, number, last=True),
            unhooked if hook is None else hook(number),
            number,
            range(column, column + 1),
        )
        stream.state = put(stream.state, slice(0, n), carried[:, :, 0], dim=1)
        iterations.append(Iteration(number, resid_post[:, :, 0]))
    stream.column += 1
    return iterations


@dataclass(frozen=True)
class Certificate:
    """How a set of states was computed, and how far it can be from the sequential ones."""

    method: str
    """`sequential` (exact by definition), `layerwise`, `sweeps`, `two_pass` or `blend_off`."""
    sweeps: int = 0
    """Sweeps over the whole stack; `layerwise`: the most that any layer's FFN took."""
    mean_sweeps: float = float("nan")
    """`layerwise`: mean over layers (one sweep recomputes the FFN of the links that still move)."""
    residual: float = 0.0
    """`sweeps`: largest relative change of a carried state in the last sweep, over rows, layers and
    positions. `layerwise`: the largest such change that was small enough not to be passed on."""
    residuals: tuple[float, ...] = ()
    """The same after every sweep (`layerwise`: largest over layers)."""
    converged: bool = True
    """The residual is below the tolerance, or there are sweeps enough to make every position exact."""
    checked: int = 0
    """Positions recomputed one by one from the solution, as `sequential` would."""
    argmax_agreement: float = float("nan")
    """Share of checked positions whose most likely token is the same."""
    logit_error: float = float("nan")
    """Largest relative L2 difference of logits at a checked position."""

    @property
    def contraction(self) -> float:
        """Observed factor by which the residual shrinks per sweep: geometric mean of the last half."""
        r = [x for x in self.residuals if x > 0]
        if len(r) < 2:
            return float("nan")
        tail = r[len(r) // 2 - 1 :] if len(r) > 2 else r
        return (tail[-1] / tail[0]) ** (1 / (len(tail) - 1))


@dataclass
class Solution:
    """States of all positions of a batch of sequences."""

    resid_post: Float[Tensor, "layer row position iteration d_model"] | None
    """Layer outputs; None where they were not asked for."""
    last: Float[Tensor, "row position iteration d_model"]
    """The last layer's outputs, from which logits are computed."""
    incoming: dict[int, Float[Tensor, "layer row d_model"]]
    """The state that each position to be checked starts from, by position."""
    certificate: Certificate


def solve_sequentially(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, "row position"],
    iterations: int | Sequence[int] = 1,
    keep: bool = True,
    check: list[int] | None = None,
) -> Solution:
    """The definition, position by position, as a `Solution`; the arguments are those of `solve_exactly`.

    Args:
        iterations: one number, or one per position. A position that runs less often repeats its last one.
    """
    outputs, incoming = [], {}
    depths = [iterations] * tokens.shape[1] if isinstance(iterations, int) else iterations
    for t in range(tokens.shape[1]):
        if t in (check or []):
            incoming[t] = stream.state.clone()
        steps = advance(model, stream, tokens[:, t], depths[t])
        steps += steps[-1:] * (max(depths) - depths[t])
        outputs.append(torch.stack([s.resid_post if keep else s.resid_post[-1:] for s in steps], dim=2))
    resid_post = torch.stack(outputs, dim=2)
    return Solution(resid_post if keep else None, resid_post[-1], incoming, Certificate("sequential"))


def relative_change(
    new: Float[Tensor, "... d_model"], old: Float[Tensor, "... d_model"]
) -> Float[Tensor, ...]:
    """|new - old| / |new|, state by state.

    Raises:
        SSTError: the states overflow.
    """
    change = relative_size(new, old)
    if not bool(torch.isfinite(change).all()):
        raise overflow()
    return change


def relative_size(new: Float[Tensor, "... d_model"], old: Float[Tensor, "... d_model"]) -> Float[Tensor, ...]:
    """`relative_change` that does not wait for the device: not finite where the states overflow."""
    wide = torch.promote_types(new.dtype, torch.float32)
    new, old = new.to(wide), old.to(wide)
    return (new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-30)


def overflow() -> SSTError:
    """What to say of states that are not finite."""
    return SSTError(
        "the states overflow: the blend does not contract on this backbone",
        "use a smaller alpha, replay(method='sequential'), or the choice prompt = 'blend_off'",
    )


def check_tolerance(tolerance: Any) -> float | None:
    """A tolerance as a number; None stays None (the dtype's default).

    Raises:
        SSTError: no number from 0 up to 1. At 1 any state at all would pass.
    """
    if tolerance is None:
        return None
    number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    value = float(tolerance) if number else math.nan
    if not 0 <= value < 1:
        raise SSTError(
            f"tolerance = {shown(tolerance)} is not a number from 0 and below 1",
            "for example tolerance = 1e-5, or leave it out",
        )
    return value
