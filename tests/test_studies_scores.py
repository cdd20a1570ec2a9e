"""Scores over seeds: what is said of planted effects, the same for every study; and gradients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny_studies import DESIGNS, NAMES, SETTINGS, TREATED, gradients, planted

from sst_interp.analyses.statistics.bootstrap import over_seeds
from sst_interp.errors import Untestable
from sst_interp.experiments.studies.decoders import excluding
from sst_interp.experiments.studies.gradient_errors import gradient_fidelity
from sst_interp.experiments.studies.scores import arm_scores

pytestmark = pytest.mark.filterwarnings("error")


def scores(name: str, rows: pd.DataFrame, times: pd.DataFrame | None = None):
    return arm_scores(rows, DESIGNS[name], times)


def worse(name: str, by: float) -> dict[str, float]:
    """The treated arm is this much worse than the others."""
    return {TREATED[name].name: -by if DESIGNS[name].percent else by}


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_effect_lies_in_its_interval_and_is_called(name):
    design, arm = DESIGNS[name], TREATED[name].name
    bad, good, none = (scores(name, planted(name, worse(name, by))) for by in (0.3, -0.3, 0))
    settings = max(1, len(SETTINGS.get(name, ())))
    for other, words in design.against.items():
        for found, effect in ((bad, worse(name, 0.3)[arm]), (good, worse(name, -0.3)[arm])):
            rows = found.differences
            rows = rows[(rows["arm"] == arm) & (rows["minus"] == other)]
            assert rows[design.score].to_numpy() == pytest.approx(effect, abs=0.03)
            ends = rows[[f"{design.score}_low", f"{design.score}_high"]].to_numpy()
            assert (np.sign(ends) == np.sign(effect)).all()
        assert bad.verdict.count(f"Worse than {words}: {arm} (") == settings
        assert good.verdict.count(f"Better than {words}: ") >= settings
        assert none.verdict.count(words) >= settings
        assert f"Worse than {words}: {arm} (" not in good.verdict
    assert bad.verdict.count("5 seeds") == settings
    for reading in design.readings:
        rows = bad.differences[bad.differences["minus"] == reading]
        assert rows["same"].all()
        assert rows[design.score].to_numpy() == pytest.approx(-0.1)  # the definition minus the reading


@pytest.mark.parametrize("name", NAMES)
def test_no_effect_is_called_one_at_the_nominal_rate(name):
    design, arm, called, n = DESIGNS[name], TREATED[name].name, 0, 0
    for seed in range(10 if name in SETTINGS else 20):
        rows = scores(name, planted(name, seed=seed)).differences
        rows = rows[(rows["arm"] == arm) & ~rows["same"]]
        if design.x:
            rows = rows[rows[design.x] == rows[design.x].max()]
        apart = (rows[f"{design.score}_low"] > 0) | (rows[f"{design.score}_high"] < 0)
        called, n = called + int(apart.sum()), n + len(rows)
    assert n >= 40
    assert called / n < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_only_a_difference_within_seeds_sees_a_small_effect(name):
    """Starts differ far more than arms do."""
    design, arm = DESIGNS[name], TREATED[name].name
    found = scores(name, planted(name, worse(name, 0.1), spread=0.3))
    other = next(iter(design.against))
    rows = found.differences[(found.differences["arm"] == arm) & (found.differences["minus"] == other)]
    assert (np.sign(rows[f"{design.score}_low"]) == np.sign(rows[f"{design.score}_high"])).all()
    finals = found.finals[found.finals["evaluated"] == design.definition].set_index("arm")
    low, high = (finals.loc[a].filter(regex=f"^{design.score}_") for a in (arm, other))
    a, b = low.to_numpy().reshape(-1, 2), high.to_numpy().reshape(-1, 2)
    assert ((a[:, 0] < b[:, 1]) & (b[:, 0] < a[:, 1])).all()  # the intervals of the scores overlap


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_and_names_of_seeds_change_nothing(name):
    rows = planted(name, worse(name, 0.1))
    mixed = rows.sample(frac=1, random_state=0).assign(seed=lambda t: 9 - t["seed"])
    design = DESIGNS[name]
    for part, by in (("finals", ["arm", "evaluated"]), ("differences", ["arm", "minus"])):
        a, b = (
            getattr(scores(name, t), part).sort_values([*design.by, *by]).reset_index(drop=True)
            for t in (rows, mixed)
        )
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_estimates_and_no_interval(name):
    found = scores(name, planted(name, worse(name, 0.3), seeds=1))
    score = DESIGNS[name].score
    assert found.finals[score].notna().all()
    assert found.finals[f"{score}_low"].isna().all()
    assert "(one seed)" in found.verdict
    assert "Worse" not in found.verdict
    assert "Better" not in found.verdict


@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_diverged_is_left_out(name):
    rows, arm = planted(name), TREATED[name].name
    first = SETTINGS.get(name, [()])[0]
    bad = (rows["seed"] == 2) & (rows["arm"] == arm) & (rows["evaluated"] == DESIGNS[name].definition)
    for column, value in zip(DESIGNS[name].settings, first, strict=True):
        bad &= rows[column] == value
    finals = scores(name, rows.assign(loss=rows["loss"].mask(bad))).finals
    here = pd.Series(True, finals.index)
    for column, value in zip(DESIGNS[name].settings, first, strict=True):
        here &= finals[column] == value
    assert (finals[here & (finals["arm"] == arm)]["seeds"] == 4).all()
    assert (finals[~here | (finals["arm"] != arm)]["seeds"] == 5).all()


@pytest.mark.parametrize("name", NAMES)
def test_missing_arms_are_said_and_empty_tables_are_untestable(name):
    rows, design = planted(name), DESIGNS[name]
    for other, words in design.against.items():
        found = scores(name, rows[rows["arm"] != other])
        assert f"No seed has a training to compare with {words}" in found.verdict
    alone = scores(name, rows[rows["arm"] == design.baseline].query("evaluated == @design.definition"))
    assert alone.verdict.startswith("Not testable: ")
    for empty in (rows.iloc[:0], pd.DataFrame(), rows.assign(loss=np.nan)):
        with pytest.raises(Untestable, match="no training"):
            scores(name, empty)


@pytest.mark.parametrize("name", NAMES)
def test_times_are_ratios_within_a_round(name):
    drift, baseline, arm = np.arange(1, 6.0), DESIGNS[name].baseline, TREATED[name].name
    times = pd.concat(
        pd.DataFrame({"round": range(5), "arm": a, "seconds": drift * factor})
        for a, factor in ((baseline, 1.0), (arm, 2.1))
    )
    ratio = scores(name, planted(name), times).finals.set_index("arm")["ratio"]
    assert ratio[arm].to_numpy() == pytest.approx(2.1)
    assert ratio[baseline].to_numpy() == pytest.approx(1) if ratio[baseline].ndim else ratio[baseline] == 1
    assert scores(name, planted(name)).finals["ratio"].isna().all()
    assert scores(name, planted(name), times[times["arm"] == arm]).finals["ratio"].isna().all()


@pytest.mark.parametrize("name", NAMES)
def test_figures_name_seeds_and_axes(name):
    found = scores(name, planted(name))
    figures = found.figures()
    assert len(figures) == {"exact-training": 5, "lrt-schedules": 2, "pretraining": 2, "recall": 2}[name]
    for figure in (*figures.values(), found.figure()):
        assert len(figure.data) > 1
        assert "5 seeds" in figure.layout.title.subtitle.text
        assert figure.layout.xaxis.title.text
    found.to_dict()


def test_scores_are_taken_at_the_last_step_and_as_trained_they_are_others():
    found = scores("exact-training", planted("exact-training", {"two-pass": 0.3}))
    rows = found.beside()
    rows = rows[rows["alpha_high"] == 0.5].set_index("arm")
    exact, two = rows.loc["exact"], rows.loc["two-pass"]
    assert two["loss"] - exact["loss"] == pytest.approx(0.3, abs=0.05) == two["behind_loss"]
    assert two["own_loss"] - two["loss"] == pytest.approx(0.1)
    assert (exact["step"], exact["accuracy"]) == (10, pytest.approx(0.8))
    assert np.isnan(exact["behind_loss"])
    assert rows["seeds"].eq(5).all()
    curve = found.curves["step"]
    assert curve[curve["step"] == 0]["loss"].to_numpy() == pytest.approx(2)
    assert list(found.finals["arm"].unique()) == ["exact", "two-pass", "no stream"]


def test_a_stream_that_gains_nothing_is_said():
    worse = scores("exact-training", planted("exact-training", {"exact": 0.5, "two-pass": 0.5})).verdict
    assert worse.count("Worse than training without a stream: ") == 2


def test_bits_per_byte_are_nats_over_bytes_and_passes_are_counted():
    found = scores("pretraining", planted("pretraining"))
    row = found.finals.iloc[0]
    assert row["bits"] == pytest.approx(row["loss"] * 100 / 250 / np.log(2))
    passes = found.differences.set_index(["arm", "minus"])["passes"]
    assert passes["LRT, both", "baseline"] == 2
    assert passes["LRT, both", "baseline, equal compute"] == 1


def test_guesses_among_the_values_shown_and_among_those_not_yet_an_answer():
    assert excluding(2) == pytest.approx(0.75)  # one half, then one
    assert "A guess is right in 12% or 34%." in scores("recall", planted("recall")).verdict
    names = {trace.name for trace in scores("recall", planted("recall")).figure().data}
    assert {"a guess", "a guess among values not yet an answer"} <= names


def test_the_mean_over_seeds_is_covered_at_the_nominal_rate():
    rng = np.random.default_rng(0)
    draws = [over_seeds(rng.normal(1, 2, size=4)) for _ in range(400)]
    hits = sum(draw.low <= 1 <= draw.high for draw in draws)
    assert 0.92 < hits / 400 < 0.98
    assert over_seeds([]).text() == "none"


def test_planted_cosines_are_found_and_the_nearest_arm_is_named():
    found = gradient_fidelity(gradients())
    row = found.table[(found.table["arm"] == "two-pass") & (found.table["part"] == "alpha")].iloc[0]
    assert row["cosine"] == pytest.approx(0.8, abs=0.005)
    assert row["norm_ratio"] == 0.5
    assert row["seeds"] == 4
    assert found.verdict.count("Nearest is 4 sweeps") == 4
    assert found.verdict.count("4 seeds") == 2
    assert gradient_fidelity(gradients(seeds=1)).table["cosine_low"].isna().all()
    broken = gradients()
    broken.loc[broken["seed"] == 1, "cosine"] = np.nan
    assert gradient_fidelity(broken).table["seeds"].eq(3).all()
    for figure in (*found.figures().values(), found.figure()):
        assert len(figure.data) > 1
        assert "4 seeds" in figure.layout.title.subtitle.text
    other = gradients().query("arm != 'two-pass'")
    assert gradient_fidelity(other).verdict.startswith("Not testable: no two-pass gradient")
    for empty in (gradients().iloc[:0], pd.DataFrame(), gradients().assign(cosine=np.nan)):
        with pytest.raises(Untestable):
            gradient_fidelity(empty)
