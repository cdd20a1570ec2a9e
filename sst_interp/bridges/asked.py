"""What a reader of hook points may ask for: names, a method, and no option that a recurrence has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from sst_interp.errors import SSTError

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
"""Which hook points: a name, names, or a function of the name; None is every one that runs."""

Method = Literal["parallel", "sequential"]


def refuse_options(others: dict[str, Any]) -> None:
    """Raise for an option of TransformerLens that would be ignored."""
    given = sorted(name for name, value in others.items() if value is not None)
    if others.get("incl_bwd") is False:
        given.remove("incl_bwd")
    if "incl_bwd" in given:
        raise SSTError(
            "incl_bwd=True does not work with a state stream: the pass records no gradients",
            "leave incl_bwd out, or boot a TransformerBridge on a copy of `model.backbone.model`",
        )
    if given:
        raise SSTError(f"{', '.join(given)}: not with a state stream", "leave it out")
