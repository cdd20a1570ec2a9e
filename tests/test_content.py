from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from synthetic import contrast, pairs_table, smooth

from sst_interp.analyses.content import content

N, T = 24, 32


def pairs_of(x, layers=4, seed=0, comparison="teacher_forced"):
    """Pairs whose mean distance is `x` [question, position]; NaN where the text has ended."""
    rng = np.random.default_rng(seed)
    u = np.exp(-5 + x[..., None] + 0.1 * rng.normal(size=(*x.shape, layers)))
    table = pairs_table(x.shape[0], x.shape[1], layers, comparisons=(comparison,))
    table = table.assign(cosine=(1 - np.minimum(u, 1)).ravel().astype("float32"))
    return table[np.isfinite(np.repeat(x.ravel(), layers))]


def steps_of(entropy, tokens=None, deepest=4):
    """A `steps` table with the given entropy and tokens [question, position]; margin is its opposite."""
    q, p = (i.ravel() for i in np.indices(entropy.shape))
    parts = []
    for text, depth in (("own", 1), ("own", deepest), ("depth1", deepest)):
        for iteration in range(1, depth + 1):
            parts.append(
                pd.DataFrame(
                    {
                        "question": q.astype("int32"),
                        "text": text,
                        "depth": np.int8(depth),
                        "position": p.astype("int16"),
                        "iteration": np.int8(iteration),
                        "token": pd.array(
                            [pd.NA] * len(q) if tokens is None else tokens.ravel(), dtype="Int32"
                        ),
                        "entropy": entropy.ravel().astype("float32"),
                        "margin": -entropy.ravel().astype("float32"),
                    }
                )
            )
    table = pd.concat(parts, ignore_index=True)
    return table[np.isfinite(table["entropy"])]


def planted(rng, by_position=0.0, by_entropy=0.0, by_class=0.0, questions=N):
    """Distance, entropy and token ids; tokens 0 to 9 are digits."""
    entropy, tokens = smooth(rng, questions, T), rng.integers(0, 40, size=(questions, T))
    read = np.roll(tokens, 1, axis=1) < 10
    read[:, 0] = False
    x = (
        smooth(rng, questions, T)
        + by_position * np.linspace(2, -2, T)
        + by_entropy * entropy
        + by_class * read
    )
    return x, entropy, tokens


def kind_of(ids):
    return np.where(ids < 10, "digit", np.where(ids < 20, "punctuation", "word"))


def content_of(pairs, steps=None, token_class=None, other=None, names=(None, None), **options):
    """Content at a threshold of 0.98; `other` has the pairs of a second run, `names` the ids of both."""
    beside = {} if other is None else {"reshuffled": SimpleNamespace(pairs=other, questions=names[1])}
    options = {"threshold": 0.98, "resamples": 200} | options
    tables = {"steps": steps, "questions": names[0]}
    return content(contrast(pairs, **tables, token_class=token_class, beside=beside, **options))


def test_planted_content_is_found_measure_by_measure():
    rng = np.random.default_rng(15)
    x, entropy, tokens = planted(rng, by_position=0.5, by_entropy=0.6, by_class=2.0)
    again = pairs_of(x + 0.5 * smooth(rng, N, T), seed=1)
    found = content_of(pairs_of(x), steps_of(entropy, tokens), kind_of, again, resamples=2000)
    assert found.content_found is True
    assert found.missing == {}
    position, uncertain = found.row("position index"), found.row("entropy")
    assert 0.05 < position["low"] < position["high"] < 0.6
    assert uncertain["beyond_low"] > 0.1
    assert uncertain["p_holm"] < 0.05
    assert found.row("margin")["estimate"] == pytest.approx(-uncertain["estimate"])
    assert found.row("class of the token read")["low"] > 0.1
    assert found.row("class of the token read")["p_holm"] < 0.05
    assert abs(found.row("class of the token emitted")["estimate"]) < 0.03
    assert found.row("second run")["beyond_low"] > 0.2
    assert found.row("second run", "shifted share")["p_holm"] < 0.05
    assert "depends on content, not on position alone" in found.verdict
    assert f"768 positions of {N} questions" in found.verdict
    rates = found.classes[found.classes["role"] == "read"].set_index("class")
    assert rates["share"]["digit"] > 2 * rates["share"]["word"]
    assert rates["low"]["digit"] > rates["high"]["word"]
    assert (rates["pairs"].sum(), found.classes["questions"].max()) == (N * (T - 1) * 4, N)


