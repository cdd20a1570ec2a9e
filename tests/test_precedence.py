import numpy as np
import pandas as pd
import pytest
from synthetic import contrast, pairs_table

from sst_interp.analyses.precedence import (
    beside_perturbations,
    perturbed_orders,
    precedence,
    state_and_argmax,
)
from sst_interp.analyses.statistics.bootstrap import Resampling
from sst_interp.analyses.statistics.permutation import (
    ORDERS,
    first_at,
    order_counts,
    order_table,
    orders,
    shuffled_orders,
)
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.choices import COMPARISONS, Choices

STEPS = (2, 3, 4)
NEVER = len(STEPS)
LAYERS = 4


def random_events(questions=20, positions=30, seed=0):
    """Steps of two things that have nothing to do with each other, but whose rates differ by question."""
    rng = np.random.default_rng(seed)
    rate = rng.uniform(0.1, 0.9, (2, questions, 1))
    x, y = (
        np.where(rng.random((questions, positions)) < r, rng.integers(0, NEVER, r.shape), NEVER) for r in rate
    )
    step = rng.integers(0, NEVER, (2, questions, positions))
    return np.where(x < NEVER, step[0], NEVER), np.where(y < NEVER, step[1], NEVER)


def tables(x, y, comparison="within", lowest=1):
    """(pairs, outputs) of a run in which layers from `lowest` up shift at step x and the argmax at step y,
    both [question, position]; what has happened stays so."""
    questions, positions = x.shape
    q, p, b = (part.ravel() for part in np.indices((questions, positions, NEVER)))
    lowest = np.broadcast_to(lowest, x.shape)[q, p]
    names = {"question": q, "comparison": comparison, "position": p, "a": 1, "b": np.array(STEPS)[b]}
    outputs = pd.DataFrame(names).assign(same_prefix=True, argmax_changed=y[q, p] <= b)
    parts = []
    for layer in range(LAYERS):
        shifted = (x[q, p] <= b) & (layer >= lowest)
        parts.append(
            pd.DataFrame(names).assign(layer=layer, cosine=np.where(shifted, 0.5, 0.999), relative_l2=0.1)
        )
    return pd.concat(parts, ignore_index=True), outputs


def nudges_table(
    changed, comparison="teacher_forced", shifted=None, directions=("true", "random", "elsewhere")
):
    """`nudges` of a run: `changed[direction]` [question, position, seed] at every site and b."""
    rows = []
    for direction in directions:
        of = changed[direction]
        q, p, s = (part.ravel() for part in np.indices(of.shape))
        for site, layers in (("output", 1), ("stream", LAYERS)):
            for b in STEPS if site == "output" else STEPS[-1:]:
                overlap = np.where(
                    (shifted if shifted is not None else np.ones(of.shape[:2], bool))[q, p], 0.5, 1
                )
                rows.append(
                    pd.DataFrame(
                        {
                            "question": q,
                            "comparison": comparison,
                            "position": p,
                            "a": 1,
                            "b": b,
                            "site": site,
                            "direction": direction,
                            "seed": s,
                            "argmax_changed": of[q, p, s],
                            "replaced": 10,
                            "winner_rank": 0,
                            "kl": 0.5,
                            "size": 0.3,
                            "cosine": [np.full(layers, c, np.float32) for c in overlap],
                            "relative_l2": [np.full(layers, 0.3, np.float32)] * len(q),
                        }
                    )
                )
    return pd.concat(rows, ignore_index=True)


def asked(pairs, outputs, comparison="within", **options):
    return contrast(pairs, comparison, outputs=outputs, **({"threshold": 0.99} | options))


def found_in(*tables, **options):
    return precedence(asked(*tables, **options))


# The order of two events


def test_orders_are_the_count():
    x, y = random_events()
    question = np.repeat(np.arange(len(x)), x.shape[1])
    found = orders(order_counts(question, x.ravel(), y.ravel(), NEVER)).sum(axis=0)
    seen = y < NEVER
    expected = [
        np.sum(seen & (x < y)),
        np.sum(seen & (x == y)),
        np.sum(seen & (x > y) & (x < NEVER)),
        np.sum(seen & (x == NEVER)),
    ]
    assert found.tolist() == expected
    assert min(expected) > 0


