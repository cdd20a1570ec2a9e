"""The halting probe: leave-one-out with permutations as one batched problem, and as a loop over scikit-learn.

    python benchmarks/probe.py                  # 198 questions x 576 dimensions, 1,000 permutations
    python benchmarks/probe.py --permutations 24 --pairs 3   # a part; the rest is extrapolated

The whole pipeline is timed: blocks, choice of dimensions and penalty inside each fold, and every fit. The
loop is what one would write without this: a scikit-learn `MLPClassifier` of the same size on the same
dimensions per fit, measured for a few of the fits. It is timed as it comes (up to 200 iterations; with fewer
than 200 questions each is one full batch) and held to as many iterations as ours take. Labels are random,
inputs are noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from timing import machine

from sst_interp.experiments.probe.fit import Design, Inputs
from sst_interp.experiments.probe.validate import permuted, score

QUESTIONS, DIMENSIONS, POSITIVE = 198, 576, 48
PERMUTATIONS = 1000
DEFAULT_ITERATIONS = 200


def fits_per_labelling(design: Design) -> int:
    """Final fits, and those the candidates are compared with."""
    extra = len(design.candidate_dims(DIMENSIONS)) + len(design.candidate_penalties) - 1
    return QUESTIONS + extra * design.blocks * (design.blocks - 1) // 2


def batched(design: Design, inputs: Inputs, labels: torch.Tensor) -> tuple[float, float]:
    """Wall and processor seconds of everything."""
    wall, cpu = time.perf_counter(), time.process_time()
    score(design, inputs, labels)
    return time.perf_counter() - wall, time.process_time() - cpu


def loop(x: np.ndarray, y: np.ndarray, k: int, fits: int, iterations: int) -> float:
    """Processor seconds of a few fits, dimensions ranked as the batched probe ranks them."""
    start = time.process_time()
    for i in range(fits):
        keep = np.arange(len(y)) != i
        own, label = x[keep], y[keep]
        z = (own - own.mean(0)) / own.std(0)
        gap = np.abs(z[label].mean(0) - z[~label].mean(0))
        dims = np.argsort(-gap)[:k]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            MLPClassifier((10,), max_iter=iterations, random_state=0).fit(z[:, dims], label)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS)
    parser.add_argument("--fits", type=int, default=10, help="scikit-learn fits to measure per round")
    parser.add_argument("--pairs", type=int, default=3, help="rounds: batched and loop in turn")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    x = rng.normal(size=(QUESTIONS, 1, DIMENSIONS)).astype(np.float32)
    positive = np.arange(QUESTIONS) < POSITIVE
    design, inputs = Design(), Inputs(torch.from_numpy(x))
    part = min(options.permutations, PERMUTATIONS)
    rounds = options.pairs if part < PERMUTATIONS else 1
    each = fits_per_labelling(design)
    print(f"{QUESTIONS} questions x {DIMENSIONS} dimensions, {each} fits per labelling; {machine()}")
    batched(design, inputs, permuted(positive, 1))
    ours, theirs, short, walls = [], [], [], []
    for seed in range(rounds):
        wall, cpu = batched(design, inputs, permuted(positive, part, seed))
        walls.append(wall)
        ours.append(cpu / (part * each))
        one = x[:, 0], positive, min(design.dims), options.fits
        theirs.append(loop(*one, DEFAULT_ITERATIONS) / options.fits)
        short.append(loop(*one, design.n_steps) / options.fits)
    note = "" if part == PERMUTATIONS else f" (extrapolated from {part})"
    own, alone = statistics.median(ours), statistics.median(theirs)
    wall, total = PERMUTATIONS * statistics.median(walls) / part, PERMUTATIONS * own * each
    print(f"  batched, {PERMUTATIONS:,} permutations{note}: {wall:.0f} s; {total:.0f} s of processor")
    print(f"  a fit: {1e3 * own:.3f} ms batched, {1e3 * alone:.1f} ms alone")
    hours, fits = alone * each * PERMUTATIONS / 3600, options.fits
    print(f"  the loop for everything: {hours:.1f} h of processor (extrapolated from {fits} fits a round)")
    for name, times in (("as it comes", theirs), (f"held to {design.n_steps} iterations", short)):
        ratios = [b / a for a, b in zip(ours, times, strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"  loop {name} / batched: {middle:.0f}x [{low:.0f}, {high:.0f}]")


if __name__ == "__main__":
    main()
