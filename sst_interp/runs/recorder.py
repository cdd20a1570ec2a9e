"""What a capture sees at one generated position, in all rollouts, and the rows that it leaves behind.

A **rollout** is one way to go on with every question of a batch: a depth and the text it reads (`own` or
`depth1`). All rollouts advance together, deepest first, so at iteration i the rollouts that still iterate are
the first n rows of one batch. A comparison is then the difference of two rollouts at the same moment, and no
state has to be kept for later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.models.choices import COMPARISONS, Comparison
from sst_interp.models.generation import decode
from sst_interp.models.measures import (
    TOP,
    Readout,
    bf16_ratio,
    compare_outputs,
    cosine,
    jaccard,
    read_out,
    relative_l2,
    rows_of,
    wide,
)
from sst_interp.models.stream import Recurrence, Stream
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.states import Spool, Spooled


class Rollout(NamedTuple):
    """One depth on one text, `own` or `depth1`."""

    text: str
    depth: int

    @property
    def writer(self) -> int:
        """The depth that writes the text."""
        return self.depth if self.text == "own" else 1


class RolloutCell(NamedTuple):
    """One iteration of one rollout: where a state was read."""

    rollout: Rollout
    iteration: int


class Pair(NamedTuple):
    """Two cells whose states are compared, and how the tables call them."""

    comparison: Comparison
    a: int
    b: int
    cell_a: RolloutCell
    cell_b: RolloutCell


def rollouts_of(depths: Sequence[int]) -> list[Rollout]:
    """Rollouts of these depths, deepest first: each depth's own text, and depth 1's text at every other."""
    rollouts = []
    for depth in sorted(depths, reverse=True):
        rollouts.append(Rollout("own", depth))
        if depth > 1:
            rollouts.append(Rollout("depth1", depth))
    return rollouts


def pairs_of(depths: Sequence[int]) -> list[Pair]:
    """What is compared with what (docs/run-format.md, Words)."""
    base = RolloutCell(Rollout("own", 1), 1)
    deeper = [d for d in sorted(depths) if d > 1]
    pairs = [Pair("teacher_forced", 1, d, base, RolloutCell(Rollout("depth1", d), d)) for d in deeper]
    pairs += [Pair("free_running", 1, d, base, RolloutCell(Rollout("own", d), d)) for d in deeper]
    if deeper:
        deepest = Rollout("own", deeper[-1])
        steps = {(a, i) for i in range(2, deepest.depth + 1) for a in (1, i - 1)}
        cells = {i: RolloutCell(deepest, i) for i in range(1, deepest.depth + 1)}
        pairs += [Pair("within", a, b, cells[a], cells[b]) for a, b in sorted(steps)]
    return pairs


class RolloutStep:
    """One generated position of a batch, in all rollouts: states and readouts by cell."""

    def __init__(
        self, rollouts: list[Rollout], batch: int, resid_post: list[Tensor], logits: list[Tensor]
    ) -> None:
        self._resid_post, self._logits = resid_post, logits
        self._read: dict[int, Readout] = {}
        self._rows = {rollout: slice(k * batch, (k + 1) * batch) for k, rollout in enumerate(rollouts)}

    def states(self, cell: RolloutCell) -> Float[Tensor, "layer question d_model"]:
        """Layer outputs of one iteration of one rollout."""
        return self._resid_post[cell.iteration - 1][:, self._rows[cell.rollout]]

    def readout(self, cell: RolloutCell) -> Readout:
        """The next-token distributions of one iteration of one rollout."""
        i = cell.iteration - 1
        if i not in self._read:  # all rollouts at once, when first asked for
            self._read[i] = read_out(self._logits[i])
        return rows_of(self._read[i], self._rows[cell.rollout])


class RolloutDecoder:
    """Decodes all rollouts of a batch of questions, greedily, position by position.

    Args:
        stream: the prompts, read up to their last token; one row per question.
        last_tokens: [question] each prompt's last token: the input of position 0.
        stop: ids that end a text.
    """

    def __init__(
        self,
        model: Recurrence,
        stream: Stream,
        last_tokens: Int[Tensor, " question"],
        depths: Sequence[int],
        stop: Int[Tensor, " stop"],
    ) -> None:
        self.model, self.stop, self.batch = model, stop, len(last_tokens)
        self.rollouts = rollouts_of(depths)
        self._stream = stream.repeat(len(self.rollouts))
        self._depths = torch.tensor([r.depth for r in self.rollouts]).repeat_interleave(self.batch)
        self._current = last_tokens.repeat(len(self.rollouts))
        started = torch.ones_like(last_tokens, dtype=torch.bool)
        self.alive: dict[int, Bool[Tensor, " question"]] = {d: started.clone() for d in depths}
        """By depth: the question's own text has not ended before this position."""
        self.same_prefix = {d: alive.clone() for d, alive in self.alive.items()}
        """By depth: its own text so far is depth 1's."""
        self.emitted: dict[int, Int[Tensor, " question"]] = {}
        """By depth: the token its own text got at the last position."""

    def step(self) -> RolloutStep:
        """Compute the next position. `alive` and `same_prefix` describe it until `finish_step`."""
        iterations, logits, final = decode(self.model, self._stream, self._current, self._depths)
        winners = final.argmax(-1).view(len(self.rollouts), self.batch)
        self.emitted = {r.depth: winners[k] for k, r in enumerate(self.rollouts) if r.text == "own"}
        return RolloutStep(self.rollouts, self.batch, [it.resid_post for it in iterations], logits)

    def finish_step(self) -> None:
        """Feed the emitted tokens back."""
        self._current = torch.cat([self.emitted[rollout.writer] for rollout in self.rollouts])
        for depth, tokens in self.emitted.items():
            self.same_prefix[depth] = self.same_prefix[depth] & (tokens == self.emitted[1])
            self.alive[depth] = self.alive[depth] & ~torch.isin(tokens, self.stop)

    def alive_in(self, rollout: Rollout) -> Bool[Tensor, " question"]:
        """Where the rollout's text has not ended before this position."""
        return self.alive[rollout.writer]


