"""The twin of a backbone that TransformerLens takes apart: the same weights, other modules.

Booting a `TransformerBridge` replaces the modules of the model it is given. So it is given a copy whose
parameters are the very same tensors, and the model itself is not touched.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    detect_tokenizer_bos_eos,
)

from sst_interp.backbone import Backbone
from sst_interp.errors import SSTError
from sst_interp.model import StateStreamModel

OWN = ("resid_mid", "stream_state", "resid_blended")
"""Sites with hook points of their own. TransformerLens' `hook_resid_mid` is the input of `ln2`, which here is
what comes after the blend; and a change there would reach the FFN and not the residual."""


class Twin(NamedTuple):
    """What a `TransformerBridge` is made of."""

    hf: nn.Module
    backbone: Backbone
    """The twin's parts, validated before TransformerLens puts its own in."""
    adapter: Any
    tokenizer: Any


def twin_of(model: StateStreamModel) -> Twin:
    """A model's backbone, ready for TransformerLens.

    Raises:
        SSTError: TransformerLens has no adapter for the family.
    """
    hf: Any = same_weights(model.backbone.model)
    backbone, name = Backbone(hf), type(hf).__name__
    try:
        config = build_bridge_config_from_hf(copy.deepcopy(hf.config), name, model.name, model.backbone.dtype)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise SSTError(
            f"TransformerLens does not know {name}: {reason}", "nnsight needs no adapter"
        ) from error
    adapter.cfg.device = str(model.backbone.device)
    attention = backbone.config._attn_implementation
    adapter.prepare_model(hf)  # may ask for another attention kernel, whose bits are not the model's
    backbone.config._attn_implementation = attention
    tokenizer = copy.deepcopy(model.tokenizer)
    if tokenizer is not None:  # TransformerLens would load another one, with other special tokens
        starts, ends = detect_tokenizer_bos_eos(tokenizer)
        adapter.cfg.default_prepend_bos = adapter.cfg.tokenizer_prepends_bos = starts
        adapter.cfg.tokenizer_appends_eos = ends
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    blocks: Any = (adapter.component_mapping or {})["blocks"]
    blocks.hook_aliases = {k: v for k, v in blocks.hook_aliases.items() if k != "hook_resid_mid"}
    for site in OWN:
        setattr(blocks, f"hook_{site}", HookPoint())
    return Twin(hf, backbone, adapter, tokenizer)


def same_weights(model: nn.Module) -> nn.Module:
    """A copy of a model's modules with the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
