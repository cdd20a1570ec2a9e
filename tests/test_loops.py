"""Loops over a part of the stack; iterations that keep their own keys are the stack unrolled."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny import prompts, relative, tiny
from tiny_capture import recipe_for, save_model, tiny_llama, word_tokenizer, write_questions
from torch import nn

import sst_interp as sst
from sst_interp.bridges.parallel_hooks import read_in_parallel, read_sequentially
from sst_interp.errors import SSTError
from sst_interp.experiments.patching.run import Plan, patch_run
from sst_interp.findings.of_run import ledger_of
from sst_interp.findings.report.page import write_report
from sst_interp.models.checkpoint import save_checkpoint
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Record, at
from sst_interp.models.kinds.looped import Looped, span_of
from sst_interp.models.model import attach, attach_looped, attach_lrt
from sst_interp.models.solvers.sequential import advance
from sst_interp.models.stream import Pass
from sst_interp.runs.capture import capture
from sst_interp.runs.recipe import Recipe

EACH = Choices(kv="each")
ROUNDING = 1e-11
LOOPS = {
    "whole": {},
    "core": {"prelude": (0, 1), "core": (1, 2)},
    "no prelude": {"core": (0, 2)},
    "no coda": {"core": (1, 3)},
    "add": {"core": (1, 2), "inject": "add"},
    "concat": {"core": (1, 2), "inject": "concat", "initial": "noise", "coda_norm": "final"},
    "normed": {"core": (1, 3), "norm": "final", "damping": 0.3},
    "unit": {"core": (0, 2), "norm": "rms", "initial": "zeros", "inject": "add", "prelude_norm": "rms"},
}


def loop(name, family="llama", kv="each", **more):
    model = attach_looped(tiny(family), choices=Choices(kv=kv), **(LOOPS[name] | more))
    if model.kind.adapter is not None:
        g = torch.Generator().manual_seed(1)
        w = 0.15 * torch.randn(model.kind.adapter.shape, generator=g, dtype=torch.float64)
        model.kind = model.kind.with_weights({"adapter": w})
    return model


def unrolled(hf, first, end, depth):
    """The same layers as a plain stack: the core `depth` times."""
    plain = copy.deepcopy(hf)
    decoder = plain.get_decoder()
    name = "h" if hasattr(decoder, "h") else "layers"
    n = len(getattr(decoder, name))
    order = [*range(first), *(list(range(first, end)) * depth), *range(end, n)]
    setattr(decoder, name, nn.ModuleList(getattr(decoder, name)[i] for i in order))
    plain.config.num_hidden_layers = len(order)
    if getattr(plain.config, "layer_types", None):
        plain.config.layer_types = [plain.config.layer_types[i] for i in order]
    return plain


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("name", ["whole", "core", "no prelude", "no coda"])
def test_where_each_iteration_keeps_its_keys_it_is_the_stack_unrolled(family, name):
    hf, tokens = tiny(family), torch.tensor([prompts()[0]])
    model = attach_looped(hf, choices=EACH, **LOOPS[name])
    for depth in (1, 2, 3):
        theirs = unrolled(hf, *model.kind.span(3), depth)(tokens, use_cache=False).logits
        done = model.replay(tokens, depth)
        last = done.resid_post[:, :, -1, depth - 1].contiguous()
        assert torch.equal(model.backbone.unembed(last), theirs)
        assert done.certificate.method == "iteration by iteration"
        assert relative(model.replay(tokens, depth, "sequential").logits[:, :, -1], theirs) < ROUNDING
    shared = attach_looped(hf, choices=Choices(kv="last"), **LOOPS[name])
    assert relative(shared.replay(tokens, 3).logits[:, :, -1], theirs) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kv", ["each", "last", "first"])
@pytest.mark.parametrize("name", LOOPS)
def test_parallel_equals_sequential(name, kv):
    """Left padding and groups included."""
    rows, model = prompts(), loop(name, kv=kv)
    for depth in (1, 3):
        alone = [model.replay([row], depth, "sequential") for row in rows]
        for how in ({}, {"groups": 3}):
            done = model.replay(rows, depth, **how)
            assert done.certificate.converged
            for k, row in enumerate(alone):
                assert relative(done.resid_post[k, : len(rows[k])], row.resid_post[0]) < 1e-9
        assert done.certificate.logit_error < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("kv", ["each", "last", "first"])
@pytest.mark.parametrize("name", ["whole", "core", "concat", "normed"])
def test_greedy_by_cache_is_a_fresh_prompts_argmax_at_every_step(name, kv):
    prompt = prompts()[0]
    for depth in (1, 2, 3, 4):
        model = loop(name, kv=kv)
        text = model.generate([prompt], depth, 8, stop_tokens=[]).tokens[0]
        for step, token in enumerate(text):
            if kv == "each":  # a prompt is read as deep as the text after it
                assert model.generate([prompt + text[:step]], depth, 1, stop_tokens=[]).tokens[0] == [token]
        whole = [*prompt, *text[:-1]]
        start = 0 if kv == "each" else len(prompt) - 1
        again = model.replay([whole], depth, start=start).logits[0, :, -1].argmax(-1)
        assert again[len(prompt) - 1 - start :].tolist() == text


@torch.no_grad()
def test_an_iteration_reaches_no_lower_iteration_of_a_later_position():
    """Iteration 2's keys at position 3, changed, leave iteration 1 at position 4 as it was."""
    prompt = prompts()[0]
    for kv, leaves in (("each", True), ("last", False)):
        model, plain, changed = loop("core", kv=kv), Record(["resid_post"]), Record(["resid_post"])
        model.generate([prompt], 2, 6, stop_tokens=[], edit=plain)

        def edit(tensor, *, changed=changed, **where):
            changed(tensor, **where) if where["site"] == "resid_post" else None
            here = where["site"] == "resid_pre" and where["layer"] == 1
            return tensor * 1.001 if here and (where["position"], where["iteration"]) == (3, 2) else None

        model.generate([prompt], 2, 6, stop_tokens=[], edit=edit)
        before, after = plain["resid_post"][:, 4, 1], changed["resid_post"][:, 4, 1]
        assert torch.equal(before[:, 0], after[:, 0]) == leaves
        assert not torch.equal(before[:, 1], after[:, 1])


