"""nnsight on a model that iterates: every value is of the position, iteration, layer and site asked for.

Values are compared bit for bit with the native recorder; what is past is refused, and never the next one.
"""

import importlib.util

import pytest
import torch
from tiny import lrt, prompts, tiny

from sst_interp.errors import SSTError
from sst_interp.models.hooks import Record
from sst_interp.models.model import attach, attach_looped

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("nnsight"), reason='pip install "sst-interp[lens]"'
)

NEW, DEPTH = 3, 3
GENERATE = {"max_new_tokens": NEW, "stop_tokens": []}
MODELS = {
    "llama-sst": lambda: attach(tiny("llama"), alpha=0.2),
    "gemma3-sst": lambda: attach(tiny("gemma3"), alpha=0.2),
    "gpt2-sst": lambda: attach(tiny("gpt2"), alpha=0.2),
    "qwen3-backbone": lambda: attach(tiny("qwen3"), alpha=0.0),
    "llama-lrt": lambda: lrt("both"),
    "gpt2-lrt": lambda: lrt("residual", hf=tiny("gpt2")),
    "llama-looped": lambda: attach_looped(tiny("llama")),
    "gemma2-looped": lambda: attach_looped(tiny("gemma2")),
}


@pytest.fixture(scope="module", params=MODELS)
def recorded(request):
    """A model, and what the native recorder sees of it."""
    model, record = MODELS[request.param](), Record()
    model.generate(prompts(2), DEPTH, edit=record, **GENERATE)
    return model, record.kept


@pytest.fixture(scope="module")
def llama():
    model, record = MODELS["llama-sst"](), Record()
    model.generate(prompts(2), DEPTH, edit=record, **GENERATE)
    return model, record.kept


def point(sst, iteration, layer, site="resid_post"):
    return getattr(sst.iteration[iteration].layers[layer], site)


def looped(sst, *asked):
    """Values at `places` in a loop over `steps`, for each (steps, places); steps None: outside a loop."""
    got = []
    with sst.generate(prompts(2), **GENERATE) as tracer:
        for steps, places in asked:
            for position in [0] if steps is None else tracer.iter[steps]:
                for iteration, layer, site in places:
                    value = point(sst, iteration, layer, site).output.save()
                    got.append((site, layer, position, iteration, value))
    return got


def test_every_value_is_of_the_place_that_was_asked_for(recorded):
    """Everything that the native recorder sees, asked for in the order in which it saw it, and its label."""
    model, kept = recorded
    at, places, got = {}, list(kept), {}
    for site, layer, position, iteration in places:
        at.setdefault(position, []).append((iteration, layer, site))
    sst = model.nnsight(DEPTH)
    with sst.generate(prompts(2), **GENERATE) as tracer:
        for position in tracer.iter[:]:
            for iteration, layer, site in at[position]:
                value = point(sst, iteration, layer, site).output.save()
                got[site, layer, position, iteration] = value
    assert list(got) == places
    for (site, layer, position, iteration), value in got.items():
        assert torch.equal(value[:, 0], kept[site, layer, position, iteration])
        assert value.place == (position, iteration, layer, site)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("earlier", "later"),
    [((1, 0, "resid_post"), (1, 2, "resid_post")), ((1, 2, "resid_post"), (2, 2, "resid_post")),
     ((2, 1, "resid_mid"), (2, 1, "mlp_out"))],
)  # fmt: skip
def test_a_value_that_is_past_is_refused(recorded, first, earlier, later):
    """Version 0.1 handed over the next position's, from `iter[1:3]` on."""
    model, kept = recorded
    sst = model.nnsight(DEPTH)
    message = f"{earlier[2]} of layer {earlier[1]}, iteration {earlier[0]}, position {first} has passed"
    with pytest.raises(SSTError, match=message) as error:
        looped(sst, (slice(first, 3), [later, earlier]))
    assert "in the order they run" in error.value.hint
    got = looped(sst, (slice(first, 3), [earlier, later]))
    assert len(got) == 2 * (3 - first)
    for *key, value in got:
        assert torch.equal(value[:, 0], kept[tuple(key)])


