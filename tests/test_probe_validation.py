"""Nothing of a held-out question's label reaches its score; a signal is found, and none is not."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from synthetic_states import states

from sst_interp.analyses.statistics.along_texts import p_value
from sst_interp.experiments.probe.fit import Design, Inputs
from sst_interp.experiments.probe.scores import aucs, pairs_in_order, pairs_scored
from sst_interp.experiments.probe.validate import (
    _losses,
    _score,
    blocks_of,
    choose,
    folds,
    leave_one_out,
    leave_pair_out,
    permuted,
    plain_leave_one_out,
    random_keys,
    rebalanced_partner,
    score,
)

QUICK = Design(dims=(2, 4), penalties=(0.03,), blocks=3)


def labels(rows=5, questions=23, positive=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(questions) < positive, (rows, 1)), axis=1).astype(np.float32)


def as_rows(positive):
    return torch.from_numpy(np.atleast_2d(positive).astype(np.float32))


def test_blocks_are_even_in_both_classes_and_follow_the_labels():
    y = labels()
    blocks = blocks_of(y, 4, random_keys(23, 0))
    for row, own in zip(blocks, y > 0.5, strict=True):
        for side in (own, ~own, np.ones(23, bool)):
            counts = np.bincount(row[side], minlength=4)
            assert counts.max() - counts.min() <= 1
    assert np.array_equal(blocks_of(y[:2], 4, random_keys(23, 0)), blocks[:2])
    assert not np.array_equal(blocks_of(y, 4, random_keys(23, 0, 1)), blocks)


def test_every_question_is_scored_once_and_never_learnt_from():
    y = labels()
    blocks = blocks_of(y, 4, random_keys(23, 0))
    for scheme in (leave_one_out, plain_leave_one_out, folds):
        splits = scheme(y, blocks, 0)
        assert (splits.test.sum(1) == 1).all()
        assert not (splits.test & splits.use).any()
        for row, split, question in np.argwhere(splits.test):
            assert blocks[row, question] in splits.excluded[splits.which[row, split]]


def test_rebalanced_splits_all_have_the_same_shares():
    y = labels()
    blocks = blocks_of(y, 4, random_keys(23, 0))
    ones = (leave_one_out(y, blocks, 0).use * y[:, None]).sum(2)
    assert (ones == 6).all()
    assert (leave_one_out(y, blocks, 0).use.sum(2) == 21).all()
    plain = (plain_leave_one_out(y, blocks, 0).use * y[:, None]).sum(2)
    assert np.array_equal(plain == 6, y > 0.5)  # the share falls where the question is positive: the bias
    partner = rebalanced_partner(y, 0)
    assert (np.take_along_axis(y, partner, 1) != y).all()


def test_pairs_are_all_pairs_of_both_classes():
    y = labels(rows=1)
    splits = leave_pair_out(y, blocks_of(y, 4, random_keys(23, 0)), 0)
    assert splits.test.shape == (1, 7 * 16, 23)
    assert ((splits.test * y[:, None]).sum(2) == 1).all()
    assert ((splits.test * (1 - y[:, None])).sum(2) == 1).all()
    assert len(np.unique(splits.test[0], axis=0)) == 7 * 16
    assert not (splits.test & splits.use).any()


@pytest.mark.parametrize("scheme", [leave_one_out, folds])
def test_the_label_of_a_held_out_question_does_not_reach_its_score(scheme):
    features, _ = states(questions=24, layers=2, d_model=8, positive=9)
    inputs, y = Inputs(features.states), labels(1, 24, 9)
    blocks = blocks_of(y, 3, random_keys(24, 0))
    splits = scheme(y, blocks, 0)

    def scored(labels):
        rows = torch.from_numpy(labels)
        return _score(
            QUICK, inputs, rows, splits, choose(QUICK, inputs, rows, blocks, splits.excluded), False
        )

    before = scored(y)
    for question in range(24):
        flipped = y.copy()
        flipped[0, question] = 1 - flipped[0, question]
        after = scored(flipped)
        assert np.isclose(after.logits[0, question], before.logits[0, question], atol=1e-4)
        assert not np.allclose(after.logits, before.logits, atol=1e-2)
        split = splits.test[0, :, question].argmax()
        assert after.dims[0, split] == before.dims[0, split]


def test_what_is_chosen_without_a_block_knows_nothing_of_its_labels():
    features, _ = states(questions=30, layers=4, d_model=8)
    design, inputs, y = Design(dims=(1, 2, 4), blocks=5), Inputs(features.states), labels(1, 30, 12)
    blocks = blocks_of(y, 5, random_keys(30, 0))
    excluded = (frozenset({0}), frozenset({1, 2}), frozenset())
    before = choose(design, inputs, torch.from_numpy(y), blocks, excluded)
    for case, out in enumerate(excluded[:2]):
        other = np.where(np.isin(blocks, list(out)), 1 - y, y).astype(np.float32)
        after = choose(design, inputs, torch.from_numpy(other), blocks, excluded)
        for a, b in zip(after, before, strict=True):
            assert a[0, case] == b[0, case]


def test_the_best_candidate_of_each_coordinate_is_chosen_and_judged_alone_as_together():
    features, _ = states(questions=24, layers=3, d_model=8, positive=9)
    axes = np.arange(3), np.array([1, 2, 4]), np.array([0.003, 0.1, 1.0])
    design = Design(dims=(1, 2, 4), penalties=tuple(axes[2]), blocks=4)
    inputs, y, excluded = Inputs(features.states), labels(2, 24, 9), (frozenset({0}), frozenset({1, 2}))
    data = design, inputs, torch.from_numpy(y), blocks_of(y, 4, random_keys(24, 0)), excluded
    current = [np.full((2, 2), axis[1]) for axis in axes]
    for place, chosen in enumerate(choose(*data)):
        tried = [[*current[:place], np.full((2, 2), v), *current[place + 1 :]] for v in axes[place]]
        losses = np.stack([_losses(*data, [one])[0] for one in tried])
        assert np.allclose(_losses(*data, tried), losses, atol=1e-5)
        current[place] = axes[place][losses.argmin(0)]
        assert np.array_equal(chosen, current[place])
    assert any(len(np.unique(chosen)) > 1 for chosen in current)


def test_a_labelling_among_many_is_that_labelling_alone():
    features, _ = states(questions=20, layers=2, d_model=6, positive=8)
    inputs, rows = Inputs(features.states), permuted(np.arange(20) < 8, 4)
    together = score(QUICK, inputs, rows, ("leave_one_out", "folds"))
    for i in range(4):
        alone = score(QUICK, inputs, rows[[i]], ("leave_one_out", "folds"))
        for scheme in together:
            assert np.allclose(alone[scheme].logits[0], together[scheme].logits[i], atol=1e-4)


def test_a_strong_signal_is_found_in_its_layer_and_dimensions_by_every_scheme():
    features, own = states(strength=2.5, dims=3, layer=1, seed=2)
    inputs, positive = Inputs(features.states), own.positive
    schemes = ("leave_one_out", "plain_leave_one_out", "folds", "leave_pair_out")
    for kind in ("two_layer", "l2", "l1"):
        design = Design(kind=kind, dims=(3,), penalties=(0.03,), blocks=4)
        found = score(design, inputs, as_rows(positive), schemes, keep=True)
        for scheme, scores in found.items():
            pairs = pairs_scored if scheme == "leave_pair_out" else pairs_in_order
            assert pairs(scores.logits[0], positive).share > 0.9
            assert (scores.layer == 1).mean() > 0.8  # 1 in 3 by chance
        if kind == "two_layer":
            read = np.concatenate(found["leave_one_out"].read)
            assert np.isin(read, [0, 1, 2]).mean() > 0.9


def test_the_auc_comes_near_the_best_there_is_and_not_above_it():
    """Two dimensions shifted by s: the best possible AUC is Phi(s sqrt(2) / sqrt(2))."""
    s, found = 1.0, []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        positive = np.arange(120) < 40
        x = rng.normal(size=(120, 1, 10))
        x[positive, 0, :2] += s
        design = Design(dims=(2, 6), blocks=4)
        scores = score(design, Inputs(torch.from_numpy(x).float()), as_rows(positive))["leave_one_out"]
        found.append(pairs_in_order(scores.logits[0], positive).share)
    best = norm.cdf(s)
    assert best - 0.1 < np.mean(found) < best + 0.03


def p_of(strength, seed, permutations=19, scheme="leave_one_out"):
    features, own = states(24, 2, 6, 10, strength, dims=2, seed=seed)
    inputs, positive = Inputs(features.states), own.positive
    real = score(QUICK, inputs, as_rows(positive), (scheme,))[scheme].logits
    rows = permuted(positive, permutations, seed)
    drawn = score(QUICK, inputs, rows, (scheme,))
    observed = aucs(real, positive[None])[0]
    return p_value(aucs(drawn[scheme].logits, rows.numpy() > 0.5), observed, 1)


def test_without_a_signal_p_values_are_uniform():
    """Choosing layer and dimensions is in the null, so it cannot make them small."""
    p = np.array([p_of(0.0, seed) for seed in range(50)])
    spread = p - np.random.default_rng(0).random(50) / 20  # p is one of 1/20 ... 20/20
    assert kstest(spread, "uniform").pvalue > 0.001
    assert (p <= 0.05).mean() <= 0.16  # 5% nominal, 50 trials; 9 or more has probability 0.1%


def test_power_rises_with_the_signal():
    power = [np.mean([p_of(s, seed) <= 0.05 for seed in range(8)]) for s in (0.7, 2.5)]
    assert power[0] < power[1]
    assert power[1] > 0.8


def test_selection_outside_the_fold_shows_as_the_difference_it_makes():
    """Noise: honest scores know nothing, and the same with the selection made on all questions seem to."""
    design = Design(dims=(4,), penalties=(0.03,), blocks=3)
    honest, leaky = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        inputs = Inputs(torch.from_numpy(rng.normal(size=(40, 1, 150))).float())
        positive = rng.permutation(np.arange(40) < 15)
        for leak, to in ((False, honest), (True, leaky)):
            own = Design(**{**design.__dict__, "leak": leak})
            logits = score(own, inputs, as_rows(positive))["leave_one_out"].logits[0]
            to.append(pairs_in_order(logits, positive).share)
    assert abs(np.mean(honest) - 0.5) < 0.15
    assert np.mean(leaky) > 0.8
    assert (np.array(leaky) > honest).all()


def test_permuted_labels_keep_the_classes_and_their_seed():
    rows = permuted(np.arange(20) < 6, 50, seed=3).numpy()
    assert (rows.sum(1) == 6).all()
    assert np.array_equal(rows, permuted(np.arange(20) < 6, 50, seed=3).numpy())
    assert len(np.unique(rows, axis=0)) > 45


def test_two_questions_of_a_class_are_enough_to_go_through():
    features, _ = states(questions=9, layers=2, d_model=5)
    positive = np.arange(9) < 2
    found = score(
        QUICK, Inputs(features.states), as_rows(positive), ("leave_one_out", "folds", "leave_pair_out")
    )
    assert all(np.isfinite(scores.logits).all() for scores in found.values())
