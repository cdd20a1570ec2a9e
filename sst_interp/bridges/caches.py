"""What TransformerLens' hook points saw: one `ActivationCache` per iteration."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from sst_interp.bridges import NamesFilter
from sst_interp.errors import SSTError, unknown_name

if TYPE_CHECKING:
    from sst_interp.bridges.transformer_lens import StateStreamBridge


class Collector:
    """Watches hook points while a bridge runs.

    Args:
        names_filter: which; every name must exist and fire.

    Raises:
        SSTError: a filter that matches nothing.
    """

    def __init__(self, bridge: StateStreamBridge, names_filter: NamesFilter = None) -> None:
        self.bridge, points = bridge, bridge.firing
        if names_filter is None or callable(names_filter):
            names = [name for name in points if names_filter is None or names_filter(name)]
        else:
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            for name in names:
                if name not in bridge.hook_dict:
                    raise unknown_name("hook point", name, points)
                bridge._check_hook_fireable(name)
        if not names:
            raise SSTError("the names filter matches no hook point", "`bridge.firing` has their names")
        self._names: dict[int, list[str]] = {}
        self._points: dict[int, HookPoint] = {}
        for name in names:  # aliases are several names of one point
            self._names.setdefault(id(points[name]), []).append(name)
            self._points[id(points[name])] = points[name]
        self._seen: dict[int, dict[int, dict[int, Tensor]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        for key, point in self._points.items():
            self._handles.append(point.register_forward_hook(self._keeper(key, point)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def caches(self) -> list[ActivationCache]:
        """One cache per iteration, positions in order."""
        caches = []
        for iteration in sorted(self._seen):
            tensors: dict[str, Tensor] = {}
            for key, pieces in self._seen[iteration].items():
                whole = _joined([pieces[first] for first in sorted(pieces)], self._points[key])
                tensors |= dict.fromkeys(self._names[key], whole)
            caches.append(ActivationCache(tensors, self.bridge))
        return caches

    def _keeper(self, key: int, point: HookPoint) -> Any:
        def keep(_module: Any, _args: Any, tensor: Any) -> None:
            if not isinstance(tensor, Tensor):
                return
            if point.hook_conversion is not None:
                tensor = point.hook_conversion.convert(tensor)
            now = self.bridge.now
            # A pass that is repeated puts its values in the place of the earlier ones.
            self._seen.setdefault(now.iteration, {}).setdefault(key, {})[now.position] = tensor.detach()

        return keep


def _joined(pieces: list[Tensor], point: HookPoint) -> Tensor:
    """Positions side by side."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=point.pos_dim or 1)
