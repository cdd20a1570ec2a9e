"""ExactTraining models on flip-flop: their gradients and trainings on a tiny plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_studies import LRT, SMALL

from sst_interp.experiments.studies.fit import (
    EXACT,
    NO_MEMORY,
    NO_STREAM,
    NONE,
    TWO_PASS,
    Arm,
    Schedule,
    Training,
    score_labels,
)
from sst_interp.experiments.studies.flipflop import (
    LRT_ARMS,
    STREAM_ARMS,
    ExactTraining,
    LrtSchedules,
    compare_gradients,
    lrt_training,
    stream_training,
)
from sst_interp.experiments.studies.tasks import FlipFlop

WIDE = SMALL.blends[1]


def training(arm: Arm = TWO_PASS, seed: int = 0) -> Training:
    return stream_training(SMALL, SMALL.weights(seed), arm, WIDE, seed, SMALL.steps)


def held_out_loss(one: Training, how: Schedule) -> float:
    return score_labels(one.model, SMALL.task, SMALL.held_out, how)["loss"].sum()


def test_the_label_is_the_value_set_last():
    task = FlipFlop(positions=20, values=3)
    tokens, labels = task.draw(50, seed=1)
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row[0] < 3
        for t in range(20):
            last = max(k for k in range(t + 1) if row[k] < 3)
            assert label[t] == row[last]
    distance = task.distance(tokens)
    assert (distance[tokens < 3] == 0).all()
    assert (distance[tokens >= 3] > 0).all()
    assert tokens.max() < task.vocabulary
    assert torch.equal(task.draw(50, seed=1)[0], tokens)
    assert not torch.equal(task.draw(50, seed=2)[0], tokens)


def test_as_many_sweeps_as_positions_have_the_exact_gradient():
    one = training()
    exact = one.gradient(EXACT.schedule)
    for groups in (1, 2):
        enough = one.gradient(Schedule(sweeps=SMALL.task.positions, groups=groups))
        for part in ("weights", "alpha"):
            assert torch.allclose(enough[part], exact[part], rtol=1e-3, atol=1e-6), (groups, part)


def test_more_sweeps_are_nearer_to_the_exact_gradient():
    rows = compare_gradients(training(), [*STREAM_ARMS, Arm("again", EXACT.schedule)])
    cosine = rows.set_index(["arm", "part"])["cosine"]
    for part in ("weights", "alpha"):
        assert cosine["again", part] == pytest.approx(1, abs=1e-6)
        assert cosine["two-pass", part] < cosine["4 sweeps", part] < 1
        assert cosine["two-pass", part] < 0.9999


def test_comparing_gradients_changes_nothing():
    looked, plain = training(), training()
    for _ in range(2):
        compare_gradients(looked, [TWO_PASS, STREAM_ARMS[3]])
        assert looked.step() == plain.step()
    for a, b in zip(looked.masters.values.values(), plain.masters.values.values(), strict=True):
        assert torch.equal(a, b)


def test_every_arm_of_a_seed_starts_from_the_same_model_and_sees_the_same_data():
    exact, two = training(EXACT), training(TWO_PASS)
    assert held_out_loss(exact, EXACT.schedule) == held_out_loss(two, EXACT.schedule)
    assert torch.equal(exact.draw(0).tokens, two.draw(0).tokens)
    assert not torch.equal(training(seed=1).draw(0).tokens, two.draw(0).tokens)


def test_alpha_stays_between_its_bounds_and_is_none_without_a_stream():
    one, plain = training(), training(NO_STREAM)
    one.finish()
    alpha = one.model.kind.weights()["alpha"]
    assert 0.015 < float(alpha.min()) <= float(alpha.max()) < 0.5
    plain.step()
    assert not plain.model.kind.weights()["alpha"].any()
    assert held_out_loss(plain, EXACT.schedule) == pytest.approx(held_out_loss(plain, NONE), rel=1e-5)


def test_an_evaluation_counts_every_label_once():
    rows = score_labels(training().model, SMALL.task, SMALL.held_out, EXACT.schedule)
    assert rows["labels"].sum() == SMALL.held_out * SMALL.task.positions
    assert rows["correct"].between(0, rows["labels"]).all()


def test_losses_and_gradients_are_measured_along_a_training(tmp_path):
    rows = ExactTraining(SMALL, (EXACT, TWO_PASS, NO_STREAM), rounds=0).run(tmp_path, seeds=[0])
    losses, gradients = rows["losses"], rows["gradients"]
    assert set(losses["step"]) == {0, 1, 2, 3, 4}
    assert set(losses["evaluated"]) == {"exact", "own", "depth 4"}
    assert set(gradients["step"]) == {0, 2}
    assert set(gradients["part"]) == {"weights", "alpha"}
    assert set(gradients["arm"]) == {"two-pass"}
    assert np.isfinite(gradients[["cosine", "norm_ratio"]]).all().all()
    plain = losses[losses["arm"] == NO_STREAM.name].groupby("alpha_high")["loss"].sum()
    assert len(plain) == 2  # trained once, and the same in both settings
    assert plain.nunique() == 1


def test_an_attention_window_hides_what_lies_before_it():
    far = replace(SMALL, window=SMALL.task.positions)
    assert far.weights(0).config.sliding_window == 6
    assert SMALL.weights(0).config.sliding_window == 2


def test_every_schedule_is_evaluated_token_by_token(tmp_path):
    rows = LrtSchedules(LRT, rounds=0).run(tmp_path, seeds=(0,))["losses"]
    sums = rows.groupby(["arm", "evaluated"])[["labels", "loss"]].sum()
    assert len(sums) == 2 * len(LRT_ARMS)
    assert sums["labels"].eq(SMALL.held_out * SMALL.task.positions).all()
    by = sums["loss"]
    for arm in ("exact", "no memory"):  # a memory that is off is off sequentially, too
        assert by[arm, "own"] == pytest.approx(by[arm, "sequential"], rel=1e-5)
    assert abs(by["multi-refine K=1", "own"] - by["multi-refine K=1", "sequential"]) > 1e-5
    assert by.round(6).nunique() > len(LRT_ARMS)


def test_chunks_of_one_position_train_what_the_exact_schedule_trains():
    weights = SMALL.weights(0)
    exact, same, other = (
        lrt_training(LRT, weights, Arm("one", how), 0).finish().kind.weights()
        for how in (Schedule("sequential"), Schedule("chunked", chunk=1), Schedule("chunked", chunk=3))
    )
    for name, value in exact.items():
        torch.testing.assert_close(value, same[name], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(exact["gamma"], other["gamma"], rtol=1e-4)


def test_the_plan_reaches_the_model():
    plan = replace(LRT, design=replace(LRT.design, pathway="residual", source=0))
    model = lrt_training(plan, SMALL.weights(0), LRT_ARMS[1], 0).finish()
    assert set(model.kind.weights()) == {"gamma"}
    assert model.kind.source == 0
    assert lrt_training(plan, SMALL.weights(0), NO_MEMORY, 0).finish().kind.off
