"""Many probes at once are each probe alone, and what a textbook would fit."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sst_interp.errors import SSTError
from sst_interp.experiments.probe.fit import (
    BETA_1,
    BETA_2,
    RATE,
    Design,
    Inputs,
    Problems,
    _start,
    balanced_weights,
    fit,
    gather,
    moments,
    precondition,
    separation,
    train_logistic,
    train_two_layer,
)


def problem(problems=5, k=4, questions=30, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(problems, k, questions, generator=g, dtype=dtype)
    y = (torch.rand(problems, questions, generator=g) < 0.4).to(dtype)
    z[:, 0] += y
    use = (torch.rand(problems, questions, generator=g) < 0.8).to(dtype)
    return z, y, use


def by_autograd(z, y, weight, penalty, hidden, steps, seed):
    """One probe by torch's own autograd and Adam."""
    k = z.shape[0]
    start = _start(k, hidden, seed).to(z)
    w = start[: hidden * (k + 1)].view(hidden, k + 1)
    params = [w[:, :k], w[:, k], start[-hidden - 1 : -1], start[-1]]
    w, b, u, c = params = [p.clone().requires_grad_() for p in params]
    adam = torch.optim.Adam(params, lr=RATE, betas=(BETA_1, BETA_2))
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
        logits = u @ torch.relu(w @ z + b[:, None]) + c
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum")
        loss = loss + penalty / 2 * (w.square().sum() + u.square().sum())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return (u @ torch.relu(w @ z + b[:, None]) + c).detach()


def test_the_two_layer_probe_is_autograds():
    z, y, use = problem()
    weight, penalty = balanced_weights(y, use), torch.tensor([0.0, 0.01, 0.1, 1.0, 0.03])
    logits, found = train_two_layer(z, y, weight, penalty.double(), hidden=6, steps=25, seed=3)
    for i in range(len(z)):
        alone = by_autograd(z[i], y[i], weight[i], float(penalty[i]), 6, 25, 3)
        assert torch.allclose(logits[i], alone, atol=1e-8)
    assert torch.allclose(found.logits(z), logits, atol=1e-12)


def test_questions_left_out_are_not_learnt_from():
    z, y, use = problem()
    z2, y2 = torch.where(use[:, None] > 0, z, 9.0), torch.where(use > 0, y, 1 - y)
    options = {"penalty": torch.full((5,), 0.01).double()}
    _, one = train_two_layer(z, y, balanced_weights(y, use), **options)
    _, other = train_two_layer(z2, y2, balanced_weights(y2, use), **options)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_both_classes_weigh_the_same_and_all_weights_are_one():
    _, y, use = problem()
    weight = balanced_weights(y, use)
    assert torch.allclose(weight.sum(1), torch.ones(5).double())
    assert torch.allclose((weight * y).sum(1), torch.full((5,), 0.5).double())
    assert (weight[use == 0] == 0).all()
    alone = balanced_weights(torch.ones(1, 4), torch.ones(1, 4))
    assert torch.equal(alone, torch.full((1, 4), 0.25))


