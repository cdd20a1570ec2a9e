"""Measures of states and outputs: small pure functions on tensors.

They reduce on the device during generation, so memory does not grow with the text. Definitions and units are
those of docs/run-format.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOP = 100
"""How many of the most likely tokens are kept: the paper's "top 100"."""

BF16_ROUNDOFF = 2.0**-8
"""Unit roundoff of bfloat16 (8 bits of significand)."""


def wide(x: Tensor) -> Tensor:
    """At least float32: reductions of bf16 states are not done in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine(a: Float[Tensor, "*cell d_model"], b: Float[Tensor, "*cell d_model"]) -> Float[Tensor, "*cell"]:
    """Cosine similarity in [-1, 1], symmetric; exactly 1 for a state and itself.

    Computed as 1 - |a/|a| - b/|b||^2 / 2, which is accurate where overlaps crowd: next to 1.
    """
    a, b = wide(a), wide(b)
    tiny = torch.finfo(a.dtype).tiny
    gap = a / a.norm(dim=-1, keepdim=True).clamp_min(tiny) - b / b.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return 1 - gap.square().sum(-1) / 2


def relative_l2(
    a: Float[Tensor, "*cell d_model"], b: Float[Tensor, "*cell d_model"]
) -> Float[Tensor, "*cell"]:
    """|b - a| / |a|: 0 if and only if the two are bit-identical."""
    a, b = wide(a), wide(b)
    return (b - a).norm(dim=-1) / a.norm(dim=-1).clamp_min(torch.finfo(a.dtype).tiny)


def bf16_ratio(
    a: Float[Tensor, "*cell d_model"], b: Float[Tensor, "*cell d_model"]
) -> Float[Tensor, "*cell"]:
    """Median over dimensions of |b - a| / (2^-8 |a|): how many bf16 roundings of `a` the change is worth
    (claim C7). One rounding is a lenient reference after many layers; docs/concepts.md.
    """
    a, b = wide(a), wide(b)
    change = (b - a).abs_()
    same = change == 0
    return change.div_(BF16_ROUNDOFF * a.abs()).masked_fill_(same, 0).median(dim=-1).values


def jaccard(a: Int[Tensor, "*cell k"], b: Int[Tensor, "*cell k"]) -> Float[Tensor, "*cell"]:
    """Jaccard index of two sets of k distinct token ids: |a & b| / |a | b|, in [0, 1]."""
    common = a.shape[-1] - replaced(a, b)
    return common / (2 * a.shape[-1] - common)


def replaced(a: Int[Tensor, "*cell k"], b: Int[Tensor, "*cell k"]) -> Int[Tensor, "*cell"]:
    """How many of a's tokens are not among b's (claim C4)."""
    return (a[..., :, None] != b[..., None, :]).all(-1).sum(-1)


class Readout(NamedTuple):
    """The recorded numbers of a next-token distribution."""

    argmax: Int[Tensor, " row"]
    """The first of the most likely tokens (bf16 logits tie now and then), as in greedy generation."""
    entropy: Float[Tensor, " row"]
    """Nats."""
    margin: Float[Tensor, " row"]
    """Logit of the first token minus logit of the second."""
    top: Int[Tensor, "row k"]
    """Ids of the 100 most likely tokens, most likely first (all, if the vocabulary is smaller)."""
    log_probs: Float[Tensor, "row vocab"]


def read_out(logits: Float[Tensor, "row vocab"]) -> Readout:
    """Reduce logits to their `Readout`."""
    log_probs = wide(logits).log_softmax(-1)
    values, top = log_probs.topk(min(TOP, logits.shape[-1]))
    entropy = -torch.linalg.vecdot(log_probs.exp(), log_probs)
    return Readout(log_probs.argmax(-1), entropy, values[:, 0] - values[:, 1], top, log_probs)


class OutputChange(NamedTuple):
    """How one next-token distribution differs from another."""

    argmax_changed: Bool[Tensor, " row"]
    replaced: Int[Tensor, " row"]
    winner_rank: Int[Tensor, " row"]
    """Rank of b's most likely token in a, ties in order of id; 0 if and only if it is a's, too."""
    kl: Float[Tensor, " row"]
    """KL(b || a), nats."""


def compare_outputs(a: Readout, b: Readout) -> OutputChange:
    """What changed from `a` to `b`, row by row."""
    in_a = a.log_probs.gather(1, b.argmax[:, None])
    before = torch.arange(a.log_probs.shape[1], device=in_a.device) < b.argmax[:, None]
    rank = ((a.log_probs > in_a) | ((a.log_probs == in_a) & before)).sum(-1)
    kl = torch.linalg.vecdot(b.log_probs.exp(), b.log_probs - a.log_probs).clamp_min(0)
    return OutputChange(a.argmax != b.argmax, replaced(a.top, b.top), rank, kl)


def rows_of(readout: Readout, rows: slice) -> Readout:
    """The same readout for some rows."""
    return Readout(*(field[rows] for field in readout))
