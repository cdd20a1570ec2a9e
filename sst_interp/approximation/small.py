"""A small decoder, trained in full, and the ways to train it: exact, with few sweeps, without a stream."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.approximation.flipflop import FlipFlop
from sst_interp.model import StateStreamModel, attach
from sst_interp.training.batches import Batch
from sst_interp.training.objective import last_layer
from sst_interp.training.optimiser import Masters
from sst_interp.training.recipe import Method, TrainingRecipe


@dataclass(frozen=True)
class Arm:
    """One way to compute the states in training, in the words of `training.objective`."""

    name: str
    method: Method
    sweeps: int = 1
    groups: int = 1
    chunk: int = 64


ARMS = (
    Arm("exact", "sequential"),
    Arm("two-pass", "two_pass"),
    Arm("2 sweeps", "two_pass", sweeps=2),
    Arm("4 sweeps", "two_pass", sweeps=4),
    Arm("2 groups", "two_pass", groups=2),
    Arm("4 groups", "two_pass", groups=4),
    Arm("no stream", "none"),
)
"""Groups make one sweep, so that they cost as many passes as two-pass training."""
EXACT, TWO_PASS, BASELINE = ARMS[0], ARMS[1], ARMS[-1]


class Blend(NamedTuple):
    """Bounds of alpha, and where every blend weight starts."""

    low: float
    high: float
    start: float


@dataclass(frozen=True)
class Plan:
    """Everything that decides a study's results, but the seeds."""

    task: FlipFlop = field(default_factory=FlipFlop)
    layers: int = 4
    d_model: int = 64
    window: int = 2
    """Positions that attention sees, its own included."""
    blends: tuple[Blend, ...] = (Blend(0.015, 0.10, 0.027), Blend(0.015, 0.50, 0.20))
    """One setting each: the paper's, and a large alpha, where an approximation must hurt if it ever does."""
    pretraining: int = 160
    """Steps without a stream before all arms start from the same weights."""
    steps: int = 240
    batch: int = 16
    learning_rate: float = 1e-3
    every: int = 20
    """Steps between comparisons of gradients, and between evaluations."""
    held_out: int = 256
    """Sequences that losses are measured on."""

    def recipe(self, blend: Blend) -> TrainingRecipe:
        """The optimiser's settings, in its own words."""
        return TrainingRecipe(
            "small", "small", "flip-flop", alpha=blend.start, alpha_bounds=(blend.low, blend.high),
            alpha_learning_rate=0.02, learning_rate=self.learning_rate, dtype="float32",
        )  # fmt: skip


class SmallTraining:
    """One training in progress.

    Args:
        plan: task, model and optimiser.
        weights: the model to start from, which is copied.
        arm: how states are computed.
        blend: bounds and start of alpha.
        seed: of the data; the order is the same for every arm.
        steps: how many there will be.
    """

    def __init__(self, plan: Plan, weights: Any, arm: Arm, blend: Blend, seed: int, steps: int) -> None:
        self.plan, self.arm, self.seed, self.done = plan, arm, seed, 0
        start = blend.start if arm.method != "none" else 0.0
        self.model: StateStreamModel = attach(copy.deepcopy(weights), alpha=start)
        shape = (plan.layers, plan.d_model) if arm.method != "none" else None
        parameters = dict(self.model.backbone.model.named_parameters())
        self.masters = Masters(plan.recipe(blend), parameters, shape, steps)

    def data(self) -> tuple[Tensor, Tensor]:
        """(tokens, labels) of the next step."""
        return self.plan.task.draw(self.plan.batch, 1_000_000 * (self.seed + 1) + self.done)

    def backward(self, arm: Arm | None = None) -> float:
        """Leave the next step's gradient, computed as `arm` does (None: its own), with the masters; returns
        the loss.
        """
        tokens, labels = self.data()
        if self.masters.logit is not None:
            self.model.alpha = self.masters.alpha()
        loss = token_losses(self.model, tokens, labels, arm or self.arm).mean()
        loss.backward()
        self.masters.gradient_norm()
        return float(loss.detach())

    def step(self) -> float:
        """Take the next step; returns its loss."""
        loss = self.backward()
        gradients = [v.grad for v in self.masters.values.values() if v.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.masters.step(self.done, norm)
        self.done += 1
        if self.masters.logit is not None:
            self.model.alpha = self.masters.alpha().detach()
        return loss

    def gradient(self, arm: Arm) -> dict[str, Float[Tensor, " parameter"]]:
        """The next step's gradient as `arm` would compute it: `weights`, and `alpha` (of its logit, which is
        what is trained). Nothing is changed by it.
        """
        self.backward(arm)
        values = self.masters.values.items()
        found = {
            "weights": torch.cat(
                [v.grad.flatten() for n, v in values if n != "alpha.logit" and v.grad is not None]
            )
        }
        if self.masters.logit is not None and self.masters.logit.grad is not None:
            found["alpha"] = self.masters.logit.grad.flatten().clone()
        self.masters.forget()
        if self.masters.logit is not None:
            self.model.alpha = self.masters.alpha().detach()
        return found


def token_losses(
    model: StateStreamModel,
    tokens: Int[Tensor, "row position"],
    labels: Int[Tensor, "row position"],
    arm: Arm,
) -> Float[Tensor, "row position"]:
    """Cross-entropy of the label at every position, nats."""
    return cross_entropy(_logits(model, tokens, arm).transpose(1, 2), labels, reduction="none")


@torch.no_grad()
def evaluate(model: StateStreamModel, plan: Plan, arm: Arm) -> dict[str, list[Any]]:
    """Losses and right answers on held-out sequences with states computed as `arm` does, by the number of
    positions since the value was set: `distance`, `labels` (how many), and sums of `loss` and `correct`.
    """
    tokens, labels = plan.task.draw(plan.held_out, seed=0)
    logits = _logits(model, tokens, arm)
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    distance = plan.task.distance(tokens).flatten()
    columns = {
        "labels": torch.ones_like(losses),
        "loss": losses,
        "correct": (logits.argmax(-1) == labels).to(losses.dtype),
    }
    sums = {name: torch.bincount(distance, v.flatten().double()).tolist() for name, v in columns.items()}
    return {"distance": list(range(len(sums["loss"])))} | sums


def fresh_weights(plan: Plan, seed: int) -> Any:
    """A small Mistral with random weights: Llama's layers with a short attention window."""
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=plan.task.vocabulary, hidden_size=plan.d_model, intermediate_size=2 * plan.d_model,
        num_hidden_layers=plan.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=4 * plan.task.positions, sliding_window=plan.window,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrained(plan: Plan, seed: int) -> Any:
    """The weights that every arm of a seed starts from: trained without a stream."""
    training = SmallTraining(
        plan, fresh_weights(plan, seed), BASELINE, plan.blends[0], 1000 + seed, plan.pretraining
    )
    for _ in range(plan.pretraining):
        training.step()
    return training.model.backbone.model


def _logits(model: StateStreamModel, tokens: Tensor, arm: Arm) -> Tensor:
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return model.backbone.unembed(last_layer(model, batch, arm.method, arm.sweeps, arm.groups))
