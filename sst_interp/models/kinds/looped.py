"""The depth-looped model as a kind of stream: the stack is iterated, and no state goes from token to token.

The recurrence over depth of the Universal Transformer (arXiv 1807.03819) on a pretrained backbone. Position
`t`, iteration `i`; `e` is the token's embedding, `y_L` the last layer's output before the final norm:

    x_0(t, 1) = e(t)
    x_0(t, i) = y_L(t, i-1)             # the default: in place of the embedding
    x_0(t, i) = e(t) + y_L(t, i-1)      # blend = "additive": the token is put in again ("input injection")

This is the blend of an SST at the stack's input, with an alpha of 1. It has no weights, and at depth 1 it is
the backbone bit for bit. As in the other kinds, iterations attend to the keys and values that `choices.kv`
keeps of earlier positions: only through them does depth at one position reach the next.
(A Universal Transformer attends to those of the same iteration, and adds an embedding of the iteration.)
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Visit
from sst_interp.models.kinds import kind
from sst_interp.models.kinds.sst import blend
from sst_interp.models.stream import Kind, Reading


@kind("looped", "depth-looped model")
@dataclass(frozen=True, eq=False)
class Looped(Kind):
    """The first layer reads the last layer's output of the iteration before, at the same position."""

    own = "loop of its own"

    def slots(self, backbone: Backbone) -> int:
        """One: the last layer's output."""
        return 1

    def weights(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def with_weights(self, weights: dict[str, Tensor]) -> Looped:
        """Itself: it has no weights."""
        return self

    def has_state(self, columns: int | Int[Tensor, " position"], origin: Tensor, iteration: int) -> Tensor:
        """From the second iteration on; the first never reads another position's state."""
        return super().has_state(columns, origin, iteration) & (iteration > 1)

    def reading(
        self, choices: Choices, state: Tensor | None, has_state: Tensor | None, visit: Visit
    ) -> Reading:
        """The state in `state` [1, row, position, d_model], where there is one."""
        if state is None or (has_state is not None and not bool(has_state.any())):
            return Reading()
        return _Looping(choices, state[0], has_state, visit)

    def next_state(
        self, backbone: Backbone, choices: Choices, resid_post: Tensor, ffn: list[Tensor]
    ) -> Float[Tensor, "1 row position d_model"]:
        """The last layer's output, before the final norm."""
        return resid_post[-1:]

    def check(self, choices: Choices) -> None:
        """Raise SSTError for a choice that means nothing where one state goes from the top to the bottom."""
        for name in ("carry", "initial_guess"):
            if getattr(choices, name) != getattr(Choices(), name):
                raise SSTError(
                    f"choice {name} = {getattr(choices, name)!r} is about states of single layers, and a "
                    "depth-looped model has none",
                    f"leave {name} out",
                )

    def label(self) -> str:
        """Its name: it has no weights."""
        return "looped"

    def __str__(self) -> str:
        return "looped over depth, no weights of its own"

    @property
    def off(self) -> bool:
        """Never: from the second iteration on it is not the backbone."""
        return False


@dataclass(frozen=True, eq=False)
class _Looping(Reading):
    choices: Choices
    state: Float[Tensor, "row position d_model"]
    has_state: Bool[Tensor, "row position"] | None
    visit: Visit

    def into_layer(self, index: int, x: Tensor) -> Tensor:
        if index > 0:
            return x
        s = self.visit("stream_state", index, self.state)
        there = x.new_ones(1) if self.has_state is None else self.has_state[..., None].to(x.dtype)
        return blend(x, s, there, self.choices)
