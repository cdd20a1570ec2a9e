"""The study of small models: gradients and trainings on a tiny plan, and tables with known answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from sst_interp.analyses.approximation_gradients import gradient_fidelity
from sst_interp.analyses.approximation_training import training_cost
from sst_interp.analyses.statistics.seeds import over_seeds
from sst_interp.approximation import study as study_module
from sst_interp.approximation.flipflop import FlipFlop
from sst_interp.approximation.small import (
    ARMS,
    BASELINE,
    EXACT,
    TWO_PASS,
    Arm,
    Blend,
    Plan,
    SmallTraining,
    evaluate,
    fresh_weights,
)
from sst_interp.approximation.study import compare_gradients, run_study, step_times, train_arm
from sst_interp.approximation.tables import all_tables
from sst_interp.documents import NOT_YET, fill, markdown
from sst_interp.errors import SSTError

TINY = Plan(
    task=FlipFlop(positions=6), layers=2, d_model=16, pretraining=2, steps=4, batch=4, every=2, held_out=8,
    blends=(Blend(0.015, 0.10, 0.05), Blend(0.015, 0.50, 0.3)),
)  # fmt: skip
WIDE = TINY.blends[1]


def training(arm: Arm = TWO_PASS, seed: int = 0) -> SmallTraining:
    return SmallTraining(TINY, fresh_weights(TINY, seed), arm, WIDE, seed, TINY.steps)


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
    exact = one.gradient(EXACT)
    for groups in (1, 2):
        enough = one.gradient(Arm("enough", "two_pass", sweeps=TINY.task.positions, groups=groups))
        for part in ("weights", "alpha"):
            assert torch.allclose(enough[part], exact[part], rtol=1e-3, atol=1e-6), (groups, part)


def test_more_sweeps_are_nearer_to_the_exact_gradient():
    rows = pd.DataFrame(compare_gradients(training(), [a for a in ARMS if a != BASELINE]))
    cosine = rows.set_index(["arm", "part"])["cosine"]
    for part in ("weights", "alpha"):
        assert cosine["exact", part] == pytest.approx(1, abs=1e-6)
        assert cosine["two-pass", part] < cosine["4 sweeps", part] < 1
        assert cosine["two-pass", part] < 0.9999


def test_comparing_gradients_changes_nothing():
    looked, plain = training(), training()
    for _ in range(2):
        compare_gradients(looked, [TWO_PASS, ARMS[3]])
        assert looked.step() == plain.step()
    for a, b in zip(looked.masters.values.values(), plain.masters.values.values(), strict=True):
        assert torch.equal(a, b)


def test_every_arm_of_a_seed_starts_from_the_same_model_and_sees_the_same_data():
    exact, two = training(EXACT), training(TWO_PASS)
    assert evaluate(exact.model, TINY, EXACT) == evaluate(two.model, TINY, EXACT)
    assert torch.equal(exact.data()[0], two.data()[0])
    assert not torch.equal(training(seed=1).data()[0], two.data()[0])


def test_alpha_stays_between_its_bounds_and_is_none_without_a_stream():
    one = training()
    for _ in range(3):
        one.step()
    assert 0.015 < float(one.model.alpha.min()) <= float(one.model.alpha.max()) < 0.5
    plain = training(BASELINE)
    plain.step()
    assert not plain.model.alpha.any()
    assert evaluate(plain.model, TINY, EXACT)["loss"] == pytest.approx(
        evaluate(plain.model, TINY, BASELINE)["loss"], rel=1e-5
    )


def test_an_evaluation_counts_every_label_once():
    found = evaluate(training().model, TINY, EXACT)
    assert sum(found["labels"]) == TINY.held_out * TINY.task.positions
    assert all(0 <= c <= n for c, n in zip(found["correct"], found["labels"], strict=True))


def test_losses_and_gradients_of_one_training():
    losses, gradients = train_arm(TINY, fresh_weights(TINY, 0), TWO_PASS, WIDE, 0)
    assert set(losses["step"]) == {0, 1, 2, 3, 4}
    assert set(losses["evaluated"]) == {"exact", "own"}
    assert set(gradients["step"]) == {0, 2}
    assert set(gradients["part"]) == {"weights", "alpha"}
    assert np.isfinite(gradients[["cosine", "norm_ratio"]]).all().all()
    _, none = train_arm(TINY, fresh_weights(TINY, 0), EXACT, WIDE, 0)
    assert none.empty


def same(a: pd.DataFrame, b: pd.DataFrame, by: list[str]) -> None:
    a, b = (t.sort_values(by).reset_index(drop=True)[sorted(t)] for t in (a, b))
    pd.testing.assert_frame_equal(a, b)


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    arms = (EXACT, TWO_PASS, BASELINE)
    whole = run_study(tmp_path / "whole", TINY, seeds=(0, 1), arms=arms, rounds=1)
    put, calls = study_module.put_rows, []

    def broken(path, rows, keys):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        put(path, rows, keys)

    monkeypatch.setattr(study_module, "put_rows", broken)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path / "cut", TINY, seeds=(0, 1), arms=arms, rounds=1)
    lines = []
    resumed = run_study(tmp_path / "cut", TINY, seeds=(0, 1), arms=arms, rounds=1, progress=lines.append)
    assert 0 < len(lines) < 10
    same(whole["losses"], resumed["losses"], ["alpha_high", "seed", "arm", "step", "evaluated", "distance"])
    same(whole["gradients"], resumed["gradients"], ["alpha_high", "seed", "step", "arm", "part"])
    assert run_study(tmp_path / "cut", TINY, seeds=(0, 1), arms=arms, progress=lines.append)["losses"].equals(
        resumed["losses"]
    )
    losses = whole["losses"]
    plain = losses[losses["arm"] == "no stream"].groupby("alpha_high")["loss"].sum()
    assert len(plain) == 2
    assert plain.nunique() == 1
    cost = training_cost(losses, whole["times"])
    assert set(cost.table["arm"]) == {"exact", "two-pass", "no stream"}
    assert gradient_fidelity(whole["gradients"]).table["seeds"].eq(2).all()


def test_a_study_of_another_plan_is_refused(tmp_path):
    short = replace(TINY, steps=1, pretraining=0, blends=TINY.blends[:1])
    run_study(tmp_path, short, seeds=(0,), arms=(BASELINE,), rounds=0)
    run_study(tmp_path, short, seeds=(0,), arms=(BASELINE,), rounds=0)
    with pytest.raises(SSTError, match="steps = 1, not 4"):
        run_study(tmp_path, replace(short, steps=4), seeds=(0,), arms=(BASELINE,), rounds=0)


def test_times_are_of_every_arm_in_every_round():
    times = step_times(TINY, (EXACT, BASELINE), rounds=2)
    assert len(times) == 4
    assert (times["seconds"] > 0).all()


def test_wide_windows_need_no_state():
    far = replace(TINY, window=TINY.task.positions)
    assert fresh_weights(far, 0).config.sliding_window == 6


def losses_table(
    behind: float = 0.3, seeds: int = 5, noise: float = 0.01, stream: float = 0.5, seed: int = 0
) -> pd.DataFrame:
    """Final losses of three arms: exact at 0.1, two-pass `behind` it, without a stream 0.1 + `stream`."""
    rng = np.random.default_rng(seed)
    rows = []
    for high in (0.1, 0.5):
        for s in range(seeds):
            common = 0.05 * rng.normal()
            for arm, level in (("exact", 0.1), ("two-pass", 0.1 + behind), ("no stream", 0.1 + stream)):
                final = level + common + noise * rng.normal()
                for step, loss in ((0, 2.0), (10, final)):
                    for evaluated in ("exact", "own"):
                        for distance, n in ((0, 30), (1, 10)):
                            rows.append(
                                {
                                    "alpha_low": 0.015, "alpha_high": high, "seed": s, "arm": arm,
                                    "step": step, "evaluated": evaluated, "alpha": 0.05,
                                    "distance": distance, "labels": n,
                                    "loss": n * (loss + 0.1 * (evaluated == "own")), "correct": n / 2,
                                }
                            )  # fmt: skip
    return pd.DataFrame(rows)


def test_a_planted_cost_is_found_within_its_interval():
    found = training_cost(losses_table(0.3))
    for high in (0.1, 0.5):
        d = found.behind("two-pass", 0.015, high)
        assert d.low < 0.3 < d.high or d.mean == pytest.approx(0.3, abs=0.02)
        assert d.low > 0
        assert d.n == 5
    assert found.verdict.count("it costs") == 2
    assert "keep" in found.verdict
    row = found.table[found.table["arm"] == "two-pass"].iloc[0]
    assert row["own"] - row["loss"] == pytest.approx(0.1)
    assert row["accuracy"] == pytest.approx(0.5)


def test_no_cost_is_called_one_at_the_nominal_rate():
    called = sum(
        training_cost(losses_table(0.0, seed=s)).verdict.count("(it costs)") for s in range(40)
    )  # 80 settings, one-sided 2.5%
    assert called <= 6
    assert "no cost is shown" in training_cost(losses_table(0.0)).verdict


def test_a_stream_that_gains_nothing_is_said():
    assert "the stream gains nothing here" in training_cost(losses_table(0.0, stream=-0.5)).verdict


def test_one_seed_gives_an_estimate_and_no_interval():
    found = training_cost(losses_table(0.3, seeds=1))
    assert np.isfinite(found.table["loss"]).all()
    assert found.table["loss_low"].isna().all()
    assert "(one seed)" in found.verdict
    assert "it costs" not in found.verdict


def test_order_of_rows_and_numbers_of_seeds_change_nothing():
    rows = losses_table()
    mixed = rows.sample(frac=1, random_state=0).assign(seed=lambda t: 9 - t["seed"])
    by = ["alpha_high", "arm"]
    a, b = (training_cost(t).table.sort_values(by).reset_index(drop=True) for t in (rows, mixed))
    pd.testing.assert_frame_equal(a, b)


def test_a_training_that_diverged_is_left_out():
    rows = losses_table(seeds=5)
    bad = (rows["seed"] == 2) & (rows["arm"] == "two-pass") & (rows["alpha_high"] == 0.5)
    broken = rows.assign(loss=rows["loss"].where(~bad))
    row = training_cost(broken).table.set_index(["alpha_high", "arm"])["seeds"]
    assert row[0.5, "two-pass"] == 4
    assert row[0.1, "two-pass"] == row[0.5, "exact"] == 5


def test_missing_arms_and_empty_tables_are_said():
    rows = losses_table()
    assert "both needed" in training_cost(rows[rows["arm"] != "exact"]).verdict
    assert training_cost(rows[rows["arm"] != "no stream"]).verdict.count("nats behind") == 2
    for empty in (rows.iloc[:0], pd.DataFrame(), rows.assign(loss=np.nan)):
        found = training_cost(empty)
        assert found.verdict.startswith("not testable:")
        assert all(figure.layout.annotations for figure in found.figures().values())
    table = gradients_table()
    for empty in (table.iloc[:0], pd.DataFrame(), table.assign(cosine=np.nan)):
        found = gradient_fidelity(empty)
        assert found.verdict.startswith("not testable:")
        assert all(figure.layout.annotations for figure in found.figures().values())


def test_times_are_ratios_within_a_round():
    drift = np.arange(1, 6.0)
    times = pd.concat(
        pd.DataFrame({"round": range(5), "arm": arm, "seconds": drift * factor})
        for arm, factor in (("no stream", 1.0), ("two-pass", 2.1), ("exact", 9.0))
    )
    ratio = training_cost(losses_table(), times).table.set_index("arm")["ratio"]
    assert (ratio["two-pass"] == 2.1).all()
    assert (ratio["exact"] == 9).all()
    assert training_cost(losses_table(), None).table["ratio"].isna().all()


def gradients_table(cosine: float = 0.8, seeds: int = 4, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    grid = pd.MultiIndex.from_product(
        [[0.1, 0.5], range(seeds), [0, 20, 40], ["two-pass", "4 sweeps"], ["weights", "alpha"]],
        names=["alpha_high", "seed", "step", "arm", "part"],
    ).to_frame(index=False)
    grid["alpha_low"] = 0.015
    grid["cosine"] = np.where(grid["arm"] == "two-pass", cosine, 0.99) + 0.002 * rng.normal(size=len(grid))
    return grid.assign(norm_ratio=0.5)


def test_planted_cosines_are_found_and_the_nearest_arm_is_named():
    found = gradient_fidelity(gradients_table())
    row = found.table[(found.table["arm"] == "two-pass") & (found.table["part"] == "alpha")].iloc[0]
    assert row["cosine"] == pytest.approx(0.8, abs=0.005)
    assert row["norm_ratio"] == 0.5
    assert row["seeds"] == 4
    assert found.verdict.count("nearest: 4 sweeps") == 4
    assert "4 seeds" in found.verdict
    one = gradient_fidelity(gradients_table(seeds=1))
    assert one.table["cosine_low"].isna().all()
    broken = gradients_table()
    broken.loc[broken["seed"] == 1, "cosine"] = np.nan
    assert gradient_fidelity(broken).table["seeds"].eq(3).all()


def test_the_mean_over_seeds_is_covered_at_the_nominal_rate():
    rng = np.random.default_rng(0)
    hits = sum(
        found.low <= 1 <= found.high for found in (over_seeds(rng.normal(1, 2, size=4)) for _ in range(400))
    )
    assert 0.92 < hits / 400 < 0.98
    assert over_seeds([]).text() == "none"


def test_figures_name_setting_seeds_and_axes():
    cost = training_cost(losses_table())
    for name, figure in (cost.figures() | gradient_fidelity(gradients_table()).figures()).items():
        assert len(figure.data) > 1, name
        assert "seeds" in figure.layout.title.subtitle.text, name
        titles = [axis.title.text for axis in figure.select_xaxes()]
        assert any(titles), name


def test_a_document_is_filled_from_the_tables_and_only_between_its_marks(tmp_path):
    document = tmp_path / "page.md"
    before = "# A page\n\n<!-- training -->\nold\n<!-- end of training -->\n\nafter\n"
    before += "<!-- groups -->\n<!-- end of groups -->\n"
    document.write_text(before)
    assert fill(document, all_tables(tmp_path)) == ["training", "groups"]
    assert document.read_text().count(NOT_YET) == 2
    losses_table().to_parquet(tmp_path / "small-losses.parquet")
    gradients_table().to_parquet(tmp_path / "small-gradients.parquet")
    fill(document, all_tables(tmp_path))
    text = document.read_text()
    assert text.startswith("# A page\n\n<!-- training -->\n\n| setting |")
    assert "after" in text
    assert "old" not in text
    assert text.count("\n| alpha in") == 6
    fill(document, all_tables(tmp_path))
    assert document.read_text() == text
    assert all("nan" not in table for table in all_tables(tmp_path).values())
    document.write_text("<!-- other -->\n<!-- end of other -->")
    with pytest.raises(SSTError, match="other"):
        fill(document, all_tables(tmp_path))


def test_a_markdown_table_leaves_what_is_missing_empty():
    assert markdown([{"a": 0.12345, "b": float("nan")}]) == "| a | b |\n| --- | --- |\n| 0.123 |  |"
    assert markdown([]) == NOT_YET
