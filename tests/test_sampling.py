"""Sampled generation, strings that end a text, tokens as they are written, and conversations."""

import numpy as np
import pytest
import torch
from tiny import prompts, relative, tiny
from tiny_capture import tiny_llama, word_tokenizer
from tiny_kinds import models

from sst_interp.errors import SSTError
from sst_interp.models.generation import Sampling
from sst_interp.models.model import attach
from sst_interp.models.solvers.sequential import advance

CHAT = (
    "{% for m in messages %}{{ '<s> ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}(A) {% endif %}"
)


@pytest.fixture
def model():
    return attach(tiny("llama"), alpha=0.2)


@pytest.fixture
def speaking():
    return attach(tiny_llama(), word_tokenizer(), alpha=0.2)


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2, "top_p": 0.8, "top_k": 6}],
)
def test_tokens_are_drawn_as_often_as_their_likelihood_says(how):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, 0.2, -3.0]).double()
    n = 4000
    sampling = Sampling(**how)
    draws = Sampling(**how, seed=range(n)).draws([[1]] * n, range(n))
    drawn = sampling.choose(logits.expand(n, -1), draws)
    shares = torch.bincount(drawn, minlength=8) / n
    wide = logits / how.get("temperature", 1.0)
    order = wide.argsort(descending=True)
    keep = torch.zeros(8, dtype=torch.bool)
    keep[order[: how.get("top_k", 8)]] = True
    likely = wide.masked_fill(~keep, -torch.inf).softmax(0)
    before = likely[order].cumsum(0) - likely[order]
    likely[order[before >= how.get("top_p", 1.0)]] = 0
    likely /= likely.sum()
    assert (shares[likely == 0] == 0).all()
    assert (shares - likely).abs().max() < 4 * (0.25 / n) ** 0.5


def test_a_row_writes_the_same_text_in_any_batch(model):
    how = {"iterations": 2, "max_new_tokens": 12, "stop_tokens": [], "temperature": 1.5}
    together = model.generate(prompts(), **how, seed=[3, 4, 5]).tokens
    for prompt, seed, tokens in zip(prompts(), [3, 4, 5], together, strict=True):
        assert model.generate([prompt], **how, seed=seed).tokens == [tokens]
    depths = how | {"iterations": [1, 4, 2]}
    mixed = model.generate(prompts(), **depths, seed=[3, 4, 5]).tokens
    assert mixed[2] == together[2]
    assert mixed[1] == model.generate(prompts()[1:2], **(how | {"iterations": 4}), seed=4).tokens[0]
    same = model.generate([prompts()[0]] * 3, **how, seed=[0, 1, 0]).tokens
    assert same[0] == same[2] != same[1]


def test_without_a_temperature_it_is_greedy(model):
    how = {"max_new_tokens": 6, "stop_tokens": []}
    greedy = model.generate(prompts(), **how).tokens
    assert model.generate(prompts(), **how, temperature=0, top_p=0.5, seed=9).tokens == greedy
    assert model.generate(prompts(), **how, top_k=1).tokens == greedy
    assert model.generate(prompts(), **how, temperature=1e-9).tokens == greedy
    assert model.generate(prompts(), **how, temperature=3.0).tokens != greedy


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": 1, "seed": [1, 2]}, "2 seeds for 3 prompts"),
        ({"temperature": 1, "seed": -1}, "seed"),
        ({"temperature": 1, "seed": "a"}, "seed"),
        ({"stop": 3}, "stop = 3"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"]}, "no tokenizer"),
    ],
)
def test_settings_that_cannot_be_are_one_line(model, how, says):
    with pytest.raises(SSTError, match=says):
        model.generate(prompts(), max_new_tokens=2, **how)


def test_a_string_ends_a_text(speaking):
    free = speaking.generate(["sun moon", "moon"], 2, 10, stop_tokens=[])
    words = free.texts[0].split()
    stop = " ".join(words[3:5])
    out = speaking.generate(["sun moon", "moon"], 2, 10, stop_tokens=[], stop=stop)
    for text, full, tokens, stopped in zip(out.texts, free.texts, out.tokens, out.stopped, strict=True):
        assert stop not in text
        assert text == (full[: full.index(stop)] if stop in full else full)
        assert stopped == (stop in full)
        assert len(tokens) <= 10
    decode = lambda n: speaking.tokenizer.decode(free.tokens[0][:n], skip_special_tokens=True)  # noqa: E731
    assert len(out.tokens[0]) == next(n for n in range(11) if stop in decode(n))


