"""One truth: TransformerLens, nnsight and the native recorder see and change the same tensors."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from tiny import FAMILIES, prompts, tiny
from tiny_capture import recipe_for, tiny_llama, word_tokenizer, write_questions

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import SITES, Record, at
from sst_interp.models.model import attach

there = all(importlib.util.find_spec(name) for name in ("transformer_lens", "nnsight"))
pytestmark = pytest.mark.skipif(not there, reason='pip install "sst-interp[lens]"')

NEW, DEPTH, LAYERS = 3, 3, 3
GENERATE = {"max_new_tokens": NEW, "stop_tokens": []}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return attach(tiny(request.param), alpha=0.2)


@pytest.fixture(scope="module")
def llama():
    return attach(tiny("llama"), alpha=0.2)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def given():
    """Two rows of one length."""
    row = prompts()[0][:7]
    return torch.tensor([row, row[::-1]])


def from_caches(caches, site):
    """[row, position, layer, iteration, d_model]"""
    return torch.stack([cache.stack_activation(site).permute(1, 2, 0, 3) for cache in caches], 3)


def traced(sst, how, *args, positions, iterations=DEPTH, layers=range(LAYERS), **kwargs):
    """Every site of these layers in every iteration and position of a trace, and what it returned."""
    got = {}
    with getattr(sst, how)(*args, **kwargs) as tracer:
        for position in tracer.iter[:positions]:
            for i in range(1, iterations + 1):
                for layer in layers:
                    for site in SITES:
                        point = getattr(sst.iteration[i].layers[layer], site)
                        got[site, layer, position, i] = point.output.save()
        result = tracer.result.save()
    return got, result


def test_generation_is_seen_alike_by_all_three(model):
    """Bit for bit, at every site of every layer, iteration and position; rows of different length."""
    record = Record()
    native = model.generate(prompts(2), DEPTH, edit=record, **GENERATE)
    lens, caches = model.bridge().generate_with_caches(prompts(2), iterations=DEPTH, **GENERATE)
    sst = model.nnsight(DEPTH)
    got, result = traced(sst, "generate", prompts(2), positions=NEW, **GENERATE)
    assert native.tokens == lens.tokens == result.tokens
    assert len(caches) == DEPTH
    assert len(got) == len(record.kept) == NEW * DEPTH * LAYERS * len(SITES)
    for site in SITES:
        assert torch.equal(from_caches(caches, site), record[site]), site
    for key, tensor in got.items():
        assert torch.equal(tensor[:, 0], record.kept[key]), key


def test_given_tokens_are_seen_alike_by_all_three(model):
    tokens = given()
    replayed = model.replay(tokens, DEPTH, "sequential")
    logits, caches = model.run_with_cache(tokens, DEPTH, method="sequential")
    sst = model.nnsight(DEPTH)
    got, result = traced(sst, "trace", tokens, positions=tokens.shape[1])
    assert torch.equal(from_caches(caches, "resid_post"), replayed.resid_post)
    for site in SITES:
        ours = from_caches(caches, site)
        for layer in range(LAYERS):
            for position in range(tokens.shape[1]):
                for i in range(DEPTH):
                    theirs = got[site, layer, position, i + 1][:, 0]
                    assert torch.equal(ours[:, position, layer, i], theirs), site
    assert relative(torch.stack(logits, 2), replayed.logits) < 1e-12  # other matrix shapes
    assert relative(result, replayed.logits[:, :, -1]) < 1e-12


@pytest.mark.parametrize(
    "choices", [{}, {"carry": "ffn_output"}, {"blend": "additive"}, {"kv": "first"}], ids=str
)
def test_all_positions_at_once_are_the_sequential_ones(model, choices):
    plain = model.choices
    model.choices = Choices(**choices)
    try:
        _, parallel = model.run_with_cache(given(), DEPTH)
        _, sequential = model.run_with_cache(given(), DEPTH, method="sequential")
    finally:
        model.choices = plain
    for a, b in zip(parallel, sequential, strict=True):
        assert set(a.keys()) == set(b.keys())
        for name in b:
            assert a[name].shape == b[name].shape, name
            assert (a[name] - b[name]).abs().max() <= 1e-9 * b[name].abs().max(), name


def test_caches_have_the_standard_names(model):
    logits, caches = model.run_with_cache(given(), 2)
    for cache, out in zip(caches, logits, strict=True):
        for layer in range(LAYERS):
            for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
                assert f"blocks.{layer}.hook_{name}" in cache
                assert cache[name, layer].shape == (2, 7, 32)
        assert cache.stack_activation("resid_post").shape == (LAYERS, 2, 7, 32)
        stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
        assert len(stack) == len(labels) == 2 * LAYERS + 1
        assert torch.equal(stack[-1], cache["resid_post", -1])
        assert cache.decompose_resid(apply_ln=True).shape[-1] == 32
        lens = model.backbone.unembed(cache.stack_activation("resid_post"))
        assert relative(lens[-1], out) < 1e-12
        normed = cache.accumulated_resid(apply_ln=True)[-1]
        assert relative(normed, model.backbone.final_norm(cache["resid_post", -1])) < 1e-12
        read = cache.logit_lens().values  # of the last position, in float32
        assert read.shape == (LAYERS + 1, 2, 97)
        assert relative(read[-1].double(), out[:, -1]) < 1e-5
    assert not torch.equal(caches[0]["resid_post", 0], caches[1]["resid_post", 0])


def test_the_blend_is_the_residuals_third_part(llama):
    """embed + attention + FFN does not sum to the residual; with what the blend adds, it does."""
    _, caches = llama.run_with_cache(given(), 2)
    for cache in caches:
        blended = cache.stack_activation("resid_blended") - cache.stack_activation("resid_mid")
        parts = cache.decompose_resid().sum(0)
        assert relative(parts + blended.sum(0), cache["resid_post", -1]) < 1e-12
        assert relative(parts, cache["resid_post", -1]) > 1e-2
        assert torch.equal(cache["blocks.1.ln2.hook_in"], cache["resid_blended", 1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.0.hook_resid_mdi", "unknown hook point"),
        (["blocks.0.hook_resid_mid", "nope"], "unknown hook point 'nope'"),
        ("blocks.0.attn.hook_pattern", "does not fire"),
        (lambda name: False, "matches no hook point"),
        (lambda name: name.endswith("hook_pattern"), "matches no hook point"),
        ([], "matches no hook point"),
    ],
)
def test_a_filter_that_matches_nothing_is_an_error(llama, names, message):
    with pytest.raises(SSTError, match=message):
        llama.run_with_cache(given(), 2, names)


def test_a_filter_keeps_what_it_names(llama):
    name = "blocks.1.hook_resid_mid"
    _, everything = llama.run_with_cache(given(), 2)
    for names in (name, [name], lambda n: n == name):
        _, caches = llama.run_with_cache(given(), 2, names)
        assert [list(cache.keys()) for cache in caches] == [[name]] * 2
        assert all(torch.equal(a[name], b[name]) for a, b in zip(caches, everything, strict=True))
    _, one = llama.bridge().run_with_cache(given(), names, iterations=2)
    assert torch.equal(one[name], everything[-1][name])
    _, alone = llama.bridge().run_with_cache(given()[:1], iterations=2, remove_batch_dim=True)
    assert alone[name].shape == (7, 32)


def turned(tensor, **_):
    return -tensor.flip(-1)


def turned_hook(tensor, hook):
    return -tensor.flip(-1)


PLACE = {"layer": 1, "position": 1, "iteration": 2}


@pytest.mark.parametrize("site", SITES)
def test_an_edit_in_generation_does_the_same_in_all_three(llama, site):
    record = Record()

    def both(tensor, **where):
        changed = edit(tensor, **where)
        record(tensor if changed is None else changed, **where)
        return changed

    edit = at(turned, site=site, **PLACE)
    native = llama.generate(prompts(2), DEPTH, edit=both, **GENERATE)
    bridge = llama.bridge()
    placed = bridge.at(turned_hook, iteration=2, position=1)
    with bridge.hooks(fwd_hooks=[(f"blocks.1.hook_{site}", placed)]):
        lens, caches = bridge.generate_with_caches(prompts(2), iterations=DEPTH, **GENERATE)
    sst, kept = llama.nnsight(DEPTH), []
    with sst.generate(prompts(2), **GENERATE) as tracer:
        for _ in tracer.iter[1]:
            point = getattr(sst.iteration[2].layers[1], site)
            point.output = -point.output.flip(-1)
        for _ in tracer.iter[1:NEW]:
            kept.append(sst.iteration[DEPTH].layers[2].resid_post.output.save())
        result = tracer.result.save()
    assert edit.calls == placed.calls == 1
    assert native.tokens == lens.tokens == result.tokens
    for other in SITES:
        assert torch.equal(from_caches(caches, other), record[other]), other
    # what came through nnsight, from the position that was edited on
    assert len(kept) == NEW - 1
    for position, tensor in enumerate(kept, 1):
        assert torch.equal(tensor[:, 0], record["resid_post"][:, position, 2, DEPTH - 1])
    before = Record()
    llama.generate(prompts(2), DEPTH, edit=before, **GENERATE)
    assert torch.equal(before["resid_post"][:, 0], record["resid_post"][:, 0])
    assert not torch.equal(before["resid_post"][:, 1, 2, 2], record["resid_post"][:, 1, 2, 2])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_edit_of_given_tokens_settles_where_the_sequential_one_is(family, site):
    """A hook that sees all positions at once, as TransformerLens' own do, against one position at a time."""
    model = attach(tiny(family), alpha=0.2)
    bridge, tokens = model.bridge(), given()
    plain = bridge(tokens, iterations=2)
    hook = (f"blocks.1.hook_{site}", bridge.at(turned_hook, iteration=1, position=3))
    at_once = bridge.run_with_hooks(tokens, fwd_hooks=[hook], iterations=2)
    one_by_one = bridge.run_with_hooks(tokens, fwd_hooks=[hook], iterations=2, method="sequential")
    sst = model.nnsight(2)
    with sst.trace(tokens) as tracer:
        for _ in tracer.iter[3]:
            point = getattr(sst.iteration[1].layers[1], site)
            point.output = -point.output.flip(-1)
        traced = tracer.result.save()
    assert relative(at_once, one_by_one) < 1e-9
    assert relative(traced, one_by_one) < 1e-12
    assert relative(one_by_one[:, :3], plain[:, :3]) < 1e-12
    for position in range(3, 7):
        assert relative(one_by_one[:, position], plain[:, position]) > 1e-8

    def by_hand(tensor, hook):
        if bridge.now.iteration == 1:
            tensor[:, 3] = -tensor[:, 3].flip(-1)
        return tensor

    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[(hook[0], by_hand)], iterations=2), at_once)


