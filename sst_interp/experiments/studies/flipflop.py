"""The studies `exact-training` and `lrt-schedules`: small models trained on flip-flop under every schedule.

| study | model | arms |
| --- | --- | --- |
| `exact-training` | an SST, in four settings of alpha | token by token, solved, few sweeps, no stream |
| `lrt-schedules` | an LRT | exact, interleaved, multi-refine, chunked, no memory |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from sst_interp.experiments.studies.fit import (
    EXACT,
    NO_MEMORY,
    NO_STREAM,
    NONE,
    OWN,
    SEQUENTIAL,
    TWO_PASS,
    Arm,
    Draw,
    Schedule,
    Training,
    random_model,
    score_labels,
)
from sst_interp.experiments.studies.gradient_errors import (
    GRADIENT_ERRORS,
    SETTING,
    bounds_words,
    conditions_table,
    gradient_errors,
    gradient_fidelity,
    gradients_table,
    measure_gradient_errors,
    schedules_table,
    setting_words,
)
from sst_interp.experiments.studies.scores import ArmScores, Design, arm_scores
from sst_interp.experiments.studies.show import interval, number, table
from sst_interp.experiments.studies.study import Finding, Job, TrainingStudy, register_study
from sst_interp.experiments.studies.tasks import FlipFlop
from sst_interp.experiments.table import Table
from sst_interp.files import check_place
from sst_interp.models.kinds.lrt import MemoryDesign
from sst_interp.models.model import attach, attach_lrt
from sst_interp.training.recipe import TrainingRecipe

DEEPER = Arm("solved, depth 1 to 4", Schedule("exact"), deepest=4)
STREAM_ARMS = (
    EXACT,
    Arm("solved to 1e-3", Schedule("exact")),
    Arm("solved, 2 and 2 sweeps", Schedule("exact", exact_sweeps=(2, 2))),
    DEEPER,
    TWO_PASS,
    Arm("2 sweeps", Schedule(sweeps=2)),
    Arm("4 sweeps", Schedule(sweeps=4)),
    Arm("4 groups", Schedule(groups=4)),
    NO_STREAM,
)
"""Of a small SST. *Exact* goes token by token, *solved* is the method `exact` of a recipe. Groups make one
sweep, so that they cost as many passes as two-pass training."""
DEEP = "depth 4"
"""The exact evaluation with four iterations of every position."""
INTERLEAVED = Arm("interleaved S=2", Schedule("interleaved", groups=2))
LRT_ARMS = (
    EXACT,
    INTERLEAVED,
    Arm("interleaved S=4", Schedule("interleaved", groups=4)),
    Arm("multi-refine K=1", Schedule("multi_refine")),
    Arm("multi-refine K=3", Schedule("multi_refine", sweeps=3)),
    Arm("chunks of 4", Schedule("chunked", chunk=4)),
    NO_MEMORY,
)
"""Of a small LRT; its memory is the plan's."""
LOOKS = 5
"""How often the losses of `small` are measured: before the first step, after the last, and evenly between."""
QUANTILES = (0.01, 0.99)
"""Of all blend weights."""
MEASURES = {"loss": ("loss", "labels", 1), "accuracy": ("correct", "labels", 1)}
DISTANCE = {"distance": "positions since the value was set"}


class Blend(NamedTuple):
    """Bounds of alpha, and the start of every blend weight."""

    low: float
    high: float
    start: float


