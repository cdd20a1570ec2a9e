"""Training with every schedule to the same number of steps, and the loss under *sequential* evaluation then.

FOLDER/latent-losses.parquet   a row per (seed, arm, evaluated, distance): sums over held-out labels. States
                               are evaluated `sequential` (the definition), or as the arm computes its `own`
FOLDER/latent-times.parquet    a row per (round, arm): seconds of a step, the arms in turn
FOLDER/latent-plan.json        the plan they belong to

A training that is in the table is not repeated: kill the process anywhere and start it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sst_interp.approximation.small import Arm, fresh_weights, pretrained
from sst_interp.latent.small import ARMS, EXACT, LatentPlan, LatentTraining, evaluate_latent, train_latent
from sst_interp.study_tables import put_rows, read_rows, same_plan

LOSSES, TIMES = "latent-losses.parquet", "latent-times.parquet"
PLAN = "latent-plan.json"


def run_schedules(
    folder: str | Path,
    plan: LatentPlan | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[Arm] = ARMS,
    rounds: int = 9,
    progress: Callable[[str], Any] | None = None,
) -> dict[str, pd.DataFrame]:
    """Train what is missing, and return the tables: `losses`, `times`.

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
    plan, folder = plan or LatentPlan(), Path(folder)
    same_plan(folder / PLAN, plan)
    for seed in seeds:
        weights = None
        for arm in arms:
            if _has(read_rows(folder / LOSSES), seed, arm):
                continue
            weights = pretrained(plan.small, seed) if weights is None else weights
            if progress is not None:
                progress(f"seed {seed}, {arm.name}")
            model = train_latent(plan, weights, arm, seed)
            for name, how in (("sequential", EXACT), ("own", arm)):  # `own` last: it says that both are there
                rows = pd.DataFrame(evaluate_latent(model, plan, how))
                about = {"seed": seed, "arm": arm.name, "evaluated": name}
                put_rows(folder / LOSSES, rows.assign(**about), list(about))
    if not (folder / TIMES).is_file() and rounds:
        put_rows(folder / TIMES, step_times(plan, arms, rounds), ["arm"])
    return read_schedules(folder)


def read_schedules(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a study: `losses`, `times`; an empty one where there is none yet."""
    return {"losses": read_rows(Path(folder) / LOSSES), "times": read_rows(Path(folder) / TIMES)}


def step_times(plan: LatentPlan, arms: Sequence[Arm] = ARMS, rounds: int = 9) -> pd.DataFrame:
    """Seconds of processor time of one step of every arm on one thread, in turn, after a warm-up of each:
    round, arm, seconds. Only ratios within a round mean anything.
    """
    weights = fresh_weights(plan.small, 0)
    trainings = [LatentTraining(plan, weights, arm, 0) for arm in arms]
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


def _has(losses: pd.DataFrame, seed: int, arm: Arm) -> bool:
    if losses.empty:
        return False
    return bool(
        ((losses["seed"] == seed) & (losses["arm"] == arm.name) & (losses["evaluated"] == "own")).any()
    )
