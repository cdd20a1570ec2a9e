"""A stream of states: what is carried from token to token, and one pass through the layers that reads it.

At position `t`, iteration `i`, a pass reads the states that the pass before it handed on: those of iteration
i - 1, or, when i = 1, of the last iteration at t - 1. A *kind* (`Kind`; one file each in `models.kinds`) says
what a state is, where it is read, what is handed on and which layers run:

| kind | state per position | where it is read | state of a first position |
| --- | --- | --- | --- |
| `sst` | every layer's output | after attention: the blend | none: no blend |
| `lrt` | one source layer's output | before attention, and in keys and values | zeros |
| `looped` | the core's output | by the core's first layer, from iteration 2 on | none |

`sst_interp.models.solvers` decides in which order positions are visited, and knows no kind.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.cache import Access, KeyValues, View
from sst_interp.models.choices import Choices
from sst_interp.models.families import SLIDING, Layer
from sst_interp.models.hooks import Visit, unhooked


@dataclass
class Stream:
    """Everything a batch of sequences carries from one token to the next.

    Columns count from the left edge of the batch, padding included: row `r` holds its tokens in columns
    `pad[r], pad[r] + 1, ...`, so all rows decode at the same column.
    """

    kv: KeyValues
    state: Float[Tensor, "slot row d_model"]
    """The states that the last iteration at the last position handed on; `Kind.slots` of them per row."""
    pad: Int[Tensor, " row"]
    """Columns of left padding. Pads are never attended to, have no state and hand none on."""
    origin: Int[Tensor, " row"]
    """First column that takes part in the recurrence: after `pad` if the prompt was read without blend."""
    column: int = 0
    """The next column to fill."""
    _latest: tuple[Tensor, int] | None = None

    @property
    def latest(self) -> int:
        """The largest `origin`: past it every row takes part. Waits for the device once per `origin`."""
        if self._latest is None or self._latest[0] is not self.origin:
            self._latest = self.origin, int(self.origin.max())
        return self._latest[1]

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.pad.shape[0]

    def take(self, rows: Int[Tensor, " row"]) -> Stream:
        """An independent copy of these rows, in this order; a row may be named several times."""
        state, pad, origin = self.state[:, rows], self.pad[rows], self.origin[rows]
        return Stream(self.kv.take(rows), state, pad, origin, self.column)

    def repeat(self, times: int) -> Stream:
        """An independent copy with every row `times` over: rows 0..R-1, 0..R-1, ..."""
        return self.take(torch.arange(self.rows, device=self.pad.device).repeat(times))


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
    """Whether the pass stores its keys and values, and which it attends to."""
    visit: Visit = unhooked
    """Is shown every tensor [row, position, d_model]; the pass goes on with what it returns."""
    iteration: int = 1
    """Which iteration of its positions it is, from 1."""
    span: range | None = None
    """The same columns as the host knows them; None: it waits for the device to learn them."""

    def inputs(self, backbone: Backbone) -> PassInputs:
        """The embedded tokens, and all that attention needs beside a residual."""
        pad = self.stream.pad[: len(self.tokens)]
        position_ids = (self.columns[None] - pad[:, None]).clamp(min=0)
        span = _span(self.columns) if self.span is None else self.span
        end = (int(self.columns[-1]) if span is None else span[-1]) + 1
        at = slice(span.start, span.stop) if span is not None and span.step == 1 else self.columns
        x = backbone.embed(self.tokens, position_ids)
        rotary = backbone.rotary(x, position_ids)
        masks = attention_masks(backbone, pad, self.columns, end, self.access, x.dtype)
        return PassInputs(x, rotary, masks, self.stream.kv.view(at, end, self.access))


class PassInputs(NamedTuple):
    """What the layers of one pass start from."""

    embedded: Float[Tensor, "row position d_model"]
    rotary: dict[str, Any]
    """By layer kind, as `Backbone.rotary` gives them."""
    masks: dict[str, Tensor | None]
    """By layer kind, as `attention_masks` gives them."""
    kv: View
    first_entry: int = 0
    """Where the store keeps the keys and values of layer 0; those of the others follow."""


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
    own entry on the diagonal. None stands for plain causal attention over everything, the kernels' fast path
    and the one the backbone itself takes. The lowest number is float32's at most: eager attention takes its
    softmax in float32, and a row of -inf (a pad) would be NaN.
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


def _span(columns: Tensor) -> range | None:
    """Neighbouring columns as a range: written without an index kernel."""
    first, last = int(columns[0]), int(columns[-1])
    return range(first, last + 1) if last - first + 1 == len(columns) else None


def access_of(kv: str, iteration: int, last: bool) -> Access:
    """How a pass uses its keys and values under `Choices.kv`.

    Args:
        iteration: of the pass, from 1.
        last: whether no further iteration of its positions follows, or none is computed beside it.
    """
    if kv == "first":
        return "write" if iteration == 1 else "read"
    return "write" if last or kv == "each" else "beside"


class Reading:
    """How one pass reads its states, layer by layer. This one reads nothing: the backbone."""

    def into_layer(self, index: int, x: Tensor) -> Tensor:
        """The residual that layer `index` reads, from the output `x` of the layer below."""
        return x

    def attention(self, index: int, layer: Layer, x: Tensor, rotary: Any, mask: Any, kv: Any) -> Tensor:
        """What the layer's attention adds to the residual."""
        return layer.attention_branch(x, rotary, mask, kv)

    def after_attention(self, index: int, m: Tensor) -> Tensor:
        """The residual that the FFN reads and adds to, from the one after attention."""
        return m