@dataclass(frozen=True)
class Plan:
    """Everything that decides the results of `exact-training`, but the seeds."""

    task: FlipFlop = field(default_factory=FlipFlop)
    layers: int = 4
    d_model: int = 64
    window: int = 2
    """Positions that attention sees, its own included."""
    blends: tuple[Blend, ...] = (
        Blend(0.015, 0.10, 0.027), Blend(0.015, 0.50, 0.20), Blend(0, 1, 0.005), Blend(0, 1, 0.05),
    )  # fmt: skip
    """One setting each: the paper's; a large alpha, where an approximation must hurt if it ever does; without
    bounds from two starts."""
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
        """A small Mistral with random weights: Llama's layers with a window of attention."""
        from transformers import MistralConfig

        config = MistralConfig(
            vocab_size=self.task.vocabulary, hidden_size=self.d_model, intermediate_size=2 * self.d_model,
            num_hidden_layers=self.layers, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=4 * self.task.positions, sliding_window=self.window,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        return random_model(config, seed)

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


@lru_cache(maxsize=1)
def pretrained(plan: Plan, seed: int) -> Any:
    """The weights that every arm of a seed starts from: trained without a stream."""
    start = plan.weights(seed)
    training = stream_training(plan, start, NO_STREAM, plan.blends[0], 1000 + seed, plan.pretraining)
    return training.finish().backbone.model


def small_table(result: ArmScores) -> str:
    """A row per setting and arm of the study `exact-training`."""
    deep = result.finals[result.finals["evaluated"] == DEEP].set_index([*SETTING, "arm"])["loss"]
    columns = {
        "setting": setting_words, "trained with": "arm",
        "loss, exact evaluation": interval("loss", ".3f"),
        "behind exact training": interval("behind_loss", "+.3f"),
        "loss as trained": number("own_loss", ".3f"),
        "loss at depth 4": lambda row: f"{deep[(*(row[name] for name in SETTING), row['arm'])]:.3f}",
        "right, exact evaluation": number("accuracy", ".1%"),
        "alpha at the end: mean": number("alpha", ".3f"), "1% and 99%": alpha_ends, "seeds": "seeds",
        "step / step without a stream": number("ratio", ".1f"),
    }  # fmt: skip
    return table(result.beside(), columns)


def alpha_ends(row: Mapping[Any, Any]) -> str:
    """Quantiles of the blend weights, means over seeds."""
    return f"{row['alpha_1']:.3f}, {row['alpha_99']:.3f}"


def lrt_table(result: ArmScores) -> str:
    """A row per arm of the study `lrt-schedules`."""
    columns = {
        "trained with": "arm", "loss, sequential": interval("loss", ".3g"),
        "behind exact training": interval("behind_loss", "+.2g"),
        "loss as trained": interval("own_loss", ".3g"), "right, sequential": number("accuracy", ".1%"),
        "seeds": "seeds", f"step / step, {result.design.baseline}": number("ratio", ".1f"),
    }  # fmt: skip
    return table(result.beside(), columns)


@register_study
class ExactTraining(TrainingStudy):
    """The same small SST trained exactly, with few sweeps and without a stream, in four settings of alpha.

    With a model, also the gradients of every schedule on it, and what they cost.
    """

    name = "exact-training"
    question = "What does training on few sweeps cost, in gradients and in the loss of the model as it runs?"
    page = "docs/exact-training.md"
    options = ("model", "seeds", "steps")
    plan_file = "exact-training-plan.json"
    new_plan, default_arms, default_rounds = Plan, STREAM_ARMS, 9
    tables = {  # noqa: RUF012
        "schedules": GRADIENT_ERRORS,
        "gradients": Table("exact-training-gradients.parquet", (*SETTING, "seed")),
        "losses": Table("exact-training-losses.parquet", (*SETTING, "seed", "arm")),
        "times": Table("exact-training-times.parquet", ("arm",)),
    }
    design = Design(
        title="Cost of the approximation in training",
        unit="nats per label",
        measures=MEASURES,
        arms=tuple(arm.name for arm in STREAM_ARMS),
        against={EXACT.name: "exact training", NO_STREAM.name: "training without a stream"},
        baseline=NO_STREAM.name,
        definition="exact",
        readings={OWN: "the loss that training sees", DEEP: "itself at depth 4"},
        exact=EXACT.name,
        settings=SETTING,
        setting_words=bounds_words,
        along={"step": "step"} | DISTANCE,
        cost=("step", "alpha", "alpha_1", "alpha_99"),
    )
    findings = (
        Finding(
            "schedules",
            lambda rows: gradient_errors(rows["schedules"]),
            {"schedules": schedules_table, "conditions": conditions_table},
        ),
        Finding(
            "gradients", lambda rows: gradient_fidelity(rows["gradients"]), {"gradients": gradients_table}
        ),
        Finding(
            "training",
            lambda rows: arm_scores(rows["losses"], ExactTraining.design, rows["times"]),
            {"training": small_table},
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
        return dict(zip(SETTING, job.setting, strict=True)) | super().about(job)

    def run(self, folder: str | Path, *, model: str | None = None, **how: Any) -> dict[str, pd.DataFrame]:
        """`TrainingStudy.run`; with a model, its gradients first."""
        if model is not None:
            check_place(Path(folder), "give another --out")
            measure_gradient_errors(folder, model, progress=how.get("progress"))
        return super().run(folder, **how)

    def begin(self, job: Job) -> Training:
        """From weights that were trained without a stream."""
        plan, start = self.plan, pretrained(self.plan, job.seed)
        return stream_training(plan, start, job.arm, job.setting, job.seed, plan.steps)

    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """Losses at some steps, states computed exactly and as trained; gradients of the two-pass arm."""
        plan, about = self.plan, self.about(job)
        looks = {round(k * plan.steps / (LOOKS - 1)) for k in range(LOOKS)}
        exact = NONE if job.arm == NO_STREAM else EXACT.schedule
        losses, gradients = [], []
        while True:
            if training.done in looks:
                alpha = training.model.kind.weights()["alpha"]
                ends = alpha.quantile(alpha.new_tensor(QUANTILES)).tolist()
                deep = exact if job.arm == NO_STREAM else exact._replace(iterations=4)
                for name, how in (("exact", exact), (OWN, job.arm.schedule), (DEEP, deep)):
                    rows = score_labels(training.model, plan.task, plan.held_out, how)
                    of_alpha = {"alpha": float(alpha.mean()), "alpha_1": ends[0], "alpha_99": ends[1]}
                    losses.append(rows.assign(step=training.done, evaluated=name, **of_alpha))
            if training.done == plan.steps:
                break
            if job.arm == TWO_PASS and training.done % plan.every == 0:
                gradients.append(compare_gradients(training, self.arms))
            training.step()
            after_step()
        rows, measured = pd.concat(losses, ignore_index=True), {}
        if gradients:
            setting = {key: value for key, value in about.items() if key != "arm"}
            measured["gradients"] = pd.concat(gradients, ignore_index=True).assign(**setting)
        same = plan.blends if job.arm == NO_STREAM else [job.setting]
        parts = [rows.assign(**self.about(job._replace(setting=blend))) for blend in same]
        return measured | {"losses": pd.concat(parts, ignore_index=True)}


def compare_gradients(training: Training, arms: Sequence[Arm]) -> pd.DataFrame:
    """Each arm's gradient of the next step against the exact one, at the same weights and on the same batch.

    Returns:
        A row per arm with an approximation and part (`weights`; `alpha`, of its logit): `cosine`, and
        `norm_ratio`, its norm over the exact one's.
    """
    exact, rows = training.gradient(EXACT.schedule), []
    for arm in [arm for arm in arms if arm not in (EXACT, DEEPER, NO_STREAM)]:
        for part, gradient in training.gradient(arm.schedule).items():
            a, b = gradient.double(), exact[part].double()
            cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
            about = {"step": training.done, "arm": arm.name, "part": part}
            rows.append(about | {"cosine": cosine, "norm_ratio": float(a.norm()) / float(b.norm())})
    return pd.DataFrame(rows)


UNUSED = (Blend(0.015, 0.10, 0.027), Blend(0.015, 0.50, 0.20))


@dataclass(frozen=True)
class LrtPlan:
    """Everything that decides the results of `lrt-schedules`, but the seeds."""

    small: Plan = field(default_factory=lambda: Plan(blends=UNUSED, pretraining=80, steps=160))
    """Task, model, optimiser and lengths; its blends mean nothing here (they are in the shipped plan)."""
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
class LrtSchedules(TrainingStudy):
    """The same small LRT trained with every schedule, and its loss when it is read token by token."""

    name = "lrt-schedules"
    question = "What does a training schedule of a Latent Recurrent Transformer cost?"
    page = "docs/lrt.md"
    options = ("seeds",)
    plan_file = "latent-plan.json"
    new_plan, default_arms, default_rounds = LrtPlan, LRT_ARMS, 9
    tables = {  # noqa: RUF012
        "losses": Table("latent-losses.parquet", ("seed", "arm")),
        "times": Table("latent-times.parquet", ("arm",)),
    }
    design = Design(
        title="An LRT trained with each schedule",
        unit="nats per label",
        measures=MEASURES,
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
            {"latent training": lrt_table},
        ),
    )

    def begin(self, job: Job) -> Training:
        """From weights that were trained without a memory."""
        return lrt_training(self.plan, pretrained(self.plan.small, job.seed), job.arm, job.seed)

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
