"""The study `fixed-point`: does training a loop at its fixed point put the first guess there?

Attractor models (arXiv 2605.12466) are trained at the fixed point of their core, by implicit differentiation,
and are said to need no iteration afterwards: what the prelude hands over nearly is the fixed point. Here a
small loop is trained so on flip-flop, in two settings. With a window of attention each iteration carries a
value a few positions further, so that no first guess can know all of it; with full attention one pass may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from sst_interp.experiments.studies.fit import Arm, Schedule, Training, label_losses, random_model
from sst_interp.experiments.studies.scores import ArmScores, Design, arm_scores
from sst_interp.experiments.studies.show import Across, interval, number, table
from sst_interp.experiments.studies.study import Finding, Job, TrainingStudy, register_study
from sst_interp.experiments.studies.tasks import FlipFlop
from sst_interp.experiments.table import Table
from sst_interp.models.choices import Choices
from sst_interp.models.kinds.looped import Looped, normed
from sst_interp.models.model import StateStreamModel, attach_looped
from sst_interp.models.solvers.fixed_point import fixed_point_states
from sst_interp.models.solvers.implicit import Solver
from sst_interp.models.stream import Pass, stack_pass
from sst_interp.training.recipe import TrainingRecipe

SOLVED = Arm("fixed point", Schedule("fixed_point"), kind="looped")
UNROLLED = Arm("4 iterations", Schedule("unrolled", iterations=4), kind="looped")
ONE_PASS = Arm("1 iteration", Schedule("unrolled", iterations=1), kind="looped")
ARMS = (SOLVED, UNROLLED, ONE_PASS)
GUESS, AT_FIXED_POINT, UNTRAINED = "first guess", "fixed point", "first guess, untrained"
DEPTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class FixedPointPlan:
    """Everything that decides the results of `fixed-point`, but the seeds and the arms."""

    task: FlipFlop = field(default_factory=FlipFlop)
    windows: tuple[int, ...] = (2, 16)
    """Positions that attention sees, its own included: a setting each."""
    layers: tuple[int, int, int] = (1, 2, 1)
    """Of prelude, core and coda."""
    d_model: int = 64
    steps: int = 300
    batch: int = 16
    learning_rate: float = 2e-3
    held_out: int = 256
    """Sequences that losses are measured on."""

    def model(self, window: int, seed: int) -> StateStreamModel:
        """A small loop with random weights: the prelude is injected, and it and the state are normed."""
        from transformers import MistralConfig

        prelude, core, coda = self.layers
        config = MistralConfig(
            vocab_size=self.task.vocabulary, hidden_size=self.d_model, intermediate_size=2 * self.d_model,
            num_hidden_layers=prelude + core + coda, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=4 * self.task.positions, sliding_window=window,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        return attach_looped(
            random_model(config, seed), choices=Choices(kv="each"), core=(prelude, prelude + core),
            inject="add", initial="prelude", norm="rms", prelude_norm="rms",
        )  # fmt: skip


@torch.no_grad()
def readings(model: StateStreamModel, task: FlipFlop, sequences: int) -> pd.DataFrame:
    """A trained loop read out at its first guess, after some iterations, and at its fixed point.

    Returns:
        A row per reading: `labels` (how many), and sums over them of `loss` (nats), `correct`, and `apart`:
        the distance of the normed state to that of the fixed point, over its length. `iterations` is how many
        it takes until states change by less than 1e-3, `residual` what was left then.
    """
    tokens, labels = task.draw(sequences, seed=0)
    backbone, kind = model.backbone, model.kind
    assert isinstance(kind, Looped)
    first, end = kind.span(backbone.n_layers)
    solver = Solver()
    iterations, residual = fixed_point_states(model, tokens, solver)[2:]
    exact = fixed_point_states(model, tokens, Solver(tolerance=1e-6))
    target = normed(kind.norm, backbone, exact.u)
    stream = model.new_stream(torch.zeros_like(tokens[:, 0]), tokens.shape[1])
    columns, state, read = torch.arange(tokens.shape[1]), None, {}
    for i in range(1, max(DEPTHS) + 1):
        outputs, state = stack_pass(model, stream, tokens, columns, state, None, "write", iteration=i)
        if i == 1:
            guess = normed(kind.prelude_norm, backbone, outputs[first - 1])
            fresh = model.new_stream(torch.zeros_like(tokens[:, 0]), tokens.shape[1])
            read[GUESS] = (read_out_guess(model, fresh, tokens, guess), guess)
        if i in DEPTHS:
            read[f"depth {i}"] = (outputs[-1], normed(kind.norm, backbone, outputs[end - 1]))
    read[AT_FIXED_POINT] = (exact.last, target)
    rows = []
    for name, (last, s) in read.items():
        right = backbone.unembed(last).argmax(-1) == labels
        apart = (s - target).norm(dim=-1) / target.norm(dim=-1)
        loss = float(label_losses(model, last, labels).sum())
        row = {"evaluated": name, "labels": labels.numel(), "loss": loss, "correct": int(right.sum())}
        row |= {"apart": float(apart.sum())}
        rows.append(row | {"iterations": iterations, "residual": residual})
    return pd.DataFrame(rows)


def read_out_guess(
    model: StateStreamModel, stream: Any, tokens: torch.Tensor, guess: torch.Tensor
) -> torch.Tensor:
    """The last layer's outputs of a coda that reads the first guess: no iteration at all."""
    p = Pass(stream, tokens, torch.arange(tokens.shape[1]), None, None, "write")
    assert isinstance(model.kind, Looped)
    return model.kind.coda_outputs(model.backbone, guess, p.inputs(model.backbone))[-1]


