"""Planted passes: states that settle, that reach a floor, that drift and that turn are told apart."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from synthetic import contrast

from sst_interp.analyses.settling import state_settling
from sst_interp.errors import Untestable

ITERATIONS = 12


def pairs_of(path, questions=12, seed=0):
    """A `pairs` table in which a state is the number `path(iteration)`, with a little noise per cell."""
    rng, rows = np.random.default_rng(seed), []
    for question in range(questions):
        for cell in range(6):
            at = [path(i) * (1 + 0.01 * rng.standard_normal()) for i in range(1, ITERATIONS + 1)]
            wanted = {(1, b) for b in range(2, ITERATIONS + 1)} | {(a, a + 1) for a in range(1, ITERATIONS)}
            rows += [
                {"question": question, "comparison": "within", "position": cell, "layer": 0, "a": a, "b": b,
                 "relative_l2": abs(at[b - 1] - at[a - 1])}
                for a, b in sorted(wanted)
            ]  # fmt: skip
    return pd.DataFrame(rows)


def found_in(pairs, **beside):
    return state_settling(contrast(pairs, "within", resamples=200, beside=beside))


def test_steps_that_shrink_settle_at_their_pace():
    rows = pairs_of(lambda i: 1.0)
    steps = 0.5 ** np.arange(1, ITERATIONS)
    where = np.concatenate([[0], np.cumsum(steps)])
    rows["relative_l2"] = np.abs(where[rows["b"] - 1] - where[rows["a"] - 1])
    found = found_in(rows)
    assert found.kind == "settles"
    assert found.pace.estimate == pytest.approx(0.5)
    assert found.turns.estimate == 0
    assert found.verdict.startswith("The state settles")
    assert found.table["travelled"].is_monotonic_increasing


def test_a_floor_is_not_taken_for_a_drift():
    rng = np.random.default_rng(1)
    rows = pairs_of(lambda i: 1.0)
    steps = 0.2 ** np.arange(1, ITERATIONS) + 0.002
    rows["relative_l2"] = np.where(
        rows["b"] == rows["a"] + 1, steps[rows["a"] - 1], 0.4 + 0.001 * rng.standard_normal(len(rows))
    )
    found = found_in(rows)
    assert found.kind == "has settled"
    assert "floor" in found.verdict
    assert "turns" not in found.verdict


def test_steps_that_grow_drift():
    rows = pairs_of(lambda i: 1.1**i)
    rows["relative_l2"] = np.abs(1.1 ** rows["b"] - 1.1 ** rows["a"])
    found = found_in(rows)
    assert found.kind == "drifts"
    assert found.pace.estimate == pytest.approx(1.1)


def test_a_cycle_turns():
    rows = pairs_of(lambda i: 1.0)
    way = np.array([0.0 if i % 2 == 0 else 1.0 + 0.001 * i for i in range(ITERATIONS)])
    rows["relative_l2"] = np.abs(way[rows["b"] - 1] - way[rows["a"] - 1]) + 1e-6
    found = found_in(rows)
    assert found.turns.low >= 1
    assert "The way from iteration 1 turns" in found.verdict


def test_a_run_with_more_iterations_is_asked_instead():
    few, many = pairs_of(lambda i: 1.0 / i), pairs_of(lambda i: 1.1**i, questions=7)
    assert found_in(few[few["b"] <= 6], beyond=SimpleNamespace(pairs=many)).n_questions == 7
    assert found_in(few, beyond=SimpleNamespace(pairs=many[:0])).n_questions == 12


def test_what_cannot_be_tested_says_why():
    rows = pairs_of(lambda i: 1.0 / i)
    without_way = rows[(rows["a"] != 1) | (rows["b"] == 2)]
    for pairs, why in (
        (rows[rows["b"] <= 3], "3 steps"),
        (rows.iloc[:0], "no pairs of comparison 'within'"),
        (without_way, r"\(1, 3\) was not captured"),
        (rows.assign(relative_l2=0.0), "no question's state changes"),
    ):
        with pytest.raises(Untestable, match=why):
            found_in(pairs)
