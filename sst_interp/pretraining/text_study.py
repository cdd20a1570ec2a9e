"""The study of pretraining on text: one small decoder from scratch, with a latent memory and without.

FOLDER/pretraining-losses.parquet   a row per (seed, arm, evaluated, position): held-out tokens, their bytes,
the
                                    sum of `loss` in nats over them, and what the training was and cost;
                                    positions in bins of 16, named by their first
FOLDER/pretraining-times.parquet    a row per (round, arm): seconds of a step, the arms in turn
FOLDER/pretraining-plan.json        the plan they belong to

A training that is in the table is not repeated: kill the process anywhere and start it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sst_interp.errors import SSTError
from sst_interp.pretraining.arms import ARMS, QUIET, RESIDUAL, Arm, Decoder
from sst_interp.pretraining.corpus import Corpus, build_corpus, every_next
from sst_interp.pretraining.evaluation import evaluations, score
from sst_interp.pretraining.text import Text
from sst_interp.pretraining.training import Training
from sst_interp.study_tables import put_rows, read_rows, same_plan

LOSSES, TIMES, PLAN = "pretraining-losses.parquet", "pretraining-times.parquet", "pretraining-plan.json"
BIN = 16


@dataclass(frozen=True)
class TextPlan:
    """Everything that decides the results, but the seeds and the arms."""

    decoder: Decoder = field(default_factory=lambda: Decoder(learning_rate=6e-3))
    vocabulary: int = 1024
    """Symbols of the byte-level BPE."""
    positions: int = 128
    """Of a window."""
    batch: int = 8
    steps: int = 300
    held_out: int = 256
    """Windows that losses are measured on."""
    share: float = 0.1
    """Of documents that are held out."""
    text: str = ""
    """sha256 of the text, filled in by the study: results on another text are another study."""


def run_text(
    folder: str | Path,
    text: Text,
    plan: TextPlan | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[Arm] = ARMS,
    rounds: int = 5,
    progress: Callable[[str, int], Any] | None = None,
) -> dict[str, pd.DataFrame]:
    """Train what is missing, and return the tables: `losses`, `times`.

    Args:
        folder: where the tables are kept.
        text: documents (`text.articles`, or `text.read_text` of a file).
        plan: model, windows and lengths; None for the default.
        seeds: each has its own start and its own order of the text, shared by all arms.
        arms: what is compared.
        rounds: of the timing, which measures one step of every arm in turn; 0 for none.
        progress: called after every step with words and the passes it took (`passes_left` has the total).

    Raises:
        SSTError: the folder holds the study of another plan or text; the text is too short; more interleaved
            groups than positions.
    """
    plan, folder = replace(plan or TextPlan(), text=text.sha256), Path(folder)
    for arm in arms:
        if arm.pathway and not 1 <= arm.groups <= plan.positions:
            raise SSTError(
                f"{arm.groups} interleaved groups do not fit into {plan.positions} positions",
                f"give 1 to {plan.positions} groups",
            )
    corpus = build_corpus(text, plan.vocabulary, plan.positions, plan.held_out, plan.share)
    same_plan(folder / PLAN, plan)
    for seed, arm in _missing(folder, seeds, arms):
        training = _training(plan, corpus, seed, arm)
        words = f"seed {seed}, {arm.name}"
        training.finish(None if progress is None else lambda w=words, a=arm: progress(w, a.passes))
        put_rows(folder / LOSSES, held_out_losses(corpus, training).assign(seed=seed), ["seed", "arm"])
    if rounds and not (folder / TIMES).is_file():
        put_rows(folder / TIMES, step_times(plan, corpus, arms, rounds), ["arm"])
    return read_text_study(folder)


def read_text_study(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a study: `losses`, `times`; an empty one where there is none yet."""
    return {name: read_rows(Path(folder) / file) for name, file in (("losses", LOSSES), ("times", TIMES))}


def passes_left(folder: str | Path, plan: TextPlan, seeds: Sequence[int], arms: Sequence[Arm] = ARMS) -> int:
    """Passes of all trainings that are missing, in steps of the baseline."""
    return sum(plan.steps * arm.longer * arm.passes for _, arm in _missing(Path(folder), seeds, arms))


def held_out_losses(corpus: Corpus, training: Training) -> pd.DataFrame:
    """Losses of a finished training on the held-out windows, under every evaluation, in bins of positions."""
    batch = every_next(corpus.held_out)
    n_bytes = corpus.n_bytes[corpus.held_out[:, 1:]].double()
    bins = torch.arange(corpus.positions - 1) // BIN
    rows = []
    for evaluated, method in evaluations(training.arm).items():
        nats, _ = score(training.model, batch, method, training.arm.groups)
        columns = {"tokens": torch.ones_like(n_bytes), "bytes": n_bytes, "loss": nats.double()}
        sums = {name: torch.bincount(bins, values.sum(dim=0)).tolist() for name, values in columns.items()}
        first = [BIN * k for k in range(len(sums["loss"]))]
        about = training.about() | {"evaluated": evaluated, "documents": corpus.held_out_documents}
        rows.append(pd.DataFrame({"position": first} | sums).assign(**about))
    return pd.concat(rows, ignore_index=True)


def step_times(plan: TextPlan, corpus: Corpus, arms: Sequence[Arm], rounds: int) -> pd.DataFrame:
    """Seconds of processor time of one step of every arm on one thread, in turn, after a warm-up of each:
    round, arm, seconds. Only ratios within a round mean anything.
    """
    trainings = [_training(plan, corpus, 0, arm) for arm in arms]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for number in range(-1, rounds):
        for training in trainings:
            before = training.seconds
            training.step()
            if number >= 0:
                about = {"round": number, "arm": training.arm.name}
                rows.append(about | {"seconds": training.seconds - before})
    torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def _training(plan: TextPlan, corpus: Corpus, seed: int, arm: Arm) -> Training:
    weights = plan.decoder.weights(len(corpus.n_bytes), plan.positions, seed)
    start = 1_000_000 * (seed + 1)
    return Training(plan.decoder, weights, arm, lambda k: corpus.draw(plan.batch, start + k), plan.steps)


def _missing(folder: Path, seeds: Sequence[int], arms: Sequence[Arm]) -> list[tuple[int, Arm]]:
    """What the question needs first, of every seed; variants of the memory after that."""
    table = read_rows(folder / LOSSES)
    done = set() if table.empty else set(zip(table["seed"], table["arm"], strict=True))
    every = [(seed, arm) for seed in seeds for arm in arms]
    every.sort(key=lambda one: one[1] in (RESIDUAL, QUIET))
    return [(seed, arm) for seed, arm in every if (seed, arm.name) not in done]
