"""What the claims ledger costs, and how that grows: all analyses with 2,000 resamples on synthetic run
folders.

    python benchmarks/ledger.py               # 1, 3, 10 and 30 million pairs
    python benchmarks/ledger.py --pairs 1e6   # one size
    python benchmarks/ledger.py --run gpqa    # a captured run

A synthetic run is written to a temporary folder first. Every size is then read and judged in a process of its
own, which prints processor time, wall time and peak memory. 30 million pairs are Gemma-3-27B (62 layers) on
198 questions at four depths.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

LAYERS, QUESTIONS, DEPTHS = 62, 198, (1, 2, 3, 4)
TYPES = 11
"""Rows of `pairs` for every position and layer: 3 teacher-forced, 3 free-running, 5 within."""
BATCH = 11
"""Questions that are written together."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--pairs", type=float, help="rows of the pairs table of one synthetic run")
    options.add_argument("--run", help="a captured run instead, by name or folder")
    chosen = options.parse_args()
    if chosen.run is not None:
        _measure(chosen.run)
        return
    for pairs in (1e6, 3e6, 1e7, 3e7) if chosen.pairs is None else (chosen.pairs,):
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder) / "synthetic", pairs)
            subprocess.run([sys.executable, __file__, "--run", f"{folder}/synthetic"], check=True)


def _write(folder: Path, pairs: float) -> None:
    """A run folder of `QUESTIONS` questions and `LAYERS` layers with about so many pairs."""
    from sst_interp.runs.recipe import Recipe
    from sst_interp.runs.writer import RunWriter

    positions = max(2, round(pairs / (LAYERS * QUESTIONS * TYPES)))
    recipe = Recipe(
        folder.name,
        "synthetic",
        "synthetic",
        depths=DEPTHS,
        questions=QUESTIONS,
        batch_size=BATCH,
        keep="none",
    )
    starts = range(0, QUESTIONS, BATCH)
    with RunWriter.open(folder, recipe, {}, n_batches=len(starts)) as writer:
        for batch, start in enumerate(starts):
            writer.commit(batch, _tables(start, min(BATCH, QUESTIONS - start), positions))
        writer.finish()


def _tables(start: int, questions: int, positions: int) -> dict[str, dict[str, np.ndarray]]:
    """The tables of a batch of questions, sorted as a run has them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from synthetic import synthetic_run
    from synthetic_outputs import outputs_table, questions_table, steps_table

    from sst_interp.runs.schema import KEYS

    run = synthetic_run(
        questions=questions, positions=positions, layers=LAYERS, depths=DEPTHS[1:], seed=start
    )
    within = run.pairs[(run.pairs["comparison"] == "within") & (run.pairs["b"] > 2)]
    pairs = pd.concat([run.pairs, within.assign(a=(within["b"] - 1).astype("int8"))], ignore_index=True)
    outputs = outputs_table(pairs, seed=start)
    steps = steps_table(outputs, DEPTHS, seed=start).assign(token=1, argmax=1, top100=None)
    right = np.random.default_rng(start).random((questions, len(DEPTHS))) < [0.51, 0.48, 0.45, 0.43]
    answers = questions_table(right, DEPTHS, seed=start).assign(
        prompt_tokens=100, prompt_sweeps=1, prompt_residual=0.0, prompt_logit_error=0.0
    )
    answers["id"] = [f"record-{start + q}" for q in answers["question"]]
    made = {"questions": answers, "steps": steps, "outputs": outputs, "pairs": pairs}
    tables = {}
    for name, table in made.items():
        ordered = table.assign(question=table["question"] + start).sort_values(KEYS[name], key=_codes)
        tables[name] = {column: ordered[column].to_numpy() for column in ordered}
    return tables


def _codes(column: pd.Series) -> pd.Series:
    """What a key column is sorted by."""
    from sst_interp.runs.schema import CATEGORIES

    known = CATEGORIES.get(str(column.name))
    return column if known is None else column.map(known.index)


def _measure(name: str) -> None:
    from sst_interp.findings.of_run import ledger_of
    from sst_interp.runs.store import open_run

    run = open_run(name)
    rows = sum(entry["rows"] for entry in run._entries("pairs"))
    before, wall = time.process_time(), time.perf_counter()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    ledger = ledger_of(run)
    seconds, wall = time.process_time() - before, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if ledger.failed:
        raise SystemExit(f"failed: {ledger.failed}")
    print(
        f"{rows:>11,} pairs, {ledger.n_questions} questions: {seconds:7.1f} s of processor time, "
        f"{wall:.1f} s of wall time; peak {peak:.2f} GB, {start:.2f} GB of it before",
        flush=True,
    )


if __name__ == "__main__":
    main()
