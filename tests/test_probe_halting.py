"""The halting probe as a finding: what it says of a signal, of none, and of runs it cannot be asked of."""

import json
from dataclasses import fields

import numpy as np
import pytest
import tiny_run
import torch
from scipy.stats import binomtest, fisher_exact
from sklearn.metrics import brier_score_loss, roc_auc_score
from synthetic_states import labels, states

from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.probe import features_of
from sst_interp.experiments.probe.finding import Halting, halting, halting_of
from sst_interp.experiments.probe.fit import Design
from sst_interp.experiments.probe.saved import layer_of, load_probe, probe_run
from sst_interp.experiments.probe.scores import (
    PAPER,
    PAPER_P,
    Hits,
    auc,
    auc_difference,
    aucs,
    balanced_accuracies,
    binomial_p,
    binomial_readings,
    brier,
    calibration,
    decisions,
    dims_read,
    fisher_p,
    implied_rate,
    pairs_in_order,
    pairs_scored,
    probabilities,
    stability,
)
from sst_interp.runs.store import open_run

QUICK = Design(dims=(2, 4), penalties=(0.03,), blocks=3)


def scored(n=60, positive=20, shift=1.0, seed=0):
    rng = np.random.default_rng(seed)
    own = rng.permutation(np.arange(n) < positive)
    return rng.normal(size=n) + shift * own, own


@pytest.fixture(scope="module")
def planted():
    features, own = states(40, 3, 12, 15, strength=1.8, dims=2, layer=1, seed=1)
    return halting_of(features, own, None, QUICK, permutations=39, repeats=2, resamples=300)


@pytest.fixture(scope="module")
def nothing():
    features, own = states(40, 3, 12, 15, strength=0.0, seed=5)
    return halting_of(features, own, None, QUICK, permutations=39, repeats=2, resamples=300)


def test_the_auc_is_sklearns_ties_included():
    scores, own = scored()
    scores = scores.round(1)
    assert pairs_in_order(scores, own).share == pytest.approx(roc_auc_score(own, scores))
    many = np.stack([scores, -scores])
    assert aucs(many, np.stack([own, own])).sum() == pytest.approx(1)
    fold = np.arange(60) % 3
    within = pairs_in_order(scores, own, fold)
    by_hand = [roc_auc_score(own[fold == k], scores[fold == k]) for k in range(3)]
    sizes = [own[fold == k].sum() * (~own[fold == k]).sum() for k in range(3)]
    assert within.share == pytest.approx(np.average(by_hand, weights=sizes))


def test_pairs_that_were_scored_one_by_one():
    scores, own = scored(12, 5)
    ones, zeros = np.flatnonzero(own), np.flatnonzero(~own)
    by_pair = np.array([[scores[i], scores[j]] for i in ones for j in zeros])
    assert np.array_equal(pairs_scored(by_pair, own).higher, pairs_in_order(scores, own).higher)


def test_intervals_of_fixed_scores_hold_the_truth_as_often_as_stated():
    """Scores that were not trained on the questions: N(1, 1) against N(0, 1), AUC = Phi(1 / sqrt 2) =
    0.760.
    """
    inside = 0
    for seed in range(60):
        scores, own = scored(80, 30, seed=seed)
        found = auc(pairs_in_order(scores, own), resamples=300)
        inside += found.low <= 0.7602 <= found.high
    assert inside >= 51  # 95% nominal, 60 trials; 50 or fewer has probability 0.1%


def test_a_difference_of_a_score_and_itself_is_nothing():
    scores, own = scored()
    one = pairs_in_order(scores, own)
    same = auc_difference(one, one, 100)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    other = auc_difference(one, pairs_in_order(-scores, own), 100)
    assert other.estimate == pytest.approx(2 * one.share - 1)


