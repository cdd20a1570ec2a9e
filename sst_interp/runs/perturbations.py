"""Nudges of the same size: what the output does when the state is moved as far, in another direction.

The argmax is a function of the last layer's state, so that it changes where the state does is partly true by
construction. The null is "any change of that size would do as much". For one question, alone, on the text
that depth 1 wrote, this module takes the change that iterating makes and puts others of the same norm in its
place, position by position. What is compared with what (state a stays where it is):

| comparison | a | b |
| --- | --- | --- |
| teacher-forced | depth 1's pass | depth b's last iteration, for every depth b > 1 |
| `within` | iteration 1 of the deepest pass | iteration b of it, for every b > 1 |

A nudge is put in at one of two sites:

- `output`: the last layer's output y_L. Nothing is computed again but the logits: y_L(a) + n is unembedded,
  with |n| = |y_L(b) - y_L(a)|. `true` is y_L(b) itself. This is the part that holds by construction.
- `stream`: the stream states that a's pass is handed, the only thing by which iterating acts on a position.
  a's pass is run once more, with s_l(a) + n_l instead of s_l(a) in every layer l, where
  |n_l| = |s_l(b) - s_l(a)|, for the deepest b. Token, position and the cache of earlier positions stay a's.
  `true` hands in s(b). In `within` that *is* iteration b. In teacher-forced it is the part of depth b that comes
  through the state; the rest comes through the deeper cache. A depth-looped model is handed nothing from the
  position before, so there is no `stream` site.

The direction of n is `random` (isotropic) or `elsewhere`: that of the same difference at another position of
the same text. All are compared with a's own output; at `stream` with the same pass handed s(a), run in the
same shape, so that no rounding of another shape is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.models.cache import Access, KeyValues
from sst_interp.models.measures import Readout, compare_outputs, cosine, read_out, relative_l2, wide
from sst_interp.models.stream import Recurrence, Stream, stack_pass
from sst_interp.runs.noise_floor import Rereading

SEEDS = 3
"""Nudges per change and direction. The same random direction is used for every b: only its size differs."""


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
    """Where it exists: a direction that is taken from where nothing changed is none."""


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
            for piece in _at_output(model, alone.last[a], alone.last[b], (*key, "output")):
                yield _labelled(piece, where)
        if depths:
            where = {"question": question, "comparison": comparison, "b": deepest, "site": "stream"}
            for piece in _at_stream(model, alone, comparison, (*key, "stream")):
                yield _labelled(piece, where)


def _at_output(model: Recurrence, a: Tensor, b: Tensor, key: tuple[object, ...]) -> Iterator[dict[str, Any]]:
    """The last layer's output moved from `a` towards `b`, and as far in other directions; [position, d]."""
    positions = torch.arange(len(a), device=a.device)
    before = read_out(model.backbone.unembed(a))
    change = (wide(b) - wide(a))[None]
    size = change[0].norm(dim=-1) / wide(a).norm(dim=-1)
    true = Perturbation("true", 0, change, torch.ones_like(positions, dtype=torch.bool))
    for nudge in (true, *perturbations_of(change, key)):
        moved = b if nudge.direction == "true" else (wide(a) + nudge.n[0]).to(a.dtype)
        after = read_out(model.backbone.unembed(moved))
        yield _measured(nudge, positions, size, a[None], moved[None], before, after)


def _at_stream(
    model: Recurrence, alone: Alone, comparison: str, key: tuple[object, ...]
) -> Iterator[dict[str, Any]]:
    """One pass handed other stream states, at all positions at once: each attends to the stored entries
    of earlier positions and to its own, and nothing is stored.
    """
    deepest = alone.reading.depths[0]
    thinking, rollout = (
        alone.rollout(deepest),
        alone.rollout(1 if comparison == "teacher_forced" else deepest),
    )
    columns, tokens = alone.columns, alone.reading.inputs
    at = model.kind.has_state(columns, rollout.origin, 1).nonzero()[:, 0]  # where one is handed in
    if not len(at):
        return
    handed = alone.incoming[:, :, at]
    # A later iteration attends to the entry that the first one left, if that is the one that is kept.
    frozen = model.choices.kv == "first" and comparison == "within"

    def one_pass(stream: Stream, state: Tensor, access: Access) -> tuple[Tensor, Tensor]:
        resid_post, carried = stack_pass(
            model, stream, tokens[:, at], columns[at], state[:, None], None, access
        )
        return resid_post[:, 0], carried[:, 0]

    b = handed[alone.reading.rows(deepest)][0]
    for _ in range(deepest - 1):
        b = one_pass(thinking, b, "read" if model.choices.kv == "first" else "beside")[1]
    a = handed[alone.reading.rows(1 if comparison == "teacher_forced" else deepest)][0]
    change = wide(b) - wide(a)
    size = (change.norm(dim=-1) / wide(a).norm(dim=-1)).median(dim=0).values
    y = one_pass(rollout, a, "read" if frozen else "beside")[0]
    before = read_out(model.backbone.unembed(y[-1]))
    true = Perturbation("true", 0, change, torch.ones_like(at, dtype=torch.bool))
    for nudge in (true, *perturbations_of(change, key)):
        state = b if nudge.direction == "true" else (wide(a) + nudge.n).to(a.dtype)
        moved = one_pass(rollout, state, "read" if frozen else "beside")[0]
        after = read_out(model.backbone.unembed(moved[-1]))
        yield _measured(nudge, at, size, y, moved, before, after)


def _measured(
    nudge: Perturbation, at: Tensor, size: Tensor, y: Tensor, moved: Tensor, before: Readout, after: Readout
) -> dict[str, Any]:
    """What a nudge did, a row per position where it exists; y, moved [layer, position, d_model]."""
    change = compare_outputs(before, after)._asdict()
    columns = {"position": at, "size": size, **change}
    layers = {"cosine": cosine(y, moved).T, "relative_l2": relative_l2(y, moved).T}
    return {
        "direction": nudge.direction,
        "seed": nudge.seed,
        **{name: x[nudge.there].cpu().numpy() for name, x in (columns | layers).items()},
    }


def _labelled(piece: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The piece with every label as a column."""
    n = len(piece["position"])
    labels = where | {"a": 1, "direction": piece["direction"], "seed": piece["seed"]}
    return piece | {name: np.full(n, value) for name, value in labels.items()}
