"""The looped model as a kind of stream: some layers run again, and no state goes from token to token.

The layers are a prelude, a core and a coda; prelude and coda may be empty. Position `t`, iteration `i`; `e`
is the prelude's output (the embedding, if it has no layers), `N` a norm or nothing, `beta` the damping:

    x(t, i) = s(t, i-1)   or   s(t, i-1) + e(t)   or   W [s(t, i-1); e(t)]     # inject
    u(t, i) = (1 - beta) core(x(t, i)) + beta s(t, i-1)
    s(t, i) = N(u(t, i)),      s(t, 0) = e(t), zeros, or seeded noise           # initial
    y(t, i) = coda(N'(u(t, i)))                                                 # what is unembedded

With its defaults the whole stack is the core: the recurrence over depth of the Universal Transformer (arXiv
1807.03819) on a pretrained backbone. At depth 1 it is then the backbone, bit for bit, as is a loop over a
part of the stack without noise, norm or damping. `choices.blend = "additive"` is `inject="add"` by its older
name.

The prelude runs once. The coda runs after every iteration: what it gives is what the model says if it stops
there. Only through keys and values does depth at one position reach the next (`choices.kv`; for core and
coda):

- `last`, `first`: a position leaves one entry per layer, of that iteration;
- `each`: iteration `i` attends to entries of iteration `i`, as Universal Transformers and most public looped
  models do. This is the stack unrolled: iteration `i` of a deep run is the model of depth `i`. Where earlier
  positions have not run that often (a prompt, which is read once), they go on when a later one asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from sst_interp.errors import SSTError, check_known
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices, as_weights, shown, whole
from sst_interp.models.families import PlainModel, unsupported
from sst_interp.models.hooks import Visit, unhooked
from sst_interp.models.kinds import kind, kinds
from sst_interp.models.stream import Kind, Pass, PassInputs, Reading, Recurrence, run_layer

Range = tuple[int, int]
"""The first of some layers, and the one after the last."""
Norm = Literal["none", "final", "rms"]
"""None; the model's norm before the unembedding; an RMS norm without weights."""


