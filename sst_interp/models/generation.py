"""Generation at any depth, greedy or sampled, in batches of prompts of different length.

`decode` is the loop's body: one position for all rows. `generate` runs it with each row's own text; the
capture (`sst_interp.runs.capture`) runs it with several depths and texts side by side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.choices import check_iterations, several, shown, whole
from sst_interp.models.halting import Depths, Look, Schedule, schedule_of
from sst_interp.models.hooks import Edit, Hook, Visit, editing, refuse_unused
from sst_interp.models.solvers import prefill
from sst_interp.models.solvers.sequential import Certificate, Iteration, advance
from sst_interp.models.stream import Recurrence, Stream


@dataclass
class Step:
    """One generated position of a batch, as it was computed."""

    position: int
    """0-based step of generation."""
    iterations: list[Iteration]
    """Layer outputs [layer, row, d_model] of each iteration, for the first n rows of `rows`."""
    logits: list[Float[Tensor, "row vocab"]]
    """Logits after each iteration, rows as in `iterations`."""
    rows: Int[Tensor, " row"]
    """Which prompt each row is (rows are sorted by depth, deepest first)."""
    alive: Tensor
    """[row] False once a row has emitted its stop token at an earlier position."""


Observe = Callable[[Step], Any]


@dataclass
class Generation:
    """Generated continuations, in the order of the prompts."""

    tokens: list[list[int]]
    """New token ids per prompt, the stop token included."""
    texts: list[str] | None
    """Decoded without special tokens; None without a tokenizer."""
    stopped: list[bool]
    """Ended by a stop token (otherwise by the budget)."""
    iterations: list[int]
    """Depth per prompt; the deepest, where it differs from position to position."""
    certificate: Certificate
    """How the prompts were read."""
    depths: list[list[int]]
    """Depth of every generated position, per prompt."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises SSTError for a setting that cannot be.

    A row draws by its own generator, made from `seed` and its prompt: it writes the same text in any batch,
    but for rounding. For several texts of one prompt give each row a seed.
    """

    temperature: float = 1.0
    """Logits are divided by it."""
    top_p: float = 1.0
    """Of the most likely tokens, the fewest that together are this likely are kept."""
    top_k: int | None = None
    """So many of the most likely tokens are kept; None: all."""
    seed: int | Sequence[int] = 0
    """One number, or one per row."""

    def __post_init__(self) -> None:
        for name, high, example in (("temperature", math.inf, 0.7), ("top_p", 1.0, 0.9)):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not (number and 0 < float(value) <= high and float(value) < math.inf):
                upto = "" if high == math.inf else " and at most 1"
                said = f"{name} = {shown(value)} is not a number above 0{upto}"
                raise SSTError(said, f"for example {name} = {example}")
        if self.top_k is not None:
            whole("top_k", self.top_k, 1)

    @classmethod
    def of(
        cls, temperature: float | None, top_p: float, top_k: int | None, seed: int | Sequence[int]
    ) -> Sampling | None:
        """From the arguments of `generate`; None is greedy: no temperature or one of 0, and nothing cut."""
        if temperature == 0 or (temperature is None and top_p == 1 and top_k is None):
            return None
        return cls(1.0 if temperature is None else temperature, top_p, top_k, seed)

    def draws(self, prompts: Sequence[Sequence[int]], order: Sequence[int]) -> list[random.Random]:
        """Every row's generator; `order` says which of the seeds is whose."""
        given: Any = self.seed
        seeds = list(given) if several(given) else [given] * len(prompts)
        if len(seeds) != len(prompts):
            raise SSTError(f"{len(seeds)} seeds for {len(prompts)} prompts", "give one, or one per prompt")
        seeds = [whole("seed", seeds[row], 0) for row in order]
        return [random.Random(f"{s}:{list(p)}") for s, p in zip(seeds, prompts, strict=True)]

    def choose(self, logits: Float[Tensor, "row vocab"], draws: Sequence[random.Random]) -> Tensor:
        """The next token of every row [row]: the place of a uniform number among the likelihoods' sums."""
        wide = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < wide.shape[-1]:
            least = wide.topk(self.top_k, dim=-1).values[:, -1:]
            wide = wide.masked_fill(wide < least, -math.inf)
        likely = wide.softmax(-1)
        if self.top_p < 1:
            ordered, places = likely.sort(-1, descending=True)
            more = ordered.cumsum(-1) - ordered >= self.top_p
            likely = likely.masked_fill(torch.zeros_like(more).scatter(-1, places, more), 0)
        sums = likely.cumsum(-1)
        at = sums.new_tensor([draw.random() for draw in draws])[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class Endings(NamedTuple):
    """What ends a text."""

    tokens: Sequence[int]
    strings: tuple[str, ...] = ()
    """A text ends before the first of these."""
    tokenizer: Any = None

    def cut(self, text: str) -> str:
        """A text up to the first of the strings."""
        places = [text.find(string) for string in self.strings]
        return text[: min((p for p in places if p >= 0), default=len(text))]

    def found(self, emitted: Sequence[int]) -> bool:
        """Whether the newest tokens hold one of the strings."""
        recent = emitted[-max(map(len, self.strings)) - 16 :]
        text = self.tokenizer.decode(recent, skip_special_tokens=True)
        return any(string in text for string in self.strings)


class Piece(NamedTuple):
    """One token of a text that is being written."""

    row: int
    """Which prompt it goes on from."""
    position: int
    token: int
    text: str
    """What it adds to the text; a character of several tokens comes with its last."""
    depth: int


def check_room(model: Recurrence, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise if a prompt and its budget do not fit the context."""
    limit = model.backbone.max_length
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise SSTError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the context of {limit}",
            f"leave room: at most {limit - max_new_tokens} prompt tokens, or a smaller max_new_tokens",
        )


@torch.no_grad()
def decode(
    model: Recurrence,
    stream: Stream,
    tokens: Tensor,
    depths: Tensor,
    hook: Callable[[int], Visit] | None = None,
) -> tuple[list[Iteration], list[Tensor], Tensor]:
    """One position of every row: its iterations, their logits, and each row's logits at its own depth.

    Args:
        tokens: [row] input tokens.
        depths: [row] on the CPU, descending.
        hook: iteration -> the visit of its pass.
    """
    iterations = advance(model, stream, tokens, depths, hook)
    logits = [model.backbone.unembed(it.resid_post[-1]) for it in iterations]
    final = logits[0].clone() if len(logits) > 1 else logits[0]
    for deeper in logits[1:]:
        final[: len(deeper)] = deeper
    return iterations, logits, final


@torch.no_grad()
def generate(
    model: Recurrence,
    tokens: Int[Tensor, "row column"],
    pad: Int[Tensor, " row"],
    depths: Depths,
    max_new_tokens: int,
    stop: Endings,
    observe: Observe | None = None,
    progress: Callable[[int], Any] | None = None,
    edit: Edit | None = None,
    hook: Hook | None = None,
    sampling: Sampling | None = None,
) -> Generation:
    """Generate from a left-padded batch of prompts; the arguments are those of `StateStreamModel.generate`.

    Args:
        tokens: prompts, with `pad` columns of padding on the left.
        depths: one per row, the policy that picks them at position 0, or one for every position.
        hook: instead of an `edit`; rows are deepest first.
        sampling: None is greedy.
    """
    for name, given in (("observe", observe), ("progress", progress), ("edit", edit)):
        if given is not None and not callable(given):
            raise SSTError(
                f"{name} = {shown(given)} cannot be called", f"give a function, or leave {name} out"
            )
    lanes = read_prompts(model, tokens, pad, depths, max_new_tokens, stop, sampling)
    if edit is not None:
        hook = lambda position, iteration: editing(edit, lanes.order)(position, iteration)  # noqa: E731
    for position in lanes.write(model, max_new_tokens, observe, hook):
        if progress is not None:
            progress(position + 1)
    if edit is not None:
        ran = f"{max(map(len, lanes.new))} positions, {max(map(max, lanes.spent))} iterations"
        refuse_unused(edit, f"there were {ran}, {model.backbone.n_layers} layers")
    return lanes.texts(torch.argsort(lanes.order).tolist())


def read_prompts(
    model: Recurrence,
    tokens: Int[Tensor, "row column"],
    pad: Int[Tensor, " row"],
    depths: Depths,
    max_new_tokens: int,
    stop: Endings,
    sampling: Sampling | None = None,
) -> Lanes:
    """The prompts read up to their last tokens, deepest rows first; the arguments are those of `generate`."""
    schedule = schedule_of(depths)
    fixed = [1] * len(pad) if schedule is not None else check_iterations(depths)  # pyright: ignore
    if len(fixed) != len(pad):
        raise SSTError(f"{len(fixed)} depths for {len(pad)} prompts", "give one number, or one per prompt")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    check_room(model, tokens.shape[1], max_new_tokens)
    order = torch.tensor(sorted(range(len(pad)), key=lambda r: -fixed[r]), device=tokens.device)
    tokens, pad = tokens[order], pad[order]
    draws = None
    if sampling is not None:
        prompts = [row[p:] for row, p in zip(tokens.tolist(), pad.tolist(), strict=True)]
        draws = sampling.draws(prompts, order.tolist())
    stream = model.new_stream(pad, tokens.shape[1] + max_new_tokens - 1)
    certificate = prefill(model, stream, tokens[:, :-1])
    at = [fixed[r] for r in order.tolist()]
    return Lanes(stream, tokens[:, -1], at, order, certificate, stop, sampling, draws, schedule)


@dataclass
class Lanes:
    """Texts that are being written side by side, deepest first."""

    stream: Stream
    current: Int[Tensor, " row"]
    """The tokens that the next position reads."""
    depths: list[int]
    """Of the next position; a `schedule` sets them anew."""
    order: Int[Tensor, " row"]
    """Which prompt each row goes on from."""
    certificate: Certificate
    stop: Endings
    sampling: Sampling | None = None
    draws: list[random.Random] | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        self.new: list[list[int]] = [[] for _ in self.depths]
        """The tokens of every text so far."""
        self.spent: list[list[int]] = [[] for _ in self.depths]
        """The depth at which each of them was written."""
        self.stopped = [False] * len(self.depths)

    def _plan(self, model: Recurrence, schedule: Schedule, position: int) -> None:
        """Set the depths of the position that is about to run, and put the deepest rows first."""
        if not schedule.plans(position):
            return
        look = look_ahead(model, self.stream, self.current, schedule.looks)
        depths = schedule.at(position, self.order.tolist(), look)
        depths = [1 if ended else d for d, ended in zip(depths, self.stopped, strict=True)]
        order = sorted(range(len(depths)), key=lambda row: -depths[row])
        self.depths = [depths[row] for row in order]
        if order == sorted(order):
            return
        at = torch.tensor(order, device=self.current.device)
        self.stream, self.current, self.order = self.stream.take(at), self.current[at], self.order[at]
        for name in ("new", "spent", "stopped", "draws"):
            kept = getattr(self, name)
            setattr(self, name, kept if kept is None else [kept[row] for row in order])

    def texts(self, rows: Sequence[int]) -> Generation:
        """What these rows have written."""
        new, spent = [self.new[row] for row in rows], [self.spent[row] for row in rows]
        stopped = [self.stopped[row] for row in rows]
        return Generation(new, None, stopped, list(map(max, spent)), self.certificate, spent)

    def write(
        self,
        model: Recurrence,
        max_new_tokens: int,
        observe: Observe | None = None,
        hook: Hook | None = None,
    ) -> Iterator[int]:
        """Write position after position, until every text has ended; yields each position's number."""
        ids = torch.tensor(sorted(self.stop.tokens), dtype=torch.long, device=self.current.device)
        alive = torch.ones_like(self.current, dtype=torch.bool)
        for position in range(max_new_tokens):
            if self.schedule is not None:
                self._plan(model, self.schedule, position)
                alive = ~torch.tensor(self.stopped, device=alive.device)
            at = None if hook is None else partial(hook, position)
            passes, logits, final = decode(model, self.stream, self.current, torch.tensor(self.depths), at)
            if observe is not None:
                observe(Step(position, passes, logits, self.order, alive))
            if self.sampling is None or self.draws is None:
                self.current = final.argmax(-1)
            else:
                self.current = self.sampling.choose(final, self.draws)
            ends, largest = torch.isin(self.current, ids), final.amax(-1)  # NaN is the largest
            # the one place that waits for the device
            tokens, ended, finite = torch.stack(
                [self.current, ends.long(), largest.isfinite().long()]
            ).tolist()
            if not all(finite):
                model.backbone.refuse_nonfinite(largest)
            for row in range(len(tokens)):
                if not self.stopped[row]:
                    self.new[row].append(tokens[row])
                    self.spent[row].append(self.depths[row])
                    cut = bool(self.stop.strings) and self.stop.found(self.new[row])
                    self.stopped[row] = bool(ended[row]) or cut
            alive = ~torch.tensor(self.stopped, device=alive.device) if self.stop.strings else alive & ~ends
            yield position
            if all(self.stopped):
                break


@torch.no_grad()
def stream_pieces(model: Recurrence, lanes: Lanes, max_new_tokens: int) -> Iterator[Piece]:
    """Every token of every text as it is written. Texts stand still before a string that ends them."""
    tokenizer, said = lanes.stop.tokenizer, [""] * len(lanes.depths)
    for position in lanes.write(model, max_new_tokens):
        for row, new in enumerate(lanes.new):
            if len(new) != position + 1:
                continue
            text, prompt = "", int(lanes.order[row])
            if tokenizer is not None:
                whole_text = lanes.stop.cut(tokenizer.decode(new, skip_special_tokens=True))
                ends = lanes.stopped[row] or position + 1 == max_new_tokens
                if ends or not whole_text.endswith("\ufffd"):  # part of a character
                    text, said[prompt] = whole_text[len(said[prompt]) :], whole_text
            yield Piece(prompt, position, new[-1], text, lanes.depths[row])


@torch.no_grad()
def generate_at_depths(
    model: Recurrence,
    tokens: Int[Tensor, "row column"],
    pad: Int[Tensor, " row"],
    depths: Sequence[int],
    max_new_tokens: int,
    stop: Endings,
    progress: Callable[[int], Any] | None = None,
) -> dict[int, Generation]:
    """Every prompt continued greedily at every depth: the prompts are read once, the depths decode side by
    side.

    Args:
        tokens: prompts, with `pad` columns of padding on the left.
        depths: distinct.

    Returns:
        Depth -> what `generate` gives at that depth (but for rounding: the batch has another shape).
    """
    depths = check_iterations(depths, "depths")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    check_room(model, tokens.shape[1], max_new_tokens)
    ordered, rows = sorted(set(depths), reverse=True), len(pad)
    stream = model.new_stream(pad, tokens.shape[1] + max_new_tokens - 1)
    certificate = prefill(model, stream, tokens[:, :-1])
    lanes = Lanes(
        stream.repeat(len(ordered)),
        tokens[:, -1].repeat(len(ordered)),
        [depth for depth in ordered for _ in range(rows)],
        torch.arange(rows, device=tokens.device).repeat(len(ordered)),
        certificate,
        stop,
    )
    for position in lanes.write(model, max_new_tokens):
        if progress is not None:
            progress(position + 1)
    by_depth = {}
    for k, depth in enumerate(ordered):
        by_depth[depth] = lanes.texts(range(k * rows, (k + 1) * rows))
    return by_depth


@torch.no_grad()
def look_ahead(model: Recurrence, stream: Stream, tokens: Int[Tensor, " row"], iterations: int) -> Look:
    """The next position of every row at this depth, computed on a copy of the stream.

    Args:
        stream: the prompts, read up to their last token.
        tokens: each prompt's last token.
        iterations: 0 computes nothing, and the look is empty.
    """
    if iterations == 0:
        b, rows = model.backbone, len(tokens)
        vocab = b.model.get_input_embeddings().num_embeddings
        nothing = stream.state.new_empty
        return Look(nothing(0, b.n_layers, rows, b.d_model), nothing(0, rows, vocab))
    seen = [it.resid_post for it in advance(model, stream.repeat(1), tokens, iterations)]
    logits = [model.backbone.unembed(states[-1]) for states in seen]
    return Look(torch.stack(seen), torch.stack(logits))
