"""Depths that differ from position to position, by a list or a policy: equal to one replay of the text."""

import pytest
import torch
from tiny import prompts, relative, tiny
from tiny_capture import tiny_llama, word_tokenizer
from tiny_kinds import models

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.halting import AtFirst, Convergence, EachPosition, Flat, OutputChange
from sst_interp.models.hooks import Record, at
from sst_interp.models.model import attach, attach_looped

LIST = [3, 1, 2, 2, 1, 3]
HOW = {"max_new_tokens": 6, "stop_tokens": []}
MODELS = {
    **{kind: lambda kind=kind: models()[kind] for kind in models()},
    "looped, each": lambda: attach_looped(tiny("llama"), core=(1, 2), choices=Choices(kv="each")),
    "looped whole, each": lambda: attach_looped(tiny("gpt2"), choices=Choices(kv="each")),
    "first": lambda: attach(tiny("qwen3"), alpha=0.2, choices=Choices(kv="first")),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def replayed(model, prompt, tokens, depths):
    """The next token at every position that was written, by a replay of the text at these depths."""
    start = len(prompt) - 1
    out = model.replay([*prompt, *tokens[:-1]], start=start, depth=depths)
    assert out.logits is not None
    return out.logits[0, :, -1].argmax(-1).tolist()


def test_a_list_is_of_positions(model):
    """In a batch of prompts of different length, each writes what its text's replay at these depths says."""
    out = model.generate(prompts(), depth=LIST, **HOW)
    for prompt, tokens, depths in zip(prompts(), out.tokens, out.depths, strict=True):
        assert depths == LIST
        assert tokens == replayed(model, prompt, tokens, depths)
    assert out.iterations == [3, 3, 3]
    assert model.generate(prompts(), depth=[2], **HOW).tokens == model.generate(prompts(), 2, **HOW).tokens


def test_rows_may_differ_in_any_order(model):
    """Deepest rows run first, so rows change places; every text is as alone, in its own place."""
    lists = [[1, 3, 1, 2], [2, 1, 3], [3, 2, 2, 1, 3]]
    together = model.generate(prompts(), depth=lists, **HOW)
    for number, prompt in enumerate(prompts()):
        alone = model.generate([prompt], depth=lists[number], **HOW)
        assert together.tokens[number] == alone.tokens[0]
        assert together.depths[number] == alone.depths[0]
        assert alone.depths[0] == [*lists[number], *lists[number][-1:] * 6][:6]
        assert replayed(model, prompt, alone.tokens[0], alone.depths[0]) == alone.tokens[0]


@pytest.mark.parametrize("policy", [Convergence(0.35, deepest=3), OutputChange(0.1, deepest=3)], ids=str)
def test_a_policy_may_be_asked_at_every_position(policy):
    model = attach(tiny("llama"), alpha=0.2)
    out = model.generate(prompts(), depth=EachPosition(policy), **HOW)
    assert len({depth for row in out.depths for depth in row}) > 1
    for prompt, tokens, depths in zip(prompts(), out.tokens, out.depths, strict=True):
        assert tokens == replayed(model, prompt, tokens, depths)
        assert model.generate([prompt], depth=policy, max_new_tokens=1).iterations == depths[:1]
        again = model.generate([prompt], depth=depths, **HOW)
        assert again.tokens[0] == tokens
    pieces = list(model.stream(prompts(), depth=EachPosition(policy), **HOW))
    for row in range(3):
        own = [piece for piece in pieces if piece.row == row]
        assert [piece.depth for piece in own] == out.depths[row]
        assert [piece.token for piece in own] == out.tokens[row]


def test_a_policy_that_always_says_one_depth_is_that_depth(model):
    flat = model.generate(prompts(), 2, **HOW)
    for depth in (Flat(2), EachPosition(Flat(2)), AtFirst(Flat(2)), [2, 2, 2]):
        out = model.generate(prompts(), depth=depth, **HOW)
        assert (out.tokens, out.iterations, out.depths) == (flat.tokens, [2] * 3, [[2] * 6] * 3)


def test_a_session_may_mix_them_and_is_one_replay(model):
    session = model.start()
    for turn, depth in zip(prompts(), ([2, 1, 3], EachPosition(Flat(2)), Convergence(0.1, 3)), strict=True):
        session.send(turn, depth=depth, max_new_tokens=4, stop_tokens=[])
    assert len(session.depths) == len(session.tokens) - 1
    whole = model.replay(session.tokens[:-1], depth=session.depths)
    assert session.tokens[-1] == int(whole.logits[0, -1, -1].argmax())
    state = session.stream.state[-1, 0]
    end = model.kind.span(3)[1] - 1 if hasattr(model.kind, "span") else None
    if model.kind.name == "sst":
        assert relative(state, whole.resid_post[0, -1, -1, -1]) < 1e-9
    elif end is not None and session.stream.state.shape[0] == 1:
        assert relative(state, whole.resid_post[0, -1, end, -1]) < 1e-9


def test_finished_rows_cost_one_iteration():
    """A row that has ended its text waits at depth 1, and its text is what it was."""
    model = attach(tiny("llama"), alpha=0.2)
    free = model.generate(prompts(), depth=[3, 2], **HOW)
    stop = [free.tokens[0][1]]
    steps = []
    out = model.generate(prompts(), depth=[3, 2], max_new_tokens=6, stop_tokens=stop, observe=steps.append)
    assert out.stopped[0]
    assert out.tokens[0] == free.tokens[0][:2]
    for step in steps[2:]:
        assert 0 not in step.rows[: len(step.iterations[-1].resid_post[0])].tolist()
        assert not step.alive[step.rows.tolist().index(0)]


def test_sampled_rows_keep_their_draws_when_they_change_places():
    model, how = attach(tiny("llama"), alpha=0.2), {**HOW, "temperature": 1.5}
    lists = [[1, 3, 1, 2], [2, 1, 3], [3, 2, 2, 1, 3]]
    together = model.generate(prompts(), depth=lists, seed=[3, 4, 5], **how)
    for number, prompt in enumerate(prompts()):
        alone = model.generate([prompt], depth=lists[number], seed=3 + number, **how)
        assert together.tokens[number] == alone.tokens[0]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_an_edited_entry_outlives_rows_that_catch_up(site):
    """Where iterations keep their own keys, a row that goes deeper has its earlier positions run. Entries of
    other rows there, edited or not, stay as they are.
    """
    lists = [[3, 1, 3, 1, 2, 3], [1, 3, 1, 3, 3, 3], [3, 3, 1, 1, 3, 2]]
    model = attach_looped(tiny("llama"), core=(0, 2), choices=Choices(kv="each"))

    def shift(tensor, **_):
        return tensor + 0.5 * torch.sin(torch.arange(32.0, dtype=torch.float64))

    def run(rows, depths):
        seen = Record(["resid_post"])

        def edit(tensor, **where):
            if where["site"] == site and where["layer"] == 1 and where["iteration"] >= 2:
                tensor = shift(tensor)
            if where["site"] == "resid_post":
                seen(tensor, **where)
            return tensor

        return model.generate(rows, depth=depths, edit=edit, **HOW), seen

    together, seen = run(prompts(), lists)
    plain = model.generate(prompts(), depth=lists, **HOW)
    for number, prompt in enumerate(prompts()):
        alone, own = run([prompt], [lists[number]])
        assert together.tokens[number] == alone.tokens[0]
        for key, value in own.kept.items():
            position, iteration = key[2], key[3]
            rows = [r for r in range(3) if together.depths[r][position] >= iteration]
            assert relative(seen.kept[key][rows.index(number)], value[0]) < 1e-9
    assert plain.tokens != together.tokens


def test_an_edit_is_given_the_rows_in_their_own_order():
    model, lists, seen = attach(tiny("llama"), alpha=0.2), [[1, 2], [2, 1], [1, 3]], {}

    def edit(tensor, **where):
        seen[where["position"], where["iteration"]] = tensor.clone()

    how = {"depth": lists, "max_new_tokens": 2, "stop_tokens": []}
    model.generate(prompts(), edit=at(edit, site="resid_post", layer=2), **how)
    assert {where: len(rows) for where, rows in seen.items()} == {
        (0, 1): 3, (0, 2): 1, (1, 1): 3, (1, 2): 2, (1, 3): 1,
    }  # fmt: skip
    for number, prompt in enumerate(prompts()):
        alone = Record(["resid_post"])
        model.generate([prompt], edit=alone, **(how | {"depth": lists[number]}))
        assert relative(seen[1, 1][number], alone.kept["resid_post", 2, 1, 1][0]) < 1e-9


@pytest.mark.parametrize(
    ("depth", "says"),
    [
        ([], "depth"),
        ([0], "depth = 0"),
        ([1.5], "depth"),
        ([[1], [2]], "2 lists of depths for 3 prompts"),
        ([[1], [2], []], "depth"),
        ("12", "depth"),
        ([True], "depth"),
        (EachPosition, "depth"),
    ],
)
def test_what_is_no_depth_is_one_line(depth, says):
    with pytest.raises(SSTError, match=says):
        attach(tiny("llama"), alpha=0.2).generate(prompts(), depth=depth, **HOW)


def test_what_does_not_go_together_is_one_line():
    model = attach(tiny_llama(), word_tokenizer(), alpha=0.2)
    with pytest.raises(SSTError, match="both iterations and depth"):
        model.generate("sun moon", 2, depth=[1, 2])
    with pytest.raises(SSTError, match="both iterations and depth"):
        model.replay("sun moon", 2, depth=[1, 2])
    with pytest.raises(SSTError, match="1 depths for 2 positions"):
        model.replay("sun moon", depth=[1])
    with pytest.raises(SSTError, match="equal length"):
        model.replay(["sun moon", "moon"], depth=[1, 2])
    with pytest.raises(SSTError, match="no halting policy"):
        EachPosition(2)
