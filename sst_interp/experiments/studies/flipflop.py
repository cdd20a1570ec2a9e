"""The studies `small` and `lrt-schedules`: small models trained on flip-flop under every schedule.

| study | model | arms |
| --- | --- | --- |
| `small` | an SST, in two settings of alpha | exact, few sweeps, no stream |
| `lrt-schedules` | an LRT | exact, interleaved, multi-refine, chunked, no memory |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from sst_interp.analyses.plots import GREY, TEMPLATE
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import over_seeds, seeds_words
from sst_interp.errors import Untestable
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
from sst_interp.experiments.studies.scores import ArmScores, Design, arm_scores
from sst_interp.experiments.studies.show import COLOURS, finite, groups_of, interval, number, table
from sst_interp.experiments.studies.study import Finding, Job, TrainingStudy, register_study
from sst_interp.experiments.studies.tasks import FlipFlop
from sst_interp.experiments.table import Table
from sst_interp.models.kinds.lrt import MemoryDesign
from sst_interp.models.model import attach, attach_lrt
from sst_interp.training.recipe import TrainingRecipe

STREAM_ARMS = (
    EXACT,
    TWO_PASS,
    Arm("2 sweeps", Schedule(sweeps=2)),
    Arm("4 sweeps", Schedule(sweeps=4)),
    Arm("2 groups", Schedule(groups=2)),
    Arm("4 groups", Schedule(groups=4)),
    NO_STREAM,
)
"""Of a small SST. Groups make one sweep, so that they cost as many passes as two-pass training."""
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
MEASURES = {"loss": ("loss", "labels", 1), "accuracy": ("correct", "labels", 1)}
DISTANCE = {"distance": "positions since the value was set"}
SETTING = ("alpha_low", "alpha_high")
PARTS = {"weights": "weights", "alpha": "alpha (its logit)"}


class Blend(NamedTuple):
    """Bounds of alpha, and the start of every blend weight."""

    low: float
    high: float
    start: float


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


@dataclass(frozen=True, eq=False)
class GradientFidelity(Result):
    """Gradients of few sweeps against exact ones. Intervals are over seeds; settings are not pooled."""

    summary: pd.DataFrame
    """A row per setting, arm and part: seeds, steps, and over them `cosine` and `norm_ratio` (mean of each
    seed's mean over the training) with `_low` and `_high`, and `lowest_cosine` of any step and seed."""
    curves: pd.DataFrame
    """A row per setting, arm, part and step: means over seeds of `cosine` and `norm_ratio`, and their lowest
    and highest seed."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Gradients against exact back-propagation"

    @property
    def table(self) -> pd.DataFrame:
        """A row per setting, arm and part."""
        return self.summary

    @property
    def verdict(self) -> str:
        """The two-pass gradient, setting by setting, and the arm that comes nearest to exact."""
        told = [self._told(ends, rows) for ends, rows in groups_of(self.summary, SETTING)]
        return " ".join(filter(None, told)) or "Not testable: no two-pass gradient was measured."

    def _told(self, ends: tuple, rows: pd.DataFrame) -> str:
        sentences = []
        for part, words in PARTS.items():
            own = rows[rows["part"] == part].set_index("arm")
            if TWO_PASS.name not in own.index:
                continue
            two, best = own.loc[TWO_PASS.name], str(own["cosine"].idxmax())
            sentences.append(
                f"The two-pass gradient of {words} has a cosine of {two['cosine']:.3f} with the exact one "
                f"(lowest {two['lowest_cosine']:.3f}) and {two['norm_ratio']:.2f} times its norm."
            )
            if best != TWO_PASS.name:
                sentences.append(f"Nearest is {best}, cosine {own.loc[best, 'cosine']:.3f}.")
        head = f"{bounds_words(*ends)}, {seeds_words(int(rows['seeds'].max()))}."
        return " ".join([head, *sentences]) if sentences else ""

    def figure(self) -> go.Figure:
        """Cosine (above) and norm ratio (below) over the training, in the widest setting."""
        return self._setting(*max(groups_of(self.curves, SETTING), key=lambda one: one[0][1]))

    def figures(self) -> dict[str, go.Figure]:
        """A figure per setting."""
        by = groups_of(self.curves, SETTING)
        return {bounds_words(*ends): self._setting(ends, rows) for ends, rows in by}

    def _setting(self, ends: tuple, rows: pd.DataFrame) -> go.Figure:
        parts = [part for part in PARTS if part in set(rows["part"])]
        figure = make_subplots(
            rows=2, cols=len(parts), shared_xaxes=True, vertical_spacing=0.08, horizontal_spacing=0.12,
            column_titles=[PARTS[part] for part in parts],
        )  # fmt: skip
        for column, part in enumerate(parts, 1):
            arms = rows[rows["part"] == part].groupby("arm", sort=False)
            for (arm, own), colour in zip(arms, COLOURS, strict=False):
                for row, name in enumerate(("cosine", "norm_ratio"), 1):
                    figure.add_scatter(
                        x=own["step"], y=own[name], name=arm, legendgroup=arm, line={"color": colour},
                        mode="lines+markers", marker={"size": 4}, showlegend=row == 1 and column == 1,
                        customdata=own[[f"{name}_lowest", f"{name}_highest"]].to_numpy(), row=row, col=column,
                        hovertemplate=f"{arm}, step %{{x}}: %{{y:.3f}} [%{{customdata[0]:.3f}} to "
                        "%{customdata[1]:.3f} over seeds]<extra></extra>",
                    )  # fmt: skip
            figure.update_yaxes(title_text="cosine with exact", row=1, col=column)
            figure.update_yaxes(title_text="norm / exact norm", row=2, col=column)
            figure.add_hline(y=1, line={"color": GREY, "dash": "dot"}, row=2, col=column)  # pyright: ignore
            figure.update_xaxes(title_text="step of the two-pass training", row=2, col=column)
        n = int(self.summary[self.summary["alpha_high"] == ends[1]]["seeds"].max())
        subtitle = f"{bounds_words(*ends)}; mean of {seeds_words(n)}"
        figure.update_layout(
            template=TEMPLATE, height=560, margin={"t": 130},
            title={"text": self.title, "subtitle": {"text": subtitle}}, legend={"y": 1.06},
        )  # fmt: skip
        return figure


def bounds_words(low: float, high: float) -> str:
    """How a setting is called."""
    return f"alpha in [{low:g}, {high:g}]"


def setting_words(row: Mapping[Any, Any]) -> str:
    """How the setting of a table's row is called."""
    return bounds_words(*(row[name] for name in SETTING))


def gradient_fidelity(gradients: pd.DataFrame) -> GradientFidelity:
    """Cosines and norm ratios of approximate gradients, from the table `gradients` of the study `small`.

    Rows that are not finite are left out. Raises Untestable if there is no other.
    """
    values = ["cosine", "norm_ratio"]
    if gradients.empty:
        raise Untestable("the table of gradients is empty")
    rows = finite(gradients, values)
    if rows.empty:
        raise Untestable("no gradient is finite")
    by, records = [*SETTING, "arm", "part"], []
    for names, own in groups_of(rows, by, sort=False):
        per_seed = own.groupby("seed")[values].mean()
        record = dict(zip(by, names, strict=True)) | {"seeds": len(per_seed), "steps": own["step"].nunique()}
        for value in values:
            record |= over_seeds(per_seed[value].to_numpy()).columns(value)
        records.append(record | {"lowest_cosine": own["cosine"].min()})
    grouped = rows.groupby([*by, "step"], sort=False)[values]
    curves = grouped.mean()
    for value in values:
        curves[f"{value}_lowest"], curves[f"{value}_highest"] = grouped.min()[value], grouped.max()[value]
    return GradientFidelity(pd.DataFrame(records), curves.reset_index())


def gradients_table(result: GradientFidelity) -> str:
    """A row per setting, arm and part."""
    columns = {
        "setting": setting_words, "gradient": "arm", "of": "part",
        "cosine with exact": interval("cosine", ".3f"), "lowest": number("lowest_cosine", ".3f"),
        "norm / exact norm": interval("norm_ratio", ".2f"), "seeds": "seeds",
    }  # fmt: skip
    return table(result.summary, columns)


def small_table(result: ArmScores) -> str:
    """A row per setting and arm of the study `small`."""
    columns = {
        "setting": setting_words, "trained with": "arm",
        "loss, exact evaluation": interval("loss", ".3f"),
        "behind exact training": interval("behind_loss", "+.3f"),
        "loss as trained": number("own_loss", ".3f"), "right, exact evaluation": number("accuracy", ".1%"),
        "alpha at the end": number("alpha", ".3f"), "seeds": "seeds",
        "step / step without a stream": number("ratio", ".1f"),
    }  # fmt: skip
    return table(result.beside(), columns)


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
class Small(TrainingStudy):
    """The same small SST trained exactly, with few sweeps and without a stream, in two settings of alpha."""

    name = "small"
    question = "What does training on few sweeps cost, in gradients and in the loss of the model as it runs?"
    page = "docs/approximation.md"
    plan_file = "small-plan.json"
    new_plan, default_arms, default_rounds = Plan, STREAM_ARMS, 9
    tables = {  # noqa: RUF012
        "gradients": Table("small-gradients.parquet", (*SETTING, "seed")),
        "losses": Table("small-losses.parquet", (*SETTING, "seed", "arm")),
        "times": Table("small-times.parquet", ("arm",)),
    }
    design = Design(
        title="Cost of the approximation in training",
        unit="nats per label",
        measures=MEASURES,
        arms=tuple(arm.name for arm in STREAM_ARMS),
        against={EXACT.name: "exact training", NO_STREAM.name: "training without a stream"},
        baseline=NO_STREAM.name,
        definition="exact",
        readings={OWN: "the loss that training sees"},
        exact=EXACT.name,
        settings=SETTING,
        setting_words=bounds_words,
        along={"step": "step"} | DISTANCE,
        cost=("step", "alpha"),
    )
    findings = (
        Finding(
            "gradients", lambda rows: gradient_fidelity(rows["gradients"]), {"gradients": gradients_table}
        ),
        Finding(
            "training",
            lambda rows: arm_scores(rows["losses"], Small.design, rows["times"]),
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
        return {"alpha_low": job.setting.low, "alpha_high": job.setting.high} | super().about(job)

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