SHIFT_KEPT_BELOW = 0.99
"""`keep = "shifts"` keeps pairs below the paper's threshold: a run's own antimode is not known yet."""


class Recorder:
    """Reduces every position of one batch at once to rows of the tables, and keeps the states asked for.

    Args:
        questions: each row's index in the run.
        recipe: says what is recorded.
        restricted: store no token ids (a list of ids is a transcript).
        spool: where the states of `keep = "all"` go while the batch is generated; None makes one.
    """

    def __init__(
        self, questions: Sequence[int], recipe: Recipe, restricted: bool, spool: Spool | None = None
    ) -> None:
        self.questions = np.asarray(questions, dtype=np.int32)
        self.pairs, self.keep, self.restricted = pairs_of(recipe.depths), recipe.keep, restricted
        self.lens = recipe.choices.overlap == "lens_jaccard"
        self.lens_tokens = "none" if restricted else recipe.lens_tokens
        self._compared = list(dict.fromkeys(c for p in self.pairs for c in (p.cell_a, p.cell_b)))
        tables = ("steps", "outputs", "pairs", "lens")
        self._rows: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in tables}
        self._layers = None if recipe.keep_layers is None else list(recipe.keep_layers)
        self._positions = None if recipe.keep_positions is None else frozenset(recipe.keep_positions)
        self._position0: Tensor | None = None
        self._spool = spool or (Spool() if self.keep == "all" else None)
        self._spooled: dict[str, tuple[Tensor, list[int]]] = {}
        self._shifts: list[tuple[np.ndarray, Tensor, Tensor]] = []
        self._lengths: dict[str, np.ndarray] = {}
        self._waiting: list[tuple[dict[str, Tensor], Callable[[dict[str, np.ndarray]], None]]] = []

    def see(self, position: int, moment: RolloutStep, decoder: RolloutDecoder) -> dict[int, list[int | None]]:
        """Record one position, before the decoder goes on. All its numbers are copied from the device at
        once.

        Returns:
            By depth: each question's token of its own text; None behind the text's end.
        """
        written: dict[int, list[int | None]] = {}
        for depth, token in decoder.emitted.items():

            def keep(x: dict[str, np.ndarray], depth: int = depth) -> None:
                pairs = zip(x["token"].tolist(), x["alive"].tolist(), strict=True)
                written[depth] = [token if goes_on else None for token, goes_on in pairs]

            self._when_copied({"token": token, "alive": decoder.alive[depth]}, keep)
        self._see_steps(position, moment, decoder)
        if self.pairs:
            tops = self._lens(position, moment, decoder)
            self._see_pairs(position, moment, decoder, tops)
        self._see_states(position, moment, decoder)
        waiting, self._waiting = self._waiting, []
        arrays = iter(copied([x for tensors, _ in waiting for x in tensors.values()]))
        for tensors, use in waiting:
            use({name: next(arrays) for name in tensors})
        return written

    def _when_copied(self, tensors: dict[str, Tensor], use: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Copy these at the end of the position, and then use them; in the order of the calls."""
        self._waiting.append((tensors, use))

    def _see_steps(self, position: int, moment: RolloutStep, decoder: RolloutDecoder) -> None:
        for rollout in decoder.rollouts:
            alive, token = decoder.alive_in(rollout), decoder.emitted[rollout.writer]
            for iteration in range(1, rollout.depth + 1):
                cell = RolloutCell(rollout, iteration)
                seen = moment.readout(cell)
                measured = {"alive": alive, "entropy": seen.entropy, "margin": seen.margin}
                if not self.restricted:
                    measured |= {"token": token, "argmax": seen.argmax, "top100": seen.top}
                self._when_copied(measured, partial(self._step_rows, position, cell))

    def _step_rows(self, position: int, cell: RolloutCell, x: dict[str, np.ndarray]) -> None:
        alive = x.pop("alive")
        hidden = dict.fromkeys(("token", "argmax", "top100"), np.full(len(alive), None))
        columns = {name: values[alive] for name, values in (x | (hidden if self.restricted else {})).items()}
        self._rows["steps"].append(self._where(position, cell, alive) | columns)

    def _where(self, position: int, cell: RolloutCell, alive: np.ndarray) -> dict[str, np.ndarray]:
        """The key columns of a row per question whose text goes on."""
        n = alive.sum()
        return {
            "question": self.questions[alive],
            "text": np.full(n, cell.rollout.text),
            "depth": np.full(n, cell.rollout.depth, np.int8),
            "position": np.full(n, position, np.int16),
            "iteration": np.full(n, cell.iteration, np.int8),
        }

    def _lens(self, position: int, moment: RolloutStep, decoder: RolloutDecoder) -> dict[RolloutCell, Tensor]:
        """Leading tokens of the logit lens, [layer, question, k] by cell, where a recipe asks for any."""
        stored = self.lens_tokens == "all" or (self.lens_tokens == "position0" and position == 0)
        if not stored and not self.lens:
            return {}
        cut = _iterated(decoder)
        states = {cell: moment.states(cell)[cut] for cell in self._compared}
        tops = lens_tops(decoder.model.backbone.unembed, states, TOP if self.lens else LENS_TOP)
        for cell, top in tops.items() if stored else ():
            top5 = top[:, :, :LENS_TOP].transpose(0, 1).flatten(1)
            measured = {"alive": decoder.alive_in(cell.rollout), "top5": top5}
            self._when_copied(measured, partial(self._lens_rows, position, cell))
        return tops

    def _lens_rows(self, position: int, cell: RolloutCell, x: dict[str, np.ndarray]) -> None:
        rows = self._where(position, cell, x["alive"])
        self._rows["lens"].append(rows | {"top5": x["top5"][x["alive"]]})

    def _see_pairs(
        self, position: int, moment: RolloutStep, decoder: RolloutDecoder, tops: dict[RolloutCell, Tensor]
    ) -> None:
        """All pairs and layers of a position in one go: [pair, layer, question]."""
        cut = _iterated(decoder)
        a = torch.stack([moment.states(p.cell_a)[cut] for p in self.pairs])
        b = torch.stack([moment.states(p.cell_b)[cut] for p in self.pairs])
        measured = compare_states(a, b)
        if self.lens:
            both_tops = [(tops[p.cell_a], tops[p.cell_b]) for p in self.pairs]
            measured["lens_jaccard"] = torch.stack([jaccard(a, b) for a, b in both_tops])
        for k, pair in enumerate(self.pairs):
            alive = decoder.alive_in(pair.cell_a.rollout) & decoder.alive_in(pair.cell_b.rollout)
            same = decoder.same_prefix[pair.b] if pair.comparison == "free_running" else alive
            change = compare_outputs(moment.readout(pair.cell_a), moment.readout(pair.cell_b))._asdict()
            states = {f"{name} of a layer": x[k] for name, x in measured.items()}
            use = partial(self._pair_rows, position, k, list(change), list(measured), a[k], b[k], cut)
            self._when_copied({"alive": alive, "same_prefix": same, **change, **states}, use)

    def _pair_rows(
        self,
        position: int,
        k: int,
        changes: list[str],
        measures: list[str],
        a: Tensor,
        b: Tensor,
        cut: slice,
        x: dict[str, np.ndarray],
    ) -> None:
        pair, alive = self.pairs[k], x["alive"]
        n, n_layers, layers = alive.sum(), len(a), np.arange(cut.start, cut.stop, dtype=np.int16)
        where = {
            "question": self.questions[alive],
            "comparison": np.full(n, pair.comparison),
            "position": np.full(n, position, np.int16),
            "a": np.full(n, pair.a, np.int8),
            "b": np.full(n, pair.b, np.int8),
            "same_prefix": x["same_prefix"][alive],
        }
        self._rows["outputs"].append(where | {name: x[name][alive] for name in changes})
        self._rows["pairs"].append(
            {name: np.repeat(column, n_layers) for name, column in where.items()}
            | {"layer": np.tile(layers, n)}
            | {name: x[f"{name} of a layer"][:, alive].T.reshape(-1) for name in measures}
        )
        if self.keep == "shifts":
            self._keep_shifts(position, k, alive, x["cosine of a layer"], a, b, cut.start)

    def _keep_shifts(
        self, position: int, k: int, alive: np.ndarray, overlap: np.ndarray, a: Tensor, b: Tensor, first: int
    ) -> None:
        if self._positions is not None and position not in self._positions:
            return
        shifted = (overlap < SHIFT_KEPT_BELOW) & alive[None]
        if self._layers is not None:
            shifted &= np.isin(first + np.arange(len(shifted)), self._layers)[:, None]
        layer, row = np.nonzero(shifted)
        pair = self.pairs[k]
        n = len(layer)
        what = [COMPARISONS.index(pair.comparison), position, 0, pair.a, pair.b]
        index = np.tile(np.array(what, np.int32), (n, 1))
        index[:, 2] = first + layer
        states = a[layer, row].cpu(), b[layer, row].cpu()
        self._shifts.append((np.column_stack([self.questions[row], index]), *states))

    def _see_states(self, position: int, moment: RolloutStep, decoder: RolloutDecoder) -> None:
        if self.keep == "none":
            return
        if position == 0:  # [question, layer, iteration, d_model]
            self._position0 = self._states(moment, decoder.rollouts[0]).cpu()
        if self._spool is None or (self._positions is not None and position not in self._positions):
            return
        for rollout in decoder.rollouts:
            key = f"{rollout.text}.d{rollout.depth}"
            self._when_copied({"alive": decoder.alive_in(rollout)}, partial(self._lengthen, key))
            states = self._states(moment, rollout)
            self._spooled.setdefault(key, (states[0:0], []))[1].append(self._spool.add(states))

    def _states(self, moment: RolloutStep, rollout: Rollout) -> Float[Tensor, "question layer iteration d"]:
        """A rollout's states at one position, in the layers that are kept."""
        cells = [moment.states(RolloutCell(rollout, i)) for i in range(1, rollout.depth + 1)]
        if self._layers is not None:
            cells = [cell[self._layers] for cell in cells]
        return torch.stack([cell.transpose(0, 1) for cell in cells], 2)

    def _lengthen(self, key: str, x: dict[str, np.ndarray]) -> None:
        self._lengths[key] = self._lengths.get(key, 0) + x["alive"].astype(int)

    def tables(self) -> dict[str, dict[str, Any]]:
        """Columns of `steps`, `outputs`, `pairs` and `lens`, in the order of docs/run-format.md."""
        return {name: _concatenated(rows) for name, rows in self._rows.items()}

    def states(self) -> dict[str, Tensor | Spooled]:
        """Kept states by tensor name; [..., layer, iteration, d_model]."""
        kept: dict[str, Tensor | Spooled] = {}
        if self._position0 is not None:
            kept |= {f"q{q}.position0": self._position0[row] for row, q in enumerate(self.questions)}
        if self._shifts:
            index = np.concatenate([i for i, _, _ in self._shifts])
            a, b = torch.cat([s[1] for s in self._shifts]), torch.cat([s[2] for s in self._shifts])
            for q in self.questions:
                rows = torch.from_numpy(np.nonzero(index[:, 0] == q)[0])
                kept[f"q{q}.shifts.index"] = torch.from_numpy(index[rows.numpy(), 1:]).contiguous()
                kept[f"q{q}.shifts.a"], kept[f"q{q}.shifts.b"] = a[rows], b[rows]
        for key, (like, starts) in self._spooled.items():
            size = math.prod(like.shape[1:]) * like.dtype.itemsize
            for row, q in enumerate(self.questions):
                here = tuple(start + row * size for start in starts[: self._lengths[key][row]])
                assert self._spool is not None
                kept[f"q{q}.{key}"] = Spooled(self._spool, like.dtype, (len(here), *like.shape[1:]), here)
        return kept


def compare_states(a: Float[Tensor, "*at d_model"], b: Float[Tensor, "*at d_model"]) -> dict[str, Tensor]:
    """What `pairs` and `noise` say of two states (docs/run-format.md), each [*at]."""
    return {
        "cosine": cosine(a, b),
        "relative_l2": relative_l2(a, b),
        "norm_a": wide(a).norm(dim=-1),
        "norm_b": wide(b).norm(dim=-1),
        "bf16_ratio": bf16_ratio(a, b),
    }


def _iterated(decoder: RolloutDecoder) -> slice:
    """The layers that are compared: one that runs once has no pair of iterations."""
    layers = decoder.model.kind.iterated(decoder.model.backbone.n_layers)
    return slice(layers.start, layers.stop)


def copied(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Tensors of any dtypes as arrays: their bytes are copied from the device in one piece."""
    if all(x.device.type == "cpu" for x in tensors):
        return [x.numpy() for x in tensors]
    parts = [x.contiguous().flatten().view(torch.uint8) for x in tensors]
    pieces = torch.cat(parts).cpu().split([len(part) for part in parts])
    return [p.clone().view(x.dtype).view(x.shape).numpy() for p, x in zip(pieces, tensors, strict=True)]


def _concatenated(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([row[name] for row in rows]) for name in (rows[0] if rows else ())}


LENS_TOP = 5
"""How many leading tokens of every layer a run records."""
ROWS_AT_ONCE = 256
"""States unembedded in one product: enough to be fast, few enough for a large vocabulary."""


def lens_tops(
    unembed: Callable[[Tensor], Tensor],
    states: Mapping[RolloutCell, Float[Tensor, "layer question d_model"]],
    k: int,
) -> dict[RolloutCell, Int[Tensor, "layer question k"]]:
    """The `k` most likely tokens of every state, most likely first (all, if the vocabulary is smaller).

    Args:
        unembed: [..., d_model] to logits [..., vocab].
        states: layer outputs by cell. Where two are bit-identical, as iteration i of every depth is at
            position 0, the first is unembedded for both.
    """
    different: dict[RolloutCell, Tensor] = {}
    same_as: dict[RolloutCell, RolloutCell] = {}
    for cell, state in states.items():
        same_as[cell] = next((c for c, s in different.items() if torch.equal(s, state)), cell)
        different.setdefault(same_as[cell], state)
    rows = torch.cat(list(different.values()), 1)
    step = max(1, ROWS_AT_ONCE // rows.shape[1])
    logits = (unembed(layers) for layers in rows.split(step))
    tops = torch.cat([x.topk(min(k, x.shape[-1])).indices for x in logits]).chunk(len(different), 1)
    by_cell = dict(zip(different, tops, strict=True))
    return {cell: by_cell[same] for cell, same in same_as.items()}


SIGNIFICANT_BITS = 12
"""Of every float in `noise` and `nudges`: within 1 part in 4,096."""


def significant(values: np.ndarray, bits: int = SIGNIFICANT_BITS) -> np.ndarray:
    """Values rounded to so many significant bits: 0, infinities and NaN stay what they are."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def rounded_floats(name: str, values: np.ndarray, bits: int = SIGNIFICANT_BITS) -> np.ndarray:
    """A column's floats as rounded float32; of a cosine, it is 1 - cosine that is rounded."""
    if name == "cosine":
        return (1 - significant(1 - values.astype(np.float64), bits)).astype(np.float32)
    return significant(values, bits).astype(np.float32)


def rounded_columns(columns: dict[str, Any], bits: int = SIGNIFICANT_BITS) -> dict[str, Any]:
    """The columns with their floats rounded; a list of arrays is a column of lists."""
    out = dict(columns)
    for name, values in columns.items():
        if isinstance(values, list):
            flat = rounded_floats(name, np.concatenate(values), bits)
            out[name] = np.split(flat, np.cumsum([len(v) for v in values])[:-1])
        elif values.dtype.kind == "f":
            out[name] = rounded_floats(name, values, bits)
    return out
