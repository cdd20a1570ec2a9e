"""Greedy generation at any depth, in batches of prompts of different length.

`decode` is the loop's body: one position for all rows. `generate` runs it with each row's own text; the
capture (`sst_interp.runs.capture`) runs it with several depths and texts side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.choices import check_iterations, shown, whole
from sst_interp.models.halting import HaltingPolicy, Look
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
    """Depth per prompt."""
    certificate: Certificate
    """How the prompts were read."""


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
    depths: Sequence[int] | HaltingPolicy,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    observe: Observe | None = None,
    progress: Callable[[int], Any] | None = None,
    edit: Edit | None = None,
    hook: Hook | None = None,
) -> Generation:
    """Generate from a left-padded batch of prompts; the arguments are those of `StateStreamModel.generate`.

    Args:
        tokens: prompts, with `pad` columns of padding on the left.
        depths: one per row, or the policy that picks them at position 0.
        hook: instead of an `edit`; rows are deepest first.
    """
    if not isinstance(depths, HaltingPolicy) and len(depths) != len(pad):
        raise SSTError(f"{len(depths)} depths for {len(pad)} prompts", "give one number, or one per prompt")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    for name, given in (("observe", observe), ("progress", progress), ("edit", edit)):
        if given is not None and not callable(given):
            raise SSTError(
                f"{name} = {shown(given)} cannot be called", f"give a function, or leave {name} out"
            )
    check_room(model, tokens.shape[1], max_new_tokens)
    columns = tokens.shape[1] + max_new_tokens - 1
    read: tuple[Stream, Certificate] | None = None
    if isinstance(depths, HaltingPolicy):
        policy, stream = depths, model.new_stream(pad, columns)
        read = stream, prefill(model, stream, tokens[:, :-1])
        depths = policy.depths(look_ahead(model, stream, tokens[:, -1], policy.looks)).tolist()
    depths = check_iterations(depths)
    order = torch.tensor(sorted(range(len(pad)), key=lambda r: -depths[r]), device=tokens.device)
    per_row = torch.tensor(depths)[order.cpu()]
    tokens, pad = tokens[order], pad[order]
    if read is None:
        stream = model.new_stream(pad, columns)
        certificate = prefill(model, stream, tokens[:, :-1])
    else:
        stream, certificate = read[0].take(order), read[1]
    hook = hook if edit is None else editing(edit, order)
    new, stopped = _write(
        model, stream, tokens[:, -1], per_row, max_new_tokens, stop_tokens, order, observe, progress, hook
    )
    if edit is not None:
        ran = f"{max(map(len, new))} positions, {max(depths)} iterations, {model.backbone.n_layers} layers"
        refuse_unused(edit, f"there were {ran}")
    back = torch.argsort(order).tolist()
    return Generation(
        tokens=[new[r] for r in back],
        texts=None,
        stopped=[stopped[r] for r in back],
        iterations=depths,
        certificate=certificate,
    )


@torch.no_grad()
def generate_at_depths(
    model: Recurrence,
    tokens: Int[Tensor, "row column"],
    pad: Int[Tensor, " row"],
    depths: Sequence[int],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    progress: Callable[[int], Any] | None = None,
) -> dict[int, Generation]:
    """Every prompt continued at every depth: the prompts are read once, the depths decode side by side.

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
    new, stopped = _write(
        model,
        stream.repeat(len(ordered)),
        tokens[:, -1].repeat(len(ordered)),
        torch.tensor(ordered).repeat_interleave(rows),
        max_new_tokens,
        stop_tokens,
        torch.arange(rows, device=tokens.device).repeat(len(ordered)),
        None,
        progress,
    )
    by_depth = {}
    for k, depth in enumerate(ordered):
        here = slice(k * rows, (k + 1) * rows)
        by_depth[depth] = Generation(new[here], None, stopped[here], [depth] * rows, certificate)
    return by_depth


def _write(
    model: Recurrence,
    stream: Stream,
    current: Tensor,
    per_row: Tensor,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    order: Tensor,
    observe: Observe | None,
    progress: Callable[[int], Any] | None,
    hook: Hook | None = None,
) -> tuple[list[list[int]], list[bool]]:
    """Greedy continuation of every row, deepest rows first: new tokens, and whether each stopped."""
    stop = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=current.device)
    alive = torch.ones_like(current, dtype=torch.bool)
    emitted, lived = [], []
    for position in range(max_new_tokens):
        at = None if hook is None else partial(hook, position)
        passes, logits, final = decode(model, stream, current, per_row, at)
        if observe is not None:
            observe(Step(position, passes, logits, order, alive))
        model.backbone.refuse_nonfinite(final.amax(-1))  # one that is not a number is the largest
        current = final.argmax(-1)
        emitted.append(current)
        lived.append(alive)
        alive = alive & ~torch.isin(current, stop)
        if progress is not None:
            progress(position + 1)
        if not bool(alive.any()):
            break
    new, lengths = torch.stack(emitted, 1).tolist(), torch.stack(lived, 1).sum(1).tolist()
    texts = [row[:length] for row, length in zip(new, lengths, strict=True)]
    return texts, (~alive).tolist()


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