def test_transformer_lens_own_patching_works(llama):
    from transformer_lens import patching

    bridge = llama.bridge()
    clean, corrupted = given()[:1], given()[1:]
    _, cache = bridge.run_with_cache(clean)
    found = patching.get_act_patch_resid_pre(bridge, corrupted, cache, lambda out: out[0, -1, 5])
    target, start = bridge(clean)[0, -1, 5], bridge(corrupted)[0, -1, 5]
    assert found.shape == (LAYERS, 7)
    assert relative(found[0, :-1].double(), start.expand(6)) > 1e-3
    everywhere = bridge.run_with_hooks(
        corrupted, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: cache["resid_pre", 0])]
    )
    assert relative(everywhere[0, -1, 5], target) < 1e-9


def test_an_edit_that_looks_ahead_is_refused_all_at_once(llama):
    noise = torch.Generator().manual_seed(0)

    def random(tensor, hook):
        return tensor + torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype)

    with pytest.raises(SSTError, match="do not settle"):
        llama.bridge().run_with_hooks(given(), fwd_hooks=[("blocks.1.hook_resid_mid", random)])


@pytest.mark.parametrize("wrong", [lambda x: x[..., :5], lambda x: x.float(), lambda x: x[:1]])
def test_a_wrong_edit_is_an_error_everywhere(llama, wrong):
    bridge, sst = llama.bridge(), llama.nnsight(1)
    name = "blocks.1.hook_resid_mid"
    for hook in (lambda x, hook: wrong(x), bridge.at(lambda x, hook: wrong(x), position=2)):
        with pytest.raises(SSTError, match="it was given") as error:
            bridge.run_with_hooks(given(), fwd_hooks=[(name, hook)])
        assert name in error.value.message
    with pytest.raises(SSTError, match="it was given"), sst.trace(given()):
        sst.iteration[1].layers[1].resid_mid.output = wrong(sst.iteration[1].layers[1].resid_mid.output)


