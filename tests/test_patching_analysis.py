"""What patches say: planted causes are found, and nothing is found where nothing is planted."""

import json

import numpy as np
import pandas as pd
import pytest

from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.patching.finding import patching, size_regression
from sst_interp.findings.answers import patching_rows
from sst_interp.findings.claims import CONTRADICTED, INCOMPARABLE, INCONCLUSIVE, SUPPORTED

LAYERS = (3, 9, 15, 19)


def rows_of(questions=30, causal=0.6, random=0.0, other=0.0, special=0.0, shifted=0.5, seed=0):
    """Synthetic rows of `patch_run`.

    `causal`, `random`, `other`: the recovered share of each patch, below the last layer; `special`: how much
    larger the log effect of a shifted pair is than its size says.
    """
    rng = np.random.default_rng(seed)
    records = []
    strength = {"state": causal, "random": random, "other": other}
    for question in range(questions):
        usual = rng.normal(0, 0.3)
        for role, position in (("shift", 4), ("stable", 2), ("random", 7)):
            for direction in ("back", "forward"):
                gap = rng.normal(0, 2)
                for what, share in strength.items():
                    for layer in LAYERS:
                        size = np.exp(rng.normal(-2, 0.5))
                        is_shifted = rng.random() < shifted
                        recovered = 1.0 if (what, layer) == ("state", LAYERS[-1]) else share
                        log_effect = (
                            np.log(size) + special * is_shifted + usual + rng.normal(0, 0.3) + layer / 5
                        )
                        records.append(
                            {
                                "question": question, "position": position, "role": role,
                                "direction": direction, "place": "layer", "what": what,
                                "first": layer, "last": layer, "size": size, "kl": np.exp(log_effect),
                                "gap": gap, "moved": recovered * gap + rng.normal(0, 0.5),
                                "token_changed": rng.random() < 0.1, "continued": what == "state",
                                "later_changed": 0.1 if what == "state" else np.nan,
                                "answer_changed": 0.0 if what == "state" else np.nan,
                                "answer_donors": 0.0 if what == "state" else np.nan,
                                "answers_differ": 0.0 if what == "state" else np.nan,
                                "shifted": float(is_shifted),
                            }
                        )  # fmt: skip
                differ = rng.random() < 0.5
                records.append(
                    records[-1]
                    | {
                        "place": "all",
                        "what": "state",
                        "first": 0,
                        "last": LAYERS[-1],
                        "gap": gap,
                        "moved": gap,
                    }
                    | {"continued": True, "later_changed": 0.5, "answers_differ": float(differ)}
                    | {"answer_changed": float(differ), "answer_donors": 1.0}
                )
    table = pd.DataFrame(records)
    table.attrs = {"threshold": 0.99, "depth": 4, "run": "planted"}
    return table


def test_a_planted_cause_is_recovered_and_beyond_its_controls():
    found = patching(rows_of(questions=40, causal=0.6, random=0.05, other=0.2))
    for direction in ("back", "forward"):
        assert found.recovered[direction].low <= 0.6 <= found.recovered[direction].high
        assert found.beyond[direction]["random"].low <= 0.55 <= found.beyond[direction]["random"].high
        assert found.beyond[direction]["other"].low <= 0.4 <= found.beyond[direction]["other"].high
        assert found.answers[direction].estimate == 1
    [c16, c16b] = patching_rows(found)
    assert (c16.claim.id, c16.grade) == ("C16", INCONCLUSIVE)  # a shift's effect is what its size says
    assert (c16b.claim.id, c16b.grade) == ("C16b", SUPPORTED)
    assert found.beyond_size.low < 0 < found.beyond_size.high
    assert found.size_slope.estimate == pytest.approx(1, abs=0.1)
    assert found.verdict.startswith("A shifted state carries its depth's output, in both directions.")
    for words in ("40 questions", "depth 4", f"{found.recovered['back'].text(percent=True)} by depth 1's"):
        assert words in found.verdict
    assert "At equal size a shifted state does about as much as a stable one" in found.verdict


