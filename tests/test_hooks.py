"""Hook points and edits: they see the formula's own tensors, change what they should, and nothing else."""

import pytest
import torch
from tiny import FAMILIES, prompts, tiny

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import SITES, Record, at
from sst_interp.models.kinds.sst import blend
from sst_interp.models.model import attach

ALPHA = 0.3
NEW, DEPTH = 4, 3


def made(family="llama", alpha=ALPHA, **choices):
    return attach(tiny(family), alpha=alpha, choices=Choices(**choices))


def generate(model, edit=None, iterations=DEPTH, batch=None, seen=None):
    observe = None if seen is None else seen.append
    return model.generate(batch or prompts(), iterations, NEW, stop_tokens=[], edit=edit, observe=observe)


def recorded(model, edit=None, **how):
    """Everything a generation shows, after `edit`."""
    record = Record()

    def both(tensor, **where):
        changed = None if edit is None else edit(tensor, **where)
        record(tensor if changed is None else changed, **where)
        return changed

    out = generate(model, both, **how)
    return out, {site: record[site] for site in SITES}


@pytest.mark.parametrize(
    "choices", [{}, {"carry": "ffn_output", "blend": "additive"}, {"kv": "first"}, {"prompt": "blend_off"}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_is_the_formula(family, choices):
    """Every line of it, from tensors recorded one by one. Axes: row, position, layer, iteration, d_model."""
    model = made(family, **choices)
    seen = []
    record = Record()
    watched = generate(model, record, seen=seen)
    x, branch, m, s, mixed, ffn, y = (record[site] for site in SITES)
    assert x.shape == (3, NEW, 3, DEPTH, 32)
    assert torch.equal(m, x + branch)
    assert torch.equal(x[:, :, 1:], y[:, :, :-1])
    assert torch.equal(y, mixed + ffn)
    handed = y if model.choices.carry == "layer_output" else ffn
    assert torch.equal(s[:, :, :, 1:], handed[:, :, :, :-1])  # from the iteration before
    assert torch.equal(s[:, 1:, :, 0], handed[:, :-1, :, -1])  # or the last one at the position before
    hand = blend(m, s, model.alpha[:, None], model.choices)
    if model.choices.prompt == "blend_off":  # no state yet, no blend
        assert torch.equal(mixed[:, 0, :, 0], m[:, 0, :, 0])
        assert torch.equal(mixed[:, 0, :, 1:], hand[:, 0, :, 1:])
        hand, mixed = hand[:, 1:], mixed[:, 1:]
    assert torch.equal(mixed, hand)
    outputs = torch.stack([torch.stack([i.resid_post for i in step.iterations], 2) for step in seen], 2)
    assert torch.equal(outputs.permute(1, 2, 0, 3, 4), y)
    assert generate(model).tokens == watched.tokens


@pytest.mark.parametrize("site", SITES)
def test_an_edit_reaches_its_iteration_and_what_comes_after(site):
    model = made()
    place = {"layer": 1, "position": 2, "iteration": 2}

    def shift(tensor, **_):
        return tensor + 1

    _, before = recorded(model)
    out, after = recorded(model, at(shift, site=site, **place))
    order = list(SITES)
    for other in SITES:
        same = (before[other] == after[other]).all(-1).all(0)  # [position, layer, iteration]
        assert same[:2].all()
        assert same[2, :, 0].all()
        assert same[2, 0, 1].all()
        comes_later = order.index(other) > order.index(site) and other != "stream_state"
        if other == site or comes_later:
            assert not same[2, 1, 1], other
        else:
            assert same[2, 1, 1], other
    assert torch.equal(after[site][:, 2, 1, 1], before[site][:, 2, 1, 1] + 1)
    assert not torch.equal(after["resid_post"][:, 3], before["resid_post"][:, 3])
    assert len(out.tokens[0]) == NEW


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_putting_back_what_was_there_changes_nothing(family):
    model = made(family)
    _, before = recorded(model)

    def same(tensor, *, layer, position, iteration, site):
        return before[site][:, position, layer, iteration - 1].clone()

    _, after = recorded(model, same)
    for site in SITES:
        assert torch.equal(before[site], after[site])


def test_another_texts_states_give_its_tokens():
    """All of the last layer's outputs from another run decide what is emitted, and nothing else does."""
    model = made()
    theirs, donor = recorded(model, batch=[[5, 6, 7]] * 3)

    def give(tensor, *, position, iteration, **_):
        return donor["resid_post"][:, position, -1, iteration - 1]

    assert generate(model).tokens != theirs.tokens
    assert generate(model, at(give, site="resid_post", layer=2)).tokens == theirs.tokens


def test_the_stream_state_is_the_only_way_from_one_iteration_to_the_next():
    """Handing iteration 2 what iteration 1 was handed repeats it, bit for bit."""
    model = made()
    _, before = recorded(model)

    def again(tensor, *, layer, position, **_):
        return before["stream_state"][:, position, layer, 0]

    _, after = recorded(model, at(again, site="stream_state", iteration=2, position=0))
    assert torch.equal(after["resid_post"][:, 0, :, 1], before["resid_post"][:, 0, :, 0])
    assert not torch.equal(before["resid_post"][:, 0, :, 1], before["resid_post"][:, 0, :, 0])


def test_rows_are_the_prompts_that_still_iterate_in_their_own_order():
    model = made()
    depths = [1, 3, 2]
    seen = {}

    def look(tensor, *, layer, position, iteration, site):
        if (layer, position, site) == (2, 0, "resid_post"):
            seen[iteration] = tensor

    generate(model, look, iterations=depths)
    alone = [recorded(model, iterations=d, batch=[p])[1] for p, d in zip(prompts(), depths, strict=True)]
    for iteration, rows in {1: [0, 1, 2], 2: [1, 2], 3: [1]}.items():
        for got, row in zip(seen[iteration], rows, strict=True):
            expected = alone[row]["resid_post"][0, 0, 2, iteration - 1]
            assert ((got - expected).norm() / expected.norm()).item() < 1e-10


def test_an_edit_of_one_prompt_leaves_the_others():
    model = made()
    depths = [1, 3, 2]
    before = generate(model, iterations=depths).tokens

    def middle(tensor, **_):
        tensor[1] = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=tensor.dtype) * 9
        return tensor

    after = generate(model, at(middle, site="resid_post", layer=2, iteration=1), iterations=[3, 3, 3])
    plain = generate(model, iterations=[3, 3, 3])
    assert after.tokens[0] == plain.tokens[0]
    assert after.tokens[2] == plain.tokens[2]
    last = {"iteration": 3, "site": "resid_post", "layer": 2}

    def only_row(tensor, **_):
        assert len(tensor) == 1  # the one prompt of depth 3
        return tensor * 0 - model.backbone.model.get_output_embeddings().weight[11] * -50

    edited = generate(model, at(only_row, **last), iterations=depths).tokens
    assert (edited[0], edited[2]) == (before[0], before[2])
    assert edited[1] != before[1]


def test_writing_into_the_copy_is_an_edit_and_touches_nothing_else():
    model = made()

    def zero(tensor, **_):
        tensor.zero_()

    def zeros(tensor, **_):
        return torch.zeros_like(tensor)

    place = {"site": "resid_pre", "layer": 2, "iteration": 1}
    _, written = recorded(model, at(zero, **place))
    _, returned = recorded(model, at(zeros, **place))
    for site in SITES:
        assert torch.equal(written[site], returned[site])
    assert written["resid_pre"][:, :, 2, 0].eq(0).all()
    assert written["resid_post"][:, :, 1, 0].ne(0).all()  # the same tensor, had it not been a copy


def returns_another_shape(tensor, **_):
    return tensor[:, :5]


def returns_one_row(tensor, **_):
    return tensor[:1]


def returns_another_dtype(tensor, **_):
    return tensor.float()


def returns_a_number(tensor, **_):
    return 0.0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (returns_another_shape, r"shape \[3, 5\]; it was given \[3, 32\]"),
        (returns_one_row, r"shape \[1, 32\]; it was given \[3, 32\]"),
        (returns_another_dtype, "dtype torch.float32; it was given torch.float64"),
        (returns_a_number, "returned a float"),
    ],
)
@pytest.mark.parametrize("site", SITES)
def test_a_wrong_edit_is_an_error_that_names_the_place(edit, message, site):
    with pytest.raises(SSTError, match=message) as error:
        generate(made(), at(edit, site=site, layer=1))
    assert f"{site} of layer 1" in error.value.message
    assert error.value.hint


