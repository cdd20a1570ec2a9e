"""Routing: what a policy gets right, what it costs, and what it knows beyond dealing depths at random."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic_outputs import questions_table

from sst_interp.errors import Untestable
from sst_interp.experiments.probe.routing import ORACLE, PROBE, THRESHOLDS, routing, traces
from sst_interp.models.halting import Convergence


def correct(n=120, seed=0):
    """A third is broken by depth 4, a third mended, the rest right or wrong throughout."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    base = np.where(kind == 0, True, np.where(kind == 1, False, rng.random(n) < 0.5))
    deep = np.where(kind == 0, False, np.where(kind == 1, True, base))
    return kind, np.stack([base, deep], 1)


def probe(scores, label="must-halt", action="halt", questions=None):
    """What routing needs of a halting result."""
    index = np.arange(len(scores)) if questions is None else questions
    table = pd.DataFrame({"question": index, "score": scores})
    return SimpleNamespace(scores=table, label=label, action=action, iteration=1)


def found(scores=None, right=None, **options):
    pattern = correct()[1]
    table = questions_table(pattern if right is None else right, (1, 4))
    p = None if scores is None else probe(np.asarray(scores, float))
    return routing(table, probe=p, resamples=300, **options)


def steps_of(numbers, deepest=4):
    """`steps` rows of the entropy at position 0 [iteration, question]."""
    i, q = (g.ravel() for g in np.indices(numbers.shape))
    rows = {"question": q, "text": "own", "depth": deepest, "position": 0, "iteration": i + 1}
    return pd.DataFrame(rows | {"entropy": numbers.ravel()})


def changes(numbers, column):
    """`within` rows at position 0 [iteration from 2 on, question], and rows that are none of a rule's
    business.
    """
    i, q = (g.ravel() for g in np.indices(numbers.shape))
    rows = pd.DataFrame({"question": q, "comparison": "within", "position": 0, "a": i + 1, "b": i + 2})
    rows[column] = numbers.ravel()
    other = [rows.assign(position=1), rows.assign(a=1, b=9), rows.assign(comparison="free_running")]
    return pd.concat([rows, *(o.assign(**{column: -1.0}) for o in other)], ignore_index=True)


def test_a_probe_that_knows_breaks_nothing_and_mends_all():
    kind, pattern = correct()
    result = found(np.where(kind == 0, 1.0, -1.0))
    row = result.row(PROBE)
    assert row["accuracy"] == pattern.any(1).mean() == result.row(ORACLE)["accuracy"]
    assert row["broken"] == 0
    assert row["broken_share_low"] == 0 < row["broken_share_high"] < 0.1
    assert row["mended"] == (kind == 1).sum()
    assert row["conservative"] == 0
    assert row["beyond"] > 0.2
    assert row["beyond_low"] > 0
    assert result.verdict.startswith("The must-halt probe beats depths dealt at random. 120 questions. ")


def test_a_probe_that_knows_nothing_has_nothing_over_dealing_depths_at_random():
    inside = 0
    for seed in range(20):
        rng = np.random.default_rng([seed, 1])
        row = found(rng.normal(size=120), correct(seed=seed)[1]).row(PROBE)
        inside += row["beyond_low"] <= 0 <= row["beyond_high"]
    assert inside >= 16  # 95% nominal, 20 trials; fewer has probability 0.3%


def test_passes_broken_and_saved_by_hand():
    right = np.array([[True, False], [True, True], [False, True], [False, False]])
    table = questions_table(right, (1, 4)).assign(tokens=[10, 20, 10, 20, 10, 20, 10, 20])
    result = routing(table, probe=probe([1.0, -1.0, 1.0, -1.0]), resamples=100)
    row = result.row(PROBE)  # depths 1, 4, 1, 4; one look each
    assert row["passes"] == pytest.approx((11 + 81 + 11 + 81) / 4)
    assert row["saved"] == pytest.approx(1 - (11 + 81 + 11 + 81) / (4 * 80))
    assert (row["broken"], row["mended"], row["conservative"]) == (0, 0, 1)
    flat = result.row("flat depth 4 (never-halt)")
    assert (flat["passes"], flat["saved"], flat["broken"], flat["mended"]) == (80, 0, 1, 1)
    shallow = result.row("flat depth 1 (always-halt)")
    assert (shallow["passes"], shallow["broken"], shallow["conservative"]) == (10, 0, 1)
    oracle = result.row(ORACLE)
    assert (oracle["accuracy"], oracle["passes"]) == (0.75, (10 + 10 + 80 + 10) / 4)
    assert result.of_question[PROBE].tolist() == [1, 4, 1, 4]


def test_a_probe_to_iterate_is_read_the_other_way_round():
    kind, _ = correct()
    scores = np.where(kind == 1, 1.0, -1.0)
    table = questions_table(correct()[1], (1, 4))
    result = routing(table, probe=probe(scores, "helped", "iterate"), resamples=50)
    assert result.row(PROBE)["broken"] == 0
    assert (result.of_question[PROBE] == np.where(kind == 1, 4, 1)).all()


