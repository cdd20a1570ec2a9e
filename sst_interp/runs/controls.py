"""The controls that need the model: measured while a run is captured, since it may keep no text.

Some questions, evenly spread, are read once more after their batch has been generated: alone, in float32, and
with their states perturbed (`perturbations`). The batch is committed first, and the rows are added to it when
they are there. The questions and all random directions depend on the recipe alone: a resumed run is an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.model import StateStreamModel
from sst_interp.models.stream import Recurrence
from sst_interp.runs.memory import free_memory
from sst_interp.runs.perturbations import Rereading, in_float32, noise_rows, perturbation_rows, read_alone
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.recorder import Rollout, RolloutCell, RolloutStep, rounded_columns
from sst_interp.runs.states import to_host


class Controls:
    """The controls of one capture.

    Args:
        model: the model that is captured.
        recipe: says how many questions get controls, and the seed.
        questions: how many questions the run has.
    """

    def __init__(self, model: StateStreamModel, recipe: Recipe, questions: int) -> None:
        self.model, self.recipe = model, recipe
        if recipe.controls and getattr(model.backbone.model, "is_quantized", False):
            said = "controls read the weights in float32, and a quantised model has other weights"
            raise SSTError(said, "controls = 0, or leave quantisation out")
        self.chosen = spread(recipe.controls, questions)
        """The questions with controls, by index in the run."""

    def watch(self, batch: int, rows: Sequence[int]) -> Watch | None:
        """What to show every position of a batch of these questions; None if none gets controls."""
        return Watch(self, batch, rows) if self.chosen & set(rows) else None

    @cached_property
    def float32(self) -> Recurrence | None:
        """The model in float32, made when first needed; None if it is in float32 already.

        It is a copy where that takes at most half of the memory that is free.
        """
        backbone = self.model.backbone
        if backbone.dtype == torch.float32:
            return None
        free = free_memory(backbone.model)
        copied = 4 * sum(weight.numel() for weight in backbone.model.parameters())
        return in_float32(self.model, free is None or 2 * copied <= free)


class Watch:
    """The controls of one batch, and the captured states that they are compared with."""

    def __init__(self, controls: Controls, batch: int, rows: Sequence[int]) -> None:
        self.controls, self.batch = controls, batch
        self.places = [place for place, row in enumerate(rows) if row in controls.chosen]
        self.questions = [rows[place] for place in self.places]
        self.depths = controls.recipe.depths
        self._captured: dict[int, list[tuple[Tensor, Callable[[], object]]]] = {}

    def see(self, moment: RolloutStep) -> None:
        """Keep one position's states on depth 1's text, depth 1 and deepest."""
        for depth in {1, max(self.depths)}:
            rollout = Rollout("own" if depth == 1 else "depth1", depth)
            states = moment.states(RolloutCell(rollout, depth))[:, self.places]
            self._captured.setdefault(depth, []).append(to_host(states))

    def read(self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> None:
        """Keep the token ids of every question of the batch, and those that depth 1 wrote to each."""
        self._read = [(list(prompts[place]), list(texts[place])) for place in self.places]

    def tables(self, done: Callable[[int], Any]) -> dict[str, dict[str, Any]]:
        """Columns of `noise` and `nudges` (left out where there are no rows).

        Args:
            done: told the budget of every question that has its controls, for a progress bar.
        """
        model, recipe, read = self.controls.model, self.controls.recipe, self._read
        noise: list[dict[str, Any]] = []
        nudges: list[dict[str, Any]] = []
        for k, (question, (prompt, text)) in enumerate(zip(self.questions, read, strict=True)):
            alone = read_alone(model, prompt, text, self.depths)
            for depth, states in alone.resid_post.items():
                noise.append(noise_rows(question, "batch", depth, self._states(depth, k, text), states))
            nudges += perturbation_rows(model, alone, question, recipe.seed)
            done(recipe.max_new_tokens)
        if (twin := self.controls.float32) is not None:
            noise += self._in_float32(twin, read)
        columns = {"noise": joined(noise), "nudges": joined(nudges)}
        return {name: rounded_columns(table) for name, table in columns.items() if table}

    def _in_float32(
        self, twin: Recurrence, read: Sequence[tuple[list[int], list[int]]]
    ) -> list[dict[str, Any]]:
        tokens, pad = self.controls.model.batch([prompt for prompt, _ in read])
        reading = Rereading(twin, tokens, pad, [text for _, text in read], sorted(self._captured))
        seen: dict[int, list[Tensor]] = {depth: [] for depth in self._captured}
        for _, iterations in reading:
            for depth, states in seen.items():
                states.append(reading.last(iterations, depth))
        rows = []
        for depth, states in seen.items():
            whole = torch.stack(states)  # [position, layer, question, d_model]
            for k, (question, (_, text)) in enumerate(zip(self.questions, read, strict=True)):
                captured = self._states(depth, k, text)
                rows.append(noise_rows(question, "fp32", depth, captured, whole[: len(text), :, k]))
        return rows

    def _states(self, depth: int, k: int, text: Sequence[int]) -> Tensor:
        """Captured states of the k-th question with controls, [position, layer, d_model]."""
        seen = self._captured[depth][: len(text)]
        for _, ready in seen:
            ready()
        states = torch.stack([states[:, k] for states, _ in seen])
        return states.to(self.controls.model.backbone.device)


def spread(n: int, of: int) -> frozenset[int]:
    """`n` of 0 .. of - 1, evenly spread; all of them if there are no more."""
    n = min(n, of)
    return frozenset(k * of // n for k in range(n))


def joined(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pieces with equal columns as one; an array [row, entry] becomes a list of arrays."""
    columns: dict[str, Any] = {}
    for name in pieces[0] if pieces else ():
        parts = [piece[name] for piece in pieces]
        if any(part.ndim > 1 for part in parts):
            columns[name] = [row for part in parts for row in part]
        else:
            columns[name] = np.concatenate(parts)
    return columns
