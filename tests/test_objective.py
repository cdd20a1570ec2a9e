"""The training objective: every schedule is differentiable, and the exact one is what they converge to."""

import pytest
import tiny
import torch
from tiny_training import answer_batch as batch
from tiny_training import loss_and_gradients, weight_of

from sst_interp.models.choices import Choices
from sst_interp.models.model import attach
from sst_interp.training.data import Batch
from sst_interp.training.objective import answer_loss, answer_token_losses, last_layer

T = 7


def model_of(family="llama", alpha=0.08, **choices):
    model = attach(tiny.tiny(family), alpha=alpha, choices=Choices(**choices))
    model.alpha = model.alpha.requires_grad_()
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_enough_sweeps_are_exact_in_loss_and_gradient(family):
    """After k sweeps the first k positions are exact, and so is what they pass on to the gradient."""
    model = model_of(family)
    exact = loss_and_gradients(model, batch(), "sequential")
    for how in (("two_pass", T, 1), ("two_pass", 1, T), ("two_pass", 3, 3)):
        for a, b in zip(exact, loss_and_gradients(model, batch(), *how), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # norms work in float32


@pytest.mark.parametrize(
    "choices",
    [{"carry": "ffn_output"}, {"blend": "additive"}, {"kv": "first"}],
    ids=lambda c: str(*c.values()),
)
def test_every_choice_is_exact_with_enough_sweeps(choices):
    model = model_of(**choices)
    exact = loss_and_gradients(model, batch(), "sequential")
    for a, b in zip(exact, loss_and_gradients(model, batch(), "two_pass", T, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # norms work in float32


@pytest.mark.parametrize("how", [("sequential",), ("two_pass", 1, 1), ("two_pass", 2, 2)], ids=str)
@pytest.mark.parametrize("initial_guess", ["shift", "scan"])
def test_gradients_are_those_of_finite_differences(how, initial_guess):
    """Through both passes: a gradient that stopped at the first would differ in the fourth digit."""
    model, data = model_of(initial_guess=initial_guess), batch()
    _, of_alpha, of_weight = loss_and_gradients(model, data, *how)
    weight, step = weight_of(model), 1e-3
    for tensor, gradient in ((model.alpha, of_alpha), (weight, of_weight)):
        direction = torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(1))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * direction
                ends.append(answer_loss(model, data, last_layer(model, data, *how)))
                tensor -= sign * step * direction
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-3, atol=1e-4)


def test_two_pass_is_not_exact_and_says_so_by_its_numbers():
    model = model_of(alpha=0.3)
    exact, two_pass = (last_layer(model, batch(), how) for how in ("sequential", "two_pass"))
    torch.testing.assert_close(exact[:, :2], two_pass[:, :2], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(exact[:, 3:], two_pass[:, 3:], rtol=1e-3)


def test_a_first_position_gets_no_blend_and_hands_its_output_on():
    """The gradient of the loss at position 1 with respect to alpha exists; at position 0 there is none."""
    model = model_of()
    for position, blended in ((0, False), (1, True)):
        answer = torch.zeros(2, T, dtype=torch.bool)
        answer[:, position] = True
        data = Batch(batch().tokens, answer)
        _, of_alpha, _ = loss_and_gradients(model, data, "two_pass", 1, 1)
        assert bool(of_alpha.any()) == blended


def test_the_baseline_is_the_backbone():
    model, data = model_of(), batch()
    logits = model.backbone.model(data.tokens).logits
    assert torch.equal(model.backbone.unembed(last_layer(model, data, "none")), logits)
    zero = attach(tiny.tiny("llama"), alpha=0.0)
    assert torch.equal(model.backbone.unembed(last_layer(zero, data, "two_pass")), logits)


def test_the_loss_is_taken_on_answers_only():
    model, data = model_of(), batch()
    last = last_layer(model, data, "two_pass")
    logits = model.backbone.unembed(last).log_softmax(-1)
    by_hand = [
        -logits[row, t, data.tokens[row, t + 1]]
        for row in range(2)
        for t in range(T - 1)
        if data.answer[row, t]
    ]
    torch.testing.assert_close(answer_token_losses(model, data, last), torch.stack(by_hand))
    torch.testing.assert_close(answer_loss(model, data, last), torch.stack(by_hand).mean())


def test_what_comes_after_does_not_change_what_came_before():
    """Padding is on the right: a pad is after everything that could see it."""
    model, data = model_of(), batch()
    for method in ("sequential", "two_pass"):
        other = Batch(torch.cat([data.tokens[:, :5], data.tokens[:, :2]], dim=1), data.answer)
        torch.testing.assert_close(
            last_layer(model, data, method)[:, :5],
            last_layer(model, other, method)[:, :5],
            rtol=1e-10,
            atol=1e-10,
        )