def test_flat_depths_and_the_oracle_frame_every_policy():
    pattern = correct()[1]
    rng = np.random.default_rng(3)
    result = found(rng.normal(size=120), steps=steps_of(rng.random((4, 120))))
    table = result.policies.set_index("name")
    assert table.loc["flat depth 1 (always-halt)", "accuracy"] == pattern[:, 0].mean()
    assert table.loc["flat depth 4 (never-halt)", "accuracy"] == pattern[:, 1].mean()
    assert (table["accuracy"] <= table.loc[ORACLE, "accuracy"]).all()
    assert (table[table["kind"] == "flat"]["beyond"].abs() < 1e-9).all()
    assert result.curve["accuracy"].between(0, table.loc[ORACLE, "accuracy"]).all()
    at_zero = result.curve[result.curve["threshold"] <= 0].iloc[-1]
    assert at_zero["accuracy"] == result.row(PROBE)["accuracy"]


def test_a_rule_learns_its_threshold_on_other_questions():
    kind, _ = correct()
    rng = np.random.default_rng(0)
    knows = np.where(kind == 0, 0.2, 2.0) + 0.1 * rng.random((4, 120))
    result = found(steps=steps_of(knows))
    row = result.row("entropy")
    assert row["broken"] == 0
    assert row["beyond_low"] > 0
    accuracies = []
    for seed in range(12):
        rng = np.random.default_rng([seed, 5])
        here = found(right=correct(seed=seed)[1], steps=steps_of(rng.random((4, 120)))).row("entropy")
        accuracies.append(here["beyond"])
    # Picked on the questions themselves the best of 22 thresholds would gain several points on noise.
    assert np.mean(accuracies) == pytest.approx(0, abs=0.03)


def test_traces_are_the_numbers_a_policy_computes():
    rng = np.random.default_rng(0)
    entropy, kl, change = rng.random((4, 5)), rng.random((3, 5)), rng.random((3, 5))
    pairs = pd.concat([changes(change * s, "relative_l2").assign(layer=i) for i, s in enumerate((0.5, 1, 9))])
    order = np.array([10, 3, 7, 1, 0])
    tables = [
        t.assign(question=order[t["question"]]).sample(frac=1, random_state=1)
        for t in (steps_of(entropy), changes(kl, "kl"), pairs)
    ]
    seen = traces(order, 4, *tables)
    assert list(seen) == list(THRESHOLDS)
    assert np.allclose(seen["entropy"], entropy)
    assert np.allclose(seen["KL between iterations"], kl)
    assert np.allclose(seen["convergence of the state"], change)
    assert Convergence(2.0).first_below(torch.from_numpy(change)).tolist() == [2] * 5
    without = traces(np.array([10, 3, 99]), 4, *tables)
    assert without == {}


def test_a_depth_between_two_captured_ones_is_the_next():
    right = np.array([[True, False, False]] * 12)
    table = questions_table(right, (1, 2, 4))
    numbers = np.tile([[5.0], [5.0], [0.0], [5.0]], (1, 12))  # halts at 3: captured as 4
    result = routing(table, steps=steps_of(numbers), resamples=50)
    assert set(result.of_question["entropy"]) <= {1, 4}


def test_what_cannot_be_routed_is_said():
    pattern = correct()[1]
    assert found().no_probe == "none was given"
    partial = routing(questions_table(pattern, (1, 4)), probe=probe(np.ones(5)), resamples=50)
    assert "about some questions only" in partial.no_probe
    assert PROBE not in partial.policies["name"].to_numpy()
    assert partial.verdict.endswith(f"No probe: {partial.no_probe}.")
    for table, words in (
        (questions_table(pattern[:, :1], (1,)), "the run has one depth, 1"),
        (pd.DataFrame(), "empty"),
        (questions_table(pattern[:2], (1, 4))[1:3], "no question has a row at every depth"),
    ):
        with pytest.raises(Untestable, match=words) as error:
            routing(table)
        assert error.value.hint
    alone = routing(questions_table(pattern[:1], (1, 4)), probe=probe(np.ones(1)), resamples=50)
    assert "no interval: one question" in alone.verdict
    gap = routing(questions_table(pattern, (1, 4)).drop(index=[0]), probe=probe(np.ones(120)), resamples=50)
    assert (gap.n_excluded, gap.n_questions) == (1, 119)
    for result in (alone, gap, partial, found()):
        json.dumps(result.to_dict(), allow_nan=False)
        result.figures()
        assert "<h3>" in result._repr_html_()


def test_nan_in_a_table_leaves_its_rule_out():
    numbers = np.random.default_rng(0).random((4, 120))
    numbers[2, 7] = np.nan
    result = found(steps=steps_of(numbers))
    assert "entropy" in result.missing
    assert "entropy" not in result.policies["name"].to_numpy()


def test_order_of_rows_and_names_of_questions_change_nothing():
    pattern = correct()[1]
    table, scores = questions_table(pattern, (1, 4)), np.random.default_rng(0).normal(size=120)
    one = routing(table, probe=probe(scores), resamples=100)
    assert (
        routing(table.sample(frac=1, random_state=0), probe=probe(scores), resamples=100).verdict
        == one.verdict
    )
    moved = table.assign(question=table["question"] + 1000)
    other = routing(moved, probe=probe(scores, questions=np.arange(120) + 1000), resamples=100)
    assert other.verdict == one.verdict


def test_the_figure_says_questions_and_units():
    result = found(np.random.default_rng(0).normal(size=120))
    figure = result.figure()
    assert "120 questions" in figure.layout.title.subtitle.text
    assert "passes" in figure.layout.xaxis.title.text
    assert "share of questions" in figure.layout.yaxis.title.text
    names = " ".join(str(trace.name) for trace in figure.data)
    for words in ("flat depths", "oracle over depths (not a policy)", "policies, out of fold"):
        assert words in names
