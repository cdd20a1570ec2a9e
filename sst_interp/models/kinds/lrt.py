"""The Latent Recurrent Transformer (arXiv 2605.26797) as a kind of stream: one state per position.

Memory `m` at position `t`, iteration `i`, is the source layer's output at (t, i-1), or, when i = 1, of the
last iteration at t-1; zeros at the first position. Layers read it on two pathways, each an option:

    residual:     x_l <- x_l + gamma_l * m                  # before layer l, one scalar per layer
    key/value:    k   <- g_loc * k + g_fb * (W_k m)         # before rotary embedding and QK norm
                  v   <- g'_loc * v + g'_fb * (W_v m)
                  g   =  2 sigmoid(G h)                     # h: what k and v are projected from

A gate is one number per key/value head; G starts at 0, so gates start at 1. W is shared by all layers or a
layer's own. With gamma 0 and W 0 the model is its backbone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from sst_interp.errors import SSTError, check_known
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices, shown
from sst_interp.models.families import Layer
from sst_interp.models.hooks import Visit
from sst_interp.models.kinds import kind
from sst_interp.models.stream import Kind, Reading

Pathway = Literal["residual", "kv", "both"]
Projections = Literal["shared", "per_layer"]


@dataclass(frozen=True)
class MemoryDesign:
    """The shape of a memory and its start: a training recipe's `[lrt]` table."""

    source: int | None = None
    """The layer whose output is the memory, from 0; left out, the last after the final norm."""

    pathway: Pathway = "residual"
    """Where the memory is read."""

    gamma: float = 0.0
    """Where every residual scalar starts. 0 leaves a pretrained backbone as it is; 0.1 is the published start
    for training from scratch."""

    projections: Projections = "shared"
    """Whether all layers share W_k and W_v, or have their own."""

    def __post_init__(self) -> None:
        if self.source is not None and (type(self.source) is not int or self.source < 0):
            raise SSTError(f"source layer {self.source!r} does not exist", "layers are counted from 0")
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
        check_known("key of [lrt]", values, [field.name for field in fields(cls)])
        return cls(**values)


@kind("lrt", "Latent Recurrent Transformer")
@dataclass(frozen=True, eq=False)
class Memory(Kind):
    """One source layer's output is carried; every layer reads it. A pathway that is off has no weights."""

    source: int | None = None
    """From 0; None: the last layer's output after the final norm."""
    gamma: Float[Tensor, " layer"] | None = None
    key: Float[Tensor, "layers_or_1 width d_model"] | None = None
    """W_k; one for all layers, or one each."""
    value: Float[Tensor, "layers_or_1 width d_model"] | None = None
    gates: Float[Tensor, "layer 2 2 head d_model"] | None = None
    """G by layer, (key, value) and (local, fed back)."""

    own = "memory"
    holds = (
        frozenset({"gamma"}),
        frozenset({"key", "value", "gates"}),
        frozenset({"gamma", "key", "value", "gates"}),
    )

    @classmethod
    def start(cls, backbone: Backbone, alpha: Any = None) -> Memory:
        """SSTError: a memory is trained, or attached to a model in memory."""
        raise SSTError(f"{backbone.family} has no memory", "sst.attach_lrt(hf_model, tokenizer) attaches one")

    @classmethod
    def restore(cls, weights: dict[str, Tensor], config: dict[str, Any]) -> Memory:
        """The source layer stands beside the tensors."""
        return cls(config.get("source"), **weights)

    def config(self) -> dict[str, Any]:
        """`source`."""
        return {"source": self.source}

    def fit(self, backbone: Backbone) -> Memory:
        """Weights like those of `build_memory`: their shapes and dtype, and finite."""
        shared = self.key is None or len(self.key) == 1 < backbone.n_layers
        design = MemoryDesign(self.source, self.pathway, 0.0, "shared" if shared else "per_layer")
        fresh = build_memory(design, backbone).weights()
        for weight, value in self.weights().items():
            if value.shape != fresh[weight].shape or not bool(torch.isfinite(value).all()):
                raise SSTError(
                    f"{weight} {list(value.shape)} must be finite numbers {list(fresh[weight].shape)}",
                    "load it with the backbone it was trained on",
                )
        return self.with_weights({name: value.to(fresh[name]) for name, value in self.weights().items()})

    def slots(self, backbone: Backbone) -> int:
        """One: the memory."""
        return 1

    def weights(self) -> dict[str, Tensor]:
        """Those of the pathways that are on: `gamma`; `key`, `value` and `gates`."""
        named = {"gamma": self.gamma, "key": self.key, "value": self.value, "gates": self.gates}
        return {name: value for name, value in named.items() if value is not None}

    def with_weights(self, weights: dict[str, Tensor]) -> Memory:
        """Other values of the weights that it has."""
        return replace(self, **weights)

    @property
    def pathway(self) -> Pathway:
        """Where the memory is read."""
        return "residual" if self.key is None else "kv" if self.gamma is None else "both"

    def reading(
        self, choices: Choices, state: Tensor | None, has_state: Tensor | None, visit: Visit
    ) -> Reading:
        """The memory in `state` [1, row, position, d_model]; None is a memory of zeros."""
        return _Remembering(self, None if state is None else state[0], has_state, visit)

    def next_state(
        self, backbone: Backbone, choices: Choices, resid_post: Tensor, ffn: list[Tensor]
    ) -> Float[Tensor, "1 row position d_model"]:
        """The source layer's output."""
        if self.source is None:
            return backbone.final_norm(resid_post[-1])[None]
        return resid_post[self.source : self.source + 1]

    def check(self, choices: Choices) -> None:
        """Raise SSTError for a choice that means nothing where no layer's output is blended."""
        for name in ("carry", "blend", "initial_guess"):
            if getattr(choices, name) != getattr(Choices(), name):
                raise SSTError(
                    f"choice {name} = {getattr(choices, name)!r} is about the blend, and a Latent Recurrent "
                    "Transformer has none",
                    f"leave {name} out",
                )

    def __str__(self) -> str:
        source = "the last layer" if self.source is None else f"layer {self.source}"
        return f"LRT, memory of {source}, pathway {self.pathway}"

    def label(self) -> str:
        """The source and the pathway."""
        return f"lrt:{self.source}:{','.join(sorted(self.weights()))}"

    @property
    def off(self) -> bool:
        """Every weight is 0. (Gates other than 1 change the backbone even where no memory is read.)"""
        return not any(bool(value.any()) for value in self.weights().values())


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
    config = backbone.config
    heads = width // (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    shape = (1 if design.projections == "shared" else n, width, d)
    gates = torch.zeros(n, 2, 2, heads, d, **how)
    return Memory(design.source, gamma, torch.zeros(shape, **how), torch.zeros(shape, **how), gates)