def test_first_at_is_the_first():
    events = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=bool)
    assert first_at(events).tolist() == [1, 0, 3, 2]
    assert first_at(np.zeros((0, 3), dtype=bool)).tolist() == []


def test_a_shuffle_keeps_how_often_each_happens_in_every_question_and_is_one():
    """Same mean and spread as shuffling positions one by one."""
    x, y = random_events(questions=6, positions=12, seed=3)
    question = np.repeat(np.arange(6), 12)
    counts = order_counts(question, x.ravel(), y.ravel(), NEVER)
    drawn = shuffled_orders(counts, resamples=4000, seed=1)
    assert (drawn.sum(axis=1) == counts.sum(axis=(0, 1))).all()
    assert (drawn.sum(axis=2) == counts.sum(axis=(0, 2))).all()
    assert (drawn >= 0).all()
    for q in range(6):  # question by question, too
        one = shuffled_orders(counts[q : q + 1], resamples=50, seed=q)
        assert (one.sum(axis=2) == counts[q].sum(axis=1)).all()
    rng = np.random.default_rng(0)
    really = []
    for _ in range(4000):
        mixed = rng.permuted(x, axis=1)
        really.append(orders(order_counts(question, mixed.ravel(), y.ravel(), NEVER).sum(axis=0)))
    ours = orders(drawn)
    assert np.allclose(ours.mean(axis=0), np.mean(really, axis=0), atol=0.15)
    assert np.allclose(ours.std(axis=0), np.std(really, axis=0), rtol=0.06)


def test_independent_events_are_rarely_called_ordered():
    """At most at the nominal rate: counts are discrete, so p-values err to the high side."""
    p = []
    for seed in range(300):
        x, y = random_events(questions=8, positions=16, seed=seed)
        counts = order_counts(np.repeat(np.arange(8), 16), x.ravel(), y.ravel(), NEVER)
        p.append(order_table(counts, resamples=199, seed=seed)["p"].to_numpy())
    rate = (np.array(p) <= 0.05).mean(axis=0)
    assert (rate < 0.09).all()
    assert (rate > 0.01).all(), "nor hardly ever: the test has a size"


def test_a_planted_order_is_found():
    _, y = random_events(seed=5)
    x = np.where((y > 0) & (y < NEVER), y - 1, NEVER)
    table = order_table(order_counts(np.repeat(np.arange(20), 30), x.ravel(), y.ravel(), NEVER)).set_index(
        "order"
    )
    later = ((y > 0) & (y < NEVER)).sum() / (y < NEVER).sum()
    assert table["share"]["before"] == pytest.approx(later)
    assert table["low"]["before"] < later < table["high"]["before"]
    assert table["null_high"]["before"] < later
    assert table["p"]["before"] < 0.002
    assert table["share"]["after"] == 0


# In a run


def test_every_number_is_the_count():
    x, y = random_events(seed=1)
    found = found_in(*tables(x, y))
    n = (y < NEVER).sum()
    assert (found.n_positions, found.n_questions, found.n_excluded, found.steps) == (600, 20, 0, STEPS)
    assert found.before.estimate == pytest.approx(np.sum((y < NEVER) & (x < y)) / n)
    assert found.together.estimate == pytest.approx(np.sum((y < NEVER) & (x == y)) / n)
    assert found.after.estimate == pytest.approx(np.sum((y < x) & (x < NEVER)) / n)
    assert found.alone.estimate == pytest.approx(np.sum((y < NEVER) & (x == NEVER)) / n)
    assert found.against.estimate == pytest.approx(found.after.estimate + found.alone.estimate)
    assert found.at_first_step.estimate == pytest.approx(np.sum(y == 0) / n)
    for interval in (found.before, found.together, found.after, found.alone, found.against):
        assert interval.low < interval.estimate < interval.high
    rows = found.table.set_index(["given", "order"])
    given = rows.loc["the argmax changes"]
    assert given.index.tolist() == list(ORDERS)
    assert given["share"].sum() == pytest.approx(1)
    assert given["share"]["before"] == pytest.approx(found.before.estimate)
    assert (given["low"]["before"], given["high"]["before"]) == (found.before.low, found.before.high)
    other = rows.loc["the state shifts"]
    assert other["positions"]["before"] == np.sum((x < NEVER) & (y < x))
    assert other["positions"]["after"] == given["positions"]["before"], (
        "the same positions, seen from the shift"
    )
    assert other["positions"]["alone"] == np.sum((x < NEVER) & (y == NEVER))
    last = found.changed[found.changed["step"] == STEPS[-1]].set_index("where")
    shares = [(y[x < NEVER] < NEVER).mean(), (y[x == NEVER] < NEVER).mean()]
    assert last["changed"].tolist() == pytest.approx(shares)
    assert found.difference.estimate == pytest.approx(shares[0] - shares[1])
    assert found.verdict.startswith("The state ")
    for words in ("Within one pass, iterations 1 to 4", "600 positions", "20 questions"):
        assert words in found.verdict
    assert found.given["share"].to_dict() == given["share"].to_dict()


