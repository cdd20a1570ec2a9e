"""The sweep solver: every schedule of the literature, one function.

A sweep maps a guess of every incoming state to a better guess with a full parallel pass. It is strictly
causal: after k sweeps the first k positions are exact, and all positions converge geometrically where the
blend contracts.

| schedule | groups | sweeps |
| --- | --- | --- |
| two-pass (SST V2 training) | 1 | 1 |
| multi-refine K (LRT) | 1 | K |
| interleaved S (LRT training) | S | 1 |
| exact | any | until the residual is below a tolerance |

With `groups` = g a sweep refines the positions p mod g in turn, each turn reading what the turn before has
just written: a sweep still costs one pass over all positions, but carries states g positions further. With
more than one iteration per position two sources of keys and values are needed: at iteration i a position
attends to the *last-iteration* entries of earlier positions and to its own current entry.

For the exact states of an SST `layerwise` is several times cheaper. It needs a state that returns to its own
layer; this solver does not, so it is the exact solver of the other kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.models.cache import put
from sst_interp.models.solvers.sequential import TOLERANCE, Certificate, Solution, relative_change
from sst_interp.models.stream import Recurrence, Stream, access_of, stack_pass


def solve_by_sweeps(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, "row position"],
    *,
    iterations: int = 1,
    groups: int = 1,
    sweeps: int | None = None,
    tolerance: float | None = None,
    most: int | None = None,
    keep: bool = True,
    check: list[int] | None = None,
    watch: Callable[[Tensor, Tensor], object] | None = None,
) -> Solution:
    """States of `tokens`, continuing `stream`, which afterwards stands behind them.

    While gradients are enabled nothing is written in place, so that the result can be differentiated through
    every pass, and with a fixed number of sweeps no residual is measured.

    Args:
        tokens: in columns `stream.column` onwards; left padding as `stream.pad` says.
        iterations: depth of every position.
        groups: positions are refined in this many interleaved groups per sweep.
        sweeps: exactly this many sweeps instead of a tolerance.
        tolerance: stop when the residual is below it; None takes the dtype's default. Never more sweeps
            than positions, by when every position is exact.
        most: give up, unconverged, once more sweeps than this would be needed at the pace of the last ones.
        keep: return every layer's outputs (`resid_post`), not only the last layer's.
        check: positions whose incoming states are returned for `spot_check`.
        watch: called after every pass, also the first one without states, with its positions and the last
            layer's outputs there [row, position, d_model].

    Raises:
        SSTError: states overflow (alpha too large for this backbone).
    """
    (rows, T), d = tokens.shape, model.backbone.d_model
    watch = watch or (lambda _at, _last: None)
    columns = torch.arange(T, device=tokens.device) + stream.column
    real = columns[None] >= stream.pad[:, None]
    tolerance = TOLERANCE[model.backbone.dtype] if tolerance is None else tolerance

    first_guess, outgoing = stack_pass(model, stream, tokens, columns, None, None, "write")
    watch(columns - stream.column, first_guess[-1])
    incoming = torch.cat([stream.state[:, :, None], outgoing[:, :, :-1]], dim=2)
    if model.choices.initial_guess == "scan":
        incoming = moving_average(
            incoming, model.alpha, model.kind.has_state(columns, stream.origin[:, None], 1)
        )
    kept = first_guess.new_zeros(len(first_guess) if keep else 1, rows, T, iterations, d)
    residuals: list[float] = []
    groups = max(1, min(groups, T))
    unmeasured = torch.is_grad_enabled() and sweeps is not None
    while len(residuals) < (T if sweeps is None else sweeps):
        change = math.nan if unmeasured else 0.0
        for group in range(groups):
            at = torch.arange(group, T, groups, device=tokens.device)
            outputs, new = _iterate(model, stream, tokens[:, at], columns[at], incoming[:, :, at], iterations)
            if not unmeasured:
                moved = relative_change(new.detach(), outgoing[:, :, at].detach())
                change = max(change, float(moved.masked_fill(~real[:, at], 0).max()))
            outgoing = put(outgoing, at, new, dim=2)
            onward = at[at + 1 < T]
            incoming = put(incoming, onward + 1, new[:, :, : len(onward)], dim=2)
            watch(at, outputs[-1][-1])
            latest = torch.stack([r if keep else r[-1:] for r in outputs], dim=3)
            kept = put(kept, at, latest, dim=2)
        residuals.append(change)
        if sweeps is None and (change < tolerance or needs_more(residuals, tolerance, most)):
            break
    stream.state, stream.column = outgoing[:, :, -1].clone(), stream.column + T
    certificate = Certificate(
        method="sweeps",
        sweeps=len(residuals),
        residual=residuals[-1],
        residuals=tuple(residuals),
        converged=residuals[-1] < tolerance or len(residuals) >= T,
    )
    at_checks = {t: incoming[:, :, t] for t in check or []}
    return Solution(kept if keep else None, kept[-1], at_checks, certificate)


def needs_more(residuals: list[float], tolerance: float, most: int | None) -> bool:
    """Whether it takes more than `most` sweeps, at the pace of the last two, to get below a tolerance.

    No pace leads to a tolerance of 0: that is always more than `most`.
    """
    if most is None or len(residuals) < 3:
        return False
    if tolerance <= 0:
        return True
    pace = math.sqrt(residuals[-1] / residuals[-3])
    return pace >= 1 or len(residuals) + math.log(tolerance / residuals[-1]) / math.log(pace) > most


def _iterate(
    model: Recurrence, stream: Stream, tokens: Tensor, columns: Tensor, state: Tensor, iterations: int
) -> tuple[list[Tensor], Tensor]:
    """All iterations of some positions from the given states: each one's resid_post, and the last state."""
    outputs = []
    for number in range(1, iterations + 1):
        has_state = model.kind.has_state(columns, stream.origin[:, None], number)
        access = access_of(model.choices.kv, number, number == iterations)
        resid_post, state = stack_pass(
            model, stream, tokens, columns, state, has_state, access, iteration=number
        )
        outputs.append(resid_post)
    return outputs, state


def moving_average(
    incoming: Float[Tensor, "layer row position d_model"],
    alpha: Float[Tensor, "layer d_model"],
    has_state: Bool[Tensor, "row position"],
) -> Float[Tensor, "layer row position d_model"]:
    """Exponential moving average of outputs: s_t = (1 - alpha) y_(t-1) + alpha s_(t-1), started afresh after
    a position that had no state itself (the `scan` hand-off; `incoming` holds y_(t-1)).
    """
    a = alpha[:, None].to(torch.promote_types(incoming.dtype, torch.float32))
    s, out = incoming[:, :, 0].to(a.dtype), [incoming[:, :, 0]]
    for t in range(1, incoming.shape[2]):
        y = incoming[:, :, t].to(a.dtype)
        s = torch.where(has_state[None, :, t - 1, None], (1 - a) * y + a * s, y)
        out.append(s.to(incoming.dtype))
    return torch.stack(out, dim=2)
