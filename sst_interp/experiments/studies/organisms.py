"""The study `organisms`: small decoders that follow the state of an automaton, trained with each recurrence.

The latent state of each task is known (`automata`). All arms have the same decoder; the plain one also with
more steps, for equal compute. They read sequences of the trained lengths and of longer ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from sst_interp.experiments.studies.automata import MACHINES, Automaton, Traced
from sst_interp.experiments.studies.decoders import Decoder, decoder_training, thousands
from sst_interp.experiments.studies.fit import (
    EXACT,
    NONE,
    SEQUENTIAL,
    Arm,
    Schedule,
    Training,
    label_losses,
)
from sst_interp.experiments.studies.scores import ArmScores, Design, arm_scores
from sst_interp.experiments.studies.show import Across, number, table
from sst_interp.experiments.studies.study import Finding, Job, TrainingStudy, register_study
from sst_interp.experiments.studies.tasks import Labelled
from sst_interp.experiments.table import Table
from sst_interp.models.model import attach
from sst_interp.training.objective import last_layer
from sst_interp.training.recipe import TrainingRecipe

PLAIN = Arm("plain", NONE)
SOLVED = Arm("SST, trained exactly", Schedule("exact"), kind="sst")
TWO_PASSES = Arm("SST, two-pass", Schedule(), kind="sst")
LRT = Arm("LRT", Schedule("interleaved", groups=2), "both")
LOOPED = Arm("looped four times", Schedule("unrolled", iterations=4), kind="looped")
LONGER = Arm("plain, more steps", NONE, longer=4)
"""As many passes of the stack as the arm with the most."""
ARMS = (PLAIN, SOLVED, TWO_PASSES, LRT, LOOPED, LONGER)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the results of `organisms`, but the seeds and the arms."""

    tasks: tuple[str, ...] = tuple(MACHINES)
    decoder: Decoder = field(default_factory=lambda: Decoder(layers=3, learning_rate=2e-3))
    alpha: float = 0.2
    """Where every blend weight of an SST starts; it is free from 0 to 1."""
    steps: int = 400
    batch: int = 64
    lengths: tuple[int, ...] = (8, 16, 24, 32)
    """Symbols of the held-out sequences; training has 4 to 16."""
    held_out: int = 256
    """Sequences per length."""
    places: int = 128
    """Positions that the decoder's rotary embedding is made for."""


@torch.no_grad()
def score(training: Training, drawn: Traced, schedule: Schedule) -> dict[str, float]:
    """Sums over held-out sequences of one length.

    Returns:
        `answers` (how many), `right` (the state after the last symbol is the most likely label), `spelled`
        (every token of the answer is), and `loss` (nats, of the last state's label).
    """
    n, batch = drawn.states.shape[1], Labelled(drawn.tokens, drawn.labels)
    last = last_layer(training.model, batch, *schedule)  # type: ignore[arg-type]  (it reads the tokens only)
    right = training.model.backbone.unembed(last).argmax(-1) == drawn.labels
    loss = label_losses(training.model, last[:, n - 1 : n], drawn.labels[:, n - 1 : n])
    sums = {"right": right[:, n - 1].sum(), "spelled": right[:, n:].all(1).sum(), "loss": loss.double().sum()}
    return {"answers": float(len(right))} | {name: float(value) for name, value in sums.items()}


def organisms_table(result: ArmScores) -> str:
    """A row per task and arm, a column per number of symbols."""

    def right(row: Mapping[Any, Any]) -> str:
        ends = f" [{row['lowest']:.0%} to {row['highest']:.0%}]" if row["seeds"] > 1 else ""
        return f"{row['accuracy']:.0%}{ends}"

    columns = {
        "task": "task", "arm": "arm", "{} symbols": Across("length", right),
        "parameters": number("parameters", ",.0f"), "steps": number("steps", ".0f"),
        "position passes, thousands": thousands, "seconds": number("seconds", ".0f"), "seeds": "seeds",
    }  # fmt: skip
    return table(result.defined, columns)


@register_study
class Organisms(TrainingStudy):
    """Small decoders on automata whose state is known: plain, SST, LRT and looped."""

    name = "organisms"
    question = "Which recurrence lets a small decoder follow a state, inside and beyond the trained lengths?"
    page = "docs/organisms.md"
    plan_file = "organisms-plan.json"
    main = "accuracy"
    new_plan, default_arms = Plan, ARMS
    tables = {  # noqa: RUF012
        "accuracy": Table("organisms-accuracy.parquet", ("task", "seed", "arm"))
    }
    design = Design(
        title="States followed, by number of symbols",
        unit="right answers",
        measures={
            "accuracy": ("right", "answers", 1),
            "spelled": ("spelled", "answers", 1),
            "loss": ("loss", "answers", 1),
        },
        arms=tuple(arm.name for arm in ARMS),
        against={PLAIN.name: "the plain decoder", SOLVED.name: "the SST trained exactly"},
        baseline=PLAIN.name,
        settings=("task",),
        setting_words=lambda task: str(task),
        x="length",
        cost=("steps", "position_passes", "seconds", "parameters"),
        percent=True,
    )
    findings = (
        Finding(
            "organisms",
            lambda rows: arm_scores(rows["accuracy"], Organisms.design),
            {"organisms": organisms_table},
        ),
    )

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """Task by task; the arms that take longest last."""
        return [Job(seed, arm, task) for task in self.plan.tasks for seed in seeds for arm in self.arms]

    def about(self, job: Job) -> dict[str, Any]:
        """The task, too."""
        return {"task": job.setting} | super().about(job)

    def begin(self, job: Job) -> Training:
        """From random weights, the same for every arm of a seed."""
        plan, task, first = self.plan, Automaton(job.setting), 1_000_000 * (job.seed + 1)
        weights = plan.decoder.weights(len(task.words), plan.places, job.seed)

        def draw(step: int) -> Labelled:
            drawn = task.draw(plan.batch, first + step)
            return Labelled(drawn.tokens, drawn.labels)

        if job.arm.kind != "sst":
            return decoder_training(plan.decoder, weights, job.arm, draw, plan.steps)
        decoder = plan.decoder
        method: Any = job.arm.schedule.method
        recipe = TrainingRecipe(
            "small", "small", "small", method=method, alpha=plan.alpha,
            alpha_bounds=(0.0, 1.0), alpha_learning_rate=0.02, learning_rate=decoder.learning_rate,
            warmup=decoder.warmup, dtype="float32",
        )  # fmt: skip
        model = attach(copy.deepcopy(weights), alpha=plan.alpha)
        return Training(model, job.arm, recipe, draw, plan.steps)

    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """States followed on held-out sequences of every length, read token by token."""
        training.finish(after_step)
        task, plan = Automaton(job.setting), self.plan
        how = job.arm.schedule if job.arm.kind == "looped" or job.arm.schedule == NONE else EXACT.schedule
        about, rows = training.about() | {"evaluated": SEQUENTIAL}, []
        for n in plan.lengths:
            rows.append(about | {"length": n} | score(training, task.draw(plan.held_out, n, n), how))
        return {"accuracy": pd.DataFrame(rows).assign(task=job.setting, seed=job.seed)}
