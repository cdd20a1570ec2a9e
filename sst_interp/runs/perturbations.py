"""Norm-matched perturbations, and the noise floor under every comparison of states.

The argmax is a function of the last layer's state, so that it changes where the state does is partly true by
construction. The null: any change of that norm would do as much. For one question, alone, on depth 1's text,
the change from state a to state b is replaced, position by position, by others of the same norm:

- teacher-forced: a is depth 1's pass, b is depth b's last iteration, for every depth b > 1.
- `within`: a is iteration 1 of the deepest pass, b is its iteration b, for every b > 1.

A perturbation n is put in at one of two sites:

- `output`: y_L(a) + n is unembedded, with |n| = |y_L(b) - y_L(a)|. This part holds by construction.
- `stream`: a's pass is run again with s_l(a) + n_l in every layer l, |n_l| = |s_l(b) - s_l(a)|, for the
  deepest b. Token, position and the cache of earlier positions stay a's. Iterating acts on a position by the
  stream alone; a depth-looped model has none, and no such site.

The direction of n is `true` (y(b) or s(b) itself), `random` (isotropic) or `elsewhere` (of the difference at
another position of the text). Every output is compared with a's own, run in the same shape.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from sst_interp.models.backbone import Backbone
from sst_interp.models.cache import Access, KeyValues
from sst_interp.models.measures import Readout, compare_outputs, cosine, read_out, relative_l2, wide
from sst_interp.models.solvers import prefill
from sst_interp.models.solvers.sequential import Iteration, advance
from sst_interp.models.stream import Recurrence, Stream, stack_pass
from sst_interp.runs.recorder import compare_states


class Rereading:
    """Given texts, read again position by position, at several depths side by side.

    Args:
        tokens: [question, column] prompts, with `pad` columns of padding on the left.
        texts: the tokens that were emitted after each prompt; a shorter text is filled up at its end, and
            what is read there means nothing.
        depths: each is a rollout; the deepest comes first.

    Iterating reads one position and gives (incoming, iterations): the states handed in from the position
    before, [layer, row, d_model], and what `advance` returns. Row `rollout * questions + question`.
    """

    def __init__(
        self,
        model: Recurrence,
        tokens: Int[Tensor, "question column"],
        pad: Int[Tensor, " question"],
        texts: Sequence[Sequence[int]],
        depths: Sequence[int],
    ) -> None:
        self.model, self.depths = model, sorted(depths, reverse=True)
        self.questions, self.length = len(texts), max(map(len, texts))
        read = [[*text, *[text[-1]] * (self.length - len(text))][:-1] for text in texts]
        new = torch.tensor(read, dtype=tokens.dtype, device=tokens.device).view(self.questions, -1)
        self.inputs = torch.cat([tokens[:, -1:], new], dim=1)
        """[question, position] the token that each position reads."""
        stream = model.new_stream(pad, tokens.shape[1] + self.length - 1)
        with torch.no_grad():
            prefill(model, stream, tokens[:, :-1])
        self.stream = stream.repeat(len(self.depths))
        """Where the reading stands."""

    def rows(self, depth: int) -> slice:
        """The rows of one depth's rollout."""
        first = self.depths.index(depth) * self.questions
        return slice(first, first + self.questions)

    def last(self, iterations: list[Iteration], depth: int) -> Float[Tensor, "layer question d_model"]:
        """Layer outputs of a rollout's last iteration."""
        return iterations[depth - 1].resid_post[:, self.rows(depth)]

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "layer row d_model"], list[Iteration]]]:
        per_row = torch.tensor(self.depths).repeat_interleave(self.questions)
        for position in range(self.length):
            incoming = self.stream.state.clone()
            with torch.no_grad():
                read = self.inputs[:, position].repeat(len(self.depths))
                iterations = advance(self.model, self.stream, read, per_row)
            yield incoming, iterations


