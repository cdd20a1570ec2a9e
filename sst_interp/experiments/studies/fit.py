"""The one small training loop, and what a trained small model scores.

It trains every weight of a small model, and those of its stream, with the optimiser of `sst-interp train`
(`training.trainer.MasterWeights`). It knows no task: it is handed batches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.experiments.studies.tasks import FlipFlop, Labelled
from sst_interp.models.kinds.lrt import Pathway
from sst_interp.models.model import StateStreamModel
from sst_interp.models.stream import Recurrence
from sst_interp.training.data import Batch
from sst_interp.training.objective import Looping, Pass, answer_loss, last_layer, mean_over_passes, run_passes
from sst_interp.training.recipe import EVERY_PASS, Method, TrainingRecipe
from sst_interp.training.trainer import MasterWeights


class Schedule(NamedTuple):
    """How states are computed in training: the arguments of `training.objective.run_passes`."""

    method: Method | Looping = "two_pass"
    sweeps: int = 1
    groups: int = 1
    chunk: int = 64
    iterations: int = 1
    exact_sweeps: tuple[int, int] | None = None

    @property
    def passes(self) -> int:
        """How often it runs the stack at every position, whether all at once or one after the other."""
        if self.method in ("none", "exact", "sequential", "chunked", "unrolled"):
            return self.iterations
        return 2 if self.method == "interleaved" else 1 + self.sweeps

    @property
    def n(self) -> int:
        """The number that names it: S groups of `interleaved`, K sweeps of the others."""
        return self.groups if self.method == "interleaved" else self.sweeps


@dataclass(frozen=True)
class Arm:
    """One way to train. Tables and findings know it by its name."""

    name: str
    schedule: Schedule
    pathway: Pathway | None = None
    """Of a decoder's latent memory; None: it has none."""
    kind: str = "lrt"
    """Of a decoder: `lrt` (which without a pathway is the plain decoder), `sst` or `looped`."""
    gamma: float | None = None
    """Where a decoder's residual scalars start; None: where the decoder says."""
    longer: int = 1
    """Times as many steps as planned."""
    deepest: int = 1
    """Every step draws a depth from 1 to this (`exact`)."""

    @property
    def passes(self) -> float:
        """Compute of a step in position passes: mean runs of the layer stack at every position."""
        return self.schedule.passes * (1 + self.deepest) / 2

    def at(self, step: int) -> Schedule:
        """The schedule of a step."""
        depth = random.Random(f"depth:{step}").randint(1, self.deepest)
        return self.schedule._replace(iterations=depth) if self.deepest > 1 else self.schedule


NONE = Schedule("none")
EXACT = Arm("exact", Schedule("sequential"))
"""Back-propagation through time, token by token: the definition."""
TWO_PASS = Arm("two-pass", Schedule())
NO_STREAM, NO_MEMORY = Arm("no stream", NONE), Arm("no memory", NONE)
SEQUENTIAL, ZERO, OWN = "sequential", "zero memory", "own"
"""How states are computed when a model is scored: token by token, which is the definition; with a memory of
zeros everywhere, which public code scores by mistake; as the arm computes them in training."""
ROWS = 64
"""Sequences that are read at once."""

Draw = Callable[[int], Batch | Labelled]
"""Step -> its batch; the same for every arm of a seed."""


class Training:
    """One training in progress: of all weights, and of the stream's unless the arm's schedule is `none`.

    `steps` are those of the plan; the arm may take a multiple.
    """

    def __init__(
        self, model: StateStreamModel, arm: Arm, recipe: TrainingRecipe, draw: Draw, steps: int
    ) -> None:
        self.model, self.arm, self.draw = model, arm, draw
        self.steps, self.done = steps * arm.longer, 0
        self.seconds = 0.0
        """Processor time spent in steps."""
        self.position_passes = 0
        weights = model.kind.weights() if arm.schedule != NONE else {}
        alpha = weights.get("alpha")
        self.masters = MasterWeights(
            recipe,
            dict(model.backbone.model.named_parameters()),
            None if alpha is None else (alpha.shape[0], alpha.shape[1]),
            self.steps,
            weights if alpha is None else None,
        )

    def step(self) -> float:
        """Take the next step; returns its loss in nats."""
        batch = self.draw(self.done)
        began = time.process_time()
        loss, norm = self._backward(batch, self.arm.at(self.done))
        self.masters.step(self.done, norm)
        self._hand_over(detached=True)
        self.done += 1
        self.seconds += time.process_time() - began
        self.position_passes += batch.tokens.numel() * self.arm.at(self.done - 1).passes
        return loss

    def finish(self, after_step: Callable[[], Any] | None = None) -> StateStreamModel:
        """Take all steps that are left; returns the model."""
        while self.done < self.steps:
            self.step()
            if after_step is not None:
                after_step()
        return self.model

    def gradient(self, schedule: Schedule) -> dict[str, Float[Tensor, " parameter"]]:
        """The next step's gradient under a schedule: `weights`, and `alpha` (of its logit, which is trained).

        The training is left as it was.
        """
        self._backward(self.draw(self.done), schedule)
        values = self.masters.values.items()
        parts = [v.grad.flatten() for name, v in values if name != "alpha.logit" and v.grad is not None]
        gradient = {"weights": torch.cat(parts)}
        if self.masters.logit is not None and self.masters.logit.grad is not None:
            gradient["alpha"] = self.masters.logit.grad.flatten().clone()
        self.masters.forget()
        self._hand_over(detached=True)
        return gradient

    def about(self) -> dict[str, Any]:
        """What it was and what it cost, as entries of a table's row."""
        gamma = self.model.kind.weights().get("gamma") if self.arm.pathway else None
        return {
            "arm": self.arm.name, "steps": self.done, "position_passes": self.position_passes,
            "seconds": self.seconds, "parameters": sum(v.numel() for v in self.masters.values.values()),
            "gamma": float("nan") if gamma is None else float(gamma.detach().abs().mean()),
        }  # fmt: skip

    def _backward(self, batch: Batch | Labelled, schedule: Schedule) -> tuple[float, float]:
        self._hand_over(detached=False)
        loss = loss_of(self.model, batch, schedule)
        loss.backward()
        return float(loss.detach()), self.masters.gradient_norm()

    def _hand_over(self, detached: bool) -> None:
        """Give the model the stream's current weights."""
        weights = self.masters.stream()
        if weights is not None:
            now = {name: w.detach() if detached else w for name, w in weights.items()}
            self.model.kind = self.model.kind.with_weights(now)


