"""What the approximation costs in training: the same small model trained exactly, with few sweeps, and
without a stream, from the same start on the same data, for several seeds.

FOLDER/small-losses.parquet      a row per (blend, seed, arm, step, evaluated, distance): held-out losses
FOLDER/small-gradients.parquet   a row per (blend, seed, step, arm, part): each gradient against the exact
                                 one, along the two-pass training
FOLDER/small-times.parquet       a row per (round, arm): seconds of a step, the arms in turn
FOLDER/small-plan.json           the plan they belong to

A training that is in the tables is not repeated: kill the process anywhere and start it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sst_interp.approximation.small import (
    ARMS,
    BASELINE,
    EXACT,
    TWO_PASS,
    Arm,
    Blend,
    Plan,
    SmallTraining,
    evaluate,
    fresh_weights,
    pretrained,
)
from sst_interp.study_tables import put_rows, read_rows, same_plan

LOSSES, GRADIENTS, TIMES = (f"small-{name}.parquet" for name in ("losses", "gradients", "times"))
PLAN = "small-plan.json"
LOOKS = 5
"""How often the losses are measured: before the first step, after the last, and evenly between."""


def run_study(
    folder: str | Path,
    plan: Plan | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[Arm] = ARMS,
    rounds: int = 9,
    progress: Callable[[str], Any] | None = None,
) -> dict[str, pd.DataFrame]:
    """Train what is missing, and return the tables: `losses`, `gradients`, `times`.

    Args:
        folder: where the tables are kept.
        plan: task, model and optimiser; None for the default.
        seeds: each has its own start and its own data, shared by all arms.
        arms: how states are computed in training.
        rounds: of the timing, which measures one step of every arm in turn.
        progress: called with a line before every training.

    Raises:
        SSTError: the folder holds the study of another plan.
    """
    plan, folder = plan or Plan(), Path(folder)
    same_plan(folder / PLAN, plan)
    for seed in seeds:
        weights = None
        for blend, arm in _missing(folder / LOSSES, plan, seed, arms):
            weights = pretrained(plan, seed) if weights is None else weights
            if progress is not None:
                progress(f"seed {seed}, alpha in [{blend.low}, {blend.high}], {arm.name}")
            losses, gradients = train_arm(plan, weights, arm, blend, seed, arms)
            # The losses say that a training is done, so they are written last.
            about = {"alpha_low": blend.low, "alpha_high": blend.high, "seed": seed}
            if len(gradients):
                put_rows(folder / GRADIENTS, gradients.assign(**about), list(about))
            for same in plan.blends if arm == BASELINE else [blend]:  # without a stream all blends are one
                about |= {"alpha_low": same.low, "alpha_high": same.high}
                put_rows(folder / LOSSES, losses.assign(**about), [*about, "arm"])
    if not (folder / TIMES).is_file() and rounds:
        put_rows(folder / TIMES, step_times(plan, arms, rounds), ["arm"])
    return read_study(folder)


def read_study(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a study: `losses`, `gradients`, `times`; an empty one where there is none yet."""
    found = {"losses": LOSSES, "gradients": GRADIENTS, "times": TIMES}
    return {name: read_rows(Path(folder) / file) for name, file in found.items()}


def train_arm(
    plan: Plan, weights: Any, arm: Arm, blend: Blend, seed: int, arms: Sequence[Arm] = ARMS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One training from the start to the end: (losses, gradients). Gradients are compared along the two-pass
    training only; of others the table is empty.

    Losses: arm, step, evaluated (`exact`: token by token; `own`: as the arm computes states), alpha (mean),
    distance, and what `small.evaluate` sums. Gradients: step, arm, part, cosine, norm_ratio.
    """
    training = SmallTraining(plan, weights, arm, blend, seed, plan.steps)
    looks = {round(k * plan.steps / (LOOKS - 1)) for k in range(LOOKS)}
    losses, gradients = [], []
    while True:
        if training.done in looks:
            for name, how in _evaluations(arm):
                sums = pd.DataFrame(evaluate(training.model, plan, how))
                about = {"arm": arm.name, "step": training.done, "evaluated": name}
                losses.append(sums.assign(**about, alpha=float(training.model.alpha.mean())))
        if training.done == plan.steps:
            break
        if arm == TWO_PASS and training.done % plan.every == 0:
            gradients += compare_gradients(training, [a for a in arms if a not in (EXACT, BASELINE)])
        training.step()
    return pd.concat(losses, ignore_index=True), pd.DataFrame(gradients)


def compare_gradients(training: SmallTraining, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Each arm's gradient of the next step against the exact one, at the same weights and on the same batch.

    Returns:
        A row per arm and part (`weights`; `alpha`, of its logit): cosine, and norm_ratio, its norm over the
        exact one's.
    """
    exact = training.gradient(EXACT)
    rows = []
    for arm in arms:
        for part, found in training.gradient(arm).items():
            about = {"step": training.done, "arm": arm.name, "part": part}
            rows.append(
                about | {"cosine": _cosine(found, exact[part]), "norm_ratio": _norms(found, exact[part])}
            )
    return rows


def step_times(plan: Plan, arms: Sequence[Arm] = ARMS, rounds: int = 9) -> pd.DataFrame:
    """Seconds of processor time of one step of every arm on one thread, in turn, after a warm-up of each:
    round, arm, seconds. Only ratios within a round mean anything.
    """
    weights = fresh_weights(plan, 0)
    trainings = [SmallTraining(plan, weights, arm, plan.blends[0], 0, rounds + 1) for arm in arms]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for number in range(-1, rounds):
        for training in trainings:
            began = time.process_time()
            training.step()
            if number >= 0:
                seconds = time.process_time() - began
                rows.append({"round": number, "arm": training.arm.name, "seconds": seconds})
    torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def _evaluations(arm: Arm) -> list[tuple[str, Arm]]:
    """(name, how states are computed) for the losses of one arm. Without a stream there is one way."""
    return [("exact", BASELINE if arm == BASELINE else EXACT), ("own", arm)]


def _missing(path: Path, plan: Plan, seed: int, arms: Sequence[Arm]) -> Iterator[tuple[Blend, Arm]]:
    table, done = read_rows(path), set()
    if len(table):
        done = set(zip(table["alpha_high"], table["seed"], table["arm"], strict=True))
    for blend in plan.blends:
        for arm in arms:
            if (blend.high, seed, arm.name) not in done and not (arm == BASELINE and blend != plan.blends[0]):
                yield blend, arm


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def _norms(a: Tensor, b: Tensor) -> float:
    return float(a.double().norm() / b.double().norm())
