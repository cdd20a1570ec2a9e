"""An LRT's schedules: trainings, comparisons with sequential unrolling, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_lrt import lrt
from test_schedules import batch
from typer.testing import CliRunner

from sst_interp import places
from sst_interp.analyses.latent_equivalence import latent_equivalence
from sst_interp.analyses.latent_training import latent_training
from sst_interp.approximation.flipflop import FlipFlop
from sst_interp.approximation.small import Arm, Plan, fresh_weights
from sst_interp.documents import NOT_YET, fill
from sst_interp.errors import SSTError
from sst_interp.latent import commands, named, schedules
from sst_interp.latent.equivalence import SCHEDULES, Schedule, Text, compare_schedules
from sst_interp.latent.memories import random_memory
from sst_interp.latent.named import equivalence_by_name
from sst_interp.latent.schedules import run_schedules, step_times
from sst_interp.latent.small import ARMS, NO_MEMORY, LatentPlan, train_latent
from sst_interp.latent.tables import all_tables
from sst_interp.training.objective import answer_loss, mean_over_passes

SMALL = Plan(FlipFlop(positions=6), layers=2, d_model=16, pretraining=2, steps=4, batch=4, held_out=8)
PLAN = LatentPlan(SMALL)
T = 8
DOCUMENT = Path(__file__).parents[1] / "docs" / "lrt.md"


def text_and_model():
    """A tiny float64 LRT with random weights, a text of 8 tokens, and some of the backbone's weights."""
    model = lrt(size=0.05)
    data = replace(batch(), tokens=batch().tokens[:1], answer=batch().answer[:1])
    layer = model.backbone.layers[0]
    weights = {"down": layer.ffn.down_proj.weight, "k": layer.attention.k_proj.weight}
    text = Text(
        "one", data.tokens, lambda last: answer_loss(model, data, last),
        lambda passes: mean_over_passes(model, data, passes),
    )  # fmt: skip
    return model, text, weights


# Trainings


def test_every_arm_is_evaluated_sequentially(tmp_path):
    found = run_schedules(tmp_path, PLAN, seeds=(0,), rounds=0)["losses"]
    sums = found.groupby(["arm", "evaluated"])[["labels", "loss"]].sum()
    assert len(sums) == 2 * len(ARMS)
    assert sums["labels"].eq(SMALL.held_out * SMALL.task.positions).all()
    by = sums["loss"]
    for arm in ("exact", "no memory"):  # a memory that is off is off sequentially, too
        assert by[arm, "own"] == pytest.approx(by[arm, "sequential"], rel=1e-5)
    assert abs(by["multi-refine K=1", "own"] - by["multi-refine K=1", "sequential"]) > 1e-5
    assert by.round(6).nunique() > len(ARMS)


