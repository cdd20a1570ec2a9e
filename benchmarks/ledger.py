"""What the claims ledger costs, and how that grows: all analyses with 2,000 resamples on synthetic runs.

    python benchmarks/ledger.py               # 1, 3, 10 and 30 million pairs; half an hour of one core
    python benchmarks/ledger.py --pairs 1e6   # one size
    python benchmarks/ledger.py --run gpqa    # a captured run

Every size has a process of its own: processor time, wall time and the peak of its memory above what it takes
to hold the tables are printed. 30 million pairs are Gemma-3-27B (62 layers) on 198 questions at four depths.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

LAYERS, QUESTIONS, TYPES = 62, 198, 11


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--pairs", type=float, help="rows of the pairs table of one synthetic run")
    options.add_argument("--run", help="a captured run instead")
    chosen = options.parse_args()
    if chosen.pairs is None and chosen.run is None:
        for pairs in (1e6, 3e6, 1e7, 3e7):
            subprocess.run([sys.executable, __file__, "--pairs", str(pairs)], check=True)
        return
    captured = _captured(chosen.run) if chosen.run else _synthetic(chosen.pairs)
    _measure(captured, chosen.run is not None)


def _captured(name: str):
    from sst_interp.runs.store import open_run

    return open_run(name)


def _synthetic(pairs: float):
    """A run of `QUESTIONS` questions and `LAYERS` layers with about so many pairs."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import numpy as np
    import pandas as pd
    from synthetic import synthetic_run
    from synthetic_outputs import outputs_table, questions_table, steps_table

    positions = max(2, round(pairs / (LAYERS * QUESTIONS * TYPES)))
    run = synthetic_run(questions=QUESTIONS, positions=positions, layers=LAYERS, depths=(2, 3, 4))
    within = run.pairs[(run.pairs["comparison"] == "within") & (run.pairs["b"] > 2)]
    more = within.assign(a=(within["b"] - 1).astype("int8"))
    run.pairs = pd.concat([run.pairs, more], ignore_index=True)
    run.outputs = outputs_table(run.pairs)
    run.steps = steps_table(run.outputs, (1, 2, 3, 4))
    right = np.random.default_rng(0).random((QUESTIONS, 4)) < [0.51, 0.48, 0.45, 0.43]
    run.questions = questions_table(right)
    return run


def _measure(run, by_name: bool) -> None:
    from sst_interp.findings.ledger import claims
    from sst_interp.findings.of_run import ledger_of

    tables = [run.pairs, run.outputs, run.steps, run.questions]
    held = sum(table.memory_usage(deep=True).sum() for table in tables) / 1e9
    before, wall = time.process_time(), time.perf_counter()
    ledger = ledger_of(run) if by_name else claims(run)
    seconds, wall = time.process_time() - before, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if ledger.failed:
        raise SystemExit(f"failed: {ledger.failed}")
    print(
        f"{len(run.pairs):>11,} pairs, {ledger.n_questions} questions: {seconds:7.1f} s of processor "
        f"({1e6 * seconds / len(run.pairs):.2f} us a pair), {wall:.1f} s of wall time; peak {peak:.2f} GB, "
        f"of which tables {held:.2f} GB",
        flush=True,
    )


if __name__ == "__main__":
    main()
