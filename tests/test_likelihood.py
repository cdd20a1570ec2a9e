"""Likelihoods of continuations: the sequential definition, token by token, at every depth."""

import pytest
import torch
from tiny import lrt, tiny

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.likelihood import ROWS, loglikelihood
from sst_interp.models.model import attach, attach_looped
from sst_interp.models.solvers.sequential import advance

CONTEXTS = [[5, 6, 7, 8, 9, 11], [12, 4], [3, 30, 31]]
CONTINUATIONS = [[[20, 21, 22, 23], [24]], [[25, 26], [27, 28, 29], [20]], [[60, 61, 62]]]
DEPTHS = [1, 2, 3, 4]
MODELS = {
    "sst": lambda choices: attach(tiny("llama"), alpha=torch.linspace(0.1, 0.3, 3), choices=choices),
    "lrt": lambda choices: lrt("both", choices=choices),
    "looped": lambda choices: attach_looped(tiny("llama"), choices=choices),
}


@torch.no_grad()
def by_definition(model, context, continuation, depth):
    """One token after another: the context at depth 1 up to its last, from there at `depth`."""
    stream = model.new_stream(torch.tensor([0]), len(context) + len(continuation))
    for token in context[:-1]:
        advance(model, stream, torch.tensor([token]), 1)
    terms = []
    for read, wanted in zip([context[-1], *continuation[:-1]], continuation, strict=True):
        last = advance(model, stream, torch.tensor([read]), depth)[-1].resid_post[-1]
        terms.append(float(model.backbone.unembed(last)[0].log_softmax(-1)[wanted]))
    return terms


@pytest.mark.parametrize("kv", ["last", "first"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_ragged_batch_is_the_definition_at_every_depth(kind, kv):
    model = MODELS[kind](Choices(kv=kv))
    tokens, pad = model.batch(CONTEXTS)
    out = loglikelihood(model, tokens, pad, CONTINUATIONS, DEPTHS)
    flat = [(c, each) for c, several in zip(CONTEXTS, CONTINUATIONS, strict=True) for each in several]
    assert out.lengths.tolist() == [len(each) for _, each in flat]
    for d, depth in enumerate(DEPTHS):
        for i, (context, each) in enumerate(flat):
            terms = by_definition(model, context, each, depth)
            assert out.terms[d, i, : len(each)].tolist() == pytest.approx(terms, abs=1e-8)
            assert not out.terms[d, i, len(each) :].any()
            assert float(out.sums[d, i]) == pytest.approx(sum(terms), abs=1e-8)
    assert not torch.allclose(out.sums[0], out.sums[3], atol=1e-3)  # the depth matters


def test_alone_and_in_a_batch_of_more_rows_than_a_pass_takes():
    model = MODELS["sst"](None)
    many = [[20 + i % 50] * (1 + i % 5) for i in range(ROWS + 7)]
    together = model.loglikelihood(CONTEXTS[0], many, DEPTHS)
    for i in (0, 3, ROWS, ROWS + 6):
        alone = model.loglikelihood(CONTEXTS[0], [many[i]], 3)
        assert alone.sums.shape == (1,)
        assert float(together.sums[2, i]) == pytest.approx(float(alone.sums[0]), abs=1e-9)


def test_a_prompt_without_the_blend_starts_the_recurrence_at_the_last_token():
    model = MODELS["sst"](Choices(prompt="blend_off"))
    blended = MODELS["sst"](None)
    one, other = (m.loglikelihood(CONTEXTS[0], CONTINUATIONS[0], 2).sums for m in (model, blended))
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_sums_of_all_next_tokens_are_one():
    model = MODELS["lrt"](None)
    sums = model.loglikelihood([5, 6, 7], [[t] for t in range(97)], 2).sums
    assert float(sums.exp().sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("continuations", "how", "says"),
    [
        ([], {}, "no continuation"),
        ([[5], []], {}, "or an empty one"),
        ("blue", {}, "are one text"),
        ([[5] * 200], {}, "exceed the context of 128"),
        ([[5]], {"iterations": 0}, "iterations = 0 is not a whole number"),
        ([[5]], {"iterations": []}, "names no depth"),
        ([["x"]], {}, "a prompt has a str among its token ids"),
    ],
)
def test_what_cannot_be_scored_is_refused(continuations, how, says):
    with pytest.raises(SSTError, match=says):
        MODELS["sst"](None).loglikelihood([5, 6], continuations, **how)


def test_texts_are_split_where_the_harness_splits_them():
    from tiny_capture import word_tokenizer

    model = attach(tiny("llama"), word_tokenizer())
    ids = model.encode("quorvex1 quorvex2 quorvex3")
    assert model.encode_pair("quorvex1", " quorvex2 quorvex3") == (ids[:1], ids[1:])
    assert model.encode_pair("quorvex1 ", "quorvex2 quorvex3") == (ids[:1], ids[1:])
    assert model.encode_pair(ids[:1], " quorvex2 quorvex3") == (ids[:1], ids[1:])
