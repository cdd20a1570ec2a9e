"""All patches at one position of one question, and their effects (docs/patching.md).

`read_text` reads the text that depth 1 wrote at depth 1 and at the deepest side by side. Then the position's
token is read again in many rows of one batch, each patched once and continued greedily. Row 0 of each
direction is the unpatched base; the two bases are each other's donor. A patch is measured by

    LD(x) = logit_b(x) - logit_a(x)
    moved = LD(base) - LD(patched),   gap = LD(base) - LD(donor)

b: the base's most likely token; a: the donor's, or where the two agree, the base's second. Over positions and
questions the recovered share is sum(moved * sign(gap)) / sum(|gap|): 0 for the base, 1 for the donor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.models.cache import KeyValues
from sst_interp.models.hooks import Site, Visit
from sst_interp.models.measures import compare_outputs, cosine, read_out, wide
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers import prefill
from sst_interp.models.solvers.sequential import advance
from sst_interp.models.stream import Recurrence, Stream
from sst_interp.runs.perturbations import generator

DEEP, SHALLOW = 0, 1
"""Rollouts of a text, deepest first."""

Place = Literal["layer", "window", "all", "stream_in", "stream_out"]
"""What is replaced at the position: the output of a layer, of neighbouring layers, of all layers (last
iteration); the states that the last iteration blends in; the states for the next position."""

What = Literal["state", "random", "other", "stranger", "own"]
"""The vector that is put in: the donor's state; the base plus a random vector, or plus another question's
difference, as long as the donor's difference; another question's state; the base itself."""

Direction = Literal["back", "forward"]
"""`back`: depth 1's state into the deep pass. `forward`: the deep pass's state into depth 1's."""

CONTROLS: tuple[What, ...] = ("random", "other", "stranger")
DIRECTIONS: tuple[tuple[Direction, int, int], ...] = (("back", DEEP, SHALLOW), ("forward", SHALLOW, DEEP))
"""(direction, base rollout, donor rollout), in the order of rows."""


@dataclass(frozen=True)
class TextStates:
    """The states of one text at two depths. Axis rollout: `DEEP`, `SHALLOW`."""

    depth: int
    stream: Stream
    """After the last position, both rollouts."""
    inputs: list[int]
    """[position] token ids."""
    first_column: int
    """The column of position 0."""
    resid_post: Float[Tensor, "position rollout layer d_model"]
    """Layer outputs of the last iteration."""
    blended: Float[Tensor, "position rollout layer d_model"]
    """The state that the last iteration blends in."""
    next_state: Float[Tensor, "position rollout layer d_model"]
    """The state for the next position, by the layer that reads it."""
    before: Float[Tensor, "position rollout slot d_model"]
    """The state from the position before."""
    has_state: Bool[Tensor, " position"]
    """Whether depth 1 reads a state there."""

    def at(self, position: int, copies: int, room: int) -> Stream:
        """The stream just before a position: `copies` rows of the deep rollout, then as many of the other,
        with `room` more columns.
        """
        column = self.first_column + position
        rows = torch.arange(2).repeat_interleave(copies)
        kv = KeyValues(len(self.stream.kv.keys), column + room)
        for mine, theirs in ((kv.keys, self.stream.kv.keys), (kv.values, self.stream.kv.values)):
            for layer, kept in enumerate(theirs):
                if kept is None:
                    continue
                copy = kept.new_zeros(len(rows), kept.shape[1], kv.columns, kept.shape[3])
                copy[:, :, :column] = kept[rows, :, :column]
                mine[layer] = copy
        state = self.before[position][rows].transpose(0, 1).contiguous()
        return Stream(kv, state, self.stream.pad[rows], self.stream.origin[rows], column)