def test_decisions_by_hand_and_the_two_that_need_no_probe():
    own = np.array([True, True, False, False, False])
    said = decisions(own, np.array([True, False, True, False, False]), 50)
    assert (said.sensitivity.estimate, said.specificity.estimate) == (0.5, 2 / 3)
    assert said.balanced.estimate == pytest.approx(7 / 12)
    assert said.called == 0.4
    for call in (True, False):
        said = decisions(own, np.full(5, call), 50)
        assert (said.sensitivity.estimate, said.specificity.estimate) == (call, not call)
        assert said.balanced.estimate == 0.5
    rows = np.array([[True, False, True, False, False]] * 2)
    assert balanced_accuracies(np.stack([own, own]), rows) == pytest.approx([7 / 12] * 2)


def test_probabilities_are_calibrated_where_scores_are_log_odds():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=4000)
    shift = -1.0
    own = rng.random(4000) < 1 / (1 + np.exp(-(scores + shift)))
    rate = own.mean()
    chance = probabilities(scores + shift - np.log(rate / (1 - rate)), own)
    assert brier(chance, own, 50).estimate == pytest.approx(brier_score_loss(own, chance))
    table = calibration(chance, own, resamples=200)
    assert (table["observed_low"] - 0.02 <= table["predicted"]).all()
    assert (table["predicted"] <= table["observed_high"] + 0.02).all()
    assert table["questions"].sum() == 4000
    assert probabilities(np.zeros(10), np.arange(10) < 3) == pytest.approx(np.full(10, 2 / 8))
    assert np.isfinite(probabilities(np.array([1e9, -1e9, 0, 0]), np.arange(4) < 2)).all()
    assert len(calibration(np.full(10, 0.3), np.arange(10) < 3)) == 1


def test_29_of_48_can_be_read_both_ways():
    rate = implied_rate(PAPER, PAPER_P)
    assert rate == pytest.approx(0.37, abs=0.005)
    assert binomial_p(PAPER, 0.5) == pytest.approx(0.0967, abs=1e-4)
    assert binomial_p(PAPER, 0.37) == pytest.approx(binomtest(29, 48, 0.37, "greater").pvalue)
    table = binomial_readings(Hits(12, 20), called=30, questions=60, others={"permuted": 0.2})
    paper = table[table["whose"] == "paper"].set_index("rate")["p"]
    assert paper.iloc[0] == pytest.approx(PAPER_P)
    assert paper.loc[48 / 198] == pytest.approx(binomtest(29, 48, 48 / 198, "greater").pvalue)
    assert paper.loc[48 / 198] < 1e-6  # recall at the base rate: as generous as the null can be made
    own = table[table["whose"] == "this run"].set_index("against")
    assert own.loc["share of positive questions", "rate"] == pytest.approx(1 / 3)
    assert own.loc["share of questions it calls positive", "rate"] == 0.5
    exact = fisher_exact([[12, 18], [8, 22]], alternative="greater").pvalue
    assert own.filter(like="Fisher", axis=0)["p"].iloc[0] == pytest.approx(exact)
    assert own.loc["permuted", "p"] == 0.2
    always = table[table["whose"] == "always-halt"].set_index("against")
    assert (always["found"] == always["of"]).all()
    assert always.loc["one half", "p"] < 1e-5  # recall alone makes a perfect probe of it ...
    assert always.filter(like="Fisher", axis=0)["p"].iloc[0] == 1  # ... which tells nothing apart


def test_fishers_test_is_about_both_margins():
    assert fisher_p(Hits(5, 5), 5, 50) < 1e-5
    assert fisher_p(Hits(5, 5), 50, 50) == 1
    assert fisher_p(Hits(0, 5), 0, 50) == 1


