"""How likely given continuations of a text are at any depth: log-probabilities, token by token.

The context is read once at depth 1 up to its last token, as a prompt is. From there every position is
iterated to the depth asked for, the context's last token included: its logits predict the first token of a
continuation. It is the model that writes at that depth (`generation`), asked about a text not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.choices import check_iterations
from sst_interp.models.generation import check_room
from sst_interp.models.measures import wide
from sst_interp.models.solvers import prefill, solve_exactly
from sst_interp.models.stream import Recurrence, Stream

ROWS = 64
"""Continuations in one pass: enough to be fast, few enough for the memory of their keys and values."""
UNEMBEDDED = 256
"""Positions unembedded at once."""


class LogLikelihood(NamedTuple):
    """Log-probabilities of continuations, in nats. One depth alone has no axis `depth`."""

    sums: Float[Tensor, "*depth continuation"]
    """Of the whole continuation, given the context."""
    terms: Float[Tensor, "*depth continuation token"]
    """Of each token, given all before it; a shorter continuation ends in zeros."""
    lengths: Int[Tensor, " continuation"]
    """Tokens of each continuation."""
    greedy: Bool[Tensor, "*depth continuation"]
    """Whether each of its tokens is the likeliest there, so that greedy generation would write it."""


@torch.no_grad()
def loglikelihood(
    model: Recurrence,
    tokens: Int[Tensor, "row column"],
    pad: Int[Tensor, " row"],
    continuations: Sequence[Sequence[Sequence[int]]],
    depths: Sequence[int],
) -> LogLikelihood:
    """Read a left-padded batch of contexts and score every continuation of each at every depth.

    Args:
        tokens: contexts, with `pad` columns of padding on the left.
        continuations: token ids of each row's continuations.
        depths: iterations of every position from the context's last token on.

    Returns:
        Continuations one row after the other.

    Raises:
        SSTError: an empty continuation, one that does not fit the context, or logits that are not finite.
    """
    longest = longest_of(continuations)
    check_room(model, tokens.shape[1], longest)
    stream = model.new_stream(pad, tokens.shape[1] + longest - 1)
    prefill(model, stream, tokens[:, :-1])
    return score(model, stream, tokens[:, -1], continuations, depths)


def longest_of(continuations: Sequence[Sequence[Sequence[int]]]) -> int:
    """Tokens of the longest continuation. Raises SSTError if one is empty, or there is none."""
    lengths = [len(each) for several in continuations for each in several]
    if not lengths or not min(lengths):
        raise SSTError("there is no continuation, or an empty one", 'for example [" blue", " green"]')
    return max(lengths)


@torch.no_grad()
def score(
    model: Recurrence,
    stream: Stream,
    last: Int[Tensor, " row"],
    continuations: Sequence[Sequence[Sequence[int]]],
    depths: Sequence[int],
) -> LogLikelihood:
    """The continuations of contexts that have been read; the other arguments are those of `loglikelihood`.

    Args:
        stream: the contexts, read up to their last token, with room for `longest_of(continuations)` columns
            more. It is left as it is.
        last: the last token of each context.
    """
    depths, device = check_iterations(depths, "iterations"), last.device
    flat = [(row, each) for row, several in enumerate(continuations) for each in several]
    lengths = torch.tensor([len(each) for _, each in flat], device=device)
    dtype = torch.promote_types(model.backbone.dtype, torch.float32)
    terms = torch.zeros(len(depths), len(flat), longest_of(continuations), dtype=dtype, device=device)
    likeliest = torch.ones_like(terms, dtype=torch.bool)
    for chosen in torch.argsort(lengths, stable=True).split(ROWS):  # alike in length, to pad little
        rows = torch.tensor([flat[i][0] for i in chosen.tolist()], device=device)
        width = int(lengths[chosen].max())
        padded = [[*flat[i][1], *[0] * (width - len(flat[i][1]))] for i in chosen.tolist()]
        wanted = torch.tensor(padded, device=device)
        real = torch.arange(width, device=device)[None] < lengths[chosen, None]
        read = torch.cat([last[rows, None], wanted[:, :-1]], dim=1)
        for k, depth in enumerate(depths):
            solution = solve_exactly(model, stream.take(rows), read, iterations=depth, keep=False)
            states, targets = solution.last[:, :, -1][real], wanted[real]
            logits = (wide(model.backbone.unembed(part)) for part in states.split(UNEMBEDDED))
            pairs = zip(logits, targets.split(UNEMBEDDED), strict=True)
            seen = [(x.log_softmax(-1).gather(-1, t[:, None])[:, 0], x.argmax(-1) == t) for x, t in pairs]
            of_tokens, first = (torch.cat(parts) for parts in zip(*seen, strict=True))
            model.backbone.refuse_nonfinite(of_tokens)
            at = k, chosen[real.nonzero()[:, 0]], real.nonzero()[:, 1]
            terms[at] = of_tokens
            likeliest[at] = first
    return LogLikelihood(terms.sum(-1), terms, lengths, likeliest.all(-1))