@torch.no_grad()
def read_text(model: Recurrence, prompt: Sequence[int], text: Sequence[int], depth: int) -> TextStates:
    """Read the prompt once, and then `text` at `depth` and at depth 1.

    Args:
        text: the tokens that depth 1 wrote. The last one was emitted and is not read.
    """
    device = model.backbone.device
    tokens = torch.tensor([list(prompt)], device=device)
    one = model.new_stream(torch.zeros(1, dtype=torch.long, device=device), tokens.shape[1] + len(text) - 1)
    prefill(model, one, tokens[:, :-1])
    stream, first = one.repeat(2), one.column
    inputs = [int(prompt[-1]), *map(int, text[:-1])]
    depths, layers = torch.tensor([depth, 1]), model.backbone.n_layers
    seen: dict[str, list[Tensor]] = {"resid_post": [], "blended": [], "next_state": [], "before": []}
    has_state = []
    for token in inputs:
        has_state.append(bool(model.kind.has_state(stream.column, stream.origin[:1], 1)))
        seen["before"].append(stream.state.transpose(0, 1).clone())
        blended = stream.state.new_zeros(2, layers, stream.state.shape[-1])

        def hook(iteration: int, blended: Tensor = blended) -> Visit:
            def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
                if site == "stream_state":
                    last = (depths[: len(tensor)] == iteration).nonzero()[:, 0]
                    blended[last, layer] = tensor[last, 0]
                return tensor

            return visit

        done = advance(model, stream, torch.full((2,), token, device=device), depths, hook)
        last = [done[int(depths[rollout]) - 1].resid_post[:, rollout] for rollout in (DEEP, SHALLOW)]
        seen["resid_post"].append(torch.stack(last))
        seen["blended"].append(blended)
        seen["next_state"].append(stream.state.transpose(0, 1).expand(-1, layers, -1).clone())
    stacked = {name: torch.stack(pieces) for name, pieces in seen.items()}
    return TextStates(depth, stream, inputs, first, has_state=torch.tensor(has_state), **stacked)


class Intervention(NamedTuple):
    """One row of a batch."""

    place: Place
    what: What
    first: int
    """The lowest layer that is replaced."""
    last: int
    """The highest."""

    @property
    def continued(self) -> bool:
        """Whether text is written after it. Controls at one layer are compared at the position only."""
        return self.place != "layer" or self.what == "state"

    @property
    def layers(self) -> range:
        """The layers that are replaced."""
        return range(self.first, self.last + 1)