def test_the_lowest_layer_is_where_the_shift_begins():
    x, y = random_events(seed=2)
    lowest = np.random.default_rng(0).integers(0, LAYERS, x.shape)
    pairs, outputs = tables(x, y, lowest=lowest)
    rows = state_and_argmax(asked(pairs, outputs))
    assert np.array_equal(rows.lowest_layer, np.where(x < NEVER, lowest, -1).ravel())
    table = found_in(pairs, outputs).by_layer
    for layer, share in zip(table["layer"], table["share"], strict=True):
        here = (x < NEVER) & (lowest == layer)
        assert share == pytest.approx((y[here] < NEVER).mean())
    assert table["pairs"].sum() == (x < NEVER).sum()


def test_other_comparisons_and_other_pairs_are_not_looked_at():
    x, y = random_events(seed=1)
    within, other = tables(x, y), tables(y, x, "teacher_forced")
    steps = [t.assign(a=2, b=3) for t in within]  # of (i - 1, i)
    both = [pd.concat(parts) for parts in zip(within, other, steps, strict=True)]
    assert found_in(*both).to_dict() == found_in(*within).to_dict()
    replayed = found_in(*both, comparison="teacher_forced")
    assert replayed.before.estimate != found_in(*within).before.estimate
    assert "Teacher-forced, depths 1 to 4" in replayed.verdict


def test_where_everything_shifts_at_once_the_order_says_nothing():
    _, y = random_events(seed=1)
    found = found_in(*tables(np.zeros_like(y), y))
    assert found.against.estimate == 0
    given = found.table[found.table["given"] == "the argmax changes"]
    assert given["share"].to_numpy() == pytest.approx(given["null"].to_numpy())
    assert (given["p"] == 1).all()
    assert found.changed["positions"].tolist() == [600, 0] * NEVER
    assert np.isnan(found.difference.estimate)


def test_without_shifts_every_change_is_against_the_claim():
    _, y = random_events(seed=1)
    found = found_in(*tables(np.full_like(y, NEVER), y))
    assert found.alone.estimate == found.against.estimate == 1
    assert found.by_layer.empty
    assert set(found.figures()) == {"order", "changed"}
    other = found.table[found.table["given"] == "the state shifts"]
    assert (other["positions"] == 0).all()
    assert other[["share", "null", "p"]].isna().all().all()


def test_what_cannot_be_tested_says_why():
    x, y = random_events(seed=1)
    pairs, outputs = tables(x, y)
    still = tables(x, np.full_like(x, NEVER))[1]
    for given, why in (
        ((pairs, still), "the argmax never changes, at 600 positions of 20 questions"),
        ((pairs[:0], outputs), "no pairs of comparison 'within'"),
        ((pairs, outputs[:0]), "no outputs of comparison 'within'"),
        ((pairs[pairs["b"] != 3], outputs), "between 1 and 3"),
        ((pairs.assign(cosine=np.nan), outputs), "no position of comparison 'within' has every overlap"),
    ):
        with pytest.raises(Untestable, match=why):
            found_in(*given)
    with pytest.raises(SSTError, match="lens_jaccard"):
        found_in(pairs, outputs, choices=Choices(overlap="lens_jaccard"))


