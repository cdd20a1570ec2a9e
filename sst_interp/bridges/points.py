"""TransformerLens' hook points in time: which fire, and hooks for one iteration or position only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sst_interp.choices import whole
from sst_interp.errors import SSTError
from sst_interp.hooks import Hook, alike
from sst_interp.stream import Recurrence, stack_pass


@dataclass(frozen=True)
class Now:
    """Where a bridge is."""

    iteration: int
    """The one that runs."""
    position: int
    """The first of its pass."""


class Runs(Protocol):
    """What says where it is."""

    now: Now


@dataclass
class Placed:
    """`fn(tensor, hook)` at one iteration, or position, or both; None means everywhere.

    With a position it is given that position alone, [row, 1, ...], however many a pass reads.
    """

    bridge: Runs
    fn: Callable[..., Any]
    iteration: int | None = None
    position: int | None = None
    calls: int = 0
    """How often it has been called."""

    def __post_init__(self) -> None:
        if self.iteration is not None:
            self.iteration = whole("iteration", self.iteration, 1)
        if self.position is not None:
            self.position = whole("position", self.position, 0)

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        """What TransformerLens calls."""
        now = self.bridge.now
        if self.iteration is not None and now.iteration != self.iteration:
            return None
        if self.position is None:
            self.calls += 1
            return self.fn(tensor, hook=hook)
        axis = (hook.pos_dim or 1) if isinstance(hook, HookPoint) else 1
        offset = self.position - now.position
        if not 0 <= offset < tensor.shape[axis]:
            return None
        self.calls += 1
        given, changed = tensor.narrow(axis, offset, 1).clone(), tensor.clone()
        changed.narrow(axis, offset, 1).copy_(alike(self.fn(given, hook=hook), given, str(hook.name)))
        return changed

    def refuse_unused(self) -> None:
        """Raise if it was never called."""
        if not self.calls:
            where = {"iteration": self.iteration, "position": self.position}
            named = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
            raise SSTError(f"the hook was never called: nothing ran at {named}", "ask for what there is")


@torch.no_grad()
def firing(
    model: Recurrence,
    points: Mapping[str, HookPoint],
    positions: int,
    hook: Hook,
    unembed: Callable[[Tensor], object],
) -> dict[str, HookPoint]:
    """The hook points that fire, found by one pass.

    TransformerLens says where its own attention has the positions of normed queries and keys. The pass says
    where this backbone has them.

    Args:
        positions: a number that is the size of no other axis before d_head.
        hook: fires the points of the sites.
        unembed: fires those behind the layers.
    """
    fired: set[HookPoint] = set()
    handles = []
    for point in set(points.values()):

        def note(_module: Any, _args: Any, out: Any, point: HookPoint = point) -> None:
            fired.add(point)
            if point.pos_dim is not None:
                point.pos_dim = list(out.shape).index(positions)

        handles.append(point.register_forward_hook(note))
    device = model.backbone.device
    stream = model.new_stream(torch.zeros(1, dtype=torch.long, device=device), positions)
    columns = torch.arange(positions, device=device)
    states = stream.state[:, :, None].expand(-1, -1, positions, -1)
    y, _ = stack_pass(model, stream, columns[None] * 0, columns, states, None, "write", hook(0, 1))
    unembed(y[-1][:, :, None])
    for handle in handles:
        handle.remove()
    return {name: point for name, point in points.items() if point in fired}
