"""Schedules of training, of both kinds of stream: equal to sequential unrolling where they must be."""

import pytest
import torch
from tiny import lrt, relative, tiny
from tiny_training import token_batch

from sst_interp.errors import SSTError
from sst_interp.models.model import attach
from sst_interp.training.objective import (
    answer_loss,
    last_layer,
    mean_over_passes,
    newest,
    run_passes,
    training_loss,
)
from sst_interp.training.recipe import TrainingRecipe

T = 8


def model_of(kind):
    """A model and the weights of its stream, to be differentiated."""
    model = attach(tiny("llama"), alpha=0.1) if kind == "sst" else lrt(kind.removeprefix("lrt-"), size=0.05)
    weights = {name: w.detach().requires_grad_() for name, w in model.kind.weights().items()}
    model.kind = model.kind.with_weights(weights)
    return model, list(weights.values())


def refined_loss(model, data, *how):
    """Of the positions' newest outputs: what sequential unrolling minimises."""
    return answer_loss(model, data, last_layer(model, data, *how))


def gradients(model, weights, loss):
    layer = model.backbone.layers[0]
    return torch.autograd.grad(loss, [*weights, layer.ffn.down_proj.weight, layer.attention.k_proj.weight])


KINDS = ["sst", "lrt-residual", "lrt-kv", "lrt-both"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", [("interleaved", 1, T), ("multi_refine", T), ("chunked", 1, 1, 1), ("two_pass", 3, 3)], ids=str
)
def test_enough_passes_are_sequential_unrolling(kind, how):
    """In states, loss and gradients."""
    model, weights = model_of(kind)
    data = token_batch()
    exact = last_layer(model, data, "sequential")
    assert relative(last_layer(model, data, *how), exact) < 1e-9
    ours, theirs = refined_loss(model, data, *how), answer_loss(model, data, exact)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for a, b in zip(gradients(model, weights, ours), gradients(model, weights, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # norms work in float32


@pytest.mark.parametrize("kind", ["lrt-residual", "lrt-both"])
def test_more_passes_come_closer(kind):
    """Over S and K: the error in states falls, and the gradient turns towards the exact one."""
    model, weights = model_of(kind)
    data = token_batch()
    exact = last_layer(model, data, "sequential")
    true = torch.cat([g.flatten() for g in gradients(model, weights, answer_loss(model, data, exact))])

    def off(*how):
        last = last_layer(model, data, *how)
        found = gradients(model, weights, answer_loss(model, data, last))
        turned = 1 - torch.cosine_similarity(torch.cat([g.flatten() for g in found]), true, dim=0)
        return relative(last.detach(), exact.detach()), float(turned)

    errors, turns = zip(*[off("multi_refine", k) for k in (1, 3, 5, T)], strict=True)
    assert sorted(errors, reverse=True) == list(errors)
    assert errors[0] > 1e-3
    assert turns[0] > turns[-1]
    for how in (("interleaved", 1, 2), ("interleaved", 1, 4), ("chunked", 1, 1, 4)):
        error, turn = off(*how)
        assert 1e-6 < error < 1
        assert turn > 1e-9
    assert off("interleaved", 1, 4)[0] < off("multi_refine", 1)[0]  # the same number of positions computed


@pytest.mark.parametrize("kind", ["sst", "lrt-both"])
def test_what_each_pass_computes(kind):
    model, _ = model_of(kind)
    tokens = token_batch().tokens
    exact = run_passes(model, tokens, "sequential")[0].last
    interleaved = run_passes(model, tokens, "interleaved", groups=3)
    assert [p.at.tolist() for p in interleaved] == [list(range(T)), [0, 3, 6], [1, 4, 7], [2, 5]]
    assert relative(newest(interleaved)[:, :3], exact[:, :3]) < 1e-9  # each read what was just written
    refined = run_passes(model, tokens, "multi_refine", sweeps=3)
    assert [len(p.at) for p in refined] == [T] * 4
    for k, found in enumerate(refined):
        assert relative(found.last[:, : k + 1], exact[:, : k + 1]) < 1e-9
        assert relative(found.last[:, k + 1 :], exact[:, k + 1 :]) > 1e-4
    chunks = run_passes(model, tokens, "chunked", chunk=3)
    assert [p.at.tolist() for p in chunks] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    alone = run_passes(model, tokens, "none")[0].last
    assert relative(chunks[0].last, alone[:, :3]) < 1e-12
    assert relative(chunks[1].last, alone[:, 3:6]) > 1e-4


def test_the_loss_is_the_mean_over_all_passes():
    model, _ = model_of("lrt-residual")
    data = token_batch()
    recipe = TrainingRecipe("tiny", "tiny", "none", method="interleaved", groups=3)
    passes = run_passes(model, data.tokens, "interleaved", groups=3)
    by_hand = []
    for found in passes:
        logits = model.backbone.unembed(found.last).log_softmax(-1)
        picked = [
            -logits[row, k, data.tokens[row, t + 1]]
            for row in range(2)
            for k, t in enumerate(found.at.tolist())
            if data.answer[row, t]
        ]
        by_hand.append(torch.stack(picked).mean())
    torch.testing.assert_close(training_loss(model, data, recipe), torch.stack(by_hand).mean())
    last_only = mean_over_passes(model, data, passes, [0, 0, 0, 1])
    torch.testing.assert_close(last_only, by_hand[-1])
    weighted = mean_over_passes(model, data, passes, [1, 0, 2, 0])
    torch.testing.assert_close(weighted, (by_hand[0] + 2 * by_hand[2]) / 3)


def test_gradients_flow_through_the_pass_without_memory():
    """The buffer is not detached: a finite difference of the loss agrees, and would not otherwise."""
    model, _ = model_of("lrt-both")
    data = token_batch()
    recipe = TrainingRecipe("tiny", "tiny", "none", method="interleaved", groups=2)
    weight = model.backbone.layers[1].ffn.down_proj.weight
    (gradient,) = torch.autograd.grad(training_loss(model, data, recipe), weight)
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-3 * direction
            ends.append(training_loss(model, data, recipe))
            weight -= sign * 1e-3 * direction
    slope = (ends[0] - ends[1]) / 2e-3
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-3, atol=1e-4)


def test_bad_schedules_are_one_clear_line():
    model, _ = model_of("lrt-residual")
    with pytest.raises(SSTError, match="9 interleaved groups are more than the 8 positions"):
        run_passes(model, token_batch().tokens, "interleaved", groups=9)
    for how, said in (
        ({"method": "interleaved", "sweeps": 2}, "'interleaved' makes no sweeps"),
        ({"method": "multi_refine", "groups": 2}, "'multi_refine' makes no groups"),
        ({"method": "multi_refine", "loss_weights": [1]}, "loss_weights has 1 numbers"),
        ({"method": "interleaved", "loss_weights": [0, 0]}, "not all 0"),
        ({"method": "chunked", "chunk": 0}, "chunk = 0"),
    ):
        with pytest.raises(SSTError, match=said):
            TrainingRecipe("tiny", "tiny", "none", **how)
    values = {"name": "n", "backbone": "b", "data": "d"}
    with pytest.raises(SSTError, match="key of \\[lrt\\] 'gama'"):
        TrainingRecipe.from_dict(values | {"lrt": {"gama": 1}})
    recipe = TrainingRecipe.from_dict(values | {"lrt": {"pathway": "both", "gamma": 0.1}, "chunk": 8})
    assert TrainingRecipe.from_dict(recipe.to_dict()) == recipe
