"""The noise floor: the same tokens at the same depth, computed in another way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.models.backbone import Backbone
from sst_interp.models.measures import bf16_ratio, cosine, relative_l2, wide
from sst_interp.models.solvers import prefill
from sst_interp.models.solvers.sequential import Iteration, advance
from sst_interp.models.stream import Recurrence

Columns = dict[str, np.ndarray]


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


def in_float32(model: Recurrence) -> Recurrence:
    """The same weights and stream in float32: a copy in memory, nothing is loaded."""
    upcast = copy.deepcopy(model.backbone.model).to(torch.float32)
    return Recurrence(Backbone(upcast), model.kind.to(torch.float32), model.choices)


def noise_rows(
    question: int,
    kind: str,
    depth: int,
    a: Float[Tensor, "position layer d_model"],
    b: Float[Tensor, "position layer d_model"],
) -> Columns:
    """Rows of `noise`: states as they were captured (`a`) against the same ones computed anew (`b`)."""
    positions, layers, _ = a.shape
    n = positions * layers
    measured = {
        "cosine": cosine(a, b),
        "relative_l2": relative_l2(a, b),
        "norm_a": wide(a).norm(dim=-1),
        "norm_b": wide(b).norm(dim=-1),
        "bf16_ratio": bf16_ratio(a, b),
    }
    return {
        "question": np.full(n, question, np.int32),
        "kind": np.full(n, kind),
        "depth": np.full(n, depth, np.int8),
        "position": np.repeat(np.arange(positions, dtype=np.int16), layers),
        "layer": np.tile(np.arange(layers, dtype=np.int16), positions),
        **{name: x.reshape(-1).cpu().numpy() for name, x in measured.items()},
    }