def words(window: int) -> str:
    """A setting in words."""
    return f"window of {window}"


def rights(result: ArmScores) -> str:
    """Right answers, a row per setting and arm, a column per reading."""
    rows = result.finals[result.finals["evaluated"] != UNTRAINED]
    more = Across("evaluated", number("accuracy", ".0%"))
    return table(rows, {"window": "window", "trained at": "arm", "{}": more, "seeds": "seeds"})


def losses(result: ArmScores) -> str:
    """Loss at the fixed point, and what is lost without refinement; iterations until it is reached."""
    rows = result.differences[result.differences["same"]]
    fixed = result.defined.set_index(["window", "arm"])

    def at(name: str, form: str) -> Callable[[Mapping[Any, Any]], str]:
        return lambda row: f"{fixed.loc[(row['window'], row['arm']), name]:{form}}"

    columns = {
        "window": "window", "trained at": "arm", "loss at the fixed point": at("loss", ".3f"),
        "less its own at: {}": Across("minus", interval("loss", "+.2g")),
        "iterations to 1e-3": at("iterations", ".0f"), "residual": at("residual", ".1g"),
        "seconds": at("seconds", ".0f"), "seeds": "seeds",
    }  # fmt: skip
    return table(rows, columns)


def distances(result: ArmScores) -> str:
    """How far from the fixed point a state is, in its lengths, a column per reading."""
    order = [UNTRAINED, GUESS, *(f"depth {n}" for n in DEPTHS)]
    rows = result.finals[result.finals["evaluated"].isin(order)]
    more = Across("evaluated", interval("distance", ".2g"))
    return table(rows, {"window": "window", "trained at": "arm", "{}": more, "seeds": "seeds"})


@register_study
class FixedPointStudy(TrainingStudy):
    """A small loop trained at its fixed point, through four iterations, and through one."""

    name = "fixed-point"
    question = "Does training a loop at its fixed point put the first guess there?"
    page = "docs/looped.md"
    plan_file = "fixed-point-plan.json"
    new_plan, default_arms = FixedPointPlan, ARMS
    tables = {"losses": Table("fixed-point.parquet", ("window", "seed", "arm"))}  # noqa: RUF012
    design = Design(
        title="A loop trained at its fixed point",
        unit="nats per label",
        measures={
            "loss": ("loss", "labels", 1),
            "accuracy": ("correct", "labels", 1),
            "distance": ("apart", "labels", 1),
        },
        arms=tuple(arm.name for arm in ARMS),
        against={UNROLLED.name: "training through 4 iterations", ONE_PASS.name: "training through 1"},
        baseline=ONE_PASS.name,
        definition=AT_FIXED_POINT,
        readings={GUESS: "its own first guess, without any iteration", "depth 1": "one iteration of itself"},
        settings=("window",),
        setting_words=words,
        cost=("iterations", "residual", "seconds"),
    )
    findings = (
        Finding(
            "fixed point",
            lambda rows: arm_scores(rows["losses"], FixedPointStudy.design),
            {"fixed point losses": losses, "fixed point right": rights, "fixed point distances": distances},
        ),
    )

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """Setting by setting."""
        return [Job(seed, arm, window) for seed in seeds for window in self.plan.windows for arm in self.arms]

    def about(self, job: Job) -> dict[str, Any]:
        """The window, too."""
        return {"window": job.setting} | super().about(job)

    def begin(self, job: Job) -> Training:
        """From random weights, which are those of all arms."""
        plan = self.plan
        recipe = TrainingRecipe(
            "small", "small", "flip-flop", method="none", learning_rate=plan.learning_rate, dtype="float32"
        )
        draw = lambda step: plan.task.draw(plan.batch, 1_000_000 * (job.seed + 1) + step)  # noqa: E731
        return Training(plan.model(job.setting, job.seed), job.arm, recipe, draw, plan.steps)

    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """What every reading scores, how far it is from the fixed point, and the first guess untrained."""
        plan = self.plan
        before = readings(training.model, plan.task, plan.held_out)
        before = before[before["evaluated"] == GUESS].assign(evaluated=UNTRAINED)
        model = training.finish(after_step)
        rows = pd.concat([before, readings(model, plan.task, plan.held_out)], ignore_index=True)
        return {"losses": rows.assign(seconds=training.seconds, **self.about(job))}
