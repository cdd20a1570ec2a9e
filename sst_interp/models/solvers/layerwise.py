"""The layerwise solver: exact states of all positions for the price of a few passes.

The recurrence couples a layer only to *itself* one step earlier: y_l at (t, i) needs x_l at (t, i), the
keys of x_l at earlier positions, and y_l one step before. So the layers can be solved one after the other,
from the bottom. Within a layer the inputs of all positions are known; attention is computed once, and what
remains is a chain through the FFN,

    y_k = m~_k + FFN(norm2(m~_k)),   m~_k = (1 - alpha) m_k + alpha y_(k-1),

with k running over (position, iteration). It is refined in parallel over k until nothing moves. The factor
per sweep is about alpha times the layer's gain, not `L * alpha` as in sweeps over the whole stack, which is
why a handful of sweeps reach rounding (docs/measurements.md).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.models.cache import Access
from sst_interp.models.choices import Choices
from sst_interp.models.families import Layer
from sst_interp.models.kinds.sst import blend
from sst_interp.models.solvers.sequential import TOLERANCE, Certificate, Solution, overflow, relative_size
from sst_interp.models.stream import Recurrence, Stream, attention_masks


@torch.no_grad()
def solve_layerwise(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, "row position"],
    *,
    iterations: int = 1,
    tolerance: float | None = None,
    keep: bool = True,
    check: list[int] | None = None,
) -> Solution:
    """States of `tokens`, continuing `stream`, which afterwards stands behind them.

    Args:
        tokens: in columns `stream.column` onwards; left padding as `stream.pad` says.
        iterations: depth of every position.
        tolerance: a layer is done when no state changes by more than this, relatively; None takes the
            dtype's default. Never more sweeps than chain links, by when every link is exact.
        keep: return every layer's outputs (`resid_post`), not only the last layer's.
        check: positions whose incoming states are returned for `spot_check`.

    Raises:
        SSTError: states overflow (alpha too large for this backbone).
    """
    backbone, choices = model.backbone, model.choices
    (rows, T), D, d = tokens.shape, iterations, backbone.d_model
    tolerance = TOLERANCE[backbone.dtype] if tolerance is None else tolerance
    columns = torch.arange(T, device=tokens.device) + stream.column
    end = stream.column + T
    position_ids = (columns[None] - stream.pad[:, None]).clamp(min=0)
    # The chain: (t, 1), (t, 2), ..., (t, D), (t + 1, 1), ...
    real = (columns[None] >= stream.pad[:, None]).repeat_interleave(D, dim=1)
    first = torch.arange(T * D, device=tokens.device) % D == 0
    at = columns.repeat_interleave(D)[None]
    origin, there = stream.origin[:, None], model.kind.has_state
    has_state = torch.where(first, there(at, origin, 1), there(at, origin, 2))

    embedded = backbone.embed(tokens, position_ids)
    rotary = backbone.rotary(embedded, position_ids)
    # The entries that later positions see are written first; the other iterations then stand beside them.
    kept = 0 if choices.kv == "first" else D - 1
    order = [kept, *(i for i in range(D) if i != kept)]
    other: Access = "read" if choices.kv == "first" else "beside"
    access: list[Access] = ["write" if i == kept else other for i in range(D)]
    masks = {
        way: attention_masks(backbone, stream.pad, columns, end, way, embedded.dtype) for way in set(access)
    }
    views = {way: stream.kv.view(slice(stream.column, end), end, way) for way in set(access)}

    x = embedded[:, :, None].expand(rows, T, D, d)
    outputs, outgoing, swept = [], [], []
    at_checks: dict[int, list[Tensor]] = {t: [] for t in check or []}
    for index, layer in enumerate(backbone.layers):
        branch = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i in order:
            branch[:, :, i] = layer.attention_branch(
                x[:, :, i], rotary[layer.kind], masks[access[i]][layer.kind], views[access[i]]
            )
        m = (x + branch).reshape(rows, T * D, d)
        before = stream.state[index]
        y, handed, changes, dropped = solve_chain(
            layer, m, before, model.alpha[index], choices, real & has_state, tolerance
        )
        swept.append((changes, dropped))
        x = y.view(rows, T, D, d)
        if keep:
            outputs.append(x)
        carried = torch.cat([before[:, None], handed[:, D - 1 :: D]], dim=1)
        outgoing.append(carried[:, -1])
        for t, states in at_checks.items():
            states.append(carried[:, t])
    stream.state, stream.column = torch.stack(outgoing), end
    return Solution(
        torch.stack(outputs) if keep else None,
        x,
        {t: torch.stack(states) for t, states in at_checks.items()},
        _certificate(swept),
    )


def solve_chain(
    layer: Layer,
    m: Float[Tensor, "row link d_model"],
    before: Float[Tensor, "row d_model"],
    alpha: Float[Tensor, " d_model"],
    choices: Choices,
    blended: Bool[Tensor, "row link"],
    tolerance: float,
) -> tuple[Float[Tensor, "row link d_model"], Float[Tensor, "row link d_model"], list[float], float]:
    """One layer's chain of FFN steps, each link starting from what the link before handed on.

    The FFN works link by link, so a sweep recomputes only links whose predecessor has just moved by more
    than `tolerance`; it ends when none has.

    Args:
        m: resid_mid of every link, known.
        before: what the link before the first handed on.
        blended: links that have a state to blend; the others are y = m + FFN(norm2(m)), once.

    Returns:
        (y, handed, changes, dropped): layer outputs, what each link hands on (the same tensor unless
        `choices.carry` is `ffn_output`), the largest relative change of each sweep, and the largest that
        was below the tolerance and so not passed on.
    """
    ffn = layer.ffn_branch(m)
    y = m + ffn
    handed = ffn if choices.carry == "ffn_output" else y
    changes, dropped = [], 0.0
    moving = blended & alpha.any()
    while len(changes) < m.shape[1] and len(indices := moving.nonzero()):  # waits for the device
        row, link = _rounded_up(indices).unbind(1)
        previous = torch.where((link > 0)[:, None], handed[row, link - 1], before[row])
        mixed = blend(m[row, link], previous, alpha, choices)
        ffn = layer.ffn_branch(mixed[None])[0]
        new_y = mixed + ffn
        new = ffn if choices.carry == "ffn_output" else new_y
        change = relative_size(new, handed[row, link])
        y[row, link], handed[row, link] = new_y, new
        moved = torch.zeros_like(moving)
        moved[row, link] = change >= tolerance
        small = change.masked_fill(change >= tolerance, 0)
        largest, largest_small = torch.stack([change.max(), small.max()]).tolist()  # waits, too
        if not math.isfinite(largest):
            raise overflow()
        changes.append(largest)
        dropped = max(dropped, largest_small)
        moving = torch.cat([torch.zeros_like(moved[:, :1]), moved[:, :-1]], dim=1) & blended
    return y, handed, changes, dropped


def _rounded_up(indices: Int[Tensor, "n axis"]) -> Int[Tensor, "m axis"]:
    """`indices` with its last row repeated up to the next power of two. CPU kernels are compiled per shape
    (bf16: tens of milliseconds each), so a sweep over any number of links must not mean any number of shapes.
    """
    n = len(indices)
    size = max(16, 1 << (n - 1).bit_length())
    return torch.cat([indices, indices[-1:].expand(size - n, -1)])


def _certificate(swept: list[tuple[list[float], float]]) -> Certificate:
    changes, dropped = zip(*swept, strict=True)
    sweeps = max(map(len, changes))
    return Certificate(
        method="layerwise",
        sweeps=sweeps,
        mean_sweeps=sum(map(len, changes)) / len(changes),
        residual=max(dropped),
        residuals=tuple(max(c[k] for c in changes if len(c) > k) for k in range(sweeps)),
    )