@pytest.mark.parametrize("name", ["output", "input"])
def test_writing_what_is_past_is_refused(llama, name):
    sst = llama[0].nnsight(DEPTH)

    def write():
        with sst.generate(prompts(2), **GENERATE) as tracer:
            for _ in tracer.iter[1]:
                y = point(sst, 1, 1).output
                setattr(point(sst, 1, 0, "resid_mid"), name, y)

    with pytest.raises(SSTError, match="resid_mid of layer 0, iteration 1, position 1 has passed"):
        write()


def test_an_input_is_the_output_before_it_is_written_to(llama):
    model, kept = llama
    sst = model.nnsight(DEPTH)

    def write(late=False):
        with sst.generate(prompts(2), **GENERATE) as tracer:
            for _ in tracer.iter[1]:
                if late:
                    point(sst, 1, 1).output.save()
                before = point(sst, 1, 1).input.save()
                point(sst, 1, 1).input = -before
                after = point(sst, 1, 1).output.save()
        return before, after

    before, after = write()
    assert torch.equal(before[:, 0], kept["resid_post", 1, 1, 1])
    assert torch.equal(after, -before)
    assert before.place == after.place == (1, 1, 1, "resid_post")
    with pytest.raises(SSTError, match=r"nothing ran at iteration.1.layers.1.resid_post.input in position 1"):
        write(late=True)


@pytest.mark.parametrize("steps", [slice(None), slice(0, 6), slice(1, 6), [0, 2, 5]], ids=str)
def test_a_loop_longer_than_the_text_ends_with_it(recorded, steps):
    """The values are kept, and what stands after the loop runs; so does another loop."""
    model, kept = recorded
    sst, got, after = model.nnsight(DEPTH), {}, []
    with sst.generate(prompts(2), **GENERATE) as tracer:
        for position in tracer.iter[steps]:
            got[position] = point(sst, DEPTH, 1).output.save()
        after.append("loop")
        for position in tracer.iter[NEW:]:
            after.append(position)
        out = tracer.result.save()
        after.append("result")
    asked = steps if isinstance(steps, list) else range(NEW)[steps]
    assert list(got) == [p for p in asked if p < NEW]
    for position, value in got.items():
        assert torch.equal(value[:, 0], kept["resid_post", 1, position, DEPTH])
    assert after == ["loop", "result"]
    assert out.tokens == model.generate(prompts(2), DEPTH, **GENERATE).tokens


def test_a_loop_that_asked_for_more_says_so(llama):
    with pytest.warns(UserWarning, match="asks for position 3; the last one was 2"):
        looped(llama[0].nnsight(1), (slice(0, 6), [(1, 0, "resid_post")]))


def test_a_text_that_stops_early_ends_the_loop(llama):
    model, _ = llama
    stop = model.generate(prompts(1), DEPTH, **GENERATE).tokens[0][1]
    sst, got = model.nnsight(DEPTH), []
    with sst.generate(prompts(1), max_new_tokens=9, stop_tokens=[stop]) as tracer:
        for position in tracer.iter[:]:
            got.append((position, point(sst, 2, 0).output.save()))
        out = tracer.result.save()
    assert out.stopped == [True]
    assert [position for position, _ in got] == list(range(len(out.tokens[0])))
    assert len(got) < 9


def test_given_tokens_end_the_loop_too(recorded):
    model, _ = recorded
    tokens, got = torch.tensor([prompts()[0][:4]]), []
    sst = model.nnsight(2)
    with sst.trace(tokens) as tracer:
        for position in tracer.iter[2:]:
            got.append((position, point(sst, 2, 2).output.save()))
        logits = tracer.result.save()
    states = model.replay(tokens, 2, "sequential").resid_post
    assert [position for position, _ in got] == [2, 3]
    for position, value in got:
        assert torch.equal(value[:, 0], states[:, position, 2, 1])
    assert logits.shape == (1, 4, 97)