@torch.no_grad()
def test_positions_may_stop_at_different_depths_and_go_on_later():
    """Iteration i of a deep run is the model of depth i, whatever the positions before have run."""
    model, rows = loop("core"), prompts()
    deep = model.replay(rows, 3).resid_post
    for depth in (1, 2):
        assert relative(model.replay(rows, depth).resid_post, deep[..., :depth, :]) < ROUNDING
    mixed = model.generate(rows, [3, 1, 2], 5, stop_tokens=[]).tokens
    assert mixed == [
        model.generate([r], d, 5, stop_tokens=[]).tokens[0] for r, d in zip(rows, (3, 1, 2), strict=True)
    ]
    tokens, stream = torch.tensor([rows[0], rows[0]]), model.new_stream(torch.zeros(2, dtype=torch.long), 11)
    for t, depths in enumerate(
        [(1, 1), (3, 1), (1, 1), (2, 1), (2, 2), (1, 1), (3, 3), (3, 1), (1, 1), (2, 1), (3, 3)]
    ):
        for it in advance(model, stream, tokens[:, t], torch.tensor(depths)):
            for row in range(it.resid_post.shape[1]):
                assert relative(it.resid_post[:, row], deep[0, t, :, it.number - 1]) < ROUNDING
    copied = stream.repeat(2).take(torch.tensor([3, 0]))
    assert copied.column == 11


@torch.no_grad()
def test_a_prompt_without_the_recurrence_stays_at_its_first_iteration():
    prompt = prompts()[0]
    exact, off = (loop("core", kv="each") for _ in "ab")
    off.choices = Choices(kv="each", prompt="blend_off")
    texts = [m.generate([prompt], 1, 5, stop_tokens=[]).tokens for m in (exact, off)]
    assert texts[0] == texts[1]
    seen = []
    for model in (exact, off):
        record = Record(["resid_post"])
        model.generate([prompt], 3, 1, stop_tokens=[], edit=record)
        seen.append(record["resid_post"][0, 0, 1])
    assert relative(seen[1][0], seen[0][0]) < ROUNDING
    assert relative(seen[1][2], seen[0][2]) > 1e-3