@pytest.mark.parametrize(
    "nothing", [{"causal": 0.0}, {"causal": 0.4, "other": 0.4}, {"causal": 0.3, "random": 0.3}]
)
def test_no_cause_is_found_where_a_control_does_as_much(nothing):
    found = patching(rows_of(**nothing))
    assert patching_rows(found)[1].grade in (CONTRADICTED, INCONCLUSIVE)
    assert found.verdict.startswith("It is not shown that")


def test_the_last_layer_counts_for_nothing():
    """There the donor is recovered by construction."""
    found = patching(rows_of(causal=0.0))
    assert found.recovered["back"].high < 0.2
    by_layer = found.by_layer[(found.by_layer["what"] == "state") & (found.by_layer["direction"] == "back")]
    assert by_layer.set_index("last")["recovered"][LAYERS[-1]] == pytest.approx(1, abs=0.1)


def test_a_shift_that_matters_more_than_its_size_is_found():
    found = patching(rows_of(questions=40, special=0.5))
    assert found.beyond_size.low <= 0.5 <= found.beyond_size.high
    assert patching_rows(found)[0].grade == SUPPORTED
    assert patching_rows(patching(rows_of(special=0.5)))[0].reason == "30 questions, and 40 are needed"
    assert "At equal size a shifted state does more than a stable one" in found.verdict
    less = patching(rows_of(questions=40, special=-0.5))
    assert patching_rows(less)[0].grade == CONTRADICTED
    assert "does less than a stable one" in less.verdict


def test_planted_coefficients_are_inside_their_intervals_as_often_as_stated():
    inside = 0
    for seed in range(30):
        rows = rows_of(questions=20, special=0.3, seed=seed)
        rows = rows[(rows["what"] == "state") & (rows["last"] < LAYERS[-1])]
        _, extra = size_regression(rows)
        inside += extra.low <= 0.3 <= extra.high
    assert inside >= 24  # 95% nominal, 30 trials


@pytest.mark.parametrize(("shifted", "words"), [(0.0, "no patched pair"), (1.0, "every patched pair")])
def test_without_both_kinds_size_and_shift_cannot_be_told_apart(shifted, words):
    found = patching(rows_of(questions=8, shifted=shifted))
    assert found.beyond_size is None
    assert words in found.verdict
    assert patching_rows(found)[0].grade == INCOMPARABLE


def test_few_questions_decide_nothing():
    assert {row.grade for row in patching_rows(patching(rows_of(questions=3)))} == {INCONCLUSIVE}


def test_without_a_shifted_pair_there_is_no_claim():
    found = patching(rows_of(questions=8, shifted=0.0))
    assert found.verdict.startswith("No patched pair has shifted. 8 questions")
    assert [row.grade for row in patching_rows(found)] == [INCOMPARABLE] * 2
    assert all(figure.layout.title.text for figure in found.figures().values())


def test_nothing_patched_is_said_so():
    with pytest.raises(Untestable, match="nothing was patched"):
        patching(pd.DataFrame())
    with pytest.raises(SSTError, match="no column"):
        patching(pd.DataFrame({"question": [1]}))


def test_the_result_is_drawn_tabled_and_json():
    found = patching(rows_of(questions=8))
    assert set(found.figures()) == {"by_layer", "map_back", "map_forward", "places", "answers"}
    for figure in found.figures().values():
        assert "8 questions" in figure.layout.title.subtitle.text
    assert list(found.effect_map["back"].index) == [2, 4, 7]
    assert list(found.effect_map["back"].columns) == list(LAYERS)
    assert set(found.effects["role"]) == {"any", "shift", "stable", "random"}
    controls = found.table[(found.table["what"] == "random")]
    assert controls["answer_changed"].isna().all()  # they were not continued
    json.dumps(found.to_dict(), allow_nan=False)