def test_a_hook_that_would_never_run_is_an_error(llama):
    bridge = llama.bridge()
    with pytest.raises(SSTError, match="does not fire"):
        bridge.run_with_hooks(given(), fwd_hooks=[("blocks.0.attn.hook_pattern", turned_hook)])
    for where in ({"iteration": 3}, {"position": 7}):
        placed = bridge.at(turned_hook, **where)
        with pytest.raises(SSTError, match="never called"):
            bridge.run_with_hooks(given(), fwd_hooks=[("blocks.0.hook_resid_mid", placed)], iterations=2)
    for where in ({"iteration": 0}, {"position": -1}):
        with pytest.raises(SSTError, match="is not a whole number from"):
            bridge.at(turned_hook, **where)
    with pytest.raises(SSTError, match="backward"):
        bridge.run_with_hooks(given(), bwd_hooks=[("blocks.0.hook_resid_mid", turned_hook)])


def test_hooks_inside_attention_and_ffn_fire_where_the_backbone_computes_them(model):
    """Heads and positions stay apart, in whatever order a family transposes them."""
    _, caches = model.run_with_cache(given(), 2)
    _, steps = model.run_with_cache(given(), 2, method="sequential")
    names = [n for n in caches[0] if "attn.q" in n or "attn.k" in n or "mlp." in n]
    assert names
    for name in names:
        assert caches[1][name].shape == steps[1][name].shape, name
        assert relative(caches[1][name], steps[1][name]) < 1e-9, name