def test_the_stream_of_tokens_is_the_generation(speaking):
    ask = ["sun moon", "moon", "sun sun sun"]
    how = {"max_new_tokens": 8, "temperature": 1.2, "seed": 2}
    out = speaking.generate(ask, [1, 3, 2], **how)
    pieces = list(speaking.stream(ask, [1, 3, 2], **how))
    for row in range(3):
        own = [piece for piece in pieces if piece.row == row]
        assert [piece.token for piece in own] == out.tokens[row]
        assert "".join(piece.text for piece in own) == out.texts[row]
        assert {piece.depth for piece in own} == {[1, 3, 2][row]}
        assert [piece.position for piece in own] == list(range(len(own)))
    greedy = next(iter(speaking.stream(ask, max_new_tokens=8)))
    assert greedy.position == 0


@pytest.mark.parametrize("kind", list(models()))
def test_a_session_is_one_replay_of_the_whole(kind):
    model = models()[kind]
    session, turns = model.start(), prompts()
    for turn in turns:
        out = session.send(turn, max_new_tokens=5, stop_tokens=[])
        before = session.tokens[: -len(out.tokens[0])]
        assert model.generate([before], 1, 5, stop_tokens=[]).tokens == out.tokens
    assert len(session.tokens) == sum(map(len, turns)) + 15
    read = session.tokens[:-1]
    whole = model.replay([read], 1, tolerance=1e-13)
    fresh = session.stream.repeat(1)
    fresh.kv.make_room(len(session.tokens))
    last = advance(model, fresh, torch.tensor(session.tokens[-1:]), 1)[0].resid_post[:, 0]
    longer = model.replay([session.tokens], 1, tolerance=1e-13)
    assert relative(last, longer.resid_post[0, -1, :, 0]) < 1e-9
    assert whole.logits.shape[1] == len(read)


def test_a_session_may_begin_with_a_prompt(speaking):
    whole = speaking.start().send("sun moon sun", 2, 5, stop_tokens=[])
    for begun, sent in (("sun moon", "sun"), ("sun moon sun", ""), ([*speaking.encode("sun")], "moon sun")):
        session = speaking.start(begun)
        assert session.send(sent, 2, 5, stop_tokens=[]).tokens == whole.tokens
        assert session.tokens == [*speaking.encode("sun moon sun"), *whole.tokens[0]]
        session.send("moon", max_new_tokens=1)
        assert session.tokens.count(speaking.encode("sun")[0]) >= 2
    with pytest.raises(SSTError, match="2 prompts where one is taken"):
        speaking.start(["sun", "moon"])


def test_a_deep_session_is_its_positions_one_by_one(model):
    session = model.start()
    depths = []
    for turn, depth in zip(prompts(), (3, 1, 2), strict=True):
        out = session.send(turn, iterations=depth, max_new_tokens=4, stop_tokens=[])
        depths += [1] * (len(turn) - 1 + (len(depths) > 0)) + [depth] * 4
        assert len(out.tokens[0]) == 4
    stream = model.new_stream(torch.zeros(1, dtype=torch.long), len(session.tokens))
    for token, depth in zip(session.tokens[:-1], depths, strict=True):
        advance(model, stream, torch.tensor([token]), depth)
    assert relative(session.stream.state, stream.state) < 1e-9


def test_a_chat_goes_on_in_its_template(speaking):
    speaking.tokenizer.chat_template = CHAT
    session = speaking.start()
    first = session.chat("sun moon", max_new_tokens=6, stop_tokens=[2], temperature=1.0)
    assert session.turns == [
        {"role": "user", "content": "sun moon"},
        {"role": "assistant", "content": first.texts[0]},
    ]
    session.turns[-1]["content"] = "something else"
    with pytest.raises(SSTError, match="does not go on"):
        session.chat("moon")


def test_an_error_leaves_a_session_as_it_was(model):
    session = model.start()
    session.send(prompts()[0], max_new_tokens=3, stop_tokens=[])
    before, state = list(session.tokens), session.stream.state.clone()
    for wrong in ({"iterations": 0}, {"max_new_tokens": 0}, {"temperature": -1}, {"max_new_tokens": 10**6}):
        with pytest.raises(SSTError):
            session.send(prompts()[1], **wrong)
    assert session.tokens == before
    assert torch.equal(session.stream.state, state)
    with pytest.raises(SSTError, match="empty prompt"):
        model.start().send([])
    more = session.send([], max_new_tokens=2, stop_tokens=[]).tokens[0]  # nothing new: it writes on
    assert session.tokens == before + more


def test_numpy_seeds_and_depths_are_numbers(model):
    how = {"max_new_tokens": 3, "stop_tokens": [], "temperature": 1.0}
    assert (
        model.generate(prompts(), np.int64(2), **how, seed=np.int64(3)).tokens
        == model.generate(prompts(), 2, **how, seed=3).tokens
    )