def run_layer(
    layer: Layer,
    index: int,
    x: Float[Tensor, "row position d_model"],
    at: PassInputs,
    reading: Reading,
    visit: Visit,
) -> tuple[Float[Tensor, "row position d_model"], Float[Tensor, "row position d_model"]]:
    """Layer `index` on the output `x` of the layer below: (its output, what its FFN adds).

    Where both branches read the same residual, there is none between them, and no `resid_mid` to visit.
    """
    x = visit("resid_pre", index, reading.into_layer(index, x))
    kv = at.kv.at(at.first_entry + index)
    branch = reading.attention(index, layer, x, at.rotary[layer.kind], at.masks[layer.kind], kv)
    branch = visit("attn_out", index, branch)
    if layer.parallel:
        ffn = visit("mlp_out", index, layer.ffn_branch(x))
        return visit("resid_post", index, ffn + branch + x), ffn
    m = visit("resid_mid", index, layer.add_attention(x, branch))
    m = visit("resid_blended", index, reading.after_attention(index, m))
    ffn = visit("mlp_out", index, layer.ffn_branch(m))
    return visit("resid_post", index, layer.add_ffn(m, ffn)), ffn


class Kind(ABC):
    """A kind of stream: the weights with which states are read, and the formula."""

    name: ClassVar[str]
    """In recipes and checkpoints; set by `kinds.kind`, as `words` is."""
    words: ClassVar[str]
    """In sentences: `State Stream Transformer`."""
    layer_by_layer: ClassVar[bool] = False
    """Whether a layer reads no state but its own, so that one layer can be solved after the other."""
    keeps_each: ClassVar[bool] = False
    """Whether its iterations can keep their own keys and values (`Choices.kv = "each"`)."""
    native: ClassVar[str] = ""
    """The `model_type` of the models that iterate in this way by themselves, in their config.json."""
    own: ClassVar[str] = "weights of its own"
    """What only checkpoints of this kind have, in errors."""
    holds: ClassVar[tuple[frozenset[str], ...]] = (frozenset(),)
    """The sets of tensors that a checkpoint may hold."""

    @classmethod
    def start(cls, backbone: Backbone, alpha: Any = None) -> Kind:
        """The kind for a backbone without a checkpoint (`load(name, kind=...)`).

        Raises:
            SSTError: it has no alpha, or no weights to start with.
        """
        if alpha is not None:
            raise SSTError(f"a {cls.words} has no alpha", "leave alpha out")
        return cls()

    @classmethod
    def restore(cls, weights: dict[str, Tensor], config: dict[str, Any]) -> Kind:
        """The kind of a checkpoint, from its tensors and the entries of `config()` beside them."""
        return cls(**weights)

    def config(self) -> dict[str, Any]:
        """What a checkpoint holds beside its tensors, JSON-ready."""
        return {}

    def fit(self, backbone: Backbone) -> Kind:
        """A copy for this backbone: weights checked, and cast to the dtype and device they are used in.

        Raises:
            SSTError: they do not fit.
        """
        return self

    def check(self, choices: Choices) -> None:  # noqa: B027 (a kind may take all of them)
        """Raise SSTError for choices that it cannot make."""

    @abstractmethod
    def slots(self, backbone: Backbone) -> int:
        """States per row and position."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Its own weights by name, as a checkpoint holds them."""

    @abstractmethod
    def with_weights(self, weights: dict[str, Tensor]) -> Kind:
        """A copy with these weights."""

    def has_state(self, columns: int | Int[Tensor, " position"], origin: Tensor, iteration: int) -> Tensor:
        """Where a pass has a state to read: from the iteration before, or, in the first, the position before.

        Args:
            columns: of the positions that the pass computes.
            origin: first column that takes part in the recurrence, [row] or [row, 1].
            iteration: of the pass, from 1.
        """
        return origin < columns if iteration == 1 else origin <= columns

    def run(
        self, model: Recurrence, p: Pass
    ) -> tuple[Float[Tensor, "layer row position d_model"], Float[Tensor, "slot row position d_model"]]:
        """One pass: here every layer once, from the embedding up.

        A kind that runs other layers overrides it. It must return an output for every layer all the same (of
        a layer that does not run again, the one that it had), and may depend on `p.iteration`.

        Returns:
            (resid_post, carried): each layer's output, and the states that are handed on.
        """
        backbone, choices = model.backbone, model.choices
        at = p.inputs(backbone)
        reading = self.reading(choices, p.state, p.has_state, p.visit)
        x, outputs, branches = at.embedded, [], []
        for index, layer in enumerate(backbone.layers):
            x, ffn = run_layer(layer, index, x, at, reading, p.visit)
            outputs.append(x)
            if choices.carry == "ffn_output":
                branches.append(ffn)
        resid_post = torch.stack(outputs)
        return resid_post, self.next_state(backbone, choices, resid_post, branches)

    @abstractmethod
    def reading(
        self,
        choices: Choices,
        state: Float[Tensor, "slot row position d_model"] | None,
        has_state: Bool[Tensor, "row position"] | None,
        visit: Visit,
    ) -> Reading:
        """How a pass reads these states; the arguments are fields of `Pass`."""

    @abstractmethod
    def next_state(
        self,
        backbone: Backbone,
        choices: Choices,
        resid_post: Float[Tensor, "layer row position d_model"],
        ffn: list[Tensor],
    ) -> Float[Tensor, "slot row position d_model"]:
        """The states that a pass hands on; `ffn` holds the FFN branches if `choices.carry` asks for them."""

    @property
    @abstractmethod
    def off(self) -> bool:
        """Whether no state can change anything: the plain backbone at every depth."""

    def label(self) -> str:
        """What its weights do not say, for `digest`."""
        return ""

    def to(self, dtype: torch.dtype) -> Kind:
        """A copy with weights of this dtype."""
        return self.with_weights({name: value.to(dtype) for name, value in self.weights().items()})

    def like(self, other: Kind) -> bool:
        """Whether the two are the same stream, in the dtype of the other."""
        ours, theirs = self.weights(), other.weights()
        if self.label() != other.label() or ours.keys() != theirs.keys():
            return False
        return all(torch.equal(w.to(theirs[name]), theirs[name]) for name, w in ours.items())

    def iterated(self, n_layers: int) -> range:
        """The layers whose output an iteration can change: the ones that a run compares."""
        return range(n_layers)

    def digest(self) -> str:
        """sha256 of its label and weights: tells two streams on one backbone apart."""
        digest = hashlib.sha256(self.label().encode())
        for _, value in sorted(self.weights().items()):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(eq=False)
class Recurrence:
    """What the formula needs: a backbone, a kind of stream, and the choices the paper leaves open."""

    backbone: Backbone
    kind: Kind
    choices: Choices

    def __post_init__(self) -> None:
        if self.choices.kv == "each" and not self.kind.keeps_each:
            raise SSTError(
                f"choice kv = 'each': a {self.kind.words} hands its states to the next position, and its "
                "iterations share their keys and values",
                "kv = 'last' or 'first'",
            )
        family = self.backbone.family
        if self.kind.native != (family if self.backbone.loops else ""):
            loops = "loops by itself" if self.backbone.loops else "does not loop by itself"
            raise SSTError(
                f"a model of family {family!r} {loops}: it is no {self.kind.words}",
                "sst.attach_looped(model) takes a model that loops by itself as it does",
            )

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
    span: range | None = None,
) -> tuple[Float[Tensor, "layer row position d_model"], Float[Tensor, "slot row position d_model"]]:
    """`Kind.run` of the model's kind; the arguments are the fields of `Pass`."""
    p = Pass(stream, tokens, columns, state, has_state, access, visit, iteration, span)
    return model.kind.run(model, p)
