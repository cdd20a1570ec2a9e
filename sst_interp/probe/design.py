"""What kind of probe, and what is left to choose inside each fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sst_interp.errors import SSTError, unknown_name

Kind = Literal["two_layer", "l2", "l1"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PENALTIES: dict[str, tuple[float, ...]] = {
    "two_layer": (0.003, 0.03, 0.1),
    "l2": (0.001, 0.01, 0.1),
    "l1": (0.1, 0.3, 0.6),
}
"""Candidates by kind. What they multiply is said in `networks` and `linear`."""
STEPS = {"two_layer": 30, "l2": 100, "l1": 100}


@dataclass(frozen=True)
class Design:
    """A kind of probe and its candidates. Everything that decides a fit, but for the data."""

    kind: Kind = "two_layer"
    """`two_layer`: the paper's, on a few dimensions. `l2`, `l1`: logistic regression on all dimensions."""
    layers: tuple[int, ...] = ()
    """Candidate layers; none: all of them."""
    dims: tuple[int, ...] = (4, 16, 64)
    """How many dimensions a `two_layer` probe may read: candidates. The paper's reads 107 of 5,376."""
    penalties: tuple[float, ...] = ()
    """Candidate penalties; none: those of the kind."""
    hidden: int = 10
    """Hidden units of a `two_layer` probe."""
    steps: int = 0
    """Full-batch steps of every fit, always as many; 0: those of the kind."""
    blocks: int = 6
    """Parts the questions are divided into for choosing (`selection`)."""
    seed: int = 0
    """Of initial weights, of blocks, and of which question of the other class is left out."""
    leak: bool = False
    """Choose dimensions, layer and penalty with the held-out questions' labels in hand. Wrong on purpose: it
    shows how much selection outside the fold would add."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of probe", self.kind, KINDS)
        if self.blocks < 3:
            raise SSTError(f"{self.blocks} blocks are too few to choose with", "at least 3, for example 6")
        if not self.dims or min(self.dims) < 1 or any(p < 0 for p in self.penalties) or self.hidden < 1:
            raise SSTError(
                "a probe needs at least one dimension, one hidden unit and penalties from 0 up",
                "the defaults of Design are a start",
            )

    @property
    def candidate_penalties(self) -> tuple[float, ...]:
        """The penalties to choose from."""
        return self.penalties or PENALTIES[self.kind]

    @property
    def n_steps(self) -> int:
        """Steps of a fit."""
        return self.steps or STEPS[self.kind]

    def candidate_dims(self, d_model: int) -> tuple[int, ...]:
        """Numbers of dimensions to choose from, where there are `d_model`. A linear probe reads all."""
        if self.kind != "two_layer":
            return (d_model,)
        return tuple(sorted({min(k, d_model) for k in self.dims}))

    def candidate_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers to choose from, where there are `n_layers`."""
        return self.layers or tuple(range(n_layers))
