"""Tokens, depths, layers, sites and positions in any clothes: every public call takes them, or says one line.

One table of calls and one of clothes. What a call gives for a thing in any clothes is what it gives for a
plain list or int, bit for bit.
"""

import numpy as np
import pytest
import torch
from tiny_capture import recipe_for, tiny_llama, word_tokenizer, write_questions

from sst_interp.bridges.jacobian import fit_lenses, read_lenses
from sst_interp.bridges.nnsight import StateStreamNNsight
from sst_interp.bridges.pretrained import as_pretrained
from sst_interp.errors import SSTError
from sst_interp.models.hooks import Record, at
from sst_interp.models.model import attach
from sst_interp.runs.capture import capture
from sst_interp.runs.export import harvest

TEXT = "sun moon quorvex1 quorvex2 sun"
MODEL = attach(tiny_llama(), word_tokenizer(), alpha=0.3, name="tiny")
ROW = MODEL.encode(TEXT)
LENSES = fit_lenses(MODEL, [ROW], iterations=2, skip=0)


def hooked(given, depth=2, **place):
    seen = []
    bridge = MODEL.bridge()
    hook = bridge.at(lambda tensor, hook: seen.append(tensor.clone()), **({"iteration": 2} | place))
    how = {"iterations": depth, "method": "sequential", "fwd_hooks": [("blocks.1.hook_resid_post", hook)]}
    return bridge.run_with_hooks(given, **how), *seen


def traced(given, depth=2):
    sst = StateStreamNNsight(MODEL, depth)
    with sst.trace(given) as tracer:
        y = sst.iteration[1].layers[1].resid_post.output.save()
        out = tracer.result.save()
    return y, out


def written_in_a_trace(given, depth=2):
    sst = StateStreamNNsight(MODEL, depth)
    with sst.generate(given, max_new_tokens=2) as tracer:
        out = tracer.result.save()
    return out.tokens


def harvested(given, depth=2):
    folder = harvested.root / str(len(list(harvested.root.iterdir())))
    harvest(MODEL, given, folder, depth)
    return (folder / "states-00000.safetensors").read_bytes()


TOKENS = {
    "replay": lambda x, d=2: MODEL.replay(x, d).logits,
    "generate": lambda x, d=2: MODEL.generate(x, d, 3).tokens,
    "generate, depth": lambda x, d=2: MODEL.generate(x, depth=d, max_new_tokens=3).tokens,
    "generate_at_depths": lambda x, d=2: MODEL.generate_at_depths(x, [d], 3)[2].tokens,
    "stream": lambda x, d=2: list(MODEL.stream(x, d, 3)),
    "send": lambda x, d=2: MODEL.start().send(x, d, 3).tokens,
    "loglikelihood": lambda x, d=2: MODEL.loglikelihood(x, [[5, 6]], d).sums,
    "run_with_cache": lambda x, d=2: MODEL.run_with_cache(x, d)[0],
    "bridge": lambda x, d=2: MODEL.bridge()(x, d),
    "run_with_hooks": hooked,
    "bridge.generate": lambda x, d=2: MODEL.bridge().generate(x, d, 3).tokens,
    "read_lenses": lambda x, d=2: read_lenses(MODEL, LENSES, x, d, return_full_logits=True)[1].lens_logits[1],
    "fit_lenses": lambda x, d=2: fit_lenses(MODEL, x, d, skip=2)[1].jacobians[0],
    "trace": traced,
    "trace.generate": written_in_a_trace,
    "harvest": harvested,
}
ONE_PROMPT = ("loglikelihood", "send")
CLOTHES = {
    "text": TEXT,
    "texts": [TEXT],
    "list": ROW,
    "tuple": tuple(ROW),
    "1-D tensor": torch.tensor(ROW),
    "2-D tensor": torch.tensor([ROW]),
    "int32 tensor": torch.tensor(ROW, dtype=torch.int32),
    "1-D array": np.array(ROW),
    "2-D array": np.array([ROW], dtype=np.uint8),
    "list of arrays": [np.array(ROW)],
    "list of tensors": [torch.tensor(ROW)],
    "list of numpy integers": [np.int64(token) for token in ROW],
}
NAKED = {
    "floats": torch.tensor(ROW).float(),
    "3-D": torch.tensor([[ROW]]),
    "a bool": [5, True],
    "negative": [5, -1],
    "outside": [5, 10**6],
    "None": None,
    "empty": [],
    "a dictionary": {"input_ids": ROW},
}
NUMBERS = {"numpy": np.int64(2), "uint8": np.uint8(2), "tensor": torch.tensor(2), "array": np.array(2)}
NO_NUMBERS = {"bool": True, "float": 2.0, "text": "2", "zero": 0, "None": None, "numpy bool": np.bool_(True)}