def nothing(tensor, **_):
    return None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"site": "resid_midd"}, "unknown site 'resid_midd'"),
        ({"site": ["resid_mid", "mlp"]}, "unknown site 'mlp'"),
        ({"iteration": 0}, "iteration = 0"),
        ({"layer": -1}, "layer = -1"),
        ({"position": [0, -2]}, "position = -2"),
        ({"position": 1.5}, "position = 1.5"),
        ({"layer": []}, "no layer is named"),
    ],
)
def test_a_place_that_cannot_be_is_an_error_at_once(where, message):
    with pytest.raises(SSTError, match=message):
        at(nothing, **where)


@pytest.mark.parametrize("where", [{"layer": 3}, {"iteration": 4}, {"position": NEW}, {"layer": [3, 4]}])
def test_an_edit_that_never_ran_is_an_error(where):
    with pytest.raises(SSTError, match="never called") as error:
        generate(made(), at(nothing, **where))
    assert "4 positions, 3 iterations, 3 layers" in error.value.hint
    assert generate(made(), at(nothing)).tokens == generate(made()).tokens


def test_a_record_says_what_it_does_not_have():
    record = Record(["resid_mid"])
    generate(made(), record)
    assert set(key[0] for key in record.kept) == {"resid_mid"}
    with pytest.raises(SSTError, match="nothing was recorded at 'mlp_out'"):
        record["mlp_out"]
    with pytest.raises(SSTError, match="unknown site"):
        Record(["resid"])
    mixed = Record()
    generate(made(), mixed, iterations=[1, 3, 2])
    with pytest.raises(SSTError, match="different depths"):
        mixed["resid_post"]
    assert len(mixed.kept["resid_post", 0, 0, 3]) == 1


def test_one_prompt_one_iteration_one_token():
    model, record = made(), Record()
    model.generate([[5]], 1, 1, stop_tokens=[], edit=record)
    assert record["resid_post"].shape == (1, 1, 3, 1, 32)
    m, mixed = record["resid_mid"], record["resid_blended"]
    assert torch.equal(m, mixed)  # one token: there is no state before it
