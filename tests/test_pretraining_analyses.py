"""What the analysis of pretraining says of planted losses, and the document that is written from it."""

import numpy as np
import pandas as pd
import pytest

from sst_interp.analyses.pretraining import pretraining
from sst_interp.documents import NOT_YET, fill
from sst_interp.pretraining.arms import BASELINE, BOTH, LONGER
from sst_interp.pretraining.tables import all_tables


def losses(
    gain: float = 0.0, longer: float = 0.0, memory: float = 0.2, seeds: int = 4, seed: int = 0
) -> pd.DataFrame:
    """Planted nats per token: the LRT is `gain` below the baseline, the longer baseline `longer`, and the LRT
    loses `memory` with a memory of zeros.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for s in range(seeds):
        start = 4 + 0.2 * rng.normal()
        for arm, evaluated, mean, passes in (
            (BASELINE.name, "sequential", start, 1),
            (LONGER.name, "sequential", start - longer, 2),
            (BOTH.name, "sequential", start - gain, 2),
            (BOTH.name, "zero memory", start - gain + memory, 2),
        ):
            noise = 0.01 * rng.normal()
            for first in (0, 16):
                about = {"seed": s, "arm": arm, "evaluated": evaluated, "position": first, "tokens": 100.0}
                cost = {"steps": passes, "position_passes": 1000 * passes, "seconds": 1.0, "parameters": 10}
                loss = 100 * (mean + noise)
                rows.append(about | {"bytes": 250.0, "loss": loss, "gamma": 0.1} | cost)
    return pd.DataFrame(rows)


def test_planted_differences_lie_in_their_intervals_and_are_called():
    found = pretraining(losses(gain=0.1, longer=0.3))
    steps, compute = (found.compared(BOTH.name, b) for b in (BASELINE.name, LONGER.name))
    assert steps["difference_low"] < -0.1 < steps["difference_high"] < 0
    assert 0 < compute["difference_low"] < 0.2 < compute["difference_high"]
    assert steps["passes"] == 2
    assert compute["passes"] == 1
    assert "equal steps -0." in found.verdict
    assert "(better)" in found.verdict
    assert "(worse)" in found.verdict
    assert "(the memory is used)" in found.verdict


def test_bits_per_byte_are_nats_over_bytes():
    row = pretraining(losses()).table.iloc[0]
    assert row["bits"] == pytest.approx(row["loss"] * 100 / 250 / np.log(2))


def test_no_difference_is_called_at_the_nominal_rate_only():
    verdicts = [pretraining(losses(memory=0.0, seed=s)).verdict for s in range(40)]
    called = sum(v.count("(better)") + v.count("(worse)") for v in verdicts)
    assert called <= 12  # of 80 at 5%
    assert sum("it is not shown that the memory is used" in v for v in verdicts) > 30


def test_differences_are_within_seeds():
    """Starts differ far more than arms: only a paired difference sees it."""
    found = pretraining(losses(gain=0.05))
    assert found.compared(BOTH.name, BASELINE.name)["difference_high"] < 0
    rows = found.table.set_index(["arm", "evaluated"]).sort_index()
    lrt, plain = (rows.loc[(arm, "sequential")] for arm in (BOTH.name, BASELINE.name))
    assert lrt["loss_high"] > plain["loss_low"]
    alone = losses(gain=0.05)
    alone = alone[~((alone["arm"] == BASELINE.name) & (alone["seed"] > 1))]
    assert pretraining(alone).compared(BOTH.name, BASELINE.name)["seeds"] == 2


def test_order_and_numbers_of_seeds_change_nothing():
    rows = losses(0.1)
    mixed = rows.sample(frac=1, random_state=0).assign(seed=lambda t: 9 - t["seed"])
    by = ["arm", "evaluated"]
    a, b = (pretraining(t).table.sort_values(by).reset_index(drop=True) for t in (rows, mixed))
    pd.testing.assert_frame_equal(a, b)


def test_one_seed_missing_arms_and_empty_tables_are_said():
    one = pretraining(losses(0.3, seeds=1))
    assert "(one seed)" in one.verdict
    assert "better" not in one.verdict
    rows = losses()
    assert "equal compute not testable" in pretraining(rows[rows["arm"] != LONGER.name]).verdict
    assert "no training had a memory" in pretraining(rows[rows["arm"] == BASELINE.name]).verdict
    for empty in (rows.iloc[:0], pd.DataFrame(), rows.assign(loss=np.inf)):
        found = pretraining(empty)
        assert found.verdict.startswith("not testable:")
        assert found.figure().layout.annotations
    bad = (rows["seed"] == 2) & (rows["arm"] == BOTH.name) & (rows["position"] == 16)
    table = pretraining(rows.assign(loss=rows["loss"].mask(bad))).table.set_index("arm")["seeds"]
    assert table[BASELINE.name] == 4
    assert (table[[BOTH.name]] == 3).all()


def test_step_times_are_ratios_within_a_round():
    drift = np.arange(1, 6.0)
    times = pd.concat(
        pd.DataFrame({"round": range(5), "arm": arm, "seconds": drift * factor})
        for arm, factor in ((BASELINE.name, 1.0), (BOTH.name, 2.3), (LONGER.name, 1.0))
    )
    table = pretraining(losses(), times).table.set_index("arm")["ratio"]
    assert table[BOTH.name].to_numpy() == pytest.approx(2.3)
    assert pretraining(losses(), None).table["ratio"].isna().all()


def test_the_figure_names_seeds_unit_and_evaluation():
    figure = pretraining(losses()).figure()
    assert "4 seeds" in figure.layout.title.subtitle.text
    assert figure.layout.xaxis.title.text == "nats per token"
    assert {trace.name for trace in figure.data} == {"sequential", "zero memory"}


def test_a_document_is_filled_and_what_is_missing_says_so(tmp_path):
    page = tmp_path / "page.md"
    names = ("text losses", "text differences", "text seeds", "text positions", "text cost", "recall")
    page.write_text("\n".join(f"<!-- {n} -->\n<!-- end of {n} -->" for n in names))
    fill(page, all_tables(tmp_path))
    assert page.read_text().count(NOT_YET) == len(names)
    losses(0.1).to_parquet(tmp_path / "pretraining-losses.parquet")
    fill(page, all_tables(tmp_path))
    text = page.read_text()
    assert text.count(NOT_YET) == 1
    assert "| LRT, both | baseline at equal compute |" in text
    assert "nan" not in text