FIRST, SECOND = [(1, 0, "resid_post")], [(1, 1, "resid_post")]


@pytest.mark.parametrize("asked", [[(1, FIRST), (slice(1, 2), SECOND)], [(None, SECOND)]], ids=str)
def test_a_position_is_looped_over_again_while_it_runs(llama, asked):
    """Outside a loop, position 0 is meant."""
    model, kept = llama
    for *key, value in looped(model.nnsight(DEPTH), *asked):
        assert torch.equal(value[:, 0], kept[tuple(key)])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([(2, FIRST), (0, SECOND)], "position 0 has passed"),
        ([(2, FIRST), ([2, 1], SECOND)], "position 1 has passed"),
        ([(slice(None), FIRST), (slice(None), FIRST)], "position 0 has passed"),
        ([(slice(2), FIRST), (None, SECOND)], r"position 0 has passed \(position 1 runs"),
        ([(slice(None), FIRST), (None, SECOND)], r"position 0 has passed \(the last position is done"),
    ],
    ids=str,
)
def test_a_position_that_is_past_is_refused(llama, asked, message):
    with pytest.raises(SSTError, match=message):
        looped(llama[0].nnsight(DEPTH), *asked)


def test_a_trace_after_one_that_failed_starts_anew(llama):
    model, kept = llama
    sst = model.nnsight(DEPTH)
    with pytest.raises(SSTError, match="has passed"):
        looped(sst, (1, SECOND), (1, FIRST))
    for *key, value in looped(sst, (1, FIRST), (1, SECOND)):
        assert torch.equal(value[:, 0], kept[tuple(key)])
    assert sst.generate(prompts(2), **GENERATE).tokens == model.generate(prompts(2), DEPTH, **GENERATE).tokens


@pytest.mark.parametrize(("iteration", "layer"), [(1, 0), (2, 1)])
def test_a_site_that_a_kind_does_not_have_there_is_an_error(iteration, layer):
    """A looped model reads a state in its first layer, from iteration 2 on."""
    sst = attach_looped(tiny("llama")).nnsight(2)
    message = f"nothing ran at iteration.{iteration}.layers.{layer}.stream_state.output in position 1"
    with pytest.raises(SSTError, match=message):
        looped(sst, (slice(1, None), [(iteration, layer, "stream_state")]))


def test_a_stored_edit_loops_over_positions_too(llama):
    model, kept = llama
    sst = model.nnsight(DEPTH)
    with sst.edit() as (tracer, edited):
        for _ in tracer.iter[1:]:
            point(edited, 1, 1).output[:] = 0
    got = {}
    with edited.generate(prompts(2), **GENERATE) as tracer:
        for position in tracer.iter[:]:
            got[position] = point(edited, 1, 1).output.save()
    assert torch.equal(got[0][:, 0], kept["resid_post", 1, 0, 1])
    assert not got[1].any()
    assert not got[2].any()


def test_rows_of_invokes_loop_apart(llama):
    """Two readers of one batch: one reads deep layers first in its own loop, the other shallow ones."""
    model, kept = llama
    rows, got = prompts(2), {}
    sst = model.nnsight(DEPTH)
    with sst.generate(**GENERATE) as tracer:
        with tracer.invoke(rows[0]):
            for position in tracer.iter[:]:
                got[0, position] = point(sst, 2, 2).output.save()
        with tracer.invoke(rows[1]):
            for position in tracer.iter[1:]:
                got[1, position] = point(sst, 1, 0).output.save()
    assert set(got) == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)}
    for (row, position), value in got.items():
        here = (2, position, 2) if row == 0 else (0, position, 1)
        assert torch.equal(value[:, 0], kept["resid_post", *here][row : row + 1])


@pytest.mark.parametrize("steps", [-1, slice(-2, None), slice(None, None, 2), "0", 1.5], ids=str)
def test_positions_that_there_are_not_are_refused(llama, steps):
    with pytest.raises(SSTError):
        looped(llama[0].nnsight(1), (steps, FIRST))