@torch.no_grad()
def test_the_formula_by_hand():
    """A first token attends to itself alone, so that each layer can run alone."""
    hf = tiny("llama")
    rotary = hf.model.rotary_emb(
        torch.zeros(1, 1, 32, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    )

    def layer(i, x):
        return hf.model.layers[i](x, position_embeddings=rotary)

    e = layer(0, hf.model.embed_tokens(torch.tensor([[7]])))
    for name, model in {name: loop(name) for name in ("add", "concat", "normed")}.items():
        s = {"add": 0 * e, "normed": e}.get(name)
        if s is None:
            s = model.kind.first_state(first_pass(model), e, Choices())
            assert 0 < s.abs().max() < 3
        for i in range(3):
            if name == "normed":
                u = 0.7 * layer(2, layer(1, s)) + 0.3 * s
                y, s = u, hf.model.norm(u)
            else:
                x = s + e if name == "add" else torch.cat([s, e], -1) @ model.kind.adapter.T
                s = layer(1, x)
                y = layer(2, s if name == "add" else hf.model.norm(s))
            ours = model.replay([[7]], 3).resid_post[0, 0]
            assert relative(ours[-1, i], y[0, 0]) < ROUNDING
            assert torch.equal(ours[0, i], ours[0, 0])  # the prelude runs once


def first_pass(model):
    stream = model.new_stream(torch.zeros(1, dtype=torch.long), 1)
    return Pass(stream, torch.tensor([[7]]), torch.tensor([0]), None, None, "write")


@torch.no_grad()
def test_noise_is_of_the_seed_and_the_position_alone():
    rows = prompts()
    model = loop("concat")
    assert (
        relative(
            model.replay(rows, 2).resid_post[1, : len(rows[1])], model.replay([rows[1]], 2).resid_post[0]
        )
        < 1e-9
    )
    again, other = loop("concat"), loop("concat", seed=1)
    assert torch.equal(model.replay(rows, 2).logits, again.replay(rows, 2).logits)
    assert relative(other.replay(rows, 2).logits, model.replay(rows, 2).logits) > 1e-2
    assert len({m.kind.digest() for m in (model, again, other)}) == 2


@torch.no_grad()
@pytest.mark.parametrize("method", ["parallel", "sequential"])
@pytest.mark.parametrize("kv", ["each", "last"])
def test_hooks_see_the_layers_that_run(method, kv):
    model, tokens, calls = loop("core", kv=kv), torch.tensor([prompts()[0]]), []

    def hook(position, iteration):
        def visit(site, layer, tensor):
            calls.append((site, layer, iteration))
            return tensor * 1.01 if (site, layer, iteration) == ("resid_pre", 0, 1) else tensor

        return visit

    if method == "parallel":
        last = read_in_parallel(model, model, tokens, 2, hook)
    else:
        last = read_sequentially(model, tokens, 2, hook)
    ran = {(layer, i) for site, layer, i in calls if site == "resid_post"}
    assert ran == {(0, 1), (1, 1), (2, 1), (1, 2), (2, 2)}
    assert {(layer, i) for site, layer, i in calls if site == "stream_state"} == {(1, 2)}
    hf = copy.deepcopy(model.backbone.model)
    hf.model.embed_tokens.weight.mul_(1.01)
    again = attach_looped(hf, choices=Choices(kv=kv), **LOOPS["core"])
    assert relative(last, again.replay(tokens, 2).resid_post[:, :, -1]) < 1e-9


def test_an_edit_of_a_prelude_layer_is_of_iteration_1():
    model, prompt = loop("core"), prompts()[0]
    with pytest.raises(SSTError, match="never called"):
        model.generate([prompt], 3, 2, edit=at(lambda t, **_: t, layer=0, iteration=2))
    record = Record(["resid_post"])
    model.generate([prompt], 3, 2, stop_tokens=[], edit=record)
    values = record["resid_post"]
    assert values.shape == (1, 2, 3, 3, 32)
    assert torch.equal(values[:, :, 0, 0], values[:, :, 0, 2])


@torch.no_grad()
@pytest.mark.parametrize("name", LOOPS)
def test_a_checkpoint_keeps_the_loop(tmp_path, name):
    backbone = save_model(tmp_path / "tiny")
    hf = sst.load(backbone, dtype="float32").backbone.model
    model = attach_looped(hf, choices=EACH, **LOOPS[name])
    folder = save_checkpoint(model, tmp_path / "looped", str(backbone))
    loaded = sst.load(folder, dtype="float32")
    assert loaded.kind.like(model.kind)
    assert loaded.kind.digest() == model.kind.digest()
    assert loaded.choices.kv == "each"
    tokens = [[5, 6, 7, 8, 9, 5, 6]]
    assert torch.equal(loaded.replay(tokens, 3).logits, model.replay(tokens, 3).logits)
    said = json.loads((folder / "stream.json").read_text())
    assert ("loop" in said) == (name != "whole")
    if name != "whole":
        said["loop"]["windings"] = 3
        (folder / "stream.json").write_text(json.dumps(said))
        with pytest.raises(SSTError, match="windings"):
            sst.load(folder, dtype="float32")


def test_what_does_not_fit_is_one_clear_line():
    hf = tiny("llama")
    for how, said in (
        ({"core": (1, 9)}, "not a range of 3 layers"),
        ({"core": (2, 2)}, "do not cut 3 layers"),
        ({"prelude": (0, 1), "core": (2, 3)}, "do not cut 3 layers"),
        ({"prelude": (0, 1), "coda": (1, 3)}, "do not cut 3 layers"),
        ({"core": [0, 1.5]}, "not a range"),
        ({"inject": "multiply"}, "inject = 'multiply' is not one of"),
        ({"initial": "ones"}, "initial = 'ones' is not one of"),
        ({"norm": "layer"}, "norm = 'layer' is not one of"),
        ({"damping": 1.0}, "damping = 1.0 is not"),
        ({"damping": "half"}, "damping = 'half' is not"),
        ({"seed": -1}, "seed = -1"),
        ({"adapter": torch.zeros(3, 3)}, r"adapter \[3, 3\] must be"),
        ({"windings": 3}, "windings"),
    ):
        with pytest.raises(SSTError, match=said) as error:
            attach_looped(hf, **how)
        assert "\n" not in error.value.message
    for make in (attach, attach_lrt):
        with pytest.raises(SSTError, match="choice kv = 'each'"):
            make(hf, choices=EACH)
    assert span_of(8, prelude=(0, 2), coda=(6, 8)) == (2, 6)
    assert span_of(8) == (0, 8)
    assert str(Looped()) == "looped over depth, no weights of its own"
    assert Looped().label() == "looped"


@pytest.mark.parametrize("kv", ["each", "last"])
def test_a_run_compares_core_and_coda_alone(tmp_path, kv):
    """Every iteration of every layer is in `states`; `pairs` leaves out the prelude, which runs once."""
    csv = write_questions(tmp_path / "words.csv", 4)
    recipe = recipe_for(csv, questions=4, max_new_tokens=4, kind="looped", keep="all", controls=1)
    recipe = replace(recipe, choices=Choices(kv=kv))
    model = attach_looped(tiny_llama(), choices=Choices(kv=kv), prelude=(0, 1), core=(1, 2))
    model.tokenizer, model.name = word_tokenizer(), "tiny"
    run = capture(recipe, model, tmp_path / "own", progress=False)
    assert sorted(set(run.pairs["layer"])) == [1, 2]
    states = run.states(0, position=None, depth=3)
    assert states.shape[1:] == (3, 3, 32)
    assert torch.equal(states[:, 0, 0], states[:, 0, 2])
    assert not torch.equal(states[:, 1, 0], states[:, 1, 2])
    if kv == "each":  # then depth 1 on depth 1's text is iteration 1, and every depth is an iteration
        within, between = (run.pairs[run.pairs["comparison"] == c] for c in ("within", "teacher_forced"))
        assert (within["cosine"] < 0.99).any()
        assert len(between)
    ledger = ledger_of(run, resamples=50)
    assert not ledger.failed
    assert "basin_shifts.teacher_forced" in ledger.results
    assert not patch_run(run, tmp_path / "patched", 2, Plan(layers=3, windows=2, new_tokens=2), model).empty
    assert "Depth-looped model" in write_report(run, tmp_path / "page.html", ledger).read_text()


def test_a_recipe_says_how_its_model_loops(tmp_path):
    csv, folder = write_questions(tmp_path / "words.csv", 3), save_model(tmp_path / "llama")
    plain = recipe_for(csv, questions=3, max_new_tokens=2, checkpoint=str(folder), kind="looped")
    recipe = Recipe.loads(plain.to_toml() + "\n[loop]\ncore = [1, 2]\ndamping = 0.5\n", "own")
    assert Recipe.loads(recipe.to_toml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe == plain.with_settings(["loop.core=[1, 2]", "loop.damping=0.5", "name=own"])
    assert recipe.fingerprint() != plain.fingerprint()
    assert plain.fingerprint() == replace(plain, loop={}).fingerprint()
    run = capture(recipe, None, tmp_path / "own", progress=False)
    assert sorted(set(run.pairs["layer"])) == [1, 2]
    assert "damping 0.5" in run.manifest["provenance"]["stream"]
    loaded = sst.load(folder, dtype=recipe.dtype, kind="looped", loop=recipe.loop)
    own = attach_looped(loaded.backbone.model, core=(1, 2), damping=0.5)
    assert loaded.kind.digest() == own.kind.digest()
    with pytest.raises(SSTError, match="the recipe's loop"):
        capture(recipe, sst.load(folder, dtype=recipe.dtype, kind="looped"), tmp_path / "other")
    for wrong, said in (
        ({"kind": None}, r"\[loop\] is of a looped model"),
        ({"loop": {"coer": [1, 2]}}, "coer"),
        ({"loop": 3}, "not a table"),
    ):
        with pytest.raises(SSTError, match=said):
            Recipe.from_dict(recipe.to_dict() | wrong)
    with pytest.raises(SSTError, match="do not cut 3 layers"):
        capture(replace(recipe, loop={"core": [2, 2]}), None, tmp_path / "none", progress=False)
    saved = save_checkpoint(loaded, tmp_path / "saved", str(folder))
    with pytest.raises(SSTError, match="a loop of its own"):
        sst.load(saved, dtype=recipe.dtype, kind="looped", loop={"core": [0, 1]})
