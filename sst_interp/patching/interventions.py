"""What is put where: the places of a patch and the vectors that go there.

| place | what is replaced, at one position |
| --- | --- |
| `layer` | one layer's output y in the last iteration: the layers above compute again from it |
| `window` | the outputs of neighbouring layers |
| `all` | every layer's output: the token is then the donor's by construction |
| `stream_in` | the stream states that the last iteration blends in, in every layer |
| `stream_out` | the stream states that are handed on to the next position: this token stays by construction |

| what | the vector |
| --- | --- |
| `state` | the donor's: the other depth's state at the same place |
| `random` | base state plus a random vector as long as the donor's difference |
| `other` | base state plus another question's difference, scaled to the length of this one's |
| `stranger` | another question's state as it is |
| `own` | the base state itself: what rounding does |
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.measures import wide
from sst_interp.nudges import generator

Place = Literal["layer", "window", "all", "stream_in", "stream_out"]
What = Literal["state", "random", "other", "stranger", "own"]
Direction = Literal["back", "forward"]
"""`back`: depth 1's state into the deep pass. `forward`: the deep pass's state into depth 1's."""

CONTROLS: tuple[What, ...] = ("random", "other", "stranger")


class Intervention(NamedTuple):
    """One row of a batch."""

    place: Place
    what: What
    first: int
    last: int
    """First and last layer that is replaced."""

    @property
    def continued(self) -> bool:
        """Whether text is written after it. Controls at one layer are compared at the position itself."""
        return self.place != "layer" or self.what == "state"

    @property
    def layers(self) -> range:
        """The layers that are replaced."""
        return range(self.first, self.last + 1)


def spread(n_layers: int, n: int) -> list[int]:
    """`n` layers spread evenly, the last among them."""
    n = min(n, n_layers)
    return sorted({(k + 1) * n_layers // n - 1 for k in range(n)})


def interventions(n_layers: int, layers: Sequence[int], windows: int, stream: bool) -> list[Intervention]:
    """Every patch that is made at one position in one direction.

    Args:
        layers: which layers are patched alone.
        windows: how many windows the layers are cut into.
        stream: whether there is a state to hand in.
    """
    top = n_layers - 1
    places: list[tuple[Place, int, int]] = [("all", 0, top), ("stream_in", 0, top), ("stream_out", 0, top)]
    for layer in reversed(layers):
        places.insert(0, ("layer", layer, layer))
    found = [
        Intervention(place, what, a, b)
        for what in ("state", *CONTROLS)
        for place, a, b in places
        if (what != "stranger" or not place.startswith("stream")) and (stream or place != "stream_in")
    ]
    edges = [k * n_layers // windows for k in range(windows + 1)]
    found += [Intervention("window", "state", a, b - 1) for a, b in pairwise(edges) if b > a]
    return [*found, Intervention("all", "own", 0, top)]


def vectors(
    what: What,
    base: Float[Tensor, "layer d_model"],
    donor: Float[Tensor, "layer d_model"],
    other_base: Float[Tensor, "layer d_model"],
    other_donor: Float[Tensor, "layer d_model"],
    key: Sequence[object],
) -> Float[Tensor, "layer d_model"]:
    """What is put in the place of `base`, layer by layer.

    Args:
        key: decides the random directions.
    """
    if what in ("state", "own", "stranger"):
        return {"state": donor, "own": base, "stranger": other_donor}[what]
    size = (wide(donor) - wide(base)).norm(dim=-1, keepdim=True)
    if what == "random":
        towards = torch.randn(base.shape, generator=generator(*key)).to(size)
    else:
        towards = wide(other_donor) - wide(other_base)
    towards = towards / towards.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(towards.dtype).tiny)
    return (wide(base) + size * towards).to(base.dtype)
