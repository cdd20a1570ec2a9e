"""One question's depth-1 text, read at depth 1 and at the deepest side by side: what patches take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sst_interp.hooks import Site, Visit
from sst_interp.keyvalues import KeyValues
from sst_interp.prompt import prefill
from sst_interp.sequential import advance
from sst_interp.stream import Recurrence, Stream

DEEP, SHALLOW = 0, 1
"""Rows of a reading, deepest first."""


@dataclass(frozen=True)
class Reading:
    """What was seen. Axes: lane (`DEEP`, `SHALLOW`)."""

    depth: int
    stream: Stream
    """After the last position, both lanes."""
    inputs: list[int]
    """[position] the token each position reads."""
    first_column: int
    """The column of position 0."""
    resid_post: Float[Tensor, "position lane layer d_model"]
    """Layer outputs of the lane's last iteration."""
    blended: Float[Tensor, "position lane layer d_model"]
    """The state that its last iteration blends in."""
    handed: Float[Tensor, "position lane layer d_model"]
    """The state that it hands on, by the layer that reads it."""
    before: Float[Tensor, "position lane slot d_model"]
    """The state that it is handed."""
    has_state: Bool[Tensor, " position"]
    """Whether depth 1 is handed a state there."""

    @property
    def slots(self) -> int:
        """States per position: as many as layers, or one that all layers read."""
        return self.before.shape[2]

    def at(self, position: int, copies: int, room: int) -> Stream:
        """The stream just before a position, every lane `copies` times over, with `room` more columns:
        rows of the deep lane first.
        """
        column = self.first_column + position
        rows = torch.arange(2).repeat_interleave(copies)
        kv = KeyValues(len(self.stream.kv.keys), column + room)
        for mine, theirs in ((kv.keys, self.stream.kv.keys), (kv.values, self.stream.kv.values)):
            for layer, kept in enumerate(theirs):
                assert kept is not None
                copy = kept.new_zeros(len(rows), kept.shape[1], kv.columns, kept.shape[3])
                copy[:, :, :column] = kept[rows, :, :column]
                mine[layer] = copy
        state = self.before[position][rows].transpose(0, 1).contiguous()
        return Stream(kv, state, self.stream.pad[rows], self.stream.origin[rows], column)


@torch.no_grad()
def read_text(model: Recurrence, prompt: Sequence[int], text: Sequence[int], depth: int) -> Reading:
    """Read the prompt once, and then `text` at `depth` and at depth 1.

    Args:
        text: the tokens that depth 1 wrote; the last of them is not read.
    """
    device = model.backbone.device
    tokens = torch.tensor([list(prompt)], device=device)
    one = model.new_stream(torch.zeros(1, dtype=torch.long, device=device), tokens.shape[1] + len(text) - 1)
    prefill(model, one, tokens[:, :-1])
    stream, first = one.repeat(2), one.column
    inputs = [int(prompt[-1]), *map(int, text[:-1])]
    depths, layers = torch.tensor([depth, 1]), model.backbone.n_layers
    seen: dict[str, list[Tensor]] = {"resid_post": [], "blended": [], "handed": [], "before": []}
    has_state = []
    for token in inputs:
        has_state.append(bool(model.kind.has_state(stream.column, stream.origin[:1], 1)))
        seen["before"].append(stream.state.transpose(0, 1).clone())
        blended = stream.state.new_zeros(2, layers, stream.state.shape[-1])

        def hook(iteration: int, blended: Tensor = blended) -> Visit:
            def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
                if site == "stream_state":
                    for lane in range(len(tensor)):
                        if iteration == depths[lane]:
                            blended[lane, layer] = tensor[lane, 0]
                return tensor

            return visit

        done = advance(model, stream, torch.full((2,), token, device=device), depths, hook)
        last = [done[int(depths[lane]) - 1].resid_post[:, lane] for lane in (DEEP, SHALLOW)]
        seen["resid_post"].append(torch.stack(last))
        seen["blended"].append(blended)
        seen["handed"].append(stream.state.transpose(0, 1).expand(-1, layers, -1).clone())
    stacked = {name: torch.stack(pieces) for name, pieces in seen.items()}
    return Reading(depth, stream, inputs, first, has_state=torch.tensor(has_state), **stacked)
