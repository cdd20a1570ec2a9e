"""Keys and values of a batch of token sequences: one entry per layer and column, overwritten by each
iteration, or, where every iteration keeps its own, one per iteration, layer and column.

Hugging Face's `DynamicCache` appends, so a second iteration at a position would leave two entries there.
Here columns are allocated once and written in place. An attention module gets an object with the cache's
`update` method (`View`); the pass's `Access` says which keys that returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Access = Literal["write", "beside", "read"]
"""What a pass does with its own keys and values.

`write`: store them in their columns and attend to the store (a plain forward, or the last iteration).
`beside`: leave the store alone; attend to it strictly before the column, and to one's own beside it (an
earlier iteration of many positions at once: every other position is read as of its last iteration).
`read`: leave the store alone and attend to it (frozen after the first iteration)."""


def put(target: Tensor, at: Tensor | slice, new: Tensor, dim: int) -> Tensor:
    """`target` with `new` in its places `at` along `dim`: written in place, or, while gradients are
    recorded, in a copy (`new` itself where it covers everything).
    """
    if not torch.is_grad_enabled():
        target.movedim(dim, 0)[at] = new.movedim(dim, 0)
        return target
    if new.shape == target.shape:
        return new
    index = torch.arange(target.shape[dim], device=target.device)[at] if isinstance(at, slice) else at
    return target.index_copy(dim, index, new)


class KeyValues:
    """A store of keys and values [row, head, column, d_head] per entry, allocated on first write.

    Args:
        n_layers: number of attention layers: entries to begin with. Those of later iterations are appended.
        columns: capacity in tokens, padding included.
    """

    def __init__(self, n_layers: int, columns: int) -> None:
        self.columns = columns
        self.keys: list[Tensor | None] = [None] * n_layers
        self.values: list[Tensor | None] = [None] * n_layers

    def view(self, columns: Tensor | slice, end: int, access: Access) -> View:
        """The cache object of one pass over `columns`: the store up to column `end`."""
        return View(self, columns, end, access)

    def save_column(self, column: int) -> list[tuple[Tensor, Tensor] | None]:
        """A copy of one column, entry by entry."""
        return [
            None if k is None or v is None else (k[:, :, column].clone(), v[:, :, column].clone())
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    def restore_column(self, column: int, saved: list[tuple[Tensor, Tensor] | None]) -> None:
        """Put back what `save_column` returned."""
        for kept, key, value in zip(saved, self.keys, self.values, strict=True):
            if kept is not None and key is not None and value is not None:
                key[:, :, column], value[:, :, column] = kept

    def make_room(self, columns: int) -> None:
        """Room for so many columns; what is stored stays."""
        for store in (self.keys, self.values):
            for n, kept in enumerate(store):
                if kept is not None and columns > kept.shape[2]:
                    rows, heads, _, d_head = kept.shape
                    store[n] = kept.new_zeros(rows, heads, columns, d_head)
                    store[n][:, :, : kept.shape[2]] = kept  # pyright: ignore
        self.columns = max(self.columns, columns)

    def take(self, rows: Tensor) -> KeyValues:
        """An independent copy of these rows, in this order; a row may be named several times."""
        copy = KeyValues(len(self.keys), self.columns)
        copy.keys = [k if k is None else k[rows] for k in self.keys]
        copy.values = [v if v is None else v[rows] for v in self.values]
        return copy


@dataclass(frozen=True)
class View:
    """The cache object that attention modules get during one pass. A pass over the first n rows of a batch
    leaves the other rows untouched, and needs no copy.
    """

    store: KeyValues
    columns: Tensor | slice
    end: int
    access: Access
    entry: int | None = None
    """Where the store keeps them; None: at the number that the attention module gives."""

    def at(self, entry: int) -> View:
        """The same for one entry of the store, whatever number the attention module gives."""
        return replace(self, entry=entry)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_args, **_kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store and return keys and values [row, head, key, d_head], as `access` says."""
        entry = layer_idx if self.entry is None else self.entry
        return self._one(self.store.keys, keys, entry), self._one(self.store.values, values, entry)

    def _one(self, store: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        rows, heads, _, d_head = new.shape
        store.extend([None] * (layer + 1 - len(store)))
        kept = store[layer]
        if kept is None:  # a later iteration's first pass may be of some rows only
            every = max([rows, *(len(k) for k in self.store.keys[:1] if k is not None)])
            kept = store[layer] = new.new_zeros(every, heads, self.store.columns, d_head)
        if self.access == "write" and torch.is_grad_enabled():
            kept = store[layer] = put(kept, self.columns, new, dim=2)
        elif self.access == "write":
            kept[:rows, :, self.columns] = new
        seen = kept[:rows, :, : self.end]
        return torch.cat([seen, new], dim=2) if self.access == "beside" else seen
