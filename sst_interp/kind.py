"""A kind of stream: what the layer stack reads of the state it carries, and what it hands on.

| kind | state per position | where it is read | state of a first position |
| --- | --- | --- | --- |
| `sst` (`sst_interp.stream`) | every layer's output | after attention: the blend | none: no blend |
| `lrt` (`sst_interp.lrt`) | one source layer's output | before attention, and in keys and values | zeros |
| `looped` (`sst_interp.looped`) | the last layer's output | by the first layer, from iteration 2 on | none |

Everything else is common: a state is carried from position to position (by a looped model it is not) and from
iteration to iteration, and a pass is the stack read with states that are given. So the sequential definition,
sweeps, lanes, replay and capture know no kind; a kind has `slots` states for each row and position, and
`has_state` says where there is one to read.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.hooks import Visit

if TYPE_CHECKING:
    from sst_interp.backbone import Backbone, Layer
    from sst_interp.choices import Choices

KindName = Literal["sst", "lrt", "looped"]
NAMES: dict[KindName, str] = {
    "sst": "State Stream Transformer",
    "lrt": "Latent Recurrent Transformer",
    "looped": "depth-looped model",
}


class Reading:
    """How one pass reads the states it is given, layer by layer. This one reads nothing: the backbone."""

    def into_layer(self, index: int, x: Tensor) -> Tensor:
        """The residual that layer `index` reads, from the one that the layer below left."""
        return x

    def attention(self, index: int, layer: Layer, x: Tensor, rotary: Any, mask: Any, kv: Any) -> Tensor:
        """What the layer's attention adds to the residual."""
        return layer.attention_branch(x, rotary, mask, kv)

    def after_attention(self, index: int, m: Tensor) -> Tensor:
        """The residual that the FFN reads and adds to, from the one after attention."""
        return m


class Kind(ABC):
    """The weights with which states are read, and the formula."""

    name: ClassVar[KindName]
    layer_by_layer: ClassVar[bool]
    """A layer reads no state but its own, so that layers can be solved one after the other (`layerwise`)."""

    @abstractmethod
    def slots(self, backbone: Backbone) -> int:
        """States per row and position."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Its own weights by name, as a checkpoint holds them."""

    @abstractmethod
    def with_weights(self, weights: dict[str, Tensor]) -> Kind:
        """The same kind with these weights in place of its own."""

    def has_state(self, columns: int | Int[Tensor, " position"], origin: Tensor, iteration: int) -> Tensor:
        """Where a pass has a state to read: from the iteration before, or, in the first, the position before.

        Args:
            columns: of the positions that the pass computes.
            origin: first column that takes part in the recurrence, [row] or [row, 1].
            iteration: of the pass, from 1.
        """
        return origin < columns if iteration == 1 else origin <= columns

    @abstractmethod
    def reading(
        self,
        choices: Choices,
        state: Float[Tensor, "slot row position d_model"] | None,
        has_state: Bool[Tensor, "row position"] | None,
        visit: Visit,
    ) -> Reading:
        """How a pass reads these states; the arguments are those of `stream.stack_pass`."""

    @abstractmethod
    def handed_on(
        self,
        backbone: Backbone,
        choices: Choices,
        resid_post: Float[Tensor, "layer row position d_model"],
        ffn: list[Tensor],
    ) -> Float[Tensor, "slot row position d_model"]:
        """The states that a pass hands on.

        Args:
            ffn: the FFN branches, if `choices.carry` asks for them; else empty.
        """

    def check(self, choices: Choices) -> None:  # noqa: B027 (a kind may take all of them)
        """Raise SSTError for choices that it cannot make."""

    def label(self) -> str:
        """What its weights do not say, for `digest`."""
        return ""

    def to(self, dtype: torch.dtype) -> Kind:
        """The same with weights of this dtype."""
        return self.with_weights({name: value.to(dtype) for name, value in self.weights().items()})

    def like(self, other: Kind) -> bool:
        """Whether the two are the same stream, in the dtype of the other."""
        ours, theirs = self.weights(), other.weights()
        if self.label() != other.label() or ours.keys() != theirs.keys():
            return False
        return all(torch.equal(w.to(theirs[name]), theirs[name]) for name, w in ours.items())

    def digest(self) -> str:
        """sha256 of everything that is its own: tells two streams on one backbone apart."""
        found = hashlib.sha256(self.label().encode())
        for _, value in sorted(self.weights().items()):
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    @abstractmethod
    def off(self) -> bool:
        """No state can change anything: it is the plain backbone at every depth."""