def linear(d=12, problems=3, questions=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(questions, d, generator=g, dtype=torch.float64) * torch.linspace(0.5, 3, d) + 2
    y = (torch.rand(problems, questions, generator=g) < 0.4).double()
    x[:, 0] += 2 * y[0]
    use = (torch.rand(problems, questions, generator=g) < 0.8).double()
    return x, y, use


def test_ridge_logistic_regression_is_sklearns():
    x, y, use = linear()
    found, weight = moments(x, use), balanced_weights(y, use)
    penalty = torch.tensor([0.02, 0.1, 0.4]).double()
    logits, _ = train_logistic(x, *found, y, weight, penalty, steps=2000)
    for i in range(3):
        keep = use[i] > 0
        z = ((x - found.mean[i]) * found.scale[i]).numpy()
        model = LogisticRegression(C=1 / (float(penalty[i]) * x.shape[1]), max_iter=2000, tol=1e-10)
        model.fit(z[keep], y[i][keep].numpy(), sample_weight=weight[i][keep].numpy())
        assert np.allclose(logits[i], model.decision_function(z), atol=1e-4)


def test_lasso_logistic_regression_is_where_it_can_get_no_better():
    x, y, use = linear()
    found, weight = moments(x, use), balanced_weights(y, use)
    penalty = torch.tensor([0.02, 0.1, 0.4]).double()
    logits, (w, _) = train_logistic(x, *found, y, weight, penalty, l1=True, steps=4000)
    z = (x[None] - found.mean[:, None]) * found.scale[:, None]
    at_zero = ((0.5 - y) * weight)[:, None] @ z
    threshold = penalty * at_zero[:, 0].abs().amax(1)
    error = (logits.sigmoid() - y) * weight
    gradient = (error[:, None] @ z)[:, 0]
    assert error.sum(1).abs().max() < 1e-6  # the constant is free
    read = w != 0
    assert read.any(1).all()
    assert not read.all()
    assert torch.allclose(gradient[read], (-threshold[:, None] * w.sign())[read], atol=1e-5)
    assert (gradient.abs() <= threshold[:, None] + 1e-5).all()


def test_the_largest_l1_penalty_reads_nothing():
    x, y, use = linear()
    found, weight = moments(x, use), balanced_weights(y, use)
    _, params = train_logistic(x, *found, y, weight, torch.full((3,), 1.001).double(), l1=True)
    assert not params.w.any()
    _, params = train_logistic(x, *found, y, weight, torch.full((3,), 0.9).double(), l1=True)
    assert (params.w != 0).any(1).all()


def test_dimensions_are_ranked_as_t_tests_rank_them():
    from scipy.stats import ttest_ind

    x, y, use = linear(problems=4)
    score = separation(x, y, use, moments(x, use))
    for i in range(4):
        ones, zeros = (x[(use[i] > 0) & (y[i] == side)].numpy() for side in (1, 0))
        t = np.abs(ttest_ind(ones, zeros).statistic)
        assert np.array_equal(np.argsort(t), np.argsort(score[i].numpy()))


def test_dimensions_that_are_constant_in_training_are_never_first_and_read_as_0():
    x, y, use = linear()
    x[:, 3] = 7.0
    x[:, 5] = torch.where(use[0] > 0, 1.0, 100.0)  # varies only where problem 0 may not look
    found = moments(x, use)
    assert found.scale[:, 3].eq(0).all()
    assert found.scale[0, 5] == 0
    assert separation(x, y, use, found)[:, 3].eq(0).all()
    assert gather(x, torch.tensor([[3], [3], [3]]), found).eq(0).all()


def test_large_offsets_and_scales_do_not_cost_precision():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=g)
    there, mean, scale = precondition(x * 0.5 + 25_000)
    assert torch.allclose(there.std(0, correction=0), torch.ones(6), atol=1e-5)
    assert torch.allclose(mean / 25_000, torch.ones(6), atol=1e-3)
    assert torch.allclose(scale, 1 / (x * 0.5 + 25_000).double().std(0, correction=0).float(), atol=1e-4)
    constant, _, scale = precondition(torch.full((50, 2), 25_000.3))
    assert not constant.any()
    assert not scale.any()


def many(problems=70, questions=24, layers=3, d=10, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(questions, layers, d))).float()
    y = torch.from_numpy((rng.random((4, questions)) < 0.4).astype(np.float32))
    table = Problems(
        rng.integers(0, 4, problems),
        rng.random((problems, questions)) < 0.9,
        rng.integers(0, layers, problems),
        rng.choice([2, 5], problems),
        rng.choice([0.01, 0.1], problems),
    )
    return x, y, table


@pytest.mark.parametrize("kind", ["two_layer", "l2", "l1"])
def test_a_problem_in_a_crowd_is_the_problem_alone(kind):
    x, y, table = many()
    design, inputs = Design(kind=kind), Inputs(x)
    logits = fit(design, inputs, y, table).logits
    for i in range(0, 70, 9):
        one = Problems(*(column[[i]] for column in table))
        assert torch.allclose(fit(design, inputs, y, one).logits[0], logits[i], atol=1e-4)


@pytest.mark.parametrize("kind", ["two_layer", "l2"])
def test_units_and_order_of_questions_make_no_difference(kind):
    x, y, table = many()
    design = Design(kind=kind)
    logits = fit(design, Inputs(x), y, table).logits
    other = x * torch.linspace(0.01, 50, 10) - 30
    assert torch.allclose(fit(design, Inputs(other), y, table).logits, logits, atol=2e-2)
    order = np.random.default_rng(1).permutation(24)
    turned = table._replace(use=table.use[:, order])
    assert torch.allclose(
        fit(design, Inputs(x[order]), y[:, order], turned).logits, logits[:, order], atol=2e-2
    )


def test_the_number_of_cores_changes_no_bit():
    x, y, table = many()
    cores, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fit(Design(), Inputs(x), y, table).logits)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(cores)
    assert torch.equal(*found)


def test_what_was_read_and_the_weights_come_back_on_request():
    x, y, table = many()
    fits = fit(Design(), Inputs(x), y, table, keep=True)
    assert [len(read) for read in fits.read] == table.dims.tolist()
    assert fit(Design(), Inputs(x), y, table).read == []
    linear_fits = fit(Design(kind="l1"), Inputs(x), y, table, keep=True)
    for read, (_, _, w, _) in zip(linear_fits.read, linear_fits.weights, strict=True):
        assert torch.equal(read, w.nonzero()[:, 0])


def test_a_design_refuses_nonsense():
    for wrong, words in (
        ({"kind": "deep"}, "unknown kind of probe"),
        ({"blocks": 2}, "too few to choose with"),
        ({"dims": ()}, "at least one dimension"),
        ({"penalties": (-1.0,)}, "at least one dimension"),
    ):
        with pytest.raises(SSTError, match=words):
            Design(**wrong)
    assert Design(dims=(64, 8, 500)).candidate_dims(100) == (8, 64, 100)
    assert Design(kind="l2").candidate_dims(100) == (100,)
