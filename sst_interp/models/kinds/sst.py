"""The State Stream Transformer: every layer's output is carried, and blended in after its attention.

Layer `l`, position `t`, iteration `i` (arXiv 2605.00206, section 3):

    m  = x + Attention(norm1(x))             # resid_mid
    m~ = (1 - alpha_l) * m + alpha_l * s_l   # the blend
    y  = m~ + FFN(norm2(m~))                 # resid_post
    s_l <- y                                 # the state carried on

`s_l` comes from (t, i-1) when i > 1, else from the last iteration at t-1. No state yet, no blend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices, as_weights
from sst_interp.models.families import unsupported
from sst_interp.models.hooks import Visit
from sst_interp.models.kinds import kind
from sst_interp.models.stream import Kind, Reading

PAPER_ALPHA = 0.027
"""Mean of the learned blend weights in arXiv 2605.00206."""


def blend(
    m: Float[Tensor, "row position d_model"],
    s: Float[Tensor, "row position d_model"],
    alpha: Float[Tensor, "... d_model"],
    choices: Choices,
) -> Float[Tensor, "row position d_model"]:
    """m~, computed in the wider of the dtypes and rounded once; `alpha` 0 gives `m` exactly."""
    keep = (1 - alpha) * m if choices.blend == "convex" else m
    return (keep + alpha * s).to(m.dtype)


@kind("sst", "State Stream Transformer")
@dataclass(frozen=True, eq=False)
class LayerBlend(Kind):
    """Every layer's output is carried, and blended in after its attention."""

    alpha: Float[Tensor, "layer d_model"]
    """Blend weights in [0, 1]. `fit` also takes a number, and a number per layer [layer]."""

    layer_by_layer = True
    own = "blend weights (alpha)"
    holds = (frozenset({"alpha"}),)

    @classmethod
    def start(cls, backbone: Backbone, alpha: Any = None) -> LayerBlend:
        """With this alpha; None turns the blend off."""
        given: Any = 0.0 if alpha is None else alpha
        return cls(given).fit(backbone)

    def fit(self, backbone: Backbone) -> LayerBlend:
        """`alpha` as [layer, d_model] in fp32 (fp64 for a float64 backbone), checked."""
        if not all(layer.adds_up for layer in backbone.layers):
            raise unsupported(
                backbone.family,
                "attention and FFN run in parallel or are not summed, so there is no post-attention residual "
                "(resid_mid) to blend a state into; sst.attach_lrt and sst.attach_looped need none",
            )
        dtype = torch.promote_types(backbone.dtype, torch.float32)
        given = as_weights("alpha", self.alpha, dtype, backbone.device)
        if given.dim() == 1:
            given = given[:, None]
        shape = (backbone.n_layers, backbone.d_model)
        try:
            full = given.expand(shape).clone()
        except RuntimeError:
            raise SSTError(
                f"alpha has shape {list(given.shape)}; this backbone needs [{shape[0]}, {shape[1]}]",
                "pass one number, one per layer, or one per layer and dimension",
            ) from None
        if not bool(torch.isfinite(full).all()) or full.min() < 0 or full.max() > 1:
            raise SSTError(
                f"alpha runs from {full.min():.4g} to {full.max():.4g}; it must lie in [0, 1]",
                "the paper's range is 0.015 to 0.10",
            )
        return LayerBlend(full)

    def slots(self, backbone: Backbone) -> int:
        """One per layer."""
        return backbone.n_layers

    def weights(self) -> dict[str, Tensor]:
        """`alpha` [layer, d_model]."""
        return {"alpha": self.alpha}

    def with_weights(self, weights: dict[str, Tensor]) -> LayerBlend:
        """Another `alpha`."""
        return LayerBlend(weights["alpha"])

    def reading(
        self, choices: Choices, state: Tensor | None, has_state: Tensor | None, visit: Visit
    ) -> Reading:
        """The blend, where there is a state."""
        if state is None:
            return Reading()
        return _Blending(self.alpha, choices, state.unbind(0), has_state, visit)

    def next_state(
        self, backbone: Backbone, choices: Choices, resid_post: Tensor, ffn: list[Tensor]
    ) -> Float[Tensor, "layer row position d_model"]:
        """The layers' outputs (the same tensor), or their FFN branches."""
        return torch.stack(ffn) if choices.carry == "ffn_output" else resid_post

    def __str__(self) -> str:
        if self.off:
            return "no blend: the plain backbone"
        return f"alpha {self.alpha.min():.4g} to {self.alpha.max():.4g}"

    @property
    def off(self) -> bool:
        """Every blend weight is 0."""
        return not bool(self.alpha.any())


@dataclass(frozen=True, eq=False)
class _Blending(Reading):
    alpha: Tensor
    choices: Choices
    state: tuple[Tensor, ...]
    has_state: Tensor | None
    visit: Visit

    def after_attention(self, index: int, m: Tensor) -> Tensor:
        a = self.alpha[index]
        if self.has_state is not None:
            a = a * self.has_state[..., None]
        return blend(m, self.visit("stream_state", index, self.state[index]), a, self.choices)