def test_which_dimensions_were_read():
    same = dims_read([np.array([1, 5])] * 6, np.full(6, 2), 10, 4)
    assert (same.count, same.share, same.layers, same.stability, same.core) == (2, 0.2, {2: 6}, 1, 2)
    assert same.table["share"].tolist() == [1, 1]
    rng = np.random.default_rng(0)
    sets = [rng.choice(100, 5, replace=False) for _ in range(200)]
    random = dims_read(sets, np.zeros(200, int), 100, 1)
    assert random.stability == pytest.approx(0, abs=0.02)
    assert random.core == 0
    assert random.spread < 0.1
    low = dims_read([np.arange(5)] * 3, np.zeros(3, int), 100, 1)
    assert low.spread == pytest.approx(0.95, abs=0.01)
    assert low.core_p < 0.001
    other_layer = dims_read([np.arange(5)] * 4, np.array([0, 0, 1, 1]), 100, 2)
    assert other_layer.stability < 0.5  # the same numbers, but not the same dimensions
    assert np.isnan(stability([3], np.array([1, 1, 1]), 1, 10))
    assert np.isnan(dims_read([np.arange(4)] * 3, np.zeros(3, int), 4, 1).stability)
    assert dims_read([np.array([], int)] * 2, np.zeros(2, int), 4, 1).count == 0


def test_a_planted_signal_is_found_and_said(planted):
    assert planted.auc.estimate > 0.9
    assert planted.p_auc == planted.p_fold_auc == 1 / 40
    assert planted.pair_auc.estimate > 0.9
    assert planted.fold_auc.estimate > 0.9
    assert planted.hits / planted.n_positive > 0.7
    assert planted.dims is not None
    assert planted.dims.layers == {1: 40}
    assert set(planted.dims.table[planted.dims.table["share"] > 0.5]["dim"]) >= {0, 1}
    assert planted.selectivity > 0
    assert planted.brier.estimate < planted.base_brier
    assert abs(planted.leak.estimate) < 0.1
    said = "The probe tells must-halt questions from the others. 15 of 40 questions positive. "
    assert planted.verdict.startswith(said)
    assert planted.verdict.count("[") == 3  # three numbers with their intervals


def test_no_signal_is_said_to_be_none(nothing):
    assert nothing.p_auc > 0.05
    assert nothing.verdict.startswith("The probe tells no more than permuted labels do. ")
    assert nothing.leak.estimate > 0.1  # what the selection alone would have found


def test_always_and_never_stand_beside_it(planted):
    table = planted.table.set_index("name")
    always, never = table.loc["always-halt"], table.loc["never-halt"]
    assert (always["sensitivity"], always["specificity"], always["auc"]) == (1, 0, 0.5)
    assert (never["sensitivity"], never["specificity"], never["auc"]) == (0, 1, 0.5)
    assert always["brier"] == pytest.approx(25 / 40)
    assert table.index[0] == "two-layer probe"
    states = {"logistic regression, L2", "logistic regression, L1", "L2, layer 0"}
    assert states | {"prompt length", "entropy", "margin", "these together"} <= set(table.index)
    assert any("random layer" in name for name in table.index)
    for name, figure in planted.figures().items():
        drawn = str(figure.to_dict())
        assert name == "dims" or ("always-halt" in drawn and "never-halt" in drawn)


def test_the_numbers_are_those_of_the_scores(planted):
    scores, own = planted.scores["score"].to_numpy(), planted.scores["positive"].to_numpy(bool)
    assert planted.auc.estimate == pytest.approx(roc_auc_score(own, scores))
    assert planted.hits == (own & (scores > 0)).sum()
    assert planted.called == (scores > 0).sum()
    assert planted.sensitivity.estimate == planted.hits / planted.n_positive
    assert len(planted.null) == planted.permutations == 39
    assert planted.readings.set_index("against").loc["labels permuted 39 times", "p"] == planted.p_hits
    checks = planted.checks.set_index("name")
    assert checks["value"].iloc[:5].tolist() == [
        area.estimate
        for area in (planted.auc, planted.pair_auc, planted.fold_auc, planted.pooled_auc, planted.leaky_auc)
    ]
    assert checks.loc["balanced accuracy", "p"] == planted.p_balanced
    assert checks.loc["Brier score", "knowing_nothing"] == planted.base_brier


