"""The small study of LRT's schedules: same start, same data, sequential evaluation."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from sst_interp.approximation.flipflop import FlipFlop
from sst_interp.approximation.latent import ARMS, LatentPlan, run_latent_study, train_latent
from sst_interp.approximation.small import Arm, Plan, fresh_weights

SMALL = Plan(FlipFlop(positions=6), layers=2, d_model=16, pretraining=2, steps=4, batch=4, held_out=8)
PLAN = LatentPlan(SMALL)


def test_every_arm_is_evaluated_sequentially(tmp_path):
    found = run_latent_study(tmp_path, PLAN, seeds=(0,))
    assert len(found) == 2 * len(ARMS)
    pd.testing.assert_frame_equal(found, pd.read_parquet(tmp_path / "latent-losses.parquet"))
    by = found.set_index(["arm", "evaluated"])["loss"]
    for arm in ("exact", "no stream"):  # a memory that is off is off sequentially, too
        assert by[arm, "own"] == pytest.approx(by[arm, "sequential"], rel=1e-5)
    assert abs(by["multi-refine K=1", "own"] - by["multi-refine K=1", "sequential"]) > 1e-7
    assert by.nunique() > len(ARMS)


def test_chunks_of_one_position_train_what_the_exact_schedule_trains():
    weights = fresh_weights(SMALL, 0)
    exact, same = (
        train_latent(PLAN, weights, arm, 0)[0].kind.weights()
        for arm in (Arm("exact", "exact"), Arm("chunks of 1", "chunked", chunk=1))
    )
    other = train_latent(PLAN, weights, Arm("chunks", "chunked", chunk=3), 0)[0].kind.weights()
    for name, value in exact.items():
        torch.testing.assert_close(value, same[name], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(exact["gamma"], other["gamma"], rtol=1e-4)


def test_the_plan_reaches_the_model():
    plan = replace(PLAN, design=replace(PLAN.design, pathway="residual", source=0))
    model, seconds = train_latent(plan, fresh_weights(SMALL, 0), ARMS[1], 0)
    assert set(model.kind.weights()) == {"gamma"}
    assert model.kind.source == 0
    assert seconds > 0
