"""A stream of states: what is carried from token to token, one pass through the layers, and who attends to whom.

At position `t`, iteration `i`, a pass reads the states that the pass before it handed on: those of iteration
i - 1, or, when i = 1, of the last iteration at t - 1. What a state is, where it is read and what is handed on is
the business of a *kind* (`Kind`; a file each in `sst_interp.models.kinds`):

| kind | state per position | where it is read | state of a first position |
| --- | --- | --- | --- |
| `sst` | every layer's output | after attention: the blend | none: no blend |
| `lrt` | one source layer's output | before attention, and in keys and values | zeros |
| `looped` | the last layer's output | by the first layer, from iteration 2 on | none |

In which order positions are visited is the business of `sst_interp.models.solvers`. The sequential definition,
sweeps, rollouts, replay and capture know no kind: a kind has `slots` states for each row and position,
`has_state` says where there is one to read, and `run` is its pass.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.backbone import SLIDING, Backbone, Layer
from sst_interp.models.cache import Access, KeyValues
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Visit, unhooked


@dataclass(eq=False)
class Recurrence:
    """What the formula needs: a backbone, a kind of stream, and the choices the paper leaves open."""

    backbone: Backbone
    kind: Kind
    choices: Choices

    @property
    def alpha(self) -> Float[Tensor, "layer d_model"]:
        """Blend weights of a State Stream Transformer; the other kinds have none (SSTError)."""
        alpha = self.kind.weights().get("alpha")
        if alpha is None:
            raise SSTError(f"a {self.kind.words} has no alpha", "its weights are `model.kind.weights()`")
        return alpha

    @alpha.setter
    def alpha(self, alpha: Float[Tensor, "layer d_model"]) -> None:
        self.kind = self.kind.with_weights({"alpha": alpha})

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


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass through the layers: the first rows of a stream, at some columns."""

    stream: Stream
    tokens: Int[Tensor, "row position"]
    columns: Int[Tensor, " position"]
    state: Float[Tensor, "slot row position d_model"] | None
    """Incoming states; None: there are none (no blend, or a memory of zeros)."""
    has_state: Bool[Tensor, "row position"] | None
    """Where there is a state to read; None means everywhere."""
    access: Access
    """What the pass does with its keys and values."""
    visit: Visit = unhooked
    """Shown every tensor [row, position, d_model] on its way; the pass goes on with what it returns."""
    iteration: int = 1
    """Which iteration of its positions it is, from 1."""


def stack_pass(
    model: Recurrence,
    stream: Stream,
    tokens: Int[Tensor, "row position"],
    columns: Int[Tensor, " position"],
    state: Float[Tensor, "slot row position d_model"] | None,
    has_state: Bool[Tensor, "row position"] | None,
    access: Access,
    visit: Visit = unhooked,
    iteration: int = 1,
) -> tuple[Float[Tensor, "layer row position d_model"], Float[Tensor, "slot row position d_model"]]:
    """One pass of the first `len(tokens)` rows at the given columns, as the model's kind runs it.

    The arguments are the fields of `Pass`; what is returned is said at `Kind.run`.
    """
    return model.kind.run(model, Pass(stream, tokens, columns, state, has_state, access, visit, iteration))


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

    name: ClassVar[str]
    """In recipes and checkpoints; it and `words` are set by `kinds.kind`."""
    words: ClassVar[str]
    """In sentences: `State Stream Transformer`."""
    layer_by_layer: ClassVar[bool] = False
    """A layer reads no state but its own, so that layers can be solved one after the other (`layerwise`)."""
    own: ClassVar[str] = "weights of its own"
    """What a checkpoint of this kind has, and one of another kind has not."""
    holds: ClassVar[tuple[frozenset[str], ...]] = (frozenset(),)
    """The sets of tensors that a checkpoint of it can hold."""

    @classmethod
    def start(cls, backbone: Backbone, alpha: Any = None) -> Kind:
        """The kind as a backbone without a checkpoint gets it from `load(name, kind=...)`.

        Raises:
            SSTError: it has no alpha, or no weights to start with.
        """
        if alpha is not None:
            raise SSTError(f"a {cls.words} has no alpha", "leave alpha out")
        return cls()

    @classmethod
    def restore(cls, weights: dict[str, Tensor], config: dict[str, Any]) -> Kind:
        """The kind as a checkpoint holds it: its tensors, and what `config` wrote beside them."""
        return cls(**weights)

    def config(self) -> dict[str, Any]:
        """What a checkpoint has to say beside its tensors, JSON-ready."""
        return {}

    def fit(self, backbone: Backbone) -> Kind:
        """The same for this backbone: its weights checked, and cast to the dtype and device they are used in.

        Raises:
            SSTError: they do not fit.
        """
        return self

    def run(
        self, model: Recurrence, p: Pass
    ) -> tuple[Float[Tensor, "layer row position d_model"], Float[Tensor, "slot row position d_model"]]:
        """One pass; by default every layer once, from the embedding up.

        Returns:
            (resid_post, carried): each layer's output, and the states that are handed on.
        """
        backbone, choices, rows = model.backbone, model.choices, p.tokens.shape[0]
        position_ids = (p.columns[None] - p.stream.pad[:rows, None]).clamp(min=0)
        end = int(p.columns[-1]) + 1
        x = backbone.embed(p.tokens, position_ids)
        rotary = backbone.rotary(x, position_ids)
        masks = attention_masks(backbone, p.stream.pad[:rows], p.columns, end, p.access, x.dtype)
        kv = p.stream.kv.view(_as_slice(p.columns), end, p.access)
        reading, visit = self.reading(choices, p.state, p.has_state, p.visit), p.visit
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
        return resid_post, self.next_state(backbone, choices, resid_post, branches)

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
        """How a pass reads these states; the arguments are those of `Pass`."""

    @abstractmethod
    def next_state(
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
