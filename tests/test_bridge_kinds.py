"""TransformerLens on every kind of model: every iteration has the native recorder's values, bit for bit."""

import importlib.util
import json

import pytest
import torch
from tiny import lrt, prompts, relative, tiny
from tiny_capture import save_model

from sst_interp.bridges import hook_points
from sst_interp.cli.experiments import hooks
from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import SITES, Record, at
from sst_interp.models.model import attach, attach_looped

there = importlib.util.find_spec("transformer_lens")
pytestmark = pytest.mark.skipif(not there, reason='pip install "sst-interp[lens]"')

DEPTH, LAYERS = 3, 3
GENERATE = {"max_new_tokens": 3, "stop_tokens": []}
MODELS = {
    "lrt-llama": lambda: lrt("both"),
    "lrt-gemma3": lambda: lrt("kv", hf=tiny("gemma3")),
    "lrt-gpt2": lambda: lrt("residual", hf=tiny("gpt2")),
    "lrt-middle": lambda: lrt("both", hf=tiny("qwen3"), source=1, projections="per_layer"),
    "looped-llama": lambda: attach_looped(tiny("llama")),
    "looped-gpt2": lambda: attach_looped(tiny("gpt2"), choices=Choices(blend="additive")),
    "looped-gemma2": lambda: attach_looped(tiny("gemma2")),
    "backbone-qwen2": lambda: attach(tiny("qwen2"), alpha=0.0),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def given():
    row = prompts()[0][:7]
    return torch.tensor([row, row[::-1]])


def point(site, layer):
    return f"blocks.{layer}.hook_{site}"


def test_generation_has_the_recorders_bits(model):
    record = Record()
    native = model.generate(prompts(2), DEPTH, edit=record, **GENERATE)
    out, caches = model.bridge().generate_with_caches(prompts(2), iterations=DEPTH, **GENERATE)
    assert out.tokens == native.tokens
    assert len(caches) == DEPTH
    seen = {(site, layer, i) for site, layer, _, i in record.kept}
    for i, cache in enumerate(caches, 1):
        for site in SITES:
            for layer in range(LAYERS):
                name = point(site, layer)
                assert (name in cache) == ((site, layer, i) in seen), name
                if name in cache:
                    ours = [record.kept[site, layer, t, i] for t in range(3)]
                    assert torch.equal(cache[name], torch.stack(ours, 1)), name


def test_given_tokens_are_the_replays(model):
    """The definition has its bits; all positions at once agree to 1e-9."""
    tokens = given()
    replayed = model.replay(tokens, DEPTH, "sequential")
    logits, caches = model.run_with_cache(tokens, DEPTH, method="sequential")
    at_once, parallel = model.run_with_cache(tokens, DEPTH)
    assert len(caches) == len(parallel) == DEPTH
    for i in range(DEPTH):
        states = caches[i].stack_activation("resid_post").permute(1, 2, 0, 3)
        assert torch.equal(states, replayed.resid_post[:, :, :, i])
        assert set(caches[i].keys()) == set(parallel[i].keys())
        for name, value in caches[i].items():
            assert parallel[i][name].shape == value.shape, name
            assert (parallel[i][name] - value).abs().max() <= 1e-9 * value.abs().max().clamp(1e-9), name
        for out in (logits[i], at_once[i]):
            assert relative(out, replayed.logits[:, :, i]) < 1e-9
        assert relative(caches[i].accumulated_resid(apply_ln=False)[-1], states[:, :, -1]) < 1e-12


@pytest.mark.parametrize("site", ["resid_pre", "stream_state", "resid_blended", "resid_post"])
def test_a_hook_and_an_edit_do_the_same(model, site):
    """Layer 0, iteration 2, position 1: where each of these kinds has the site."""

    def turned(tensor, **_):
        return -tensor.flip(-1)

    edit = at(turned, site=site, layer=0, position=1, iteration=2)
    native = model.generate(prompts(2), DEPTH, edit=edit, **GENERATE)
    bridge = model.bridge()
    placed = bridge.at(lambda tensor, hook: turned(tensor), iteration=2, position=1)
    record = Record(["resid_post"])

    def both(tensor, **where):
        changed = edit(tensor, **where)
        if where["site"] == "resid_post":
            record(tensor if changed is None else changed, **where)
        return changed

    model.generate(prompts(2), DEPTH, edit=both, **GENERATE)
    with bridge.hooks(fwd_hooks=[(point(site, 0), placed)]):
        out, caches = bridge.generate_with_caches(prompts(2), iterations=DEPTH, **GENERATE)
    assert out.tokens == native.tokens
    for i, cache in enumerate(caches):
        states = cache.stack_activation("resid_post").permute(1, 2, 0, 3)
        assert torch.equal(states, record["resid_post"][:, :, :, i])
    once = bridge.run_with_hooks(given(), fwd_hooks=[(point(site, 0), placed)], iterations=2)
    steps = bridge.run_with_hooks(
        given(), fwd_hooks=[(point(site, 0), placed)], iterations=2, method="sequential"
    )
    assert relative(once, steps) < 1e-9


def test_a_memory_after_the_final_norm_fires_no_hook_there():
    """Hooks of `ln_final` are of the logits: an edit there changes these and nothing else."""
    model = lrt("both")
    bridge, tokens = model.bridge(), given()
    _, plain = model.run_with_cache(tokens, 2, method="sequential")
    calls = []

    def halved(tensor, hook):
        calls.append(tensor.shape)
        return tensor / 2

    name = "ln_final.hook_normalized"
    with bridge.hooks(fwd_hooks=[(name, halved)]):
        logits, caches = bridge.run_with_caches(tokens, 2, method="sequential")
    assert calls == [(*tokens.shape, 32)] * 2
    assert torch.equal(caches[1]["resid_post", 2], plain[1]["resid_post", 2])
    assert plain[1][name].shape == (2, 7, 32)
    assert len(logits) == 2


def test_a_state_that_no_iteration_reads_is_an_error():
    """A looped model reads its state in the first layer, from iteration 2 on."""
    model, name = attach_looped(tiny("llama")), point("stream_state", 0)
    with pytest.raises(SSTError, match=f"nothing ran at {name} in 1 iteration"):
        model.run_with_cache(given(), 1, name)
    _, caches = model.run_with_cache(given(), 3, name)
    assert [list(cache.keys()) for cache in caches] == [[], [name], [name]]
    with pytest.raises(SSTError, match="does not fire"):
        model.run_with_cache(given(), 3, point("stream_state", 1))


def test_the_listing_is_what_runs(model):
    """Every name, shape and first iteration, as caches have them; every site, as the native recorder."""
    _, caches = model.run_with_cache(given(), 2)
    rows = {row["name"]: row for row in hook_points(model)}
    assert set(rows) == set(caches[1].keys())
    for name, row in rows.items():
        sizes = {"row": 2, "position": 7}
        shape = [sizes.get(axis, axis) for axis in row["shape"]]
        assert list(caches[1][name].shape) == shape, name
        assert row["first_iteration"] == (1 if name in caches[0] else 2), name
    record = Record()
    model.generate(prompts(2), 2, edit=record, **GENERATE)
    sites = {(row["site"], row["layer"]) for row in rows.values() if row["site"]}
    assert sites == {key[:2] for key in record.kept}


def test_the_command_lists_them(tmp_path, capsys):
    save_model(tmp_path / "tiny")
    capsys.readouterr()
    hooks(str(tmp_path / "tiny"))
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "stream_state" in line]
    assert line.split() == [
        *("blocks.{layer}.hook_stream_state", "stream_state"),
        *("row", "x", "position", "x", "32", "from", "1", "0-2"),
    ]
    hooks(str(tmp_path / "tiny"), as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in rows} == {None, 0, 1, 2}