@kind("looped", "depth-looped model")
@dataclass(frozen=True, eq=False)
class Looped(Kind):
    """The core's first layer reads the core's output of the iteration before, at the same position."""

    core: Range | None = None
    """The layers that run again; None: all. Those below are the prelude, those above the coda."""
    inject: Literal["none", "add", "concat"] = "none"
    """What the core reads of the prelude's output, beside the state."""
    initial: Literal["prelude", "zeros", "noise"] | None = None
    """The state before the first iteration; None: `prelude`, or `zeros` where something is injected."""
    norm: Norm = "none"
    """On the state that is carried."""
    prelude_norm: Norm = "none"
    """On the prelude's output, once."""
    coda_norm: Norm = "none"
    """On what the coda reads."""
    damping: float = 0.0
    """`beta`: how much of the state before stays, from 0 and below 1."""
    seed: int = 0
    """Of the noise, which depends on it and on the position."""
    noise: float = 1.0
    """Standard deviation of the noise: normal, cut off at three of them."""
    depth: int = 1
    """Iterations that the model was trained with; 1 if it was not."""
    adapter: Float[Tensor, "d_model twice_d_model"] | None = None
    """W of `inject="concat"`; left out, it adds the two."""
    gate: Float[Tensor, " d_model_and_bias"] | None = None
    """A trained exit gate: see `exit_probabilities`."""

    module: ClassVar[type[PlainModel] | None] = None
    """The model itself, where transformers does not know its family."""
    own = "loop of its own"
    keeps_each = True
    holds = (
        frozenset(), frozenset({"adapter"}), frozenset({"gate"}), frozenset({"adapter", "gate"}),
    )  # fmt: skip

    @classmethod
    def restore(cls, weights: dict[str, Tensor], config: dict[str, Any]) -> Looped:
        """What differs from the defaults stands in `loop`."""
        loop = dict(config.get("loop", {}))
        unknown = set(loop) - {field.name for field in fields(cls)} | (set(loop) & {"adapter", "gate"})
        if unknown:
            raise SSTError(f"a loop has no {sorted(unknown)[0]!r}", "a newer version may know it")
        if isinstance(loop.get("core"), list):
            loop["core"] = tuple(loop["core"])
        return cls(**loop, adapter=weights.get("adapter"), gate=weights.get("gate"))

    def config(self) -> dict[str, Any]:
        """`loop`: the settings that differ from the defaults."""
        names = [f for f in fields(self) if f.name not in ("adapter", "gate")]
        loop = {f.name: getattr(self, f.name) for f in names if getattr(self, f.name) != f.default}
        return {"loop": loop} if loop else {}

    def fit(self, backbone: Backbone) -> Looped:
        """Settings checked, weights in the backbone's dtype.

        Raises:
            SSTError: a setting or weight that does not fit; a backbone that loops by itself in another way.
        """
        n, d = backbone.n_layers, backbone.d_model
        hints = get_type_hints(type(self))
        for field in fields(self):
            allowed = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
            if field.name == "initial":
                allowed = ("prelude", "zeros", "noise", None)
            if allowed and getattr(self, field.name) not in allowed:
                raise SSTError(
                    f"{field.name} = {shown(getattr(self, field.name))} is not one of "
                    f"{', '.join(repr(x) for x in allowed if x is not None)}",
                    f"for example {field.name}={allowed[0]!r}",
                )
        if self.core is not None:
            span_of(n, core=self.core)
        number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if not number or not 0 <= self.damping < 1:
            raise SSTError(
                f"damping = {shown(self.damping)} is not from 0 and below 1", "for example damping=0.5"
            )
        whole("seed", self.seed, 0)
        weights = {}
        if self.inject == "concat" and self.adapter is None:
            eye = torch.eye(d, dtype=backbone.dtype, device=backbone.device)
            weights["adapter"] = torch.cat([eye, eye], 1)
        for name, shape in (("adapter", (d, 2 * d)), ("gate", (d + 1,))):
            if (given := getattr(self, name)) is None:
                continue
            weights[name] = as_weights(name, given, backbone.dtype, backbone.device)
            if tuple(weights[name].shape) != shape or not bool(torch.isfinite(weights[name]).all()):
                raise SSTError(
                    f"{name} {list(weights[name].shape)} must be finite numbers {list(shape)}",
                    "load it with the backbone it was trained on",
                )
        fitted = self.with_weights(weights)
        if backbone.loops and self.native == backbone.family:
            fitted.validate(backbone)
        return fitted

    @classmethod
    def of(cls, backbone: Backbone) -> tuple[Looped, Choices]:
        """How a model of the kind's own family loops by its config.json, and the keys and values it keeps."""
        raise NotImplementedError(cls.__name__)

    @property
    def checked(self) -> int:
        """Iterations that `validate` runs."""
        return self.depth

    def logits_of(self, backbone: Backbone, tokens: Int[Tensor, "row position"]) -> Tensor:
        """The model's own logits after `checked` iterations."""
        return backbone.model(tokens, use_cache=False).logits

    @torch.no_grad()
    def validate(self, backbone: Backbone) -> None:
        """Raise SSTError unless the loop gives the logits of a model that loops by itself, bit for bit."""
        tokens = backbone.sample_tokens()
        model = Recurrence(backbone, self, Choices(kv="each"))
        stream = model.new_stream(torch.zeros_like(tokens[:, 0]), tokens.shape[1])
        columns, state = torch.arange(tokens.shape[1], device=tokens.device), None
        resid_post = torch.zeros(())
        for i in range(1, self.checked + 1):
            p = Pass(stream, tokens, columns, state, None, "write", iteration=i)
            resid_post, state = self.run(model, p)
        ours, theirs = backbone.unembed(resid_post[-1]), self.logits_of(backbone, tokens)
        if not torch.equal(ours, theirs):
            off = f"largest difference {(ours - theirs).abs().max().item():.3g}"
            raise unsupported(backbone.family, f"the loop does not give the model's own logits ({off})")

    def span(self, n_layers: int) -> Range:
        """The core of a stack of `n_layers`."""
        return (0, n_layers) if self.core is None else self.core

    def iterated(self, n_layers: int) -> range:
        """Core and coda."""
        return range(self.span(n_layers)[0], n_layers)

    def name_of(self, iteration: int) -> str:
        """An iteration in words."""
        return f"iteration {iteration}"

    def slots(self, backbone: Backbone) -> int:
        """One, the core's output; with a prelude every layer's: those of the prelude stay what they were."""
        return 1 if self.span(backbone.n_layers)[0] == 0 else backbone.n_layers

    def weights(self) -> dict[str, Tensor]:
        """`adapter` and `gate`, if it has them."""
        named = {"adapter": self.adapter, "gate": self.gate}
        return {name: value for name, value in named.items() if value is not None}

    def with_weights(self, weights: dict[str, Tensor]) -> Looped:
        """Other values of the weights that it has."""
        return replace(self, **weights)

    def has_state(self, columns: int | Int[Tensor, " position"], origin: Tensor, iteration: int) -> Tensor:
        """From the second iteration on; the first never reads another position's state."""
        return super().has_state(columns, origin, iteration) & (iteration > 1)

    def run(
        self, model: Recurrence, p: Pass
    ) -> tuple[Float[Tensor, "layer row position d_model"], Float[Tensor, "slot row position d_model"]]:
        """The prelude if it is the first iteration, the core, and the coda."""
        at = p.inputs(model.backbone)
        if model.choices.kv != "each":
            return self.one_pass(model, p, at)
        if p.iteration > 1:
            self._catch_up(model, p)
        at = at._replace(first_entry=self._entry(model.backbone, p.iteration))
        resid_post, state = self.one_pass(model, p, at)
        self._remember(model.backbone, p, at, state)
        return resid_post, state

    def one_pass(self, model: Recurrence, p: Pass, at: PassInputs) -> tuple[Tensor, Tensor]:
        """What `run` returns, without a look at other iterations' entries."""
        backbone, (first, end) = model.backbone, self.span(model.backbone.n_layers)
        if p.iteration == 1:
            once = at if first == 0 or p.access == "write" else replace(p, access="write").inputs(backbone)
            outputs = through(backbone, range(first), at.embedded, once, p.visit)
        else:
            assert p.state is not None
            outputs = list(p.state[:first])
        e = normed(self.prelude_norm, backbone, outputs[-1] if first else at.embedded)
        s = self.first_state(p, e, model.choices)
        if p.iteration > 1 and p.state is not None and (p.has_state is None or bool(p.has_state.any())):
            carried = normed(self.norm, backbone, p.state[end - 1 if len(p.state) > 1 else 0])
            carried = p.visit("stream_state", first, carried)
            s = carried if p.has_state is None else torch.where(p.has_state[..., None], carried, s)
        outputs += self.core_outputs(model, s, e, at, p.visit)
        outputs += self.coda_outputs(backbone, outputs[-1], at, p.visit)
        resid_post = torch.stack(outputs)
        return resid_post, resid_post[end - 1 : end] if self.slots(backbone) == 1 else resid_post

    def injects(self, choices: Choices) -> str:
        """`inject`, or what `choices.blend` says by its older name."""
        return "add" if self.inject == "none" and choices.blend == "additive" else self.inject

    def core_outputs(
        self, model: Recurrence, s: Tensor, e: Tensor, at: PassInputs, visit: Visit = unhooked
    ) -> list[Tensor]:
        """The core's layers from the state and the prelude's output; the last is u, damped."""
        x, inject = s, self.injects(model.choices)
        if inject == "add":
            x = s + e
        elif inject == "concat":
            assert self.adapter is not None
            x = linear(torch.cat([s, e], dim=-1), self.adapter)
        outputs = through(model.backbone, range(*self.span(model.backbone.n_layers)), x, at, visit)
        if self.damping:
            outputs[-1] = (1 - self.damping) * outputs[-1] + self.damping * s
        return outputs

    def coda_outputs(
        self, backbone: Backbone, u: Tensor, at: PassInputs, visit: Visit = unhooked
    ) -> list[Tensor]:
        """The coda's layers, from the core's output."""
        coda = range(self.span(backbone.n_layers)[1], backbone.n_layers)
        return through(backbone, coda, normed(self.coda_norm, backbone, u) if coda else u, at, visit)

    def first_state(self, p: Pass, e: Tensor, choices: Choices) -> Tensor:
        """s(t, 0), from the prelude's output."""
        initial = self.initial or ("prelude" if self.injects(choices) == "none" else "zeros")
        if initial == "prelude":
            return e
        if initial == "zeros":
            return torch.zeros_like(e)
        position = (p.columns[None] - p.stream.pad[: len(e), None]).clamp(min=0)
        different, which = position.unique(return_inverse=True)
        table = torch.stack([_noise(self.seed, t, e.shape[-1]) for t in different.tolist()])
        return (self.noise * table).to(e)[which]

    def memory(self, backbone: Backbone) -> list[int]:
        """The slots of the state that an iteration reads of the one before."""
        first, end = self.span(backbone.n_layers)
        return [0] if first == 0 else [first - 1, end - 1]

    def _entry(self, backbone: Backbone, iteration: int) -> int:
        """Where the store keeps an iteration's entries: one per layer, and one for what it has left."""
        return (iteration - 1) * (backbone.n_layers + 1)

    def _remember(self, backbone: Backbone, p: Pass, at: PassInputs, state: Tensor) -> None:
        """Keep what a further iteration of these columns starts from, and note that this one has run."""
        left = torch.stack([*state[self.memory(backbone)], at.embedded], dim=1)
        at.kv.at(at.first_entry + backbone.n_layers).update(left, torch.ones_like(left[:, :1, :, :1]), 0)

    def _catch_up(self, model: Recurrence, p: Pass) -> None:
        """Run this iteration at earlier columns of these rows that have not run it.

        Rows may differ in what they have run. So it goes on stretch by stretch in which none does, and a row
        that has run a stretch, perhaps with edits, gets its entries back.
        """
        stream, rows, n = p.stream, len(p.tokens), model.backbone.n_layers
        first = self._entry(model.backbone, p.iteration)
        kept = stream.kv.values[first + n] if first + n < len(stream.kv.values) else None
        ran = torch.zeros(rows, stream.column, dtype=torch.bool, device=p.tokens.device)
        if kept is not None:
            ran = kept[:rows, 0, : stream.column, 0] > 0
        if bool(ran.all()):
            return
        turns = [0, *((ran[:, 1:] != ran[:, :-1]).any(0).nonzero()[:, 0] + 1).tolist(), stream.column]
        for start, end in pairwise(turns):
            had = ran[:, start]
            if bool(had.all()):
                continue
            stores = [(s, e) for s in (stream.kv.keys, stream.kv.values) for e in range(first, first + n + 1)]
            stores = [(s, e) for s, e in stores if bool(had.any()) and s[e] is not None]
            saved = [s[e][:rows, :, start:end][had] for s, e in stores]  # pyright: ignore
            self._run_late(model, p, start, end)
            for (s, e), entries in zip(stores, saved, strict=True):
                s[e][:rows, :, start:end][had] = entries  # pyright: ignore

    def _run_late(self, model: Recurrence, p: Pass, start: int, end: int) -> None:
        """Run this iteration at columns that have run the one before."""
        stream, rows, backbone = p.stream, len(p.tokens), model.backbone
        entry = self._entry(backbone, p.iteration)
        before = stream.kv.keys[entry - 1]
        assert before is not None
        *left, embedded = before[:rows, :, start:end].unbind(1)
        state = embedded.new_zeros(self.slots(backbone), *embedded.shape)
        for slot, value in zip(self.memory(backbone), left, strict=True):
            state[slot] = value
        columns = torch.arange(start, end, device=embedded.device)
        has_state = self.has_state(columns, stream.origin[:rows, None], p.iteration)
        tokens = torch.zeros_like(columns).expand(rows, -1)  # what they embed to is remembered
        late = Pass(stream, tokens, columns, state, has_state, "write", iteration=p.iteration)
        at = late.inputs(backbone)
        at = at._replace(embedded=embedded, first_entry=entry)
        self._remember(backbone, late, at, self.one_pass(model, late, at)[1])

    def exit_probabilities(
        self, backbone: Backbone, last: Float[Tensor, "*at iteration d_model"]
    ) -> Float[Tensor, "*at iteration"]:
        """With which probability a model with an exit gate stops after each iteration; they sum to 1.

        The gate says lambda_i = sigmoid(w . norm(y_i) + b), and p_i = lambda_i (1 - lambda_1) ... (1 -
        lambda_(i-1)); the last iteration takes what is left (arXiv 2510.25741).

        Args:
            last: the last layer's outputs of iterations 1, 2, ...: `replay(...).resid_post[:, :, -1]`.

        Raises:
            SSTError: it has no gate.
        """
        if self.gate is None:
            raise SSTError(f"a {self.words} without an exit gate has no exit probabilities", "Ouro has one")
        stop = torch.sigmoid(backbone.final_norm(last) @ self.gate[:-1] + self.gate[-1])
        stop = torch.cat([stop[..., :-1], torch.ones_like(stop[..., -1:])], dim=-1)
        going_on = torch.cat([torch.ones_like(stop[..., :1]), (1 - stop[..., :-1]).cumprod(-1)], dim=-1)
        return stop * going_on

    def reading(
        self, choices: Choices, state: Tensor | None, has_state: Tensor | None, visit: Visit
    ) -> Reading:
        """None: `run` reads the state."""
        return Reading()

    def next_state(
        self, backbone: Backbone, choices: Choices, resid_post: Tensor, ffn: list[Tensor]
    ) -> Float[Tensor, "slot row position d_model"]:
        """`run` hands it on."""
        raise NotImplementedError

    def check(self, choices: Choices) -> None:
        """Raise SSTError for a choice that means nothing where one state goes from the top to the bottom."""
        for name in ("carry", "initial_guess"):
            if getattr(choices, name) != getattr(Choices(), name):
                raise SSTError(
                    f"choice {name} = {getattr(choices, name)!r} is about states of single layers, and a "
                    f"{self.words} has none",
                    f"leave {name} out",
                )

    def label(self) -> str:
        """Its name, and the settings that differ from the defaults."""
        loop = self.config().get("loop")
        return self.name + (f":{json.dumps(loop, sort_keys=True)}" if loop else "")

    def __str__(self) -> str:
        loop = ", ".join(f"{key} {value}" for key, value in self.config().get("loop", {}).items())
        own = ", ".join(self.weights()) or "no weights of its own"
        return f"looped over depth{f' ({loop})' if loop else ''}, {own}"

    @property
    def off(self) -> bool:
        """Never: from the second iteration on it is not the backbone."""
        return False


