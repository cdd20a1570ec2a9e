"""Attaching a Latent Recurrent Transformer (`sst_interp.lrt`) to a language model in memory.

model = sst.attach_lrt(hf_model, tokenizer, pathway="both")
model.generate(["Why is the sky blue?"], iterations=4).texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sst_interp.backbone import Backbone, Layer
from sst_interp.choices import Choices
from sst_interp.errors import SSTError
from sst_interp.lrt import Memory
from sst_interp.lrt_design import MemoryDesign, Pathway, Projections
from sst_interp.model import StateStreamModel, as_weights


def build_memory(design: MemoryDesign, backbone: Backbone) -> Memory:
    """Fresh weights for a backbone.

    Raises:
        SSTError: an unknown source layer, or a key/value pathway into attention that has no `k_proj`.
    """
    n, d = backbone.n_layers, backbone.d_model
    if design.source is not None and design.source >= n:
        raise SSTError(
            f"source layer {design.source!r} does not exist: the model has {n} layers",
            f"give 0 to {n - 1}, or leave it out for the last layer after the final norm",
        )
    wide = torch.promote_types(backbone.dtype, torch.float32)
    how: dict[str, Any] = {"dtype": wide, "device": backbone.device}
    gamma = None if design.pathway == "kv" else torch.full((n,), float(design.gamma), **how)
    if design.pathway == "residual":
        return Memory(design.source, gamma)
    widths = {key_value_width(backbone.family, layer) for layer in backbone.layers}
    if len(widths) > 1:
        raise SSTError(
            f"the layers of {backbone.family!r} have keys of different widths", 'pathway="residual"'
        )
    (width,) = widths
    heads = width // _d_head(backbone)
    shape = (1 if design.projections == "shared" else n, width, d)
    gates = torch.zeros(n, 2, 2, heads, d, **how)
    return Memory(design.source, gamma, torch.zeros(shape, **how), torch.zeros(shape, **how), gates)


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
    start = gamma if isinstance(gamma, int | float) else 0.0
    kind = build_memory(MemoryDesign(source, pathway, start, projections), backbone)
    if not isinstance(gamma, int | float):
        given = as_weights("gamma", gamma, torch.float64, backbone.device)
        if kind.gamma is None or given.shape != kind.gamma.shape or not bool(torch.isfinite(given).all()):
            raise SSTError(
                f"gamma has shape {list(given.shape)}: it must be a finite number for each of "
                f"{backbone.n_layers} layers of a residual pathway",
                "for example gamma=0.1",
            )
        kind = replace(kind, gamma=given.to(kind.gamma))
    return StateStreamModel(backbone, tokenizer, choices=choices, name=name or backbone.family, kind=kind)


def attach_memory(
    model: nn.Module, memory: Memory, tokenizer: Any, choices: Choices | None, name: str
) -> StateStreamModel:
    """Attach a memory whose weights are given, as a checkpoint holds them.

    Raises:
        SSTError: they do not fit the model.
    """
    backbone = Backbone(model)
    shared = memory.key is None or len(memory.key) == 1 < backbone.n_layers
    design = MemoryDesign(memory.source, memory.pathway, 0.0, "shared" if shared else "per_layer")
    fresh = build_memory(design, backbone).weights()
    for weight, value in memory.weights().items():
        if value.shape != fresh[weight].shape or not bool(torch.isfinite(value).all()):
            raise SSTError(
                f"{name}: {weight} {list(value.shape)} must be finite numbers {list(fresh[weight].shape)}",
                "load it with the backbone it was trained on",
            )
    kind = memory.with_weights({key: value.to(fresh[key]) for key, value in memory.weights().items()})
    return StateStreamModel(backbone, tokenizer, choices=choices, name=name, kind=kind)


def key_value_width(family: str, layer: Layer) -> int:
    """Numbers per position that a layer's keys (and its values) have.

    Raises:
        SSTError: its attention does not project keys and values on their own, or not to the same width.
    """
    found = [getattr(layer.attention, name, None) for name in ("k_proj", "v_proj")]
    widths: set[Any] = {getattr(module, "out_features", None) for module in found}
    if None in widths or len(widths) != 1:
        raise SSTError(
            f"family {family!r} has no key/value pathway: its attention has no `k_proj` and `v_proj` alike",
            'pathway="residual" needs neither',
        )
    return int(widths.pop())


def _d_head(backbone: Backbone) -> int:
    config = backbone.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
