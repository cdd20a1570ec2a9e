"""Which blends the errors of sweeps are measured for: alpha, and the layers it is switched on in.

The blend is in every layer, so what counts may be `L * alpha` and not alpha. A blend weight of 0 switches a
layer off, so that L is varied on one backbone, independently of alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.approximation.errors import CYCLIC, SCHEDULES, Schedule
from sst_interp.errors import SSTError
from sst_interp.loading import PAPER_ALPHA

WHERE = ("all", "first", "last", "spread")


@dataclass(frozen=True)
class Condition:
    """A blend with the same weight in some layers and none in the others."""

    alpha: float
    where: str = "all"
    """`all`, `first`, `last` or `spread` (evenly over the stack)."""
    n: int = 0
    """How many layers; left out with `all`."""
    schedules: tuple[Schedule, ...] = SCHEDULES

    @property
    def layers(self) -> str:
        """Which layers, in words."""
        return self.where if self.where == "all" else f"{self.n} {self.where}"

    def weights(self, n_layers: int) -> Float[Tensor, " layer"]:
        """Alpha of every layer."""
        weights = torch.zeros(n_layers, dtype=torch.float64)
        weights[switched_on(n_layers, self.where, self.n)] = self.alpha
        return weights


def switched_on(n_layers: int, where: str, n: int = 0) -> list[int]:
    """The layers that blend. `spread` takes the middle of each of `n` equal parts of the stack.

    Raises:
        SSTError: an unknown `where`, or not 1 to `n_layers` layers.
    """
    if where not in WHERE:
        raise SSTError(f"layers {where!r} are not one of {', '.join(WHERE)}", "for example 'all'")
    if where == "all":
        return list(range(n_layers))
    if not 1 <= n <= n_layers:
        raise SSTError(f"{n} layers cannot blend in a stack of {n_layers}", f"give 1 to {n_layers}")
    if where == "spread":
        return [int((k + 0.5) * n_layers / n) for k in range(n)]
    return list(range(n)) if where == "first" else list(range(n_layers - n, n_layers))


FEW = SCHEDULES[:3]
"""1, 2 and 4 sweeps: enough where only the size of the two-pass error and its contraction are asked for."""


def grid(n_layers: int, alphas: Sequence[float] = (0.005, 0.01, 0.027, 0.05, 0.1)) -> list[Condition]:
    """The blends of an untrained backbone: every alpha in all layers (the paper's mean also in cyclic
    groups), and in a third and a tenth of the layers, spread or (a third) the first or the last.
    """
    third, tenth = max(1, n_layers // 3), max(1, n_layers // 10)
    found = [Condition(a, schedules=SCHEDULES if a > 0.01 else FEW) for a in alphas if a != PAPER_ALPHA]
    found.append(Condition(PAPER_ALPHA, schedules=SCHEDULES + CYCLIC))
    found += [Condition(a, "spread", third, FEW) for a in alphas if a >= 0.01]
    found += [Condition(a, "spread", tenth, FEW) for a in (PAPER_ALPHA, max(alphas))]
    found += [Condition(PAPER_ALPHA, where, third, FEW) for where in ("first", "last")]
    return found
