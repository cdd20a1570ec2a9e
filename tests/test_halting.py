"""Halting policies: whatever picks the depth, the text is the one of that depth."""

import pytest
import torch
from tiny import prompts, tiny

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.generation import look_ahead
from sst_interp.models.halting import Convergence, Entropy, Flat, HaltingPolicy, Look, OutputChange
from sst_interp.models.measures import compare_outputs, read_out, relative_l2
from sst_interp.models.model import attach


class ByLength(HaltingPolicy):
    """Depths that are given beforehand."""

    deepest = 4

    def __init__(self, given):
        self.given = torch.tensor(given)

    @property
    def looks(self):
        return 2

    def depths(self, look):
        self.seen = look
        return self.given


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def model(request):
    return attach(tiny(request.param), alpha=0.2)


def test_each_question_gets_the_text_of_its_own_depth(model):
    given = [2, 4, 1]
    out = model.generate(prompts(), max_new_tokens=10, stop_tokens=[], depth=ByLength(given))
    assert out.iterations == given
    for prompt, depth, tokens in zip(prompts(), given, out.tokens, strict=True):
        assert model.generate([prompt], depth, 10, stop_tokens=[]).tokens[0] == tokens
    assert out.tokens == model.generate(prompts(), given, 10, stop_tokens=[]).tokens


@pytest.mark.parametrize("prompt", ["exact", "blend_off", "two_pass"])
@pytest.mark.parametrize("kv", ["last", "first"])
def test_what_is_seen_is_position_0_and_looking_changes_nothing(prompt, kv):
    model = attach(tiny("llama"), alpha=0.2, choices=Choices(prompt=prompt, kv=kv))
    policy, steps = ByLength([2, 2, 2]), []
    out = model.generate(
        prompts(), max_new_tokens=5, stop_tokens=[], depth=policy, observe=steps.append
    )  # fmt: skip
    assert out.tokens == model.generate(prompts(), 2, 5, stop_tokens=[]).tokens
    for i, iteration in enumerate(steps[0].iterations):
        assert torch.allclose(policy.seen.resid_post[i], iteration.resid_post, atol=1e-12)
        assert torch.allclose(policy.seen.logits[i], steps[0].logits[i], atol=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_policy_that_always_says_one_depth_writes_what_that_flat_depth_writes(model, depth):
    flat = model.generate(prompts(), max_new_tokens=8, stop_tokens=[], depth=Flat(depth))
    for policy in (ByLength([depth] * 3), Convergence(-1.0, deepest=depth), Entropy(-1.0, deepest=depth)):
        out = model.generate(prompts(), max_new_tokens=8, stop_tokens=[], depth=policy)
        assert (out.tokens, out.iterations) == (flat.tokens, [depth] * 3)


def test_depth_and_iterations_are_two_words_for_the_same(model):
    flat = model.generate(prompts(), iterations=3, max_new_tokens=6, stop_tokens=[])
    for depth in (3, Flat(3)):
        out = model.generate(prompts(), depth=depth, max_new_tokens=6, stop_tokens=[])
        assert (out.tokens, out.iterations) == (flat.tokens, [3, 3, 3])
    with pytest.raises(SSTError, match="both iterations and depth"):
        model.generate(prompts(), iterations=2, depth=3)


def test_a_stream_in_another_order_is_the_same_questions(model):
    tokens, pad = model.batch(prompts())
    stream = model.new_stream(pad, tokens.shape[1] + 4)
    model.prefill(stream, tokens[:, :-1])
    order = torch.tensor([2, 0, 1])
    straight = look_ahead(model, stream, tokens[:, -1], 2)
    turned = look_ahead(model, stream.take(order), tokens[order, -1], 2)
    assert torch.allclose(turned.resid_post, straight.resid_post[:, :, order], atol=1e-12)
    assert torch.equal(stream.state, stream.take(order).take(torch.argsort(order)).state)


def look(iterations=4, layers=3, rows=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(iterations, layers, rows, 8, generator=g)
    return Look(states, torch.randn(iterations, rows, 11, generator=g))


def test_numbers_are_the_measures_of_a_run():
    seen = look()
    change = Convergence(0.1).numbers(seen)
    kl, entropy = OutputChange(0.1).numbers(seen), Entropy(0.1).numbers(seen)
    assert change.shape == kl.shape == (3, 5)
    assert entropy.shape == (4, 5)
    for i in range(1, 4):
        a, b = seen.resid_post[i - 1], seen.resid_post[i]
        assert torch.allclose(change[i - 1], relative_l2(a, b).median(0).values)
        outputs = compare_outputs(read_out(seen.logits[i - 1]), read_out(seen.logits[i]))
        assert torch.allclose(kl[i - 1], outputs.kl, atol=1e-6)
    assert torch.allclose(entropy[2], read_out(seen.logits[2]).entropy)


@pytest.mark.parametrize("kind", [Convergence, OutputChange, Entropy])
def test_a_threshold_halts_at_the_first_iteration_below_it(kind):
    numbers = kind(1.0).numbers(look())
    depths = kind(float("inf")).depths(look())
    assert (depths == kind.first).all()
    assert (kind(-1.0).depths(look()) == 4).all()
    level = float(numbers.flatten().median())
    for row, depth in enumerate(kind(level).depths(look()).tolist()):
        before = numbers[: depth - kind.first, row]
        assert (before >= level).all()
        assert depth == 4 or numbers[depth - kind.first, row] < level
    levels = numbers.flatten().sort().values.tolist()
    by_level = torch.stack([kind(x).depths(look()) for x in levels])
    assert (by_level.diff(dim=0) <= 0).all()  # a laxer threshold never thinks longer


def test_a_policy_that_may_not_iterate_does_not():
    for kind in (Convergence, OutputChange, Entropy):
        assert (kind(0.0, deepest=1).depths(look(1)) == 1).all()


def test_policies_in_a_batch_are_policies_alone(model):
    tokens, pad = model.batch(prompts())
    stream = model.new_stream(pad, tokens.shape[1])
    model.prefill(stream, tokens[:, :-1])
    numbers = Convergence(0.0).numbers(look_ahead(model, stream, tokens[:, -1], 4))
    policy = Convergence(float(numbers.flatten().sort().values[4:6].mean()), deepest=4)
    together = model.generate(prompts(), max_new_tokens=6, stop_tokens=[], depth=policy)
    assert len(set(together.iterations)) > 1
    for prompt, tokens, depth in zip(prompts(), together.tokens, together.iterations, strict=True):
        alone = model.generate([prompt], max_new_tokens=6, stop_tokens=[], depth=policy)
        assert (alone.tokens[0], alone.iterations[0]) == (tokens, depth)


def test_nonsense_is_refused(model):
    with pytest.raises(SSTError, match="whole number from 1"):
        Flat(0)
    with pytest.raises(SSTError, match="threshold = nan is not a number"):
        Convergence(float("nan"))
    with pytest.raises(SSTError, match="is not a whole number from 1 to 127"):
        model.generate(prompts(), max_new_tokens=3, depth=ByLength([1, 0, 1]))


def test_a_prompt_of_one_token_can_be_looked_at(model):
    out = model.generate([[5], [7]], max_new_tokens=4, stop_tokens=[], depth=ByLength([3, 1]))
    assert out.tokens[0] == model.generate([[5]], 3, 4, stop_tokens=[]).tokens[0]
