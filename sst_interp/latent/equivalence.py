"""How far is a schedule from sequential unrolling: in hidden states, in the loss, and in gradients?

Interleaved and multi-refine passes (`training.schedules`) are compared on one text with the definition, exact
back-propagation through time token by token. Equivalence was claimed for them (arXiv 2605.26797) and not
shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.approximation.errors import bin_starts, position_bins
from sst_interp.model import StateStreamModel
from sst_interp.training.schedules import Pass, newest, run_passes

NEWEST, EVERY_PASS = "newest outputs", "every pass"
"""Which loss: of the positions' newest outputs, as sequential unrolling has it; or the mean over all passes,
the first one without a memory included, which is what these schedules minimise."""


class Schedule(NamedTuple):
    """`interleaved` with n = S, or `multi_refine` with n = K."""

    method: str
    n: int

    @property
    def passes(self) -> int:
        """Passes over all positions that it costs."""
        return 2 if self.method == "interleaved" else 1 + self.n


SCHEDULES = (
    *(Schedule("interleaved", s) for s in (1, 2, 4, 8)),
    *(Schedule("multi_refine", k) for k in (1, 2, 3, 4)),
)
"""S = 1 and K = 1 are the same two passes."""


@dataclass(frozen=True)
class Text:
    """One text, and what is minimised on it."""

    id: str
    tokens: Int[Tensor, "1 position"]
    loss: Callable[[Float[Tensor, "1 position d_model"]], Tensor]
    """Mean loss in nats, from the last layer's outputs."""
    loss_of_passes: Callable[[Sequence[Pass]], Tensor]
    """The same, mean over passes: what the schedule trains on."""


class Compared(NamedTuple):
    """Tables of one text."""

    states: pd.DataFrame
    """A row per schedule and bin of positions. `position` is the first of the bin, `positions` how many it
    has; sums over them: `error2` and `norm2` (squared L2 of the last layer's difference and of the exact
    one), `relative` (relative L2 error)."""
    gradients: pd.DataFrame
    """A row per schedule, loss (`newest outputs`, `every pass`) and part (`weights`, `memory`, and each of
    the memory's own): `cosine` with the exact gradient, `norm_ratio` (over the exact one's norm), and the
    losses `loss` and `loss_exact` (nats)."""


def compare_schedules(
    model: StateStreamModel,
    text: Text,
    weights: Mapping[str, Tensor],
    schedules: Sequence[Schedule] = SCHEDULES,
) -> Compared:
    """Every schedule against sequential unrolling, at the same weights and on the same text.

    Args:
        model: a Latent Recurrent Transformer; float32 or wider, or rounding is measured.
        text: what is read and minimised.
        weights: those of the backbone (or of adapters on it) whose gradient is compared.
        schedules: which; those with more groups than positions are left out.
    """
    kept = model.kind
    memory = {name: w.detach().clone().requires_grad_() for name, w in kept.weights().items()}
    model.kind = kept.with_weights(dict(memory))
    parts = {"weights": list(weights.values()), **{name: [w] for name, w in memory.items()}}
    try:
        exact = newest(run_passes(model, text.tokens, "sequential"))
        loss = text.loss(exact)
        true, loss_exact = _gradient(loss, parts, keep=False), float(loss.detach())
        exact, states, gradients = exact.detach()[0], [], []
        for schedule in schedules:
            if schedule.method == "interleaved" and schedule.n > text.tokens.shape[1]:
                continue
            passes = run_passes(model, text.tokens, schedule.method, schedule.n, schedule.n)  # type: ignore[arg-type]
            last = newest(passes)
            about = {"id": text.id, "method": schedule.method, "n": schedule.n}
            states.append(_by_position(exact, last.detach()[0]).assign(**about))
            for name, value, keep in (
                (NEWEST, text.loss(last), True),
                (EVERY_PASS, text.loss_of_passes(passes), False),
            ):
                losses = {"of": name, "loss": float(value.detach()), "loss_exact": loss_exact}
                found = _gradient(value, parts, keep)
                gradients += [about | losses | row for row in _against(found, true, list(memory))]
    finally:
        model.kind = kept
    return Compared(pd.concat(states, ignore_index=True), pd.DataFrame(gradients))


def _gradient(loss: Tensor, parts: Mapping[str, Sequence[Tensor]], keep: bool) -> dict[str, list[Tensor]]:
    """The gradient by part; `keep` leaves the graph for another one."""
    wanted = [w for part in parts.values() for w in part]
    found = iter(torch.autograd.grad(loss, wanted, retain_graph=keep, materialize_grads=True))
    return {name: [next(found) for _ in part] for name, part in parts.items()}


def _against(
    found: dict[str, list[Tensor]], true: dict[str, list[Tensor]], memory: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Cosine and norm ratio by part; the memory's weights also all together."""
    products = {
        name: np.array(
            [sum(_dot(a, b) for a, b in zip(*pair, strict=True)) for pair in _pairs(own, true[name])]
        )
        for name, own in found.items()
    }
    products["memory"] = np.sum([products[name] for name in memory], axis=0)
    for name, (own, theirs, both) in products.items():
        cosine = both / np.sqrt(own * theirs) if own > 0 and theirs > 0 else np.nan
        yield {"part": name, "cosine": cosine, "norm_ratio": np.sqrt(own / theirs) if theirs > 0 else np.nan}


def _pairs(a: list[Tensor], b: list[Tensor]) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
    return (a, a), (b, b), (a, b)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _by_position(
    exact: Float[Tensor, "position d_model"], found: Float[Tensor, "position d_model"]
) -> pd.DataFrame:
    error2, norm2 = (x.double().square().sum(-1) for x in (found - exact, exact))
    columns = {"error2": error2, "norm2": norm2, "relative": (error2 / norm2).sqrt()}
    bins = position_bins(len(exact))
    sums = {name: np.bincount(bins, value.cpu().numpy()) for name, value in columns.items()}
    return pd.DataFrame({"position": bin_starts(int(bins[-1]) + 1), "positions": np.bincount(bins)} | sums)
