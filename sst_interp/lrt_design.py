"""Attaching a Latent Recurrent Transformer (`sst_interp.lrt`) to a language model in memory.

model = sst.attach_lrt(hf_model, tokenizer, pathway="both")
model.generate(["Why is the sky blue?"], iterations=4).texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sst_interp.backbone import Backbone, Layer
from sst_interp.choices import Choices
from sst_interp.errors import SSTError
from sst_interp.lrt import Memory, Pathway
from sst_interp.model import StateStreamModel

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
        for key, allowed in (("pathway", Pathway), ("projections", Projections)):
            if getattr(self, key) not in get_args(allowed):
                raise SSTError(
                    f"{key} = {getattr(self, key)!r} is not one of {', '.join(get_args(allowed))}",
                    f"for example {key} = {get_args(allowed)[0]!r}",
                )
        if not isinstance(self.gamma, int | float) or not abs(self.gamma) < float("inf"):
            raise SSTError(f"gamma = {self.gamma!r} is not a finite number", "for example gamma = 0.1")

    def build(self, backbone: Backbone) -> Memory:
        """Fresh weights for a backbone.

        Raises:
            SSTError: an unknown source layer, or a key/value pathway into attention that has no `k_proj`.
        """
        n, d = backbone.n_layers, backbone.d_model
        if self.source is not None and (type(self.source) is not int or not 0 <= self.source < n):
            raise SSTError(
                f"source layer {self.source!r} does not exist: the model has {n} layers",
                f"give 0 to {n - 1}, or leave it out for the last layer after the final norm",
            )
        wide = torch.promote_types(backbone.dtype, torch.float32)
        how: dict[str, Any] = {"dtype": wide, "device": backbone.device}
        gamma = None if self.pathway == "kv" else torch.full((n,), float(self.gamma), **how)
        if self.pathway == "residual":
            return Memory(self.source, gamma)
        widths = {key_value_width(backbone.family, layer) for layer in backbone.layers}
        if len(widths) > 1:
            raise SSTError(
                f"the layers of {backbone.family!r} have keys of different widths", 'pathway="residual"'
            )
        (width,) = widths
        heads = width // _d_head(backbone)
        shape = (1 if self.projections == "shared" else n, width, d)
        gates = torch.zeros(n, 2, 2, heads, d, **how)
        return Memory(self.source, gamma, torch.zeros(shape, **how), torch.zeros(shape, **how), gates)


def attach_lrt(
    model: nn.Module,
    tokenizer: Any = None,
    source: int | None = None,
    pathway: Pathway = "residual",
    gamma: float | Sequence[float] | Tensor = 0.0,
    projections: Projections = "shared",
    choices: Choices | None = None,
    name: str | None = None,
) -> StateStreamModel:
    """Attach a latent memory to any Hugging Face causal LM in memory. With the defaults it changes nothing.

    The model is not copied or changed; parts are resolved by family and validated by numbers.

    Args:
        model: `AutoModelForCausalLM` of a supported family. GPT-2 has the residual pathway only.
        tokenizer: its tokenizer, if texts are to be used.
        source: the layer whose output is the memory, from 0; None for the last after the final norm.
        pathway: where layers read it: `residual`, `kv` or `both`.
        gamma: residual scalars, one number or one per layer.
        projections: of the key/value pathway: one pair for all layers, or one per layer.
        choices: what the paper leaves open; those about the blend do not apply.
        name: how listings and errors call it; None takes the family's.

    Raises:
        SSTError: unsupported family or pathway, unknown source layer, gamma of the wrong shape.
    """
    backbone = Backbone(model)
    start = float(gamma) if isinstance(gamma, int | float) else 0.0
    kind = MemoryDesign(source, pathway, start, projections).build(backbone)
    if not isinstance(gamma, int | float):
        given = torch.as_tensor(gamma).detach()
        if kind.gamma is None or given.shape != kind.gamma.shape or not bool(torch.isfinite(given).all()):
            raise SSTError(
                f"gamma has shape {list(given.shape)}: it must be a finite number for each of "
                f"{backbone.n_layers} layers of a residual pathway",
                "for example gamma=0.1",
            )
        kind = replace(kind, gamma=given.to(kind.gamma))
    return StateStreamModel(backbone, tokenizer, choices=choices, name=name or backbone.family, kind=kind)


def key_value_width(family: str, layer: Layer) -> int:
    """Numbers per position that a layer's keys (and its values) have.

    Raises:
        SSTError: its attention does not project keys and values on their own, or not to the same width.
    """
    found = [getattr(layer.attention, name, None) for name in ("k_proj", "v_proj")]
    widths = {getattr(module, "out_features", None) for module in found}
    if None in widths or len(widths) != 1:
        raise SSTError(
            f"family {family!r} has no key/value pathway: its attention has no `k_proj` and `v_proj` alike",
            'pathway="residual" needs neither',
        )
    return int(widths.pop())


def _d_head(backbone: Backbone) -> int:
    config = backbone.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