def loop_of(n_layers: int, settings: Mapping[str, Any]) -> Looped:
    """A loop over a stack of `n_layers`, from `prelude`, `core`, `coda` and fields of `Looped`.

    Raises:
        SSTError: an unknown setting, or ranges that do not cut the stack.
    """
    check_known("setting of a loop", settings, SETTINGS)
    ranges = {name: settings[name] for name in PARTS if settings.get(name) is not None}
    others = {name: value for name, value in settings.items() if name not in PARTS}
    return Looped(core=span_of(n_layers, **ranges) if ranges else None, **others)


def native_kind(backbone: Backbone) -> tuple[Looped, Choices]:
    """How a backbone that loops by itself does, and the keys and values that it keeps.

    Raises:
        SSTError: no kind knows its family.
    """
    known = looping_family(backbone.family)
    if known is None:
        raise unsupported(backbone.family, "it loops in a way that no kind knows")
    return known.of(backbone)


def looping_family(model_type: str) -> type[Looped] | None:
    """The kind of a family that loops by itself, by the `model_type` of its config.json; None for others."""
    looping = [k for k in kinds().values() if issubclass(k, Looped) and k.native]
    return next((k for k in looping if k.native == model_type), None)


def span_of(
    n_layers: int, prelude: Range | None = None, core: Range | None = None, coda: Range | None = None
) -> Range:
    """The core of a stack of `n_layers`, from the parts that are given; the others fill the rest.

    Raises:
        SSTError: they are no ranges of layers that follow each other from the first to the last.
    """
    given = {"prelude": prelude, "core": core, "coda": coda}
    for name, part in given.items():
        whole_numbers = (
            isinstance(part, tuple | list) and len(part) == 2 and all(type(x) is int for x in part)
        )
        if part is not None and not (whole_numbers and 0 <= part[0] <= part[1] <= n_layers):
            raise SSTError(
                f"{name} = {shown(part)} is not a range of {n_layers} layers",
                f"the first, and the one after the last: for example core=(0, {n_layers})",
            )
    first = core[0] if core else prelude[1] if prelude else 0
    end = core[1] if core else coda[0] if coda else n_layers
    parts = (prelude or (0, first), (first, end), coda or (end, n_layers))
    if first >= end or parts != ((0, first), (first, end), (end, n_layers)):
        words = ", ".join(f"{name} {shown(part)}" for name, part in given.items() if part is not None)
        raise SSTError(
            f"{words}: they do not cut {n_layers} layers into a prelude, a core and a coda",
            f"for example prelude=(0, 1), core=(1, {n_layers})",
        )
    return first, end


def through(
    backbone: Backbone, layers: range, x: Tensor, at: PassInputs, visit: Visit = unhooked
) -> list[Tensor]:
    """The outputs of some layers, each on the one below, from `x` on."""
    outputs = []
    for index in layers:
        x, _ = run_layer(backbone.layers[index], index, x, at, Reading(), visit)
        outputs.append(x)
    return outputs


PARTS = ("prelude", "core", "coda")
SETTINGS = (*PARTS, *(field.name for field in fields(Looped) if field.name != "core"))
"""What a recipe's `[loop]` and `attach_looped` take."""


def normed(norm: Norm, backbone: Backbone, x: Tensor) -> Tensor:
    """A state or output under one of the norms."""
    if norm == "final":
        return backbone.final_norm(x)
    if norm == "rms":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return x


@lru_cache(maxsize=65536)
def _noise(seed: int, position: int, width: int) -> Float[Tensor, " width"]:
    """Standard normal noise of one position, cut off at 3: the same in any batch and on any device."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + position)
    return torch.nn.init.trunc_normal_(torch.empty(width), 0, 1, -3, 3, generator=generator)
