"""The numbers of the tables as properties: bounds, symmetries, and what must come out exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_interp.models.measures import (
    BF16_ROUNDOFF,
    TOP,
    bf16_ratio,
    compare_outputs,
    cosine,
    jaccard,
    read_out,
    relative_l2,
    replaced,
    rows_of,
)

D_MODEL = 576
"""SmolLM2's: the error of a sum grows with it."""


def states(n=200, scale=1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, D_MODEL, generator=g, dtype=torch.float64) * scale).to(dtype)


def rotated(a, angle):
    """`a` turned by `angle` radians in a random plane, in float64."""
    g = torch.Generator().manual_seed(1)
    other = torch.randn(a.shape, generator=g, dtype=torch.float64)
    other = other - (other * a).sum(-1, keepdim=True) / a.square().sum(-1, keepdim=True) * a
    other = other / other.norm(dim=-1, keepdim=True) * a.norm(dim=-1, keepdim=True)
    return math.cos(angle) * a + math.sin(angle) * other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 25_000.0])
def test_cosine_of_a_state_and_itself_is_exactly_one(dtype, norm):
    a = states(scale=norm / D_MODEL**0.5, dtype=dtype)
    assert (cosine(a, a.clone()) == 1).all()
    assert (cosine(a, -a) + 1).abs().max() < 1e-6
    assert (relative_l2(a, a.clone()) == 0).all()
    assert (bf16_ratio(a, a.clone()) == 0).all()


def test_cosine_is_symmetric_bounded_and_blind_to_scale():
    a, b = states(seed=1), states(seed=2)
    assert torch.equal(cosine(a, b), cosine(b, a))
    assert torch.equal(cosine(a, 2.0**12 * b), cosine(a, b))
    assert (cosine(a, 3.7e3 * b) - cosine(a, b)).abs().max() < 1e-6
    assert (cosine(a, 3.7e3 * a) - 1).abs().max() < 1e-12
    assert cosine(a, b).abs().max() < 0.3
    assert cosine(a[:, None], b[None]).shape == (200, 200)


@pytest.mark.parametrize("angle", [1e-4, 1e-3, 5e-3, 0.05, 0.5, 2.0])
def test_cosine_is_accurate_where_overlaps_crowd(angle):
    """Next to 1, a dot product of unit vectors loses what this keeps: float32 states, truth in float64."""
    a = states().double()
    b = rotated(a, angle)
    assert (cosine(a, b) - math.cos(angle)).abs().max() < 1e-14
    a, b = a.float(), b.float()
    truth = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    got = cosine(a, b).double()
    assert (got - truth).abs().max() < 6.1e-8 + 3e-7 * (1 - math.cos(angle))  # one rounding of the result
    assert (got <= 1).all()


def test_relative_l2_is_zero_only_for_identical_states():
    a = states(dtype=torch.bfloat16)
    b = a.clone()
    b[7, 3] = torch.nextafter(b[7, 3].float(), torch.tensor(9.0)).bfloat16()  # below bf16: still the same
    assert (relative_l2(a, b) == 0).all()
    b.view(torch.int16)[7, 3] += 1  # the next bf16 number
    assert (relative_l2(a, b) > 0).nonzero().tolist() == [[7]]
    a = states()
    assert relative_l2(a, 3 * a).tolist() == pytest.approx([2.0] * len(a))
    assert relative_l2(2 * a, a).tolist() == pytest.approx([0.5] * len(a))  # relative to the first


def test_bf16_ratio_counts_rounding_units():
    a = states(dtype=torch.float64)
    one = a * (1 + BF16_ROUNDOFF)
    assert bf16_ratio(a, one).tolist() == pytest.approx([1.0] * len(a))
    assert bf16_ratio(a, a - 5 * (one - a)).tolist() == pytest.approx([5.0] * len(a))
    a = states(dtype=torch.bfloat16)
    neighbour = (a.view(torch.int16) + 1).view(torch.bfloat16)  # one spacing: 1 to 2 units of roundoff
    ratio = bf16_ratio(a, neighbour)
    assert (ratio > 1).all()
    assert (ratio <= 2).all()


def test_bf16_ratio_survives_zeros():
    a = states()
    a[:, : D_MODEL // 4] = 0
    b = a * (1 + BF16_ROUNDOFF)
    ratio = bf16_ratio(a, b)  # a quarter of the dimensions did not change: the median is still one unit
    assert ratio.tolist() == pytest.approx([1.0] * len(a), rel=1e-3)
    b[:, :3] = 1  # a change of a zero is infinitely many units of it, in 3 dimensions of 576
    assert torch.isfinite(bf16_ratio(a, b)).all()
    assert (bf16_ratio(torch.zeros(2, 5), torch.zeros(2, 5)) == 0).all()


SETS = st.integers(1, 12).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 20), min_size=k, max_size=k, unique=True)] * 2)
)