def test_a_position_without_every_overlap_is_left_out_and_counted():
    x, y = random_events(seed=1)
    pairs, outputs = tables(x, y)
    at = (pairs["question"] == 3) & (pairs["position"] == 5)
    pairs.loc[at & (pairs["layer"] == 2) & (pairs["b"] == 3), "cosine"] = np.nan
    ended = (outputs["question"] == 4) & (outputs["position"] == 7) & (outputs["b"] == 4)
    found = found_in(pairs, outputs[~ended])
    assert (found.n_positions, found.n_excluded) == (598, 2)
    keep = np.ones(x.shape, bool)
    keep[3, 5] = keep[4, 7] = False
    n = (y[keep] < NEVER).sum()
    assert found.before.estimate == pytest.approx(((y < NEVER) & (x < y))[keep].sum() / n)


def test_the_synthetic_runs_of_the_other_analyses_do():
    pairs = pairs_table(questions=12, depths=(2, 3, 4), comparisons=COMPARISONS, seed=1)
    keys = ["question", "comparison", "position", "a", "b", "same_prefix"]
    outputs = pairs[pairs["layer"] == 7][keys].assign(
        argmax_changed=(pairs["cosine"] < 0.9)[pairs["layer"] == 7]
    )
    for comparison in COMPARISONS:
        found = found_in(pairs, outputs, comparison, threshold=0.95)
        assert found.against.estimate == 0, "the argmax changes only where the last layer has shifted"
        assert found.words.capitalize() in found.verdict
        for figure in found.figures().values():
            layout = str(figure.to_dict()["layout"])
            assert found.words in layout
            assert "12 questions" in layout


# Against nudges of the same size


def nudged(true=0.6, random=0.3, elsewhere=0.3, questions=20, positions=20, seed=0):
    """Which nudges change the argmax, given how often each does."""
    rng = np.random.default_rng(seed)
    effect = rng.uniform(-0.1, 0.1, (questions, 1, 1))
    shares = {"true": (true, 1), "random": (random, 3), "elsewhere": (elsewhere, 3)}
    return {
        d: rng.random((questions, positions, k)) < np.clip(s + effect, 0, 1) for d, (s, k) in shares.items()
    }


def test_a_change_that_does_more_than_its_size_is_said_to():
    x, y = random_events(seed=1, positions=20)
    x[:, :10] = 0
    found = found_in(*tables(x, y, "teacher_forced"), "teacher_forced", nudges=nudges_table(nudged()))
    rows = found.beside_perturbations.set_index(["site", "direction", "where"])
    at = ("output", "random", "shifted")
    assert rows["difference_low"][at] < 0.3 < rows["difference_high"][at]
    assert "flips the argmax more often than a random change of the same size" in found.verdict
    assert rows["positions"][at] == (x < NEVER).sum()
    assert rows["positions"]["stream", "true", "stable"] == (x == NEVER).sum()
    less = found_in(*tables(x, y, "teacher_forced"), "teacher_forced", nudges=nudges_table(nudged(0.1, 0.5)))
    assert "flips the argmax less often than" in less.verdict


def test_the_planted_difference_is_inside_its_interval_as_often_as_stated():
    inside = 0
    for seed in range(40):
        table = nudges_table(nudged(0.4, 0.4, seed=seed), directions=("true", "random"))
        every = pd.DataFrame({"question": np.repeat(range(20), 20), "position": np.tile(range(20), 20)})
        found = beside_perturbations(table, every.assign(shifted=True), Resampling(300, 0))
        row = found.set_index(["site", "direction"]).loc[("output", "random")]
        inside += row["difference_low"] <= 0 <= row["difference_high"]
    assert inside >= 33  # 95% nominal, 40 trials; 32 or fewer has probability 0.1% at 93%


def test_only_the_same_positions_are_compared():
    """A nudge that exists at some positions only is held against the true change there."""
    changed = nudged(questions=6)
    changed["true"] = np.zeros((6, 20, 1), bool)
    changed["true"][:, 10:] = True
    table = nudges_table(changed)
    table = table[(table["direction"] != "elsewhere") | (table["position"] >= 10)]
    every = pd.DataFrame({"question": np.repeat(range(6), 20), "position": np.tile(range(20), 6)})
    found = beside_perturbations(table, every.assign(shifted=True), Resampling(300, 0))
    rows = found.set_index(["site", "direction"])
    for site in ("output", "stream"):
        own = rows.loc[(site, "elsewhere")]
        assert own["positions"] == 60
        assert own["difference"] == pytest.approx(1 - own["changed"])


