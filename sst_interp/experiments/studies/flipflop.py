"""The studies `small` and `lrt-schedules`: small models trained on flip-flop with every way to find states.

| study | model | arms |
| --- | --- | --- |
| `small` | an SST, in two settings of alpha | exact, few sweeps, no stream |
| `lrt-schedules` | an LRT | exact, interleaved, multi-refine, chunked, no memory |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from sst_interp.experiments.studies import tables as written
from sst_interp.experiments.studies.arms import (
    EXACT,
    LRT_ARMS,
    NO_MEMORY,
    NO_STREAM,
    NONE,
    STREAM_ARMS,
    TWO_PASS,
    Arm,
    Blend,
    short_sighted,
)
from sst_interp.experiments.studies.fit import OWN, SEQUENTIAL, Draw, Training, score_labels
from sst_interp.experiments.studies.gradients import bounds_words, gradient_fidelity
from sst_interp.experiments.studies.scores import Design, arm_scores
from sst_interp.experiments.studies.study import Finding, Job, TrainingStudy, register_study
from sst_interp.experiments.studies.tasks import FlipFlop
from sst_interp.experiments.table import Table
from sst_interp.models.kinds.lrt import MemoryDesign
from sst_interp.models.model import attach, attach_lrt
from sst_interp.training.recipe import TrainingRecipe

LOOKS = 5
"""How often the losses of `small` are measured: before the first step, after the last, and evenly between."""
DISTANCE = {"distance": "positions since the value was set"}


@dataclass(frozen=True)
class Plan:
    """Everything that decides the results of `small`, but the seeds."""

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
    """Steps between comparisons of gradients."""
    held_out: int = 256
    """Sequences that losses are measured on."""

    def weights(self, seed: int) -> Any:
        """A small model with random weights."""
        task = self.task
        return short_sighted(task.vocabulary, task.positions, self.layers, self.d_model, self.window, seed)

    def draw(self, seed: int) -> Draw:
        """The training data of a seed."""
        return lambda step: self.task.draw(self.batch, 1_000_000 * (seed + 1) + step)


def stream_training(plan: Plan, weights: Any, arm: Arm, blend: Blend, seed: int, steps: int) -> Training:
    """A small SST before its first step; the weights are copied."""
    recipe = TrainingRecipe(
        "small", "small", "flip-flop", alpha=blend.start, alpha_bounds=(blend.low, blend.high),
        alpha_learning_rate=0.02, learning_rate=plan.learning_rate, dtype="float32",
    )  # fmt: skip
    model = attach(copy.deepcopy(weights), alpha=0.0 if arm.schedule == NONE else blend.start)
    return Training(model, arm, recipe, plan.draw(seed), steps)


def pretrained(plan: Plan, seed: int) -> Any:
    """The weights that every arm of a seed starts from: trained without a stream."""
    start = plan.weights(seed)
    training = stream_training(plan, start, NO_STREAM, plan.blends[0], 1000 + seed, plan.pretraining)
    return training.finish().backbone.model


class _FlipFlopStudy(TrainingStudy):
    """Arms that start from weights trained without a stream, which are kept for the next arm of the seed."""

    default_rounds = 9

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start: tuple[int, Any] | None = None

    def start(self, plan: Plan, seed: int) -> Any:
        """`pretrained`, once for a seed."""
        if self._start is None or self._start[0] != seed:
            self._start = seed, pretrained(plan, seed)
        return self._start[1]


@register_study
class Small(_FlipFlopStudy):
    """The same small SST trained exactly, with few sweeps and without a stream, in two settings of alpha.
    Along the two-pass training every approximate gradient is compared with the exact one.
    """

    name = "small"
    question = "What does training on few sweeps cost, in gradients and in the loss of the model as it runs?"
    page = "docs/approximation.md"
    plan_file = "small-plan.json"
    new_plan, default_arms = Plan, STREAM_ARMS
    tables = {  # noqa: RUF012
        "gradients": Table("small-gradients.parquet", ("alpha_low", "alpha_high", "seed")),
        "losses": Table("small-losses.parquet", ("alpha_low", "alpha_high", "seed", "arm")),
        "times": Table("small-times.parquet", ("arm",)),
    }
    design = Design(
        title="Cost of the approximation in training",
        unit="nats per label",
        measures={"loss": ("loss", "labels", 1), "accuracy": ("correct", "labels", 1)},
        arms=tuple(arm.name for arm in STREAM_ARMS),
        against={EXACT.name: "exact training", NO_STREAM.name: "training without a stream"},
        baseline=NO_STREAM.name,
        definition="exact",
        readings={OWN: "the loss that training sees"},
        exact=EXACT.name,
        settings=("alpha_low", "alpha_high"),
        setting_words=bounds_words,
        along={"step": "step"} | DISTANCE,
        cost=("step", "alpha"),
    )
    findings = (
        Finding(
            "gradients", lambda rows: gradient_fidelity(rows["gradients"]), {"gradients": written.gradients}
        ),
        Finding(
            "training",
            lambda rows: arm_scores(rows["losses"], Small.design, rows["times"]),
            {"training": written.training},
        ),
    )

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """Without a stream all blends are one, which is trained once."""
        return [
            Job(seed, arm, blend)
            for seed in seeds
            for blend in self.plan.blends
            for arm in self.arms
            if arm != NO_STREAM or blend == self.plan.blends[0]
        ]

    def about(self, job: Job) -> dict[str, Any]:
        """The bounds of alpha, too."""
        return {"alpha_low": job.setting.low, "alpha_high": job.setting.high} | super().about(job)

    def begin(self, job: Job) -> Training:
        """From weights that were trained without a stream."""
        start = self.start(self.plan, job.seed)
        return stream_training(self.plan, start, job.arm, job.setting, job.seed, self.plan.steps)

    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """Losses at some steps, states computed exactly (token by token) and as the arm does (own); gradients
        along the two-pass training only.
        """
        plan, about = self.plan, self.about(job)
        looks = {round(k * plan.steps / (LOOKS - 1)) for k in range(LOOKS)}
        exact = NONE if job.arm == NO_STREAM else EXACT.schedule
        losses, gradients = [], []
        while True:
            if training.done in looks:
                for name, how in (("exact", exact), (OWN, job.arm.schedule)):
                    rows = score_labels(training.model, plan.task, plan.held_out, how)
                    alpha = float(training.model.kind.weights()["alpha"].mean())
                    losses.append(rows.assign(step=training.done, evaluated=name, alpha=alpha))
            if training.done == plan.steps:
                break
            if job.arm == TWO_PASS and training.done % plan.every == 0:
                gradients.append(compare_gradients(training, self.arms))
            training.step()
            after_step()
        rows = pd.concat(losses, ignore_index=True)
        same = plan.blends if job.arm == NO_STREAM else [job.setting]
        parts = [rows.assign(**about | {"alpha_low": b.low, "alpha_high": b.high}) for b in same]
        measured = {"losses": pd.concat(parts, ignore_index=True)}
        if gradients:
            setting = {key: value for key, value in about.items() if key != "arm"}
            measured = {"gradients": pd.concat(gradients, ignore_index=True).assign(**setting)} | measured
        return measured


def compare_gradients(training: Training, arms: Sequence[Arm]) -> pd.DataFrame:
    """Each arm's gradient of the next step against the exact one, at the same weights and on the same batch.

    Returns:
        A row per arm with an approximation and part (`weights`; `alpha`, of its logit): `cosine`, and
        `norm_ratio`, its norm over the exact one's.
    """
    exact, rows = training.gradient(EXACT.schedule), []
    for arm in [arm for arm in arms if arm not in (EXACT, NO_STREAM)]:
        for part, gradient in training.gradient(arm.schedule).items():
            a, b = gradient.double(), exact[part].double()
            cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
            about = {"step": training.done, "arm": arm.name, "part": part}
            rows.append(about | {"cosine": cosine, "norm_ratio": float(a.norm()) / float(b.norm())})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class LrtPlan:
    """Everything that decides the results of `lrt-schedules`, but the seeds."""

    small: Plan = field(default_factory=lambda: Plan(pretraining=80, steps=160))
    """Task, model, optimiser and lengths; its blends mean nothing here."""
    design: MemoryDesign = field(default_factory=lambda: MemoryDesign(pathway="both", gamma=0.1))
    """The memory of every arm but the one without. gamma 0.1 is the published start from scratch."""
    memory_learning_rate: float = 5e-3


def lrt_training(plan: LrtPlan, weights: Any, arm: Arm, seed: int) -> Training:
    """A small LRT before its first step; the weights are copied."""
    design, small = plan.design, plan.small
    recipe = TrainingRecipe(
        "latent", "small", "flip-flop", learning_rate=small.learning_rate, dtype="float32", lrt=design,
        lrt_learning_rate=plan.memory_learning_rate,
    )  # fmt: skip
    model = copy.deepcopy(weights)
    if arm.schedule == NONE:
        attached = attach_lrt(model)
    else:
        attached = attach_lrt(model, None, design.source, design.pathway, design.gamma, design.projections)
    return Training(attached, arm, recipe, small.draw(seed), small.steps)


@register_study
class LrtSchedules(_FlipFlopStudy):
    """The same small LRT trained with every schedule, and its loss when it is read token by token."""

    name = "lrt-schedules"
    question = "What does a training schedule of a Latent Recurrent Transformer cost?"
    page = "docs/lrt.md"
    options = ("seeds",)
    plan_file = "latent-plan.json"
    new_plan, default_arms = LrtPlan, LRT_ARMS
    tables = {  # noqa: RUF012
        "losses": Table("latent-losses.parquet", ("seed", "arm")),
        "times": Table("latent-times.parquet", ("arm",)),
    }
    design = Design(
        title="An LRT trained with each schedule",
        unit="nats per label",
        measures={"loss": ("loss", "labels", 1), "accuracy": ("correct", "labels", 1)},
        arms=tuple(arm.name for arm in LRT_ARMS),
        against={EXACT.name: "exact training", NO_MEMORY.name: "training without a memory"},
        baseline=NO_MEMORY.name,
        readings={OWN: "the loss that training sees"},
        exact=EXACT.name,
        along=DISTANCE,
    )
    findings = (
        Finding(
            "latent training",
            lambda rows: arm_scores(rows["losses"], LrtSchedules.design, rows["times"]),
            {"latent training": written.latent_training},
        ),
    )

    def begin(self, job: Job) -> Training:
        """From weights that were trained without a memory."""
        return lrt_training(self.plan, self.start(self.plan.small, job.seed), job.arm, job.seed)

    def passes(self, job: Job) -> int:
        """Position passes of a training."""
        return self.plan.small.steps * job.arm.passes

    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """Losses at the end, states computed token by token and as the arm does."""
        model, small = training.finish(after_step), self.plan.small
        parts = [
            score_labels(model, small.task, small.held_out, how).assign(evaluated=name)
            for name, how in ((SEQUENTIAL, EXACT.schedule), (OWN, job.arm.schedule))
        ]
        return {"losses": pd.concat(parts, ignore_index=True).assign(**self.about(job))}