@settings(max_examples=60, deadline=None)
@given(SETS)
def test_token_sets_agree_with_python_sets(sets):
    a, b = sets
    got = replaced(torch.tensor([a, b, a]), torch.tensor([b, a, a])).tolist()
    assert got == [len(set(a) - set(b)), len(set(b) - set(a)), 0]
    same = jaccard(torch.tensor(a), torch.tensor(b)).item()
    assert same == pytest.approx(len(set(a) & set(b)) / len(set(a) | set(b)))
    assert same == jaccard(torch.tensor(b), torch.tensor(a)).item()


def test_read_out_of_known_distributions():
    vocabulary = 5000
    logits = torch.zeros(3, vocabulary)
    logits[1, 42], logits[1, 7] = 50.0, 47.5
    logits[2, ::2] = -1e4  # half of the tokens are as good as impossible
    seen = read_out(logits + 3)
    assert seen.entropy[0].item() == pytest.approx(math.log(vocabulary), rel=1e-5)
    assert seen.entropy[2].item() == pytest.approx(math.log(vocabulary / 2), rel=1e-5)
    assert seen.margin.tolist() == pytest.approx([0, 2.5, 0])
    assert seen.argmax.tolist() == [0, 42, 1]  # of equals, the first
    assert seen.top.shape == (3, TOP)
    assert seen.top[1, :2].tolist() == [42, 7]
    assert all(len(set(row)) == TOP for row in seen.top.tolist())
    p, q = 1 / (1 + math.exp(-2.5)), 1 / (1 + math.exp(2.5))
    assert seen.entropy[1].item() == pytest.approx(-p * math.log(p) - q * math.log(q), rel=1e-4)
    assert seen.log_probs.exp().sum(-1).tolist() == pytest.approx([1, 1, 1], rel=1e-5)
    assert torch.isfinite(read_out(torch.randn(4, vocabulary).bfloat16()).entropy).all()


def test_top_is_sorted_by_likelihood():
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(0))
    seen = read_out(logits)
    order = logits.sort(-1, descending=True)
    assert torch.equal(seen.top, order.indices[:, :TOP])
    assert torch.equal(seen.argmax, seen.top[:, 0])
    assert (seen.margin - (order.values[:, 0] - order.values[:, 1])).abs().max() < 1e-5


@pytest.mark.parametrize("vocabulary", [2, 97, 400])
def test_outputs_are_compared_as_documented(vocabulary):
    g = torch.Generator().manual_seed(vocabulary)
    x = torch.randn(64, vocabulary, generator=g, dtype=torch.float64) * 3
    y = x + torch.randn(64, vocabulary, generator=g, dtype=torch.float64)
    a, b = read_out(x), read_out(y)
    change = compare_outputs(a, b)
    p, q = x.softmax(-1), y.softmax(-1)
    assert torch.equal(change.argmax_changed, x.argmax(-1) != y.argmax(-1))
    assert 0 < change.argmax_changed.sum() < 64
    assert torch.equal(change.winner_rank == 0, ~change.argmax_changed)
    by_sorting = [
        xr.argsort(descending=True).tolist().index(int(yr.argmax())) for xr, yr in zip(x, y, strict=True)
    ]
    assert change.winner_rank.tolist() == by_sorting
    assert (change.kl - (q * (q / p).log()).sum(-1)).abs().max() < 1e-9
    assert (change.kl > 0).all()
    k = min(TOP, vocabulary)
    sets = zip(x.topk(k).indices.tolist(), y.topk(k).indices.tolist(), strict=True)
    assert change.replaced.tolist() == [len(set(s) - set(t)) for s, t in sets]
    same = compare_outputs(a, a)
    assert not same.argmax_changed.any()
    assert not same.replaced.any()
    assert not same.winner_rank.any()
    assert (same.kl == 0).all()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda v: st.tuples(*[st.lists(st.integers(-2, 2), min_size=v, max_size=v)] * 2)
    )
)
def test_ties_go_to_the_smaller_id_everywhere(logits):
    """bf16 logits tie often: the winner, its rank and "unchanged" must not depend on how topk breaks ties."""
    x, y = (torch.tensor([row], dtype=torch.bfloat16) for row in logits)
    a, b = read_out(x), read_out(y)
    change = compare_outputs(a, b)
    first = [row.index(max(row)) for row in logits]
    assert (a.argmax.item(), b.argmax.item()) == tuple(first)
    ranked = sorted(range(len(logits[0])), key=lambda i: (-logits[0][i], i))
    assert change.winner_rank.item() == ranked.index(first[1])
    assert (change.winner_rank.item() == 0) == (not change.argmax_changed.item())


def test_rows_of_keeps_every_field_together():
    seen = read_out(torch.randn(6, 300, generator=torch.Generator().manual_seed(0)))
    part = rows_of(seen, slice(2, 4))
    for name, field in part._asdict().items():
        assert torch.equal(field, getattr(seen, name)[2:4])
