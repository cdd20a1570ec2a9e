"""The state stream: the blend, the state update, and one pass through the layer stack.

Layer `l`, position `t`, iteration `i` (arXiv 2605.00206, section 3):

    m  = x + Attention(norm1(x))             # resid_mid
    m~ = (1 - alpha_l) * m + alpha_l * s_l   # the blend
    y  = m~ + FFN(norm2(m~))                 # resid_post
    s_l <- y                                 # the state carried on

`s_l` comes from (t, i-1) when i > 1, else from the last iteration at t-1. No state yet, no blend.
This is one kind of stream (`sst_interp.models.stream`); `sst_interp.models.kinds.lrt` and `sst_interp.models.kinds.looped` have the others. This
module knows the formula and who attends to whom; in which order positions are visited is the business of
`sequential`, `layerwise` and `sweeps`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.backbone import SLIDING, Backbone
from sst_interp.models.cache import Access, KeyValues
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Visit, unhooked
from sst_interp.models.kinds.sst import LayerBlend

if TYPE_CHECKING:
    from sst_interp.models.backbone import Backbone, Layer
    from sst_interp.models.choices import Choices


@dataclass(eq=False)
class Recurrence:
    """What the formula needs: a backbone, a kind of stream, and the choices the paper leaves open."""

    backbone: Backbone
    kind: Kind
    choices: Choices

    @property
    def alpha(self) -> Float[Tensor, "layer d_model"]:
        """Blend weights of a State Stream Transformer; the other kinds have none (SSTError)."""
        if not isinstance(self.kind, LayerBlend):
            raise SSTError(
                f"a {NAMES[self.kind.name]} has no alpha", "its weights are `model.kind.weights()`"
            )
        return self.kind.alpha

    @alpha.setter
    def alpha(self, alpha: Float[Tensor, "layer d_model"]) -> None:
        self.kind = LayerBlend(alpha)

    def new_stream(self, pad: Int[Tensor, " row"], columns: int) -> Stream:
        """An empty stream with room for `columns` tokens per row, `pad` of them padding on the left.

        Raises:
            SSTError: the model was put into training mode and has dropout.
        """
        b = self.backbone
        b.refuse_dropout()
        state = torch.zeros(self.kind.slots(b), len(pad), b.d_model, dtype=b.dtype, device=b.device)
        return Stream(KeyValues(b.n_layers, columns), state, pad, pad.clone())


@dataclass
class Stream:
    """Everything a batch of sequences carries from one token to the next.

    Columns count from the left edge of the batch, padding included: row `r` holds its tokens in columns
    `pad[r], pad[r] + 1, ...`, so all rows decode at the same column.
    """

    kv: KeyValues
    state: Float[Tensor, "slot row d_model"]
    """What the last iteration at the last position handed on: s_l, a slot per layer (or the memory: one)."""
    pad: Int[Tensor, " row"]
    """Columns of left padding. Pads are never attended to, have no state and hand none on."""
    origin: Int[Tensor, " row"]
    """First column that takes part in the recurrence: there is no state before it. `pad`, unless the
    prompt was read with the blend off."""
    column: int = 0
    """The next column to fill."""

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.pad.shape[0]

    def repeat(self, times: int) -> Stream:
        """An independent copy with every row `times` over: rows 0..R-1, 0..R-1, ..."""
        return Stream(
            self.kv.repeat(times),
            self.state.repeat(1, times, 1),
            self.pad.repeat(times),
            self.origin.repeat(times),
            self.column,
        )


def stack_pass(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, "row position"],
    columns: Int[Tensor, " position"],
    state: Float[Tensor, "slot row position d_model"] | None,
    has_state: Bool[Tensor, "row position"] | None,
    access: Access,
    visit: Visit = unhooked,
) -> tuple[Float[Tensor, "layer row position d_model"], Float[Tensor, "slot row position d_model"]]:
    """One pass of the first `len(tokens)` rows through all layers at the given columns.

    Args:
        state: incoming states; None: there are none (no blend, or a memory of zeros).
        has_state: where there is a state to read; None means everywhere.
        access: what the pass does with its keys and values.
        visit: shown every tensor [row, position, d_model] on its way; the pass goes on with what it returns.

    Returns:
        (resid_post, carried): each layer's output, and the states that are handed on.
    """
    backbone, choices, rows = model.backbone, model.choices, tokens.shape[0]
    position_ids = (columns[None] - stream.pad[:rows, None]).clamp(min=0)
    end = int(columns[-1]) + 1
    x = backbone.embed(tokens, position_ids)
    rotary = backbone.rotary(x, position_ids)
    masks = attention_masks(backbone, stream.pad[:rows], columns, end, access, x.dtype)
    kv = stream.kv.view(_as_slice(columns), end, access)
    reading = model.kind.reading(choices, state, has_state, visit)
    outputs, branches = [], []
    for index, layer in enumerate(backbone.layers):
        x = visit("resid_pre", index, reading.into_layer(index, x))
        branch = reading.attention(index, layer, x, rotary[layer.kind], masks[layer.kind], kv)
        m = visit("resid_mid", index, x + visit("attn_out", index, branch))
        m = visit("resid_blended", index, reading.after_attention(index, m))
        ffn = visit("mlp_out", index, layer.ffn_branch(m))
        x = visit("resid_post", index, m + ffn)
        outputs.append(x)
        if choices.carry == "ffn_output":
            branches.append(ffn)
    resid_post = torch.stack(outputs)
    return resid_post, model.kind.handed_on(backbone, choices, resid_post, branches)


def attention_masks(
    backbone: Backbone,
    pad: Int[Tensor, " row"],
    columns: Int[Tensor, " position"],
    end: int,
    access: Access,
    dtype: torch.dtype,
) -> dict[str, Tensor | None]:
    """Additive masks [row, 1, position, key] by layer kind: 0 where a query may look, else the lowest number.

    With `beside` the keys are `[store | own]`: a query sees the store strictly before its column, and its
    own entry on the diagonal. None stands for "plain causal over everything", the attention kernels' fast
    path and the one the backbone itself takes. The lowest number is float32's at most: eager attention takes
    its softmax in float32, and a row of -inf (a pad) would be NaN.
    """
    n, device = len(columns), pad.device
    whole = n == end and access == "write" and n > 1 and not bool(pad.any())
    key = torch.arange(end, device=device)
    distance = columns[:, None] - key[None]
    causal = distance > 0 if access == "beside" else distance >= 0
    real = key[None] >= pad[:, None]
    own = torch.eye(n, dtype=torch.bool, device=device)
    masks: dict[str, Tensor | None] = {}
    for kind in {layer.kind for layer in backbone.layers}:
        window = backbone.window if kind == SLIDING else None
        narrow = window is not None and end > window
        if whole and not narrow and backbone.config._attn_implementation == "sdpa":
            masks[kind] = None
            continue
        near = causal if window is None else causal & (distance < window)
        seen = (near[None] & real[:, None])[:, None]
        if access == "beside":
            seen = torch.cat([seen, own.expand(len(pad), 1, n, n)], dim=-1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        masks[kind] = mask.masked_fill_(~seen, max(torch.finfo(dtype).min, torch.finfo(torch.float32).min))
    return masks


def _as_slice(columns: Tensor) -> Tensor | slice:
    """Neighbouring columns as a slice: written without an index kernel."""
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns


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