def test_chunks_of_one_position_train_what_the_exact_schedule_trains():
    weights = fresh_weights(SMALL, 0)
    exact, same = (
        train_latent(PLAN, weights, arm, 0).kind.weights()
        for arm in (Arm("exact", "sequential"), Arm("chunks of 1", "chunked", chunk=1))
    )
    other = train_latent(PLAN, weights, Arm("chunks", "chunked", chunk=3), 0).kind.weights()
    for name, value in exact.items():
        torch.testing.assert_close(value, same[name], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(exact["gamma"], other["gamma"], rtol=1e-4)


def test_the_plan_reaches_the_model():
    plan = replace(PLAN, design=replace(PLAN.design, pathway="residual", source=0))
    model = train_latent(plan, fresh_weights(SMALL, 0), ARMS[1], 0)
    assert set(model.kind.weights()) == {"gamma"}
    assert model.kind.source == 0
    assert train_latent(plan, fresh_weights(SMALL, 0), NO_MEMORY, 0).kind.off


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    arms = (ARMS[0], ARMS[1], NO_MEMORY)
    whole = run_schedules(tmp_path / "whole", PLAN, (0, 1), arms, rounds=1)
    put, calls = schedules.put_rows, []

    def broken(path, rows, keys):
        calls.append(path)
        if len(calls) == 4:  # between the two evaluations of one training
            raise KeyboardInterrupt
        put(path, rows, keys)

    monkeypatch.setattr(schedules, "put_rows", broken)
    with pytest.raises(KeyboardInterrupt):
        run_schedules(tmp_path / "cut", PLAN, (0, 1), arms, rounds=1)
    lines = []
    resumed = run_schedules(tmp_path / "cut", PLAN, (0, 1), arms, rounds=1, progress=lines.append)
    assert len(lines) == 5
    by = ["seed", "arm", "evaluated", "distance"]
    a, b = (t["losses"].sort_values(by).reset_index(drop=True) for t in (whole, resumed))
    pd.testing.assert_frame_equal(a, b)
    again = run_schedules(tmp_path / "cut", PLAN, (0, 1), arms, rounds=1, progress=lines.append)
    assert len(lines) == 5
    assert again["times"].equals(resumed["times"])
    with pytest.raises(SSTError, match=r"memory_learning_rate = 0\.005, not 0\.1"):
        run_schedules(tmp_path / "cut", replace(PLAN, memory_learning_rate=0.1), (0,), arms)


def test_times_are_of_every_arm_in_every_round():
    times = step_times(PLAN, ARMS[:2], rounds=3)
    assert times.groupby("arm")["round"].apply(list).to_dict() == {a.name: [0, 1, 2] for a in ARMS[:2]}
    assert (times["seconds"] > 0).all()


# Equivalence


def test_as_many_groups_or_sweeps_as_positions_are_sequential_unrolling():
    model, text, weights = text_and_model()
    found = compare_schedules(model, text, weights, [Schedule("interleaved", T), Schedule("multi_refine", T)])
    assert (found.states["relative"] < 1e-9).all()
    newest = found.gradients[found.gradients["of"] == "newest outputs"]
    assert set(newest["part"]) == {"weights", "memory", *model.kind.weights()}
    np.testing.assert_allclose(newest["loss"], newest["loss_exact"], rtol=1e-9)
    np.testing.assert_allclose(newest[["cosine", "norm_ratio"]], 1, atol=1e-5)
    every = found.gradients[found.gradients["of"] == "every pass"]  # has the pass without a memory in it
    assert (every["norm_ratio"] - 1).abs().min() > 1e-3


def test_fewer_are_not_and_one_group_is_one_sweep():
    model, text, weights = text_and_model()
    found = compare_schedules(model, text, weights, SCHEDULES[:-1])
    by = found.states.groupby(["method", "n"])[["error2", "norm2"]].sum()
    error = np.sqrt(by["error2"] / by["norm2"])
    assert error["interleaved", 1] == pytest.approx(error["multi_refine", 1], rel=1e-9)
    assert error["multi_refine", 1] > error["multi_refine", 2] > error["multi_refine", 3] > 1e-6
    assert error["interleaved", 8] < 1e-9  # T = 8
    first = found.states[found.states["position"] == 0]
    assert (first["relative"] < 1e-12).all()  # a first position has no memory under any schedule
    newest = found.gradients[(found.gradients["of"] == "newest outputs") & (found.gradients["n"] < T)]
    assert newest["cosine"].max() <= 1 + 1e-9
    assert (1 - newest["cosine"]).max() > 1e-3


def test_comparing_changes_nothing_and_leaves_out_what_cannot_be():
    model, text, weights = text_and_model()
    before, kind = {n: w.clone() for n, w in model.kind.weights().items()}, model.kind
    found = compare_schedules(model, text, weights, [Schedule("interleaved", 2), Schedule("interleaved", 9)])
    assert set(found.states["n"]) == {2}
    assert model.kind is kind
    assert all(torch.equal(w, model.kind.weights()[n]) for n, w in before.items())
    assert all(w.grad is None for w in weights.values())


def test_a_random_memory_has_the_size_it_is_said_to_have():
    model = lrt()
    kind = random_memory(model, 0.05)
    weights = kind.weights()
    assert (weights["gamma"] == 0.05).all()
    m = torch.randn(500, model.backbone.d_model, dtype=torch.float64)
    for name in ("key", "value"):
        fed = m @ weights[name].flatten(0, 1).T
        assert 0.03 < float(fed.std() / m.std()) < 0.08
    assert random_memory(model, 0.05).digest() == kind.digest() != random_memory(model, 0.05, seed=1).digest()
    with pytest.raises(SSTError, match="size = 0 of a random memory"):
        random_memory(model, 0)


def test_equivalence_goes_on_by_question_and_refuses_another_model(tmp_path, monkeypatch):
    asked = SCHEDULES[:2]
    found = equivalence_by_name("small", tmp_path, 1, schedules=asked, plan=PLAN)
    calls, compare = [], named.compare_schedules
    monkeypatch.setattr(named, "compare_schedules", lambda *a: calls.append(a[1].id) or compare(*a))
    again = equivalence_by_name("small", tmp_path, 2, schedules=asked, plan=PLAN)
    assert calls == ["sequence 1"] * 2  # the exactly and the interleaved trained model
    pd.testing.assert_frame_equal(again["states"].iloc[: len(found["states"])], found["states"])
    assert again["gradients"].groupby(["memory", "id"]).ngroups == 4
    longer = replace(PLAN, small=replace(SMALL, steps=5))
    with pytest.raises(SSTError, match="equivalence of another 'small'"):
        equivalence_by_name("small", tmp_path, 1, schedules=asked, plan=longer)


def test_a_name_without_a_memory_is_one_line(tmp_path):
    with pytest.raises(SSTError, match="is a State Stream Transformer, not a Latent Recurrent Transformer"):
        equivalence_by_name("smollm2-135m-sst", tmp_path)
    with pytest.raises(SSTError, match="has no memory"):
        equivalence_by_name("smollm2-135m", tmp_path, sizes=())


# What is made of the tables


def planted_equivalence(error: float, cosine: float, questions: int = 6, seed: int = 0):
    """Tables in which every question has about this error and cosine, with some spread."""
    rng = np.random.default_rng(seed)
    states, gradients = [], []
    for q in range(questions):
        for schedule in SCHEDULES[:4]:
            about = {
                "model": "m",
                "memory": "trained",
                "id": str(q),
                "method": schedule.method,
                "n": schedule.n,
            }
            for position, n in ((0, 1), (1, 1), (2, 2)):
                norm2 = rng.uniform(50, 100)
                e2 = norm2 * (error * rng.uniform(0.9, 1.1)) ** 2
                states.append(about | {"position": position, "positions": n, "error2": e2, "norm2": norm2})
            for of in ("newest outputs", "every pass"):
                for part in ("weights", "memory"):
                    value = {"cosine": cosine + rng.normal(0, 0.001), "norm_ratio": 0.5}
                    losses = {"loss": 1 + error, "loss_exact": 1.0}
                    gradients.append(about | {"of": of, "part": part} | value | losses)
    return pd.DataFrame(states), pd.DataFrame(gradients)


def test_a_planted_error_is_found_within_its_interval():
    found = latent_equivalence(*planted_equivalence(0.2, 0.8))
    row = found.table.iloc[1]
    assert row["state_low"] < 0.2 < row["state_high"]
    assert row["weights_cosine_low"] < 0.8 < row["memory_cosine_high"]
    assert row["loss_change"] == pytest.approx(0.2)
    assert "no schedule measured is within 1%" in found.verdict
    assert "6 questions" in found.verdict
    same = latent_equivalence(*planted_equivalence(0.001, 0.9999)).verdict
    assert "in the direction of gradients too: interleaved S = 1" in same
    assert latent_equivalence(*planted_equivalence(0.001, 0.7)).verdict.endswith("gradients too: none.")


def test_order_changes_nothing_one_question_has_no_interval_and_nothing_is_said():
    states, gradients = planted_equivalence(0.2, 0.8)
    mixed = [t.sample(frac=1, random_state=1) for t in (states, gradients)]
    a, b = (latent_equivalence(*t).table.sort_values("n") for t in ((states, gradients), mixed))
    np.testing.assert_allclose(a["state"], b["state"])
    np.testing.assert_allclose(a["state_low"], b["state_low"], rtol=0.05)
    one = latent_equivalence(states[states["id"] == "0"], gradients[gradients["id"] == "0"])
    assert one.table["state"].notna().all()
    assert one.table["state_low"].isna().all()
    assert latent_equivalence(pd.DataFrame(), pd.DataFrame()).verdict.startswith("not testable:")
    broken = gradients.assign(loss=gradients["loss"].where(gradients["id"] != "0", np.nan))
    assert latent_equivalence(states, broken).table["questions"].eq(5).all()
    for result in (latent_equivalence(states, gradients), latent_equivalence(pd.DataFrame(), pd.DataFrame())):
        assert all(figure.layout.title.text for figure in result.figures().values())


def planted_losses(seeds: int = 5, costs: float = 0.1, spread: float = 0.01, seed: int = 0) -> pd.DataFrame:
    """Sums over 100 labels: exact training ends at 0.2, interleaved `costs` behind, no memory at 0.5."""
    rng, rows = np.random.default_rng(seed), []
    for s in range(seeds):
        level = rng.normal(0, 0.05)
        for arm, loss in (("exact", 0.2), ("interleaved S=2", 0.2 + costs), ("no memory", 0.5)):
            final = loss + level + (rng.normal(0, spread) if arm != "exact" else 0)
            for how, gap in (("sequential", 0), ("own", 0.05 if "inter" in arm else 0)):
                about = {"seed": s, "arm": arm, "evaluated": how, "distance": 0, "labels": 100.0}
                rows.append(about | {"loss": 100 * (final - gap), "correct": 80.0})
    return pd.DataFrame(rows)


def test_a_planted_cost_is_found_and_none_is_not_called_one():
    found = latent_training(planted_losses())
    row = found.table.set_index("arm").loc["interleaved S=2"]
    assert row["behind_low"] < 0.1 < row["behind_high"]
    assert row["gap"] == pytest.approx(0.05)
    assert "(it costs)" in found.verdict
    assert "5 seeds" in found.verdict
    said = ["no cost is shown" in latent_training(planted_losses(costs=0, seed=k)).verdict for k in range(60)]
    assert 0.85 < np.mean(said) <= 1
    worse = latent_training(planted_losses(costs=0.5)).verdict
    assert "Worse than no memory at all, read sequentially: interleaved S=2" in worse


def test_seeds_are_paired_one_has_no_interval_and_missing_ones_are_said():
    losses = planted_losses()
    numbered = losses.assign(seed=losses["seed"] * 7 + 3).sample(frac=1, random_state=0)
    a, b = (latent_training(t).table.set_index("arm").sort_index() for t in (losses, numbered))
    pd.testing.assert_frame_equal(a, b)
    one = latent_training(losses[losses["seed"] == 0])
    assert one.table["loss_low"].isna().all()
    assert "one seed" in one.verdict
    assert "not testable" in latent_training(losses[losses["arm"] != "exact"]).verdict
    assert latent_training(pd.DataFrame()).verdict.startswith("not testable:")
    diverged = losses.assign(
        loss=losses["loss"].where((losses["seed"] > 0) | (losses["arm"] != "exact"), np.nan)
    )
    assert latent_training(diverged).table.set_index("arm")["seeds"].to_dict()["exact"] == 4
    for result in (latent_training(losses), latent_training(pd.DataFrame())):
        assert all(figure.layout.title.text for figure in result.figures().values())


def test_step_times_are_ratios_within_a_round():
    times = pd.DataFrame(
        [
            {"round": r, "arm": arm, "seconds": load * s}
            for r, load in enumerate((1, 5, 2))
            for arm, s in (("exact", 8.0), ("no memory", 2.0))
        ]
    )
    assert latent_training(planted_losses(), times).table.set_index("arm")["ratio"]["exact"] == pytest.approx(
        4
    )


def test_the_tables_of_a_document_are_written_and_others_left_alone(tmp_path):
    assert set(all_tables(tmp_path).values()) >= {NOT_YET}
    path = tmp_path / "lrt.md"
    path.write_text(
        "before\n<!-- latent training -->\nold\n<!-- end of latent training -->\n"
        "<!-- another's -->\nkept\n<!-- end of another's -->\n"
    )
    planted_losses().to_parquet(tmp_path / "latent-losses.parquet")
    assert fill(path, all_tables(tmp_path), others=True) == ["latent training"]
    text = path.read_text()
    assert "old" not in text
    assert "| interleaved S=2 |" in text
    assert "kept" in text


def test_the_shipped_tables_are_whole_and_the_command_shows_them():
    runner = CliRunner()
    shown = runner.invoke(commands.app, ["show", "--studies", str(places.shipped("studies"))])
    assert shown.exit_code == 0, shown.output
    assert NOT_YET not in shown.output
    assert "not testable" not in shown.output
    tables = all_tables(places.shipped("studies"))
    for name, text in tables.items():
        assert f"## {name}" in shown.output
        assert text in DOCUMENT.read_text(), f"sst-interp latent document {DOCUMENT} --studies data/studies"


def test_sizes_that_are_no_numbers_are_one_line():
    with pytest.raises(SSTError, match="sizes 'a,b' are not numbers"):
        CliRunner().invoke(
            commands.app, ["equivalence", "smollm2-135m", "--sizes", "a,b"], catch_exceptions=False
        )
