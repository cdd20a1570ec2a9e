"""The study of in-context recall: decoders of one and two layers, trained from scratch with and without a
memory.

FOLDER/recall-accuracy.parquet   a row per (layers, seed, arm, evaluated, pairs): answers, sums of `right` and
                                 `loss` over them, and what the training was and cost
FOLDER/recall-plan.json          the plan they belong to

A training that is in the table is not repeated: kill the process anywhere and start it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sst_interp.pretraining.arms import BASELINE, BOTH, LONGER, Arm, Decoder
from sst_interp.pretraining.evaluation import evaluations, score
from sst_interp.pretraining.recall import Recall
from sst_interp.pretraining.training import Training
from sst_interp.study_tables import put_rows, read_rows, same_plan

ACCURACY, PLAN = "recall-accuracy.parquet", "recall-plan.json"
ARMS = (BASELINE, BOTH, LONGER)


@dataclass(frozen=True)
class RecallPlan:
    """Everything that decides the results, but the seeds and the arms."""

    task: Recall = field(default_factory=Recall)
    layers: tuple[int, ...] = (1, 2)
    """A decoder of each; one layer of attention alone cannot look a value up by the key before it."""
    decoder: Decoder = field(default_factory=lambda: Decoder(d_model=64, learning_rate=5e-3))
    """Its number of layers means nothing here."""
    steps: int = 800
    batch: int = 32
    held_out: int = 128
    """Sequences per number of pairs, half of them with a filler."""


def run_recall(
    folder: str | Path,
    plan: RecallPlan | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[Arm] = ARMS,
    progress: Callable[[str, int], Any] | None = None,
) -> pd.DataFrame:
    """Train what is missing, and return the table.

    Args:
        folder: where the table is kept.
        plan: task, model and lengths; None for the default.
        seeds: each has its own start and its own data, shared by all arms.
        arms: what is compared.
        progress: called after every step with words and the passes it took (`passes_left` has the total).

    Raises:
        SSTError: the folder holds the study of another plan.
    """
    plan, folder = plan or RecallPlan(), Path(folder)
    same_plan(folder / PLAN, plan)
    for seed, layers, arm in _missing(folder, plan, seeds, arms):
        training = _training(plan, layers, seed, arm)
        words = f"{layers} layer{'s' * (layers > 1)}, seed {seed}, {arm.name}"
        training.finish(None if progress is None else lambda w=words, a=arm: progress(w, a.passes))
        rows = accuracy(plan, training).assign(layers=layers, seed=seed)
        put_rows(folder / ACCURACY, rows, ["layers", "seed", "arm"])
    return read_recall(folder)


def read_recall(folder: str | Path) -> pd.DataFrame:
    """The table of a study; an empty one where there is none yet."""
    return read_rows(Path(folder) / ACCURACY)


def passes_left(folder: str | Path, plan: RecallPlan, seeds: Sequence[int], arms: Sequence[Arm]) -> int:
    """Passes of all trainings that are missing, in steps of the baseline."""
    return sum(plan.steps * a.longer * a.passes for _, _, a in _missing(Path(folder), plan, seeds, arms))


def accuracy(plan: RecallPlan, training: Training) -> pd.DataFrame:
    """Answers to held-out sequences, under every evaluation and for every number of pairs."""
    rows = []
    for evaluated, method in evaluations(training.arm).items():
        for n in plan.task.pairs:
            about = training.about() | {"evaluated": evaluated, "pairs": n, "answers": 0}
            sums = {"right": 0.0, "loss": 0.0}
            for filler in (False, True):
                batch = plan.task.draw(plan.held_out // 2, 1 + int(filler), n, filler)
                nats, right = score(training.model, batch, method, training.arm.groups)
                sums["right"] += float(right.nansum())
                sums["loss"] += float(nats.nansum())
                about["answers"] += int((~right.isnan()).sum())
            rows.append(about | sums)
    return pd.DataFrame(rows)


def _training(plan: RecallPlan, layers: int, seed: int, arm: Arm) -> Training:
    decoder = replace(plan.decoder, layers=layers)
    weights = decoder.weights(plan.task.vocabulary, plan.task.positions, seed)
    start = 1_000_000 * (seed + 1)
    return Training(decoder, weights, arm, lambda k: plan.task.draw(plan.batch, start + k), plan.steps)


def _missing(
    folder: Path, plan: RecallPlan, seeds: Sequence[int], arms: Sequence[Arm]
) -> list[tuple[int, int, Arm]]:
    table = read_recall(folder)
    done = set() if table.empty else set(zip(table["seed"], table["layers"], table["arm"], strict=True))
    every = [(seed, layers, arm) for layers in plan.layers for seed in seeds for arm in arms]
    return [one for one in every if (one[0], one[1], one[2].name) not in done]