def test_the_model_is_not_touched():
    hf = tiny("llama")
    kinds = [type(module).__name__ for module in hf.modules()]
    before = hf(given(), use_cache=False).logits
    model = attach(hf, alpha=0.2)
    generated = model.generate([prompts()[0]], 2, 4, stop_tokens=[]).tokens
    bridge = model.bridge()
    bridge.run_with_hooks(given(), fwd_hooks=[("blocks.1.hook_resid_mid", turned_hook)])
    with model.nnsight(2).trace(given()):
        pass
    assert [type(module).__name__ for module in hf.modules()] == kinds
    assert torch.equal(hf(given(), use_cache=False).logits, before)
    assert model.generate([prompts()[0]], 2, 4, stop_tokens=[]).tokens == generated
    ours = {id(p) for p in hf.parameters()}
    assert ours <= {id(p) for p in bridge.original_model.parameters()}  # shared, not copied
    assert model.bridge() is bridge


def test_the_blend_is_the_models_own_as_it_is_now(llama):
    model = attach(tiny("llama"), alpha=0.2)
    before = model.bridge()(given())
    model.alpha = model.alpha * 0
    assert torch.equal(model.bridge()(given()), attach(tiny("llama"), alpha=0.0).bridge()(given()))
    assert not torch.equal(model.bridge()(given()), before)


def test_what_would_run_the_backbone_alone_is_refused(llama):
    bridge = llama.bridge()
    for name in ("enable_compatibility_mode", "process_weights", "generate_stream", "hf_generate"):
        with pytest.raises(SSTError, match=f"{name} works on the backbone alone"):
            getattr(bridge, name)()
    with pytest.raises(SSTError, match="stop_at_layer"):
        bridge(given(), stop_at_layer=1)
    with pytest.raises(SSTError, match="unknown method"):
        bridge(given(), method="fast")
    with pytest.raises(SSTError, match="iterations = 0 is not a whole number"):
        bridge(given(), iterations=0)
    with pytest.raises(SSTError, match="different length"):
        bridge(prompts())
    with pytest.raises(SSTError, match="different length"), llama.nnsight(1).trace(prompts()):
        pass
    with pytest.raises(SSTError, match="iterations = 0 is not a whole number"):
        llama.nnsight(0)


def test_invokes_are_rows_of_one_batch(llama):
    tokens = given()
    sst = llama.nnsight(2)
    with sst.trace() as tracer:
        with tracer.invoke(tokens[0]):
            for _ in tracer.iter[3]:
                sst.iteration[2].layers[1].resid_post.output[:] = 0
        with tracer.invoke(tokens[1:].tolist()):
            mine = sst.iteration[1].layers[0].resid_mid.output.save()
        with tracer.invoke():
            together = tracer.result.save()
    plain = llama.bridge()(tokens, iterations=2)
    assert mine.shape == (1, 1, 32)
    assert relative(together[1], plain[1]) < 1e-12
    assert relative(together[0, 3:], plain[0, 3:]) > 1e-3


def test_a_trace_writes_into_nothing_but_the_pass(llama):
    """Writing in place where the stream's own tensors could be hit: the layer before, and the state."""
    sst, record = llama.nnsight(2), Record()
    with sst.generate([prompts()[0]], **GENERATE) as tracer:
        earlier = sst.iteration[1].layers[0].resid_post.output.save()
        sst.iteration[1].layers[1].resid_pre.output[:] = 0
        sst.iteration[2].layers[1].stream_state.output[:] = 0
        tracer.result.save()
    llama.generate([prompts()[0]], 2, edit=record, **GENERATE)
    assert torch.equal(earlier[:, 0], record.kept["resid_post", 0, 0, 1])


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    from sst_interp.runs.capture import capture

    folder = tmp_path_factory.mktemp("captured")
    csv = write_questions(folder / "words.csv", 3)
    model = attach(tiny_llama(), word_tokenizer(), 0.3, name="tiny")
    recipe = recipe_for(csv, depths=(1, 2), keep="all", max_new_tokens=4)
    return model, capture(recipe, model, folder / "own", progress=False)