@pytest.fixture(scope="module", autouse=True)
def harvests(tmp_path_factory):
    harvested.root = tmp_path_factory.mktemp("harvests")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list) and len(a) and isinstance(a[0], torch.Tensor):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def one_line(call):
    with pytest.raises(SSTError) as told:
        call()
    assert "\n" not in told.value.message
    assert told.value.hint


@pytest.mark.parametrize("clothes", CLOTHES)
@pytest.mark.parametrize("call", TOKENS)
def test_tokens(call, clothes):
    """A call of one prompt takes one that stands alone; the others take it with or without its batch."""
    assert same(TOKENS[call](CLOTHES[clothes]), TOKENS[call](ROW))


@pytest.mark.parametrize("given", NAKED)
@pytest.mark.parametrize("call", TOKENS)
def test_what_are_no_tokens(call, given):
    one_line(lambda: TOKENS[call](NAKED[given]))


@pytest.mark.parametrize("clothes", NUMBERS)
@pytest.mark.parametrize("call", TOKENS)
def test_depths(call, clothes):
    assert same(TOKENS[call](ROW, NUMBERS[clothes]), TOKENS[call](ROW, 2))


@pytest.mark.parametrize("given", NO_NUMBERS)
@pytest.mark.parametrize("call", TOKENS)
def test_what_are_no_depths(call, given):
    if (call, given) == ("generate, depth", "None"):
        return  # None is the default there
    one_line(lambda: TOKENS[call](ROW, NO_NUMBERS[given]))


MANY = {
    "list": [0, 2],
    "tuple": (0, 2),
    "array": np.array([0, 2]),
    "tensor": torch.tensor([0, 2]),
    "numpy integers": [np.int64(0), np.int64(2)],
    "set": {0, 2},
    "range": range(0, 4, 2),
}
ONE = {"int": 2, "numpy": np.int64(2), "tensor": torch.tensor(2), "array": np.array(2)}
DEPTH_LISTS = {
    "tuple": (2, 1, 3),
    "array": np.array([2, 1, 3]),
    "tensor": torch.tensor([2, 1, 3]),
    "numpy integers": list(np.array([2, 1, 3])),
    "nested": [[2, 1, 3]],
    "2-D tensor": torch.tensor([[2, 1, 3]]),
    "list of arrays": [np.array([2, 1, 3])],
}


@pytest.mark.parametrize("clothes", DEPTH_LISTS)
def test_depths_of_positions(clothes):
    given = DEPTH_LISTS[clothes]
    wanted = MODEL.generate(ROW, depth=[2, 1, 3], max_new_tokens=4).tokens
    assert MODEL.generate(ROW, depth=given, max_new_tokens=4).tokens == wanted
    assert MODEL.start().send(ROW, depth=given, max_new_tokens=4).tokens == wanted


@pytest.mark.parametrize("clothes", ["tuple", "array", "tensor", "numpy integers"])
def test_depths_of_prompts_and_of_a_table(clothes):
    given = DEPTH_LISTS[clothes]
    rows = [ROW, ROW[:3], ROW[:2]]
    assert MODEL.generate(rows, given, 3).tokens == MODEL.generate(rows, [2, 1, 3], 3).tokens
    wanted = MODEL.generate_at_depths(rows, [2, 1, 3], 3)
    assert {d: out.tokens for d, out in MODEL.generate_at_depths(rows, given, 3).items()} == {
        d: out.tokens for d, out in wanted.items()
    }
    several = MODEL.loglikelihood(ROW, [[5, 6]], given).sums
    assert torch.equal(several, MODEL.loglikelihood(ROW, [[5, 6]], [2, 1, 3]).sums)
    assert torch.equal(
        MODEL.replay(ROW[:3], depth=given).logits, MODEL.replay(ROW[:3], depth=[2, 1, 3]).logits
    )


