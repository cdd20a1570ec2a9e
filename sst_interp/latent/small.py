"""A small Latent Recurrent Transformer, trained in full, and the schedules to train it with.

Task and start are those of `approximation.small`: flip-flop with a short attention window, from weights that
were trained without a memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.approximation.small import Arm, Plan
from sst_interp.lrt_attach import attach_lrt
from sst_interp.lrt_design import MemoryDesign
from sst_interp.model import StateStreamModel
from sst_interp.training.optimiser import Masters
from sst_interp.training.recipe import EVERY_PASS, TrainingRecipe
from sst_interp.training.schedules import Pass, newest, run_passes

EXACT = Arm("exact", "sequential")
ARMS = (
    EXACT,
    Arm("interleaved S=2", "interleaved", groups=2),
    Arm("interleaved S=4", "interleaved", groups=4),
    Arm("multi-refine K=1", "multi_refine"),
    Arm("multi-refine K=3", "multi_refine", sweeps=3),
    Arm("chunks of 4", "chunked", chunk=4),
    Arm("no memory", "none"),
)
NO_MEMORY = ARMS[-1]


@dataclass(frozen=True)
class LatentPlan:
    """Everything that decides the results, but the seeds."""

    small: Plan = field(default_factory=lambda: Plan(pretraining=80, steps=160))
    """Task, model, optimiser and lengths; its blends mean nothing here."""
    design: MemoryDesign = field(default_factory=lambda: MemoryDesign(pathway="both", gamma=0.1))
    """The memory of every arm but the one without. gamma 0.1 is the published start from scratch."""
    memory_learning_rate: float = 5e-3


class LatentTraining:
    """One training in progress.

    Args:
        plan: task, model and optimiser.
        weights: the Hugging Face model to start from, which is copied.
        arm: how states are computed in training.
        seed: of the data; the order is the same for every arm.
    """

    def __init__(self, plan: LatentPlan, weights: Any, arm: Arm, seed: int) -> None:
        self.plan, self.arm, self.seed, self.done = plan, arm, seed, 0
        design, small = plan.design, plan.small
        hf, memory = copy.deepcopy(weights), None
        if arm.method == "none":
            self.model = attach_lrt(hf)
        else:
            self.model = attach_lrt(hf, None, design.source, design.pathway, design.gamma, design.projections)
            memory = self.model.kind.weights()
        recipe = TrainingRecipe(
            "latent", "small", "flip-flop", learning_rate=small.learning_rate, dtype="float32", lrt=design,
            lrt_learning_rate=plan.memory_learning_rate,
        )  # fmt: skip
        parameters = dict(self.model.backbone.model.named_parameters())
        self.masters = Masters(recipe, parameters, None, small.steps, memory)

    def step(self) -> None:
        """Take the next step. With `interleaved` and `multi_refine` the loss is the mean over all passes, as
        it was published; else it is that of the newest outputs.
        """
        small = self.plan.small
        tokens, labels = small.task.draw(small.batch, 1_000_000 * (self.seed + 1) + self.done)
        if self.masters.memory:
            self.model.kind = self.model.kind.with_weights(self.masters.stream() or {})
        found = _passes(self.model, tokens, self.arm)
        if self.arm.method not in EVERY_PASS:
            found = [Pass(torch.arange(tokens.shape[1]), newest(found))]
        losses = [_losses(self.model, p.last, labels[:, p.at]).mean() for p in found]
        torch.stack(losses).mean().backward()
        self.masters.step(self.done, self.masters.gradient_norm())
        self.done += 1
        self.model.kind = self.model.kind.with_weights(
            {name: w.detach() for name, w in (self.masters.stream() or self.model.kind.weights()).items()}
        )


def train_latent(plan: LatentPlan, weights: Any, arm: Arm, seed: int) -> StateStreamModel:
    """The model of one training from the start to the end."""
    training = LatentTraining(plan, weights, arm, seed)
    while training.done < plan.small.steps:
        training.step()
    return training.model


@torch.no_grad()
def evaluate_latent(model: StateStreamModel, plan: LatentPlan, arm: Arm) -> dict[str, list[Any]]:
    """Losses and right answers on held-out sequences with states computed as `arm` does, by the number of
    positions since the value was set: `distance`, `labels` (how many), and sums of `loss` (nats) and
    `correct`.
    """
    task = plan.small.task
    tokens, labels = task.draw(plan.small.held_out, seed=0)
    last = newest(_passes(model, tokens, arm))
    right = model.backbone.unembed(last).argmax(-1) == labels
    losses, distance = _losses(model, last, labels), task.distance(tokens).flatten()
    columns = {"labels": torch.ones_like(losses), "loss": losses, "correct": right}
    sums = {name: torch.bincount(distance, v.flatten().double()).tolist() for name, v in columns.items()}
    return {"distance": list(range(len(sums["loss"])))} | sums


def _passes(model: StateStreamModel, tokens: Tensor, arm: Arm) -> list[Pass]:
    return run_passes(model, tokens, arm.method, arm.sweeps, arm.groups, arm.chunk)


def _losses(model: StateStreamModel, last: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model.backbone.unembed(last).transpose(1, 2), labels, reduction="none")