def key_value_width(family: str, layer: Layer) -> int:
    """Width of a layer's keys and of its values.

    Raises:
        SSTError: its attention does not project keys and values on their own, or not to the same width.
    """
    projections = [getattr(layer.attention, name, None) for name in ("k_proj", "v_proj")]
    widths: set[Any] = {getattr(module, "out_features", None) for module in projections}
    if None in widths or len(widths) != 1:
        raise SSTError(
            f"family {family!r} has no key/value pathway: its attention has no `k_proj` and `v_proj` alike",
            'pathway="residual" needs neither',
        )
    return int(widths.pop())


class _Remembering(Reading):
    """Reads the memory of one pass, zero where there is no state, and its projections."""

    def __init__(self, kind: Memory, m: Tensor | None, has_state: Tensor | None, visit: Visit) -> None:
        self.kind, self.visit, self.given = kind, visit, m
        self.absent = None if has_state is None else ~has_state[..., None]
        self.m = None if m is None else self._zeroed(m)
        self.fed = self._project(self.m)
        self.now = (self.m, self.fed)

    def into_layer(self, index: int, x: Tensor) -> Tensor:
        self.now = self.m, self.fed
        if self.given is not None:
            seen = self.visit("stream_state", index, self.given)
            if seen is not self.given:  # this layer alone reads another memory
                m = self._zeroed(seen)
                self.now = m, self._project(m)
        gamma, m = self.kind.gamma, self.now[0]
        if gamma is None or m is None:
            return x
        return (x + gamma[index, None] * m).to(x.dtype)

    def attention(self, index: int, layer: Layer, x: Tensor, rotary: Any, mask: Any, kv: Any) -> Tensor:
        if self.kind.gates is None:
            return layer.attention_branch(x, rotary, mask, kv)
        handles = []
        try:
            attention: Any = layer.attention
            for which, module in enumerate((attention.k_proj, attention.v_proj)):
                fed = None if self.now[1] is None else self.now[1][which]
                own = None if fed is None else fed[..., index if fed.shape[-2] > 1 else 0, :]
                gate = self.kind.gates[index, which]
                handles.append(module.register_forward_hook(_gated(gate, own)))
            return layer.attention_branch(x, rotary, mask, kv)
        finally:
            for handle in handles:
                handle.remove()

    def _zeroed(self, m: Tensor) -> Tensor:
        return m if self.absent is None else m.masked_fill(self.absent, 0)

    def _project(self, m: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(W_k m, W_v m), each [row, position, layer or 1, width]."""
        if m is None or self.kind.key is None or self.kind.value is None:
            return None
        k, v = (
            linear(m, w.flatten(0, 1).to(m.dtype)).unflatten(-1, w.shape[:2])
            for w in (self.kind.key, self.kind.value)
        )
        return k, v


def _gated(gate: Float[Tensor, "2 head d_model"], fed: Tensor | None) -> Any:
    """A hook on `k_proj` or `v_proj`: gates its output and adds the projected memory `fed`."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        h, heads = args[0], gate.shape[1]
        logits = linear(h, gate.flatten(0, 1).to(h.dtype)).to(gate.dtype).unflatten(-1, (2, heads, 1))
        local, back = (2 * torch.sigmoid(logits)).unbind(-3)
        mixed = local * out.unflatten(-1, (heads, -1))
        if fed is not None:
            mixed = mixed + back * fed.unflatten(-1, (heads, -1))
        return mixed.flatten(-2).to(out.dtype)

    return hook
