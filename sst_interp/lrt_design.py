"""What is decided about a Latent Recurrent Transformer before any weight is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sst_interp.choices import shown
from sst_interp.errors import SSTError, unknown_name

Pathway = Literal["residual", "kv", "both"]
Projections = Literal["shared", "per_layer"]


@dataclass(frozen=True)
class MemoryDesign:
    """What is decided before any weight is trained: a training recipe's `[lrt]` table."""

    source: int | None = None
    """The layer whose output is the memory, from 0; left out, the last after the final norm."""

    pathway: Pathway = "residual"
    """Where the memory is read."""

    gamma: float = 0.0
    """Where every residual scalar starts. 0 leaves a pretrained backbone as it is; 0.1 is the published start
    for training from scratch."""

    projections: Projections = "shared"
    """Whether all layers share W_k and W_v."""

    def __post_init__(self) -> None:
        if self.source is not None and (type(self.source) is not int or self.source < 0):
            raise SSTError(
                f"source layer {self.source!r} does not exist",
                "layers are counted from 0",
            )
        for key, allowed in (("pathway", Pathway), ("projections", Projections)):
            if getattr(self, key) not in get_args(allowed):
                raise SSTError(
                    f"{key} = {shown(getattr(self, key))} is not one of {', '.join(get_args(allowed))}",
                    f"for example {key} = {get_args(allowed)[0]!r}",
                )
        number = isinstance(self.gamma, int | float) and not isinstance(self.gamma, bool)
        if not number or not abs(self.gamma) < float("inf"):
            raise SSTError(f"gamma = {shown(self.gamma)} is not a finite number", "for example gamma = 0.1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryDesign:
        """From a recipe's table; an unknown key is an error with the nearest name."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name("key of [lrt]", key, known)
        return cls(**values)