def loss_of(model: Recurrence, batch: Batch | Labelled, schedule: Schedule) -> Tensor:
    """The loss that a schedule minimises, nats per token or label: with `interleaved` and `multi_refine` the
    mean over all passes, as it was published; else that of the positions' newest outputs.
    """
    labelled = isinstance(batch, Labelled)
    if schedule.method in EVERY_PASS:
        passes = run_passes(model, batch.tokens, *schedule)
        if labelled:
            return label_loss_of_passes(model, batch, passes)
        return mean_over_passes(model, batch, passes)
    last = last_layer(model, batch, *schedule)  # type: ignore[arg-type]  (it reads the tokens only)
    return label_loss(model, batch, last) if labelled else answer_loss(model, batch, last)


def label_losses(
    model: Recurrence, last: Float[Tensor, "row position d_model"], labels: Int[Tensor, "row position"]
) -> Float[Tensor, "row position"]:
    """Cross-entropy of the label at every position, nats."""
    return cross_entropy(model.backbone.unembed(last).transpose(1, 2), labels, reduction="none")


def label_loss(model: Recurrence, batch: Labelled, last: Float[Tensor, "row position d_model"]) -> Tensor:
    """Mean cross-entropy of all labels, nats."""
    return label_losses(model, last, batch.labels).mean()


def label_loss_of_passes(model: Recurrence, batch: Labelled, passes: Sequence[Pass]) -> Tensor:
    """The same as a mean over passes, each where it computed anything."""
    return torch.stack([label_losses(model, p.last, batch.labels[:, p.at]).mean() for p in passes]).mean()


@torch.no_grad()
def score_labels(model: StateStreamModel, task: FlipFlop, sequences: int, schedule: Schedule) -> pd.DataFrame:
    """Losses and right answers on held-out sequences, with states computed as a schedule does.

    Returns:
        A row per `distance` (positions since the value was set): `labels` (how many), and sums of `loss`
        (nats) and `correct` over them.
    """
    tokens, labels = batch = task.draw(sequences, seed=0)
    last = last_layer(model, batch, *schedule)  # type: ignore[arg-type]
    losses, distance = label_losses(model, last, labels), task.distance(tokens).flatten()
    right = model.backbone.unembed(last).argmax(-1) == labels
    columns = {"labels": torch.ones_like(losses), "loss": losses, "correct": right}
    sums = {name: torch.bincount(distance, v.flatten().double()).tolist() for name, v in columns.items()}
    return pd.DataFrame({"distance": range(len(sums["loss"]))} | sums)


@torch.no_grad()
def score_tokens(
    model: Recurrence, batch: Batch, schedule: Schedule
) -> tuple[Float[Tensor, "row next"], Float[Tensor, "row next"]]:
    """(nats, right) of every next token: its cross-entropy, and 1 where it is the most likely one.

    Columns are the positions that predict, 0 to T - 2; those that `batch.answer` leaves out are NaN.
    """
    nats, right = [], []
    for rows in torch.arange(len(batch.tokens)).split(ROWS):
        part = Batch(batch.tokens[rows], batch.answer[rows])
        logits = model.backbone.unembed(last_layer(model, part, *schedule)[:, :-1]).float()
        targets, unasked = part.tokens[:, 1:], ~part.answer[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        nats.append(losses.masked_fill(unasked, torch.nan))
        right.append((logits.argmax(-1) == targets).float().masked_fill(unasked, torch.nan))
    return torch.cat(nats), torch.cat(right)


def evaluations(arm: Arm) -> dict[str, Schedule]:
    """Evaluated -> schedule, for an arm of a decoder. Without a memory all are one parallel pass; a loop that
    keeps the entries of each iteration is the definition as it is trained, and can run deeper or less deep.
    """
    if arm.kind == "looped":
        depths = {f"depth {n}": arm.schedule._replace(iterations=n) for n in (1, 4)}
        return {SEQUENTIAL: arm.schedule} | depths
    if arm.kind == "sst":
        return {SEQUENTIAL: Schedule("exact"), ZERO: NONE, OWN: arm.schedule}
    if arm.pathway is None:
        return {SEQUENTIAL: NONE}
    return {SEQUENTIAL: EXACT.schedule, ZERO: NONE, OWN: arm.schedule}


def step_times(trainings: Sequence[Training], rounds: int) -> pd.DataFrame:
    """Processor seconds of one step of every training, on one thread, in turn, after a warm-up of each.

    Returns:
        A row per round and arm: `seconds`. Only ratios within a round mean anything.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for number in range(-1, rounds):
            for training in trainings:
                before = training.seconds
                training.step()
                if number >= 0:
                    about = {"round": number, "arm": training.arm.name}
                    rows.append(about | {"seconds": training.seconds - before})
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def random_model(config: Any, seed: int) -> Any:
    """A model with random weights, in float32."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