def spread(n_layers: int, n: int) -> list[int]:
    """`n` layers spread evenly, the last among them."""
    n = min(n, n_layers)
    return sorted({(k + 1) * n_layers // n - 1 for k in range(n)})


def interventions(n_layers: int, layers: Sequence[int], windows: int, stream: bool) -> list[Intervention]:
    """Every patch at one position in one direction.

    Args:
        layers: layers that are patched alone.
        windows: into how many windows all layers are cut.
        stream: whether the position reads a state.
    """
    top = n_layers - 1
    places: list[tuple[Place, int, int]] = [("all", 0, top), ("stream_in", 0, top), ("stream_out", 0, top)]
    for layer in reversed(layers):
        places.insert(0, ("layer", layer, layer))
    patches = [
        Intervention(place, what, a, b)
        for what in ("state", *CONTROLS)
        for place, a, b in places
        if (what != "stranger" or not place.startswith("stream")) and (stream or place != "stream_in")
    ]
    edges = [k * n_layers // windows for k in range(windows + 1)]
    patches += [Intervention("window", "state", a, b - 1) for a, b in pairwise(edges) if b > a]
    return [*patches, Intervention("all", "own", 0, top)]


def vectors(
    what: What,
    base: Float[Tensor, "layer d_model"],
    donor: Float[Tensor, "layer d_model"],
    other_base: Float[Tensor, "layer d_model"],
    other_donor: Float[Tensor, "layer d_model"],
    key: Sequence[object],
) -> Float[Tensor, "layer d_model"]:
    """The vectors that replace `base`, layer by layer. `key` decides the random directions."""
    if what in ("state", "own", "stranger"):
        return {"state": donor, "own": base, "stranger": other_donor}[what]
    size = (wide(donor) - wide(base)).norm(dim=-1, keepdim=True)
    if what == "random":
        towards = torch.randn(base.shape, generator=generator(*key)).to(size)
    else:
        towards = wide(other_donor) - wide(other_base)
    towards = towards / towards.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(towards.dtype).tiny)
    return (wide(base) + size * towards).to(base.dtype)


class Written(NamedTuple):
    """The text and states of each row of a batch, from the patched position on."""

    logits: Float[Tensor, "row vocab"]
    """At the patched position."""
    tokens: Int[Tensor, "row step"]
    """Emitted at the patched position and after."""
    states: Float[Tensor, "step row layer d_model"]
    """Last-iteration layer outputs at the later positions."""


class Texts(NamedTuple):
    """Tokens emitted at the patched position and after, also past a stop token."""

    patched: list[int]
    base: list[int]
    donor: list[int]
    sums: list[list[float]] | None = None
    """Log-likelihoods of the choices in the same three, where there are any at position 0."""


Sizes = dict[tuple[Direction, int], tuple[float, float]]
"""(direction, number of the patch) -> |change| / |state| and |change|, means over layers."""


class Patches:
    """The vectors to put in, and where."""

    def __init__(self) -> None:
        self._at: dict[tuple[int, int, Site, int], tuple[list[int], list[Tensor]]] = {}

    def put(self, step: int, iteration: int, site: Site, layer: int, row: int, value: Tensor) -> None:
        """Give row `row` the vector `value` [d_model] at a site."""
        rows, values = self._at.setdefault((step, iteration, site, layer), ([], []))
        rows.append(row)
        values.append(value)

    def hook(self, step: int, iteration: int) -> Visit:
        """The hook of one pass."""

        def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
            if (step, iteration, site, layer) not in self._at:
                return tensor
            rows, values = self._at[step, iteration, site, layer]
            patched = tensor.clone()
            patched[rows, 0] = torch.stack(values)
            return patched

        return visit


def effects(
    model: StateStreamModel,
    reading: TextStates,
    other: TextStates,
    position: int,
    layers: Sequence[int],
    windows: int,
    new_tokens: int,
    key: Sequence[object],
    choices: Sequence[Sequence[int]] = (),
) -> tuple[list[dict[str, Any]], list[Texts]]:
    """The effect of every patch at a position.

    Args:
        reading: the question's text.
        other: another question's text, at the same position or its last.
        layers, windows: see `interventions`.
        new_tokens: how many tokens are written after the patched position's.
        key: decides the random directions.
        choices: token ids of each choice of a question that is answered by likelihood. They go on from the
            prompt, so they are scored at position 0 only.

    Returns:
        A row of numbers per patch, and the texts of the patched row, its base and its donor.
    """
    rows: list[dict[str, Any]] = []
    texts: list[Texts] = []
    every = interventions(model.backbone.n_layers, layers, windows, bool(reading.has_state[position]))
    for continued, steps in ((True, new_tokens), (False, 0)):
        todo = [intervention for intervention in every if intervention.continued == continued]
        patches, sizes = placed(reading, other, position, todo, key)
        written = write(model, reading, position, patches, len(todo) + 1, steps)
        sums = None
        if choices and continued and position == 0:
            sums = choice_sums(model, reading, patches, len(todo) + 1, choices)
        done, wrote = measured(todo, sizes, written, model.stop_tokens, sums)
        rows += [row | {"continued": continued} for row in done]
        texts += wrote
    return rows, texts


def placed(
    reading: TextStates, other: TextStates, position: int, todo: Sequence[Intervention], key: Sequence[object]
) -> tuple[Patches, Sizes]:
    """The vectors of every patch in the rows of their batch, and their sizes."""
    stranger, copies = min(position, len(other.inputs) - 1), len(todo) + 1
    patches, sizes = Patches(), {}
    for direction, base, donor in DIRECTIONS:
        first = 1 if direction == "back" else copies + 1
        for k, intervention in enumerate(todo):
            part = {"stream_in": "blended", "stream_out": "next_state"}.get(intervention.place, "resid_post")
            mine, theirs = getattr(reading, part)[position], getattr(other, part)[stranger]
            own = slice(None if part == "resid_post" else reading.before.shape[2])  # one if layers share it
            new = vectors(
                intervention.what, mine[base][own], mine[donor][own], theirs[base][own], theirs[donor][own],
                (*key, position, direction, part),
            ).expand(mine[base].shape)  # fmt: skip
            where = list(intervention.layers)
            change = (wide(new) - wide(mine[base]))[where].norm(dim=-1)
            norms = wide(mine[base])[where].norm(dim=-1)
            sizes[direction, k] = float((change / norms).mean()), float(change.mean())
            site: Site = "resid_post" if part == "resid_post" else "stream_state"
            last = reading.depth if direction == "back" else 1
            step, iteration = (1, 1) if intervention.place == "stream_out" else (0, last)
            for layer in where:
                patches.put(step, iteration, site, layer, first + k, new[layer])
    return patches, sizes


@torch.no_grad()
def write(
    model: StateStreamModel,
    reading: TextStates,
    position: int,
    patches: Patches,
    copies: int,
    new_tokens: int,
) -> Written:
    """Read the position's token in every row, patched, and go on greedily: `copies` rows per direction."""
    stream = reading.at(position, copies, new_tokens + 1)
    depths = torch.tensor([reading.depth] * copies + [1] * copies)
    current = torch.full((2 * copies,), reading.inputs[position], device=model.backbone.device)
    first, tokens, states = None, [], []
    for step in range(new_tokens + 1):
        resid_post = _last_states(model, stream, current, depths, patches, step)
        final = model.backbone.unembed(resid_post[-1])
        if first is None:
            first = final
        else:
            states.append(resid_post.transpose(0, 1))
        current = final.argmax(-1)
        tokens.append(current)
    assert first is not None
    none = first.new_zeros(0, 2 * copies, model.backbone.n_layers, model.backbone.d_model)
    return Written(first, torch.stack(tokens, 1), torch.stack(states) if states else none)


@torch.no_grad()
def choice_sums(
    model: StateStreamModel,
    reading: TextStates,
    patches: Patches,
    copies: int,
    choices: Sequence[Sequence[int]],
) -> Float[Tensor, "row choice"]:
    """The log-likelihood of every choice in the rows of `write` at position 0, nats."""
    depths, sums = torch.tensor([reading.depth] * copies + [1] * copies), []
    for choice in choices:
        stream = reading.at(0, copies, len(choice))
        current = torch.full((2 * copies,), reading.inputs[0], device=model.backbone.device)
        terms = []
        for step, token in enumerate(choice):
            resid_post = _last_states(model, stream, current, depths, patches, step)
            terms.append(wide(model.backbone.unembed(resid_post[-1])).log_softmax(-1)[:, token])
            current = torch.full_like(current, token)
        sums.append(torch.stack(terms).sum(0))
    return torch.stack(sums, 1)


def _last_states(
    model: StateStreamModel, stream: Stream, tokens: Tensor, depths: Tensor, patches: Patches, step: int
) -> Float[Tensor, "layer row d_model"]:
    """One position read, patched: each row's layer outputs at its own depth, deep rows first."""
    copies = len(tokens) // 2
    iterations = advance(model, stream, tokens, depths, partial(patches.hook, step))
    deep, shallow = iterations[-1].resid_post[:, :copies], iterations[0].resid_post[:, copies:]
    return torch.cat([deep, shallow], dim=1)


def measured(
    todo: Sequence[Intervention],
    sizes: Sizes,
    written: Written,
    stop_tokens: Sequence[int] = (),
    sums: Float[Tensor, "row choice"] | None = None,
) -> tuple[list[dict[str, Any]], list[Texts]]:
    """A row per direction and patch. Nothing after the base's stop token is compared."""
    rows: list[dict[str, Any]] = []
    texts: list[Texts] = []
    copies = len(todo) + 1
    logits, tokens = wide(written.logits), written.tokens
    for direction, base, donor in DIRECTIONS:
        base, donor = copies * base, copies * donor  # their rows
        own = slice(base + 1, base + copies)
        b, a = int(logits[base].argmax()), int(logits[donor].argmax())
        differ = a != b
        if not differ:
            a = int(logits[base].topk(2).indices[1])
        ld = logits[:, b] - logits[:, a]
        before = read_out(logits[base : base + 1].expand(len(todo), -1))
        changed = compare_outputs(before, read_out(logits[own]))
        stops = [k for k, token in enumerate(tokens[base].tolist(), 1) if token in set(stop_tokens)]
        live = slice(1, max(2, stops[0] if stops else tokens.shape[1]))

        def unlike(one: int, another: int, live: slice = live) -> float:
            return float((tokens[one, live] != tokens[another, live]).float().mean())

        states = written.states[: live.stop - 1]
        later = {
            name: cosine(states[:, row : row + 1], states[:, own]).mean(dim=(0, 2))
            for name, row in (("base", base), ("donor", donor))
        }
        for k, intervention in enumerate(todo):
            row = base + 1 + k
            relative, norm = sizes[direction, k]
            rows.append(
                {
                    "direction": direction,
                    **intervention._asdict(),
                    "size": relative,
                    "norm": norm,
                    "winners_differ": differ,
                    "gap": float(ld[base] - ld[donor]),
                    "moved": float(ld[base] - ld[row]),
                    "kl": float(changed.kl[k]),
                    "token_changed": int(tokens[row, 0]) != b,
                    "token_donors": int(tokens[row, 0]) == int(tokens[donor, 0]),
                    "later_changed": unlike(row, base),
                    "later_unlike_donor": unlike(row, donor),
                    "donor_later_changed": unlike(donor, base),
                    "later_overlap_base": float(later["base"][k]),
                    "later_overlap_donor": float(later["donor"][k]),
                }
            )
            three = [row, base, donor]
            scored = None if sums is None else sums[three].tolist()
            texts.append(Texts(*tokens[three].tolist(), sums=scored))
    return rows, texts
