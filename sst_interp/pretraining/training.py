"""The one loop: a decoder trained from given weights, with a latent memory or without.

Knows no task: it is handed batches. The loss is that of `sst-interp train` (`training.objective`): the mean
over the passes of the schedule, each over the positions it computed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from sst_interp.lrt_attach import attach_lrt
from sst_interp.model import StateStreamModel
from sst_interp.pretraining.arms import Arm, Decoder
from sst_interp.training.batches import Batch
from sst_interp.training.objective import training_loss
from sst_interp.training.optimiser import Masters

Draw = Callable[[int], Batch]
"""Step -> its batch; the same for every arm of a seed."""


class Training:
    """One training in progress.

    Args:
        decoder: size and optimiser.
        weights: the model to start from, which is copied.
        arm: with which memory, and for how long.
        draw: the data.
        steps: planned; the arm may take a multiple.
    """

    def __init__(self, decoder: Decoder, weights: Any, arm: Arm, draw: Draw, steps: int) -> None:
        self.arm, self.draw, self.recipe = arm, draw, decoder.recipe(arm)
        self.steps, self.done = steps * arm.longer, 0
        self.seconds = 0.0
        """Of processor time, in steps."""
        self.position_passes = 0
        start = decoder.gamma_of(arm) if arm.pathway else 0.0
        self.model: StateStreamModel = attach_lrt(
            copy.deepcopy(weights), pathway=arm.pathway or "residual", gamma=start
        )
        memory = self.model.kind.weights() if arm.pathway else None
        parameters = dict(self.model.backbone.model.named_parameters())
        self.masters = Masters(self.recipe, parameters, None, self.steps, memory)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(value.numel() for value in self.masters.values.values())

    def step(self) -> float:
        """Take the next step; returns its loss, nats per token."""
        batch = self.draw(self.done)
        began = time.process_time()
        if self.masters.memory:
            self.model.kind = self.model.kind.with_weights(self.masters.stream() or {})
        loss = training_loss(self.model, batch, self.recipe)
        loss.backward()
        self.masters.step(self.done, self.masters.gradient_norm())
        self.done += 1
        self.seconds += time.process_time() - began
        self.position_passes += batch.tokens.numel() * self.arm.passes
        return float(loss.detach())

    def finish(self, after_step: Callable[[], Any] | None = None) -> StateStreamModel:
        """Take all steps that are left; returns the model, which is no longer trained.

        Args:
            after_step: called after every step.
        """
        while self.done < self.steps:
            self.step()
            if after_step is not None:
                after_step()
        kept = {name: value.detach() for name, value in self.model.kind.weights().items()}
        self.model.kind = self.model.kind.with_weights(kept)
        return self.model

    def about(self) -> dict[str, Any]:
        """What it was and what it cost, as entries of a table's row."""
        weights = self.model.kind.weights() if self.arm.pathway else {}
        gamma = weights.get("gamma")
        return {
            "arm": self.arm.name, "steps": self.done, "position_passes": self.position_passes,
            "seconds": self.seconds, "parameters": self.parameters,
            "gamma": float("nan") if gamma is None else float(gamma.detach().abs().mean()),
        }  # fmt: skip