def test_within_takes_its_shifts_from_the_pass_that_was_nudged():
    """The run's own `within` rows read another text."""
    x, y = random_events(seed=1, positions=20)
    shifted = np.zeros(x.shape, bool)
    shifted[:, :5] = True
    table = nudges_table(nudged(), "within", shifted)
    found = found_in(*tables(x, y), nudges=table)
    rows = found.beside_perturbations.set_index(["site", "direction", "where"])
    assert rows["positions"]["output", "true", "shifted"] == 100
    assert rows["positions"]["output", "true", "stable"] == 300
    relative = table.assign(
        relative_l2=[1 - c for c in table["cosine"]], cosine=[c * 0 for c in table["cosine"]]
    )
    other = found_in(*tables(x, y), nudges=relative, choices=Choices(overlap="relative_l2"), threshold=0.8)
    assert other.beside_perturbations.equals(found.beside_perturbations)


def test_the_order_of_nudges_is_the_count():
    """Three sizes of one nudge: the state shifts at the second, the argmax changes at the third, or first."""
    changed = {"true": np.ones((5, 4, 1), bool), "random": np.zeros((5, 4, 3), bool)}
    table = nudges_table(changed, directions=("true", "random"))
    table["cosine"] = [np.full(1, 0.999 if b == 2 else 0.5) for b in table["b"]]
    later = (table["direction"] == "random") & (table["b"] == 4) & (table["seed"] < 2)
    table.loc[later, "argmax_changed"] = True
    found = perturbed_orders(table, 0.99, "cosine", Resampling()).set_index(["direction", "order"])
    assert found["share"]["true", "after"] == 1
    assert found["share"]["random", "before"] == 1
    assert found["positions"]["random", "before"] == 5 * 4 * 2
    assert "elsewhere" not in found.index


def test_without_perturbations_that_part_is_not_known():
    pairs, outputs = tables(*random_events(seed=1))
    table = nudges_table(nudged(), "teacher_forced")
    for nudges in (None, table[:0], table):  # the last: of another comparison
        found = found_in(pairs, outputs, nudges=nudges)
        assert "same size: the run has no norm-matched perturbations (within; " in found.verdict
        assert found.beside_perturbations.empty
        assert found.by_construction.empty
        assert np.isfinite(found.before.estimate), "the rest is there"
        found.figures()
    free = found_in(*tables(*random_events(seed=1), "free_running"), "free_running", nudges=table)
    assert "No random changes of the same size: each depth reads its own text." in free.verdict
    jaccard = found_in(
        pairs.assign(lens_jaccard=pairs["cosine"]),
        outputs,
        nudges=nudges_table(nudged(), "within"),
        choices=Choices(overlap="lens_jaccard"),
    )
    assert "same size: norm-matched perturbations have no lens_jaccard" in jaccard.verdict


def test_nudges_elsewhere_than_the_run_are_said_to_be_useless():
    x, y = random_events(seed=1, questions=3)
    table = nudges_table(nudged(questions=3)).assign(question=lambda t: t["question"] + 50)
    found = found_in(*tables(x, y, "teacher_forced"), "teacher_forced", nudges=table)
    assert "No random changes of the same size: no perturbed position has all its overlaps" in found.verdict
    stable = found_in(
        *tables(np.full_like(x, NEVER), y, "teacher_forced"),
        "teacher_forced",
        nudges=nudges_table(nudged(questions=3)),
    )
    assert "No perturbed position shifts" in stable.verdict


def test_nan_in_nudges_is_left_out():
    x, y = random_events(seed=1, positions=20)
    table = nudges_table(nudged())
    table.loc[table["position"] == 0, "kl"] = np.nan
    found = found_in(*tables(np.zeros_like(x), y, "teacher_forced"), "teacher_forced", nudges=table)
    assert (found.beside_perturbations["positions"] == 20 * 19).all()
    for figure in found.figures().values():
        assert "20 questions" in str(figure.to_dict()["layout"])
