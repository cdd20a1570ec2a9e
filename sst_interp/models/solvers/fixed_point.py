"""A loop at its fixed point: the core is solved to a tolerance, with the exact gradient in constant memory.

One iteration of a looped model maps what the core gave to what it gives next, at all positions together, each
iteration with keys and values of its own: u(i+1) = H(u(i)). Solved, iterations number nothing any more:

    u* = H(u*).

The gradient of a loss with respect to everything that H reads is that of *one* iteration at u*, with lambda
in place of the loss's own gradient g (implicit differentiation):

    lambda = g + (dH/du)^T lambda.

Both equations are iterated until nothing moves (`Solver`), at most `MOST` times. The graph of one iteration
is all that is remembered, however many it takes: deep equilibrium models (arXiv 1909.01377), and for looped
language models Attractor (arXiv 2605.12466). Where the core does not contract, the residual says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sst_interp.errors import SSTError
from sst_interp.models.cache import KeyValues
from sst_interp.models.kinds.looped import Looped, normed, through
from sst_interp.models.solvers.implicit import Solver
from sst_interp.models.stream import Pass, Recurrence

MOST = 40
"""Iterations after which a solution is taken as it is."""


class FixedPoint(NamedTuple):
    """A solved loop; positions are of whole rows, without padding."""

    last: Float[Tensor, "row position d_model"]
    """The last layer's outputs at the fixed point."""
    u: Float[Tensor, "row position d_model"]
    """The core's output there."""
    iterations: int
    """Of the core, the first one included."""
    residual: float
    """Relative change in the last one, root mean square over positions."""


def fixed_point_states(
    model: Recurrence, tokens: Int[Tensor, "row position"], solver: Solver | None = None
) -> FixedPoint:
    """The fixed point of a loop on some rows of equal length, differentiable.

    Args:
        solver: its tolerance counts, and it records the solution, and its backward pass when that has run.

    Raises:
        SSTError: a model that is not looped, or that loops in a way of its own.
    """
    kind, backbone = model.kind, model.backbone
    if not isinstance(kind, Looped) or type(kind).one_pass is not Looped.one_pass:
        raise SSTError(
            f"a {kind.words} has no core to be solved", "sst.attach_looped(...) makes one that has"
        )
    solver = solver or Solver()
    solver.states, solver.adjoints = [], []
    (rows, T), first = tokens.shape, kind.span(backbone.n_layers)[0]
    stream = model.new_stream(torch.zeros(rows, dtype=torch.long, device=tokens.device), T)
    p = Pass(stream, tokens, torch.arange(T, device=tokens.device), None, None, "write")
    inputs = p.inputs(backbone)

    def fresh() -> Any:
        return inputs._replace(kv=KeyValues(backbone.n_layers, T).view(slice(0, T), T, "write"))

    below = through(backbone, range(first), inputs.embedded, fresh())
    e = normed(kind.prelude_norm, backbone, below[-1] if below else inputs.embedded)

    def iterate(s: Tensor) -> Tensor:
        return kind.core_outputs(model, s, e, fresh())[-1]

    def again(u: Tensor) -> Tensor:
        return iterate(normed(kind.norm, backbone, u))

    with torch.no_grad():
        old = iterate(kind.first_state(p, e, model.choices))
        new, count = again(old), 2

        def gap(_sweeps: int) -> Tensor:
            return _size(new - old) / _size(new).clamp(min=1e-30)

        def mend(_sweeps: int) -> None:
            nonlocal old, new, count
            old, new, count = new, again(new), count + 1

        solver.settle(False, MOST, gap, mend)
    residual = float(solver.states[-1].residual)
    if torch.is_grad_enabled():
        u = new.detach().requires_grad_()
        solved = again(u)
        new = _Implicit.apply(
            solved, lambda g: torch.autograd.grad(solved, u, g, retain_graph=True)[0], solver
        )
    outputs = kind.coda_outputs(backbone, new, fresh())
    return FixedPoint(outputs[-1] if outputs else new, new, count, residual)


class _Implicit(torch.autograd.Function):
    """The identity; backwards from g to lambda."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, pull: Callable[[Tensor], Tensor], solver: Solver) -> Tensor:
        ctx.pull, ctx.solver = pull, solver
        return u.view_as(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        total, carried = g, ctx.pull(g)

        def gap(_sweeps: int) -> Tensor:
            return _size(carried) / _size(total).clamp(min=1e-30)

        def mend(_sweeps: int) -> None:
            nonlocal total, carried
            total = total + carried
            carried = ctx.pull(carried)

        ctx.solver.settle(True, MOST, gap, mend)
        return total + carried, None, None


def _size(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32)).norm()