def test_everything_is_json_and_every_figure_says_questions_and_units(planted, nothing):
    for result in (planted, nothing):
        again = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert again["n_positive"] == 15
        assert "<h3>" in result._repr_html_()
        for figure in result.figures().values():
            assert "40 questions" in figure.layout.title.subtitle.text
            assert figure.layout.xaxis.title.text
    assert {f.name for f in fields(Halting)} >= {"definition", "p_auc", "leak", "readings", "comparison"}


def test_the_same_seed_gives_the_same_finding_and_a_layer_can_be_named():
    features, own = states(24, 2, 6, 10, strength=1.0, seed=3)
    options = {"design": QUICK, "permutations": 3, "repeats": 1, "resamples": 50}
    one = halting_of(features, own, 0, **options)
    assert halting_of(features, own, 0, **options).to_dict() == one.to_dict()
    assert set(one.scores["layer"]) == {0}
    untested = halting_of(features, own, 0, **(options | {"permutations": 0}))
    assert np.isnan(untested.p_auc)
    assert untested.verdict.startswith("Not tested: no labels were permuted. ")
    untested.figures()
    assert untested.auc == one.auc


def test_what_does_not_vary_is_no_alternative():
    features, own = states(24, 2, 6, 10, seed=3)
    still = features_of(features.states, torch.tensor([[100.0, torch.nan, 1.0]]).repeat(24, 1))
    names = halting_of(still, own, 0, QUICK, 0, 1, 50).table["name"].tolist()
    assert "prompt length" not in names
    assert "entropy" not in names
    assert "these together" not in names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve questions, of which depth 2 breaks every third."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = tiny_run.tiny_recipe(questions=12)
    found = open_run(tiny_run.capture(folder, recipe, [[i, i + 1] for i in range(0, 12, 2)]))
    table = found.questions
    found.questions = table.assign(correct=(table["depth"] == 1) | (table["question"] % 3 > 0))
    return found


def test_from_a_run_to_a_saved_probe(run, tmp_path):
    seen = []
    found = probe_run(
        run, "must-halt", permutations=5, design=QUICK, save=tmp_path / "p",
        progress=lambda what, done, of: seen.append((what, done, of)),
    )  # fmt: skip
    assert found.halting.n_questions == 12
    assert found.halting.n_positive == 4
    assert seen[-1] == ("permutations", 5, 5)
    assert "probe" in found.routing.policies["name"].to_numpy()
    assert set(found.routing.policies["name"]) >= {
        "convergence of the state",
        "KL between iterations",
        "entropy",
    }
    kept = load_probe(tmp_path / "p")
    assert kept.model["model_hash"] == "abc"
    assert kept.evidence["run"] == "tiny"
    assert kept.evidence["p"] == found.halting.p_auc
    json.dumps([found.halting.to_dict(), found.routing.to_dict()], allow_nan=False)


def test_bad_input_is_a_line(run, tmp_path):
    with pytest.raises(SSTError, match="layer 7 was not captured: there are layers 0 to 1"):
        halting(run, layer=7)
    with pytest.raises(SSTError, match="unknown label"):
        halting(run, "halt")
    with pytest.raises(SSTError, match="neither auto nor a number"):
        probe_run(run, layer="first")
    assert (layer_of("auto"), layer_of(None), layer_of("15"), layer_of(3)) == (None, None, 15, 3)
    bare = open_run(tiny_run.capture(tmp_path / "bare", tiny_run.tiny_recipe("bare", keep="none")))
    with pytest.raises(Untestable, match="all equal"):
        halting(bare)
    bare.questions = run.questions[run.questions["question"] < 6]
    with pytest.raises(SSTError, match="keeps no states"):
        halting(bare)
    same = features_of(torch.ones(6, 2, 4))
    with pytest.raises(Untestable, match="features are constant"):
        halting_of(same, labels(np.arange(6) < 3))