def test_position_alone_is_not_called_content():
    alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(100 + seed)
        x, entropy, tokens = planted(rng, by_position=1.0)
        entropy = entropy + np.linspace(2, -2, T)  # high where shifts are, at every question alike
        found = content_of(pairs_of(x), steps_of(entropy, tokens), kind_of)
        assert found.row("position index")["low"] > 0.2
        assert found.row("entropy")["p_circular"] < 0.05
        alarms += bool(found.content_found)
    assert alarms <= 4  # 5% nominal
    assert "No dependence on content beyond position is seen" in found.verdict or alarms


def test_a_run_without_tokens_is_tested_on_the_rest():
    rng = np.random.default_rng(17)
    x, entropy, _ = planted(rng, by_entropy=1.0)
    found = content_of(pairs_of(x), steps_of(entropy), kind_of)
    assert found.missing["class of the token read"] == "the run stores no tokens"
    assert found.missing["second run"] == "no second run was given"
    assert found.content_found is True
    assert "class of the token emitted (the run stores no tokens)" in found.verdict
    assert "not testable: the run stores no tokens" in str(found.figures()["classes"].layout.title)
    without = content_of(pairs_of(x))
    assert without.missing["entropy"] == "the run has no steps table"
    assert without.content_found is None
    assert "Whether content matters is not testable here" in without.verdict
    assert np.isfinite(without.row("position index")["estimate"])
    unclassed = content_of(pairs_of(x), steps_of(entropy, np.ones((N, T), int)))
    assert unclassed.missing["class of the token read"] == "no token classes were given"


def test_a_second_run_is_paired_by_id_and_says_why_it_cannot_be():
    rng = np.random.default_rng(18)
    x, _, _ = planted(rng)
    pairs, order = pairs_of(x), np.arange(N)[::-1]
    second = pairs.assign(question=order[pairs["question"]].astype("int32"))
    names = tuple(
        pd.DataFrame({"question": range(N), "id": [f"r{q}" for q in ids]}) for ids in (range(N), order)
    )
    assert content_of(pairs, other=second, names=names).row("second run")["estimate"] > 0.99
    assert content_of(pairs, other=second).row("second run")["estimate"] < 0.5
    short = content_of(pairs, other=second[second["position"] < 20], names=names)
    assert short.row("second run")["estimate"] > 0.99
    for other, words in (
        (
            pairs_of(x, comparison="free_running"),
            "in the second run, the run has no pairs of comparison 'teacher_forced'",
        ),
        (pairs.assign(question=pairs["question"] + 99), "the two runs have no question in common"),
    ):
        assert words in content_of(pairs, other=other).missing["second run"]


def test_within_reads_the_steps_of_the_deepest_pass():
    rng = np.random.default_rng(19)
    x, entropy, tokens = planted(rng, by_entropy=1.0)
    steps = steps_of(entropy, tokens)
    shallow = steps["depth"] == 1
    steps.loc[shallow, ["entropy", "margin"]] = 0.0
    found = content_of(pairs_of(x, comparison="within"), steps, kind_of)
    assert found.row("entropy")["low"] > 0.4
    flat = content_of(pairs_of(x), steps, kind_of)
    assert "no question has 8 positions" in flat.missing["entropy"]


def test_no_shifts_and_all_shifts_leave_the_distance_to_be_tested():
    rng = np.random.default_rng(21)
    x, entropy, tokens = planted(rng, by_entropy=1.0)
    for threshold in (-1.0, 2.0):
        found = content_of(pairs_of(x), steps_of(entropy, tokens), kind_of, threshold=threshold)
        rows = found.measures[found.measures["of"] == "shifted share"]
        assert rows["estimate"].isna().all()
        assert rows["note"].notna().all()
        assert found.row("entropy")["low"] > 0.4
    still = content_of(pairs_of(0 * x, layers=1).assign(cosine=np.float32(0.9)), steps_of(entropy))
    assert still.content_found is None
    assert still.missing["position index"] == "nothing varies"


def test_few_questions_one_question_and_one_position_do_not_tell():
    rng = np.random.default_rng(22)
    x, entropy, tokens = planted(rng, by_entropy=3.0, questions=4)
    steps = steps_of(entropy, tokens)
    few = content_of(pairs_of(x), steps, kind_of)
    assert few.content_found is None  # 4 questions have 24 orders
    one = content_of(pairs_of(x[:1]), steps, kind_of, pairs_of(x[:1]))
    assert one.content_found is None
    assert "no interval: one question" in one.verdict
    assert content_of(pairs_of(x[:, :1]), steps, kind_of).content_found is None
    table = pairs_of(x)
    table.loc[table["question"] == 1, "cosine"] = np.nan
    assert content_of(table, steps).n_questions == 3