@pytest.mark.parametrize(("depth", "text"), [(1, "own"), (2, "own"), (2, "depth1")])
def test_a_captured_question_is_read_again(captured, depth, text):
    model, run = captured
    for question in range(3):
        caches = run.caches(question, depth=depth, text=text, model=model)
        kept = run.states(question, None, depth, text)  # [position, layer, iteration, d_model]
        assert len(caches) == depth
        again = from_caches(caches, "resid_post")[0]
        assert again.shape == kept.shape
        assert relative(again, kept) < 1e-10  # a batch of another shape
        one = run.cache(question, depth, depth=depth, text=text, model=model)
        assert torch.equal(one["resid_mid", 1], caches[-1]["resid_mid", 1])


def test_a_cache_is_never_of_something_else(captured):
    from sst_interp.bridges import run_cache, run_caches

    model, run = captured
    other = attach(tiny_llama(seed=1), word_tokenizer(), 0.3, name="tiny")
    with pytest.raises(SSTError, match="another model"):
        run_caches(run, 0, model=other)
    blended = attach(model.backbone.model, word_tokenizer(), 0.2, name="tiny")
    with pytest.raises(SSTError, match="another alpha"):
        run_caches(run, 0, model=blended)
    with pytest.raises(SSTError, match="no question 9"):
        run_caches(run, 9, model=model)
    with pytest.raises(SSTError, match="no depth 5"):
        run_caches(run, 0, 5, model=model)
    with pytest.raises(SSTError, match="neither 'own' nor 'depth1'"):
        run_caches(run, 0, text="theirs", model=model)
    with pytest.raises(SSTError, match="no iteration 3"):
        run_cache(run, 0, 3, model=model)


def test_texts_are_read_as_the_model_reads_them():
    model = attach(tiny_llama(), word_tokenizer(), 0.2)
    bridge = model.bridge()
    ids = model.encode("quorvex3 quorvex5 quorvex8")
    assert torch.equal(bridge("quorvex3 quorvex5 quorvex8"), bridge(torch.tensor([ids])))
    assert torch.equal(bridge(ids), bridge(torch.tensor(ids)))
    out = bridge.generate("quorvex3 quorvex5", iterations=2, max_new_tokens=3, stop_tokens=[])
    assert out.texts == model.generate(["quorvex3 quorvex5"], 2, 3, stop_tokens=[]).texts
    with model.nnsight(2).generate("quorvex3 quorvex5", max_new_tokens=3, stop_tokens=[]) as tracer:
        result = tracer.result.save()
    assert result.texts == out.texts
    loss = bridge(torch.tensor([ids]), return_type="loss")
    assert loss.dim() == 0


def test_neither_tool_is_imported_before_it_is_asked_for():
    """nnsight patches torch when it is imported."""
    code = "import sys, sst_interp.bridges, sst_interp.runs.capture; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "sst_interp.models.hooks" in loaded.split()
    assert not {"nnsight", "transformer_lens"} & set(loaded.split())


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_is_seen_alike_by_all_three(dtype):
    import sst_interp as sst_interp

    model = sst_interp.load("smollm2-135m", alpha=0.027, dtype=dtype)
    prompt, record = model.encode("The sky is blue because"), Record()
    out = model.generate([prompt], 2, edit=record, **GENERATE)
    lens, caches = model.bridge().generate_with_caches([prompt], iterations=2, **GENERATE)
    got, result = traced(
        model.nnsight(2), "generate", prompt, positions=NEW, iterations=2, layers=(0, 14, 29), **GENERATE
    )
    assert out.tokens == lens.tokens == result.tokens
    noise = {"float32": 1e-5, "bfloat16": 0.02}[dtype]
    for site in SITES:
        theirs, ours = from_caches(caches, site).float(), record[site].float()
        assert ours.shape == (1, NEW, 30, 2, 576)
        # Every vector of its own; the first position has no state yet, and is nothing in all three.
        off = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1).clamp(min=1e-6)
        assert off.max() < noise, site
    assert len(got) == len(SITES) * 3 * NEW * 2
    for (site, layer, position, iteration), tensor in got.items():
        ours = record[site][:, position, layer, iteration - 1].float()
        off = (tensor[:, 0].float() - ours).norm() / ours.norm().clamp(min=1e-6)
        assert off < noise, (site, layer, position, iteration)
    _, parallel = model.run_with_cache([prompt + out.tokens[0]], 2, "blocks.29.hook_resid_post")
    replayed = model.replay([prompt + out.tokens[0]], 2).resid_post[:, :, 29, 1]
    assert relative(parallel[1]["resid_post", 29].float(), replayed.float()) < noise