def test_a_family_that_transformer_lens_does_not_know_has_its_sites(monkeypatch):
    from sst_interp import bridges

    def unknown(_model):
        raise SSTError("unknown", "")

    monkeypatch.setattr(bridges, "bridge", unknown)
    rows = hook_points(attach_looped(tiny("llama")))
    assert {row["name"] for row in rows} == {None}
    assert [row["layer"] for row in rows if row["site"] == "stream_state"] == [0]
    assert rows[0]["nnsight"].startswith("iteration[i].layers[0].")


@pytest.mark.parametrize("make", [lambda: lrt("residual"), lambda: attach_looped(tiny("llama"))])
def test_a_jacobian_lens_reads_every_iteration(make):
    """Read by hand from the caches (docs/bridges.md); at depth 1 as TransformerLens itself reads it."""
    from transformer_lens.tools.analysis import JacobianLens

    model, tokens, g = make(), given()[:1], torch.Generator().manual_seed(0)
    jacobians = {layer: torch.randn(32, 32, generator=g) for layer in range(LAYERS - 1)}
    lens = JacobianLens(jacobians, n_prompts=1, d_model=32)
    theirs = lens.readout(model.bridge(), tokens, return_full_logits=True).lens_logits
    for depth in (1, 2):
        _, caches = model.run_with_cache(tokens, depth)
        for layer in jacobians:
            moved = lens.transport(caches[-1]["resid_post", layer], layer).to(model.backbone.dtype)
            ours = model.backbone.unembed(moved)[0].float()
            assert (relative(ours, theirs[layer]) < 1e-4) == (depth == 1)
