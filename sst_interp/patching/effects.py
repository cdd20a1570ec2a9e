"""All patches at one position of one question: rows of one batch, patched once and continued greedily.

Row 0 of each direction is the base, unpatched: the deep pass for `back`, depth 1's for `forward`. Each is
the other's donor. The logit difference that a patch is measured by is

    LD(x) = logit_b(x) - logit_a(x)

b: the base's most likely token; a: the donor's, or where the two agree, the base's second. A patch moves it
by `moved` = LD(base) - LD(patched) of `gap` = LD(base) - LD(donor); over positions and questions the
recovered share is sum(moved * sign(gap)) / sum(|gap|): 0 for the base, 1 for the donor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.hooks import Site, Visit
from sst_interp.measures import compare_outputs, cosine, read_out, wide
from sst_interp.model import StateStreamModel
from sst_interp.patching.interventions import Direction, Intervention, interventions, vectors
from sst_interp.patching.reading import DEEP, SHALLOW, Reading
from sst_interp.sequential import advance

DIRECTIONS: tuple[tuple[Direction, int, int], ...] = (("back", DEEP, SHALLOW), ("forward", SHALLOW, DEEP))
"""(direction, base lane, donor lane), in the order of rows."""


class Written(NamedTuple):
    """What the rows of a batch did, from the patched position on."""

    logits: Float[Tensor, "row vocab"]
    """At the patched position."""
    tokens: Int[Tensor, "row step"]
    """Emitted there and after."""
    states: Float[Tensor, "step row layer d_model"]
    """Last-iteration layer outputs at the positions after it."""


class Texts(NamedTuple):
    """Tokens emitted at the patched position and after, past any stop token."""

    patched: list[int]
    base: list[int]
    donor: list[int]


Sizes = dict[tuple[Direction, int], tuple[float, float]]
"""By direction and number of the patch: its length over the state's, and its length; means over layers."""


class Patches:
    """Vectors to put in: by (step, iteration, site, layer) the rows they go to."""

    def __init__(self) -> None:
        self._at: dict[tuple[int, int, Site, int], tuple[list[int], list[Tensor]]] = {}

    def put(self, step: int, iteration: int, site: Site, layer: int, row: int, value: Tensor) -> None:
        """Row `row` gets `value` [d_model] there."""
        rows, values = self._at.setdefault((step, iteration, site, layer), ([], []))
        rows.append(row)
        values.append(value)

    def hook(self, step: int, iteration: int) -> Visit:
        """What a pass asks."""

        def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
            found = self._at.get((step, iteration, site, layer))
            if found is None:
                return tensor
            patched = tensor.clone()
            patched[found[0], 0] = torch.stack(found[1])
            return patched

        return visit


def effects(
    model: StateStreamModel,
    reading: Reading,
    other: Reading,
    position: int,
    layers: Sequence[int],
    windows: int,
    new_tokens: int,
    key: Sequence[object],
) -> tuple[list[dict[str, Any]], list[Texts]]:
    """What every patch at a position does.

    Args:
        other: another question's reading, at the same position or its last.
        layers: layers that are patched alone.
        windows: how many windows the layers are cut into.
        new_tokens: how many tokens are written after the patched position's.
        key: decides the random directions.

    Returns:
        A row of numbers per patch, and for each of them what the patched row, its base and its donor wrote.
    """
    stream = bool(reading.has_state[position])
    rows: list[dict[str, Any]] = []
    texts: list[Texts] = []
    every = interventions(model.backbone.n_layers, layers, windows, stream)
    for continued, steps in ((True, new_tokens), (False, 0)):
        todo = [intervention for intervention in every if intervention.continued == continued]
        patches, sizes = placed(reading, other, position, todo, key)
        written = write(model, reading, position, patches, len(todo) + 1, steps)
        for found, text in zip(*measured(todo, sizes, written, model.stop_tokens), strict=True):
            rows.append(found | {"continued": continued})
            texts.append(text)
    return rows, texts


def placed(
    reading: Reading, other: Reading, position: int, todo: Sequence[Intervention], key: Sequence[object]
) -> tuple[Patches, Sizes]:
    """The vectors of every patch, in the rows of their batch, and how long they are."""
    stranger, copies = min(position, len(other.inputs) - 1), len(todo) + 1
    patches, sizes = Patches(), {}
    for direction, base, donor in DIRECTIONS:
        first = 1 if direction == "back" else copies + 1
        for k, intervention in enumerate(todo):
            part = {"stream_in": "blended", "stream_out": "handed"}.get(intervention.place, "resid_post")
            mine, theirs = getattr(reading, part)[position], getattr(other, part)[stranger]
            own = slice(None if part == "resid_post" else reading.slots)  # one vector if layers share it
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
    model: StateStreamModel, reading: Reading, position: int, patches: Patches, copies: int, new_tokens: int
) -> Written:
    """Read the position's token in every row, patched, and go on greedily: `copies` rows per direction."""
    stream = reading.at(position, copies, new_tokens + 1)
    depths = torch.tensor([reading.depth] * copies + [1] * copies)
    current = torch.full((2 * copies,), reading.inputs[position], device=model.backbone.device)
    first, tokens, states = None, [], []
    for step in range(new_tokens + 1):
        iterations = advance(model, stream, current, depths, partial(patches.hook, step))
        deep, shallow = iterations[-1].resid_post[:, :copies], iterations[0].resid_post[:, copies:]
        resid_post = torch.cat([deep, shallow], dim=1)
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


def measured(
    todo: Sequence[Intervention],
    sizes: Sizes,
    written: Written,
    stop_tokens: Sequence[int] = (),
) -> tuple[list[dict[str, Any]], list[Texts]]:
    """A row per direction and patch. What comes after the base's stop token is not compared."""
    rows: list[dict[str, Any]] = []
    texts: list[Texts] = []
    copies = len(todo) + 1
    logits, tokens = wide(written.logits), written.tokens
    sides: tuple[tuple[Direction, int, int], ...] = (("back", 0, copies), ("forward", copies, 0))
    for direction, base, donor in sides:
        own = slice(base + 1, base + copies)
        b = int(logits[base].argmax())
        a = int(logits[donor].argmax())
        differ = a != b
        if not differ:
            a = int(logits[base].topk(2).indices[1])
        ld = logits[:, b] - logits[:, a]
        before = read_out(logits[base : base + 1].expand(len(todo), -1))
        changed = compare_outputs(before, read_out(logits[own]))
        live = slice(1, max(2, _lived(tokens[base].tolist(), stop_tokens)))
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
                    "later_changed": float((tokens[row, live] != tokens[base, live]).float().mean()),
                    "later_unlike_donor": float((tokens[row, live] != tokens[donor, live]).float().mean()),
                    "donor_later_changed": float((tokens[donor, live] != tokens[base, live]).float().mean()),
                    "later_overlap_base": float(later["base"][k]),
                    "later_overlap_donor": float(later["donor"][k]),
                }
            )
            texts.append(Texts(*(tokens[r].tolist() for r in (row, base, donor))))
    return rows, texts


def _lived(tokens: Sequence[int], stop_tokens: Sequence[int]) -> int:
    """How many tokens there are up to a stop token, with it."""
    stops = [k for k, token in enumerate(tokens) if token in set(stop_tokens)]
    return stops[0] + 1 if stops else len(tokens)