class _Float32(nn.Module):
    """A weight in float32, made anew whenever it is read, and forgotten."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(torch.float32)


class _Upcast(Backbone):
    """A backbone whose weights are read as float32."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def in_float32(model: Recurrence, whole: bool = True) -> Recurrence:
    """The same weights and stream in float32; nothing is loaded. The results have the same bytes either way.

    Args:
        whole: make a copy in memory. Otherwise a weight is upcast when a layer reads it, and let go: slower,
            and never more than one of them is there.
    """
    kind = model.kind.to(torch.float32)
    if whole:
        upcast = copy.deepcopy(model.backbone.model).to(torch.float32)
        return Recurrence(Backbone(upcast), kind, model.choices)
    shared = {id(weight): weight for weight in model.backbone.model.parameters()}
    upcast = copy.deepcopy(model.backbone.model, shared)
    for module in list(upcast.modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                module.register_buffer(name, buffer.to(torch.float32))
        for name, _ in list(module.named_parameters(recurse=False)):
            register_parametrization(module, name, _Float32(), unsafe=True)
    return Recurrence(_Upcast(upcast), kind, model.choices)


def noise_rows(
    question: int,
    kind: str,
    depth: int,
    a: Float[Tensor, "position layer d_model"],
    b: Float[Tensor, "position layer d_model"],
) -> dict[str, np.ndarray]:
    """Rows of `noise`: states as they were captured (`a`) against the same ones computed anew (`b`)."""
    positions, layers, _ = a.shape
    n = positions * layers
    return {
        "question": np.full(n, question, np.int32),
        "kind": np.full(n, kind),
        "depth": np.full(n, depth, np.int8),
        "position": np.repeat(np.arange(positions, dtype=np.int16), layers),
        "layer": np.tile(np.arange(layers, dtype=np.int16), positions),
        **{name: x.reshape(-1).cpu().numpy() for name, x in compare_states(a, b).items()},
    }


SEEDS = 3
"""Perturbations per change and direction. Every b has the same random directions: only their norms differ."""


@dataclass
class Alone:
    """One question's depth-1 text, read alone at every depth."""

    reading: Rereading
    incoming: Float[Tensor, "row layer position d_model"]
    """What each rollout's first iteration was handed from the position before."""
    last: dict[tuple[int, int], Float[Tensor, "position d_model"]]
    """By (depth, iteration): the last layer's outputs."""
    resid_post: dict[int, Float[Tensor, "position layer d_model"]]
    """By depth, 1 and the deepest: all layers' outputs of the last iteration."""

    @property
    def columns(self) -> Int[Tensor, " position"]:
        """The column of each position."""
        stream = self.reading.stream
        return torch.arange(stream.column - self.reading.length, stream.column, device=stream.pad.device)

    def rollout(self, depth: int) -> Stream:
        """One depth's stream, a view."""
        whole, rows = self.reading.stream, self.reading.rows(depth)
        kv = KeyValues(len(whole.kv.keys), whole.kv.columns)
        kv.keys = [k if k is None else k[rows] for k in whole.kv.keys]
        kv.values = [v if v is None else v[rows] for v in whole.kv.values]
        return Stream(kv, whole.state[:, rows], whole.pad[rows], whole.origin[rows], whole.column)


def read_alone(model: Recurrence, prompt: Sequence[int], text: Sequence[int], depths: Sequence[int]) -> Alone:
    """Read one prompt and the text after it in a batch of its own: a row per depth."""
    device = model.backbone.device
    tokens = torch.tensor([list(prompt)], device=device)
    reading = Rereading(model, tokens, torch.zeros(1, dtype=torch.long, device=device), [text], depths)
    deepest, incoming = max(depths), []
    last: dict[tuple[int, int], list[Tensor]] = {}
    whole: dict[int, list[Tensor]] = {}
    for state, iterations in reading:
        incoming.append(state.transpose(0, 1))
        for depth in depths:
            for i in range(1 if depth == deepest else depth, depth + 1):
                row = iterations[i - 1].resid_post[-1, reading.rows(depth)][0]
                last.setdefault((depth, i), []).append(row)
        for depth in {1, deepest}:
            whole.setdefault(depth, []).append(reading.last(iterations, depth)[:, 0])
    return Alone(
        reading,
        torch.stack(incoming, dim=2),
        {key: torch.stack(rows) for key, rows in last.items()},
        {depth: torch.stack(states) for depth, states in whole.items()},
    )


class Perturbation(NamedTuple):
    """One direction for every position of a text."""

    direction: str
    seed: int
    n: Float[Tensor, "layer position d_model"]
    there: Bool[Tensor, " position"]
    """Where it exists: the place that it is taken from must have a change."""


def perturbations_of(
    change: Float[Tensor, "layer position d_model"], key: Sequence[object]
) -> Iterator[Perturbation]:
    """Vectors of the norms of `change`, layer by layer, in other directions. `key` decides all of them."""
    layers, positions, d = change.shape
    size = change.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(change.dtype).tiny

    def turned(towards: Tensor) -> Tensor:
        return towards / towards.norm(dim=-1, keepdim=True).clamp_min(tiny) * size

    for seed in range(SEEDS):
        normal = torch.randn(positions, layers, d, generator=generator(*key, "random", seed))
        towards = normal.transpose(0, 1).to(change)
        yield Perturbation("random", seed, turned(towards), torch.ones_like(size[0, :, 0], dtype=torch.bool))
    offsets = torch.randperm(max(positions - 1, 0), generator=generator(*key, "elsewhere")) + 1
    for seed, offset in enumerate(offsets[:SEEDS].tolist()):
        towards = change.roll(offset, dims=1)
        there = ((towards.norm(dim=-1) > 0) | (size[..., 0] == 0)).all(dim=0)
        yield Perturbation("elsewhere", seed, turned(towards), there)


def generator(*key: object) -> torch.Generator:
    """Random numbers that depend on the key and on nothing else: not on batches, sessions or devices."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def perturbation_rows(model: Recurrence, alone: Alone, question: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of `nudges` for one question, in pieces: columns of docs/run-format.md.

    Args:
        question: its index in the run; with `seed` it decides every random direction.
    """
    deepest = alone.reading.depths[0]
    depths = [d for d in reversed(alone.reading.depths) if d > 1]
    for comparison, a, bs in (
        ("teacher_forced", (1, 1), [(d, d) for d in depths]),
        ("within", (deepest, 1), [(deepest, i) for i in range(2, deepest + 1)]),
    ):
        key = (seed, question, comparison)
        for b in bs:
            where = {"question": question, "comparison": comparison, "b": b[1], "site": "output"}
            yield from _at_output(model, alone.last[a], alone.last[b], (*key, "output"), where)
        if depths:
            where = {"question": question, "comparison": comparison, "b": deepest, "site": "stream"}
            yield from _at_stream(model, alone, comparison, (*key, "stream"), where)


def _at_output(
    model: Recurrence, a: Tensor, b: Tensor, key: tuple[object, ...], where: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The last layer's output moved from `a` towards `b`, and as far in other directions; [position, d]."""
    positions = torch.arange(len(a), device=a.device)
    before = read_out(model.backbone.unembed(a))
    change = (wide(b) - wide(a))[None]
    size = change[0].norm(dim=-1) / wide(a).norm(dim=-1)
    true = Perturbation("true", 0, change, torch.ones_like(positions, dtype=torch.bool))
    for each in (true, *perturbations_of(change, key)):
        moved = b if each.direction == "true" else (wide(a) + each.n[0]).to(a.dtype)
        after = read_out(model.backbone.unembed(moved))
        yield _rows(where, each, positions, size, a[None], moved[None], before, after)


def _at_stream(
    model: Recurrence, alone: Alone, comparison: str, key: tuple[object, ...], where: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One pass handed other stream states, at all positions at once: each attends to the stored entries
    of earlier positions and to its own, and nothing is stored.
    """
    deepest = alone.reading.depths[0]
    of_a = 1 if comparison == "teacher_forced" else deepest
    thinking, rollout = alone.rollout(deepest), alone.rollout(of_a)
    columns, tokens = alone.columns, alone.reading.inputs
    at = model.kind.has_state(columns, rollout.origin, 1).nonzero()[:, 0]  # where one is handed in
    if not len(at):
        return
    handed = alone.incoming[:, :, at]
    # A later iteration attends to the entry that the first one left, if that is the one that is kept.
    frozen = model.choices.kv == "first" and comparison == "within"

    def one_pass(stream: Stream, state: Tensor, access: Access) -> tuple[Tensor, Tensor]:
        at_once = (tokens[:, at], columns[at], state[:, None], None, access)
        resid_post, carried = stack_pass(model, stream, *at_once)
        return resid_post[:, 0], carried[:, 0]

    b = handed[alone.reading.rows(deepest)][0]
    for _ in range(deepest - 1):
        b = one_pass(thinking, b, "read" if model.choices.kv == "first" else "beside")[1]
    a = handed[alone.reading.rows(of_a)][0]
    change = wide(b) - wide(a)
    size = (change.norm(dim=-1) / wide(a).norm(dim=-1)).median(dim=0).values
    y = one_pass(rollout, a, "read" if frozen else "beside")[0]
    before = read_out(model.backbone.unembed(y[-1]))
    true = Perturbation("true", 0, change, torch.ones_like(at, dtype=torch.bool))
    for each in (true, *perturbations_of(change, key)):
        state = b if each.direction == "true" else (wide(a) + each.n).to(a.dtype)
        moved = one_pass(rollout, state, "read" if frozen else "beside")[0]
        after = read_out(model.backbone.unembed(moved[-1]))
        yield _rows(where, each, at, size, y, moved, before, after)


def _rows(
    where: dict[str, Any],
    each: Perturbation,
    at: Tensor,
    size: Tensor,
    y: Tensor,
    moved: Tensor,
    before: Readout,
    after: Readout,
) -> dict[str, Any]:
    """What a perturbation did, a row per position where it exists; y, moved [layer, position, d_model]."""
    columns = {"position": at, "size": size, **compare_outputs(before, after)._asdict()}
    columns |= {"cosine": cosine(y, moved).T, "relative_l2": relative_l2(y, moved).T}
    labels = where | {"a": 1, "direction": each.direction, "seed": each.seed}
    return {
        **{name: np.full(int(each.there.sum()), value) for name, value in labels.items()},
        **{name: x[each.there].cpu().numpy() for name, x in columns.items()},
    }