def places(**where):
    seen = []
    edit = at(lambda tensor, **here: seen.append(tuple(here.values())), **where)
    MODEL.generate([ROW], 3, 3, stop_tokens=[], edit=edit)
    return seen


@pytest.mark.parametrize("clothes", MANY)
def test_places_of_an_edit(clothes):
    given = MANY[clothes]
    assert places(layer=given) == places(layer=[0, 2])
    assert places(position=given) == places(position=[0, 2])
    more = {"set": {1, 3}, "range": range(1, 4, 2)}.get(clothes)
    if more is not None:
        assert places(iteration=more) == places(iteration=[1, 3])


@pytest.mark.parametrize("clothes", ONE)
def test_one_place(clothes):
    given = ONE[clothes]
    for axis in ("layer", "position", "iteration"):
        assert places(**{axis: given}) == places(**{axis: 2})
    assert same(hooked(ROW, position=given), hooked(ROW, position=2))
    assert same(hooked(ROW, iteration=given), hooked(ROW, iteration=2))
    sst = StateStreamNNsight(MODEL, 2)
    with sst.generate([ROW], max_new_tokens=4, stop_tokens=[]) as tracer:
        for _ in tracer.iter[given]:
            y = sst.iteration[2].layers[2].resid_post.output.save()
    assert y.place == (2, 2, 2, "resid_post")


def test_sites():
    for site in ("resid_mid", ["resid_mid"], ("resid_mid",), {"resid_mid"}):
        assert places(site=site) == places(site="resid_mid")
        record = Record(site)
        MODEL.generate([ROW], 2, 2, stop_tokens=[], edit=record)
        assert record["resid_mid"].shape == (1, 2, 3, 2, 32)
    one_line(lambda: Record("resid_midd"))
    one_line(lambda: Record(2))
    one_line(lambda: at(lambda tensor, **_: None, site=2))
    names = "blocks.1.hook_resid_mid"
    for given in (names, [names], (names,), lambda name: name == names):
        assert list(MODEL.run_with_cache(ROW, 2, given)[1][0].keys()) == [names]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_for(write_questions(folder / "words.csv", 3), depths=(1, 3), keep="all", max_new_tokens=3)
    return capture(recipe, MODEL, folder / "own", progress=False)


@pytest.mark.parametrize("clothes", ONE)
def test_numbers_of_a_run(run, clothes):
    given = ONE[clothes]
    assert torch.equal(run.states(given, given, 3), run.states(2, 2, 3))
    assert torch.equal(run.states(0, 0, torch.tensor(3)), run.states(0, 0, 3))
    assert torch.equal(run.state(given, given), run.state(2, 2))


@pytest.mark.parametrize("given", [True, 1.0, "1", -1, [1], None], ids=repr)
def test_what_are_no_numbers_of_a_run(run, given):
    one_line(lambda: run.states(given))
    one_line(lambda: run.state(0, given))
    if given is not None:
        one_line(lambda: run.states(0, given))
        one_line(lambda: run.states(0, 0, given))


@pytest.mark.parametrize("clothes", [name for name in MANY if name != "set"])
def test_axes_of_an_export(run, tmp_path, clothes):
    given = MANY[clothes]
    for name, axis in (("given", given), ("list", [0, 2])):
        run.export(tmp_path / name, rows=axis, layers=axis)
    file = "states-00000.safetensors"
    assert (tmp_path / "given" / file).read_bytes() == (tmp_path / "list" / file).read_bytes()


def test_a_dataset_is_the_table(run):
    pytest.importorskip("datasets")
    for name in ("questions", "steps", "pairs"):
        rows, table = run.dataset(name), run.table(name)
        assert rows.column_names == list(table.columns)
        assert len(rows) == len(table)
    within = run.dataset("pairs", ["layer", "cosine"], "within")
    table = run.table("pairs", ["layer", "cosine"], "within")
    assert within["layer"][:] == table["layer"].tolist()
    assert within["cosine"][:] == table["cosine"].tolist()
    one_line(lambda: run.dataset("pears"))


def test_transformers_own_takes_tensors_of_either_shape():
    mine = as_pretrained(MODEL, np.int64(2))
    two = mine.generate(torch.tensor([ROW]), max_new_tokens=3, do_sample=False)
    assert two[0, len(ROW) :].tolist() == MODEL.generate(ROW, 2, 3).tokens[0]
    one_line(lambda: mine(torch.tensor(ROW).float()))
