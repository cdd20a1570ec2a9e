"""A probe on disk is the probe, belongs to its model, and steers it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic_states import states
from tiny import prompts, tiny

from sst_interp.errors import SSTError
from sst_interp.experiments.probe.fit import Design, Inputs, Problems, fit
from sst_interp.experiments.probe.saved import (
    HaltingProbe,
    load_probe,
    model_identity,
    refuse_other,
    train_probe,
)
from sst_interp.models.choices import Choices
from sst_interp.models.generation import look_ahead
from sst_interp.models.model import attach

RUN = SimpleNamespace(
    manifest={"provenance": {"model_hash": "abc", "alpha_hash": "def", "n_layers": 3, "d_model": 24}},
    recipe=SimpleNamespace(choices=Choices()),
)


def trained(kind="two_layer", **changes):
    features, labels = states(strength=1.5, seed=4)
    design = Design(kind=kind, dims=(3, 6), blocks=3)
    return features, labels, replace(train_probe(RUN, features, labels, design, {"auc": 0.9}), **changes)


@pytest.mark.parametrize("kind", ["two_layer", "l2", "l1"])
def test_it_reads_states_as_it_read_them_in_training(kind):
    features, labels, probe = trained(kind)
    assert probe.layer == 1
    own = features.states[:, probe.layer]
    dims = len(probe.dims) if kind == "two_layer" else 24
    penalties = Design(kind=kind).candidate_penalties
    y = torch.from_numpy(labels.positive[None].astype(np.float32))
    problems = Problems(
        np.zeros(len(penalties), int), np.ones((len(penalties), 60), bool),
        np.full(len(penalties), probe.layer),
        np.full(len(penalties), dims), np.array(penalties),
    )  # fmt: skip
    candidates = fit(Design(kind=kind), Inputs(features.states), y, problems).logits
    gaps = (candidates - probe.logits(own)).abs().amax(1)
    assert gaps.min() < 1e-3
    positive = torch.from_numpy(labels.positive)
    assert ((probe.logits(own) > 0) == positive).float().mean() > 0.9
    chance = probe.probability(own)
    assert torch.allclose(torch.logit(chance, eps=1e-12), probe.logits(own) + probe.log_odds, atol=0.1)
    assert probe.log_odds == pytest.approx(np.log(20 / 40))


@pytest.mark.parametrize("kind", ["two_layer", "l2", "l1"])
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    features, _, probe = trained(kind)
    again = load_probe(probe.save(tmp_path / "probe"))
    own = features.states[:, probe.layer]
    assert torch.equal(again.logits(own), probe.logits(own))
    for name in ("layer", "iteration", "shallowest", "deepest", "halts", "log_odds", "label", "threshold"):
        assert getattr(again, name) == getattr(probe, name)
    assert dict(again.model) == dict(probe.model)
    assert again.evidence == {"auc": 0.9}
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["probe.json", "probe.safetensors"]


def test_it_is_refused_for_another_model(tmp_path):
    model = attach(tiny("llama"), alpha=0.1)
    own = model_identity(model)
    for key in ("model_hash", "alpha_hash", "n_layers", "d_model", "carry", "prompt"):
        other = own | {key: "something else"}
        with pytest.raises(SSTError, match=f"belongs to another model.*{key}"):
            refuse_other(own, other)
    refuse_other(own, own)
    for partial in ({}, {"model_hash": own["model_hash"]}):  # what is not said fits no model
        with pytest.raises(SSTError, match=r"belongs to another model.*unknown"):
            refuse_other(partial, own)
    _, _, probe = trained()
    folder = replace(probe, model=own).save(tmp_path / "own")
    load_probe(folder, model)
    for stranger in (attach(tiny("llama", seed=1), alpha=0.1), attach(tiny("llama"), alpha=0.2)):
        with pytest.raises(SSTError, match="another model"):
            load_probe(folder, stranger)
        with pytest.raises(SSTError, match="another model"):
            stranger.generate(prompts(), depth=load_probe(folder))
    blend_off = attach(tiny("llama"), alpha=0.1, choices=Choices(prompt="blend_off"))
    with pytest.raises(SSTError, match="prompt = exact"):
        load_probe(folder, blend_off)


def without(name):
    return lambda values: values.pop(name)


def put(**changes):
    return lambda values: values.update(changes)


NAN = float("nan")
DAMAGED = [
    ("probe.json", put(format=9), "not of format 1"),
    ("probe.json", without("layer"), "lacks layer"),
    ("probe.json", put(model={}), "does not say which model"),
    ("probe.json", put(model=[]), "model is no object"),
    ("probe.json", put(layer=-1), "no layer -1"),
    ("probe.json", put(layer=3), "no layer 3"),
    ("probe.json", put(layer=True), "layer is no whole number"),
    ("probe.json", put(layer="1"), "layer is no whole number"),
    ("probe.json", put(iteration=0), "iteration 0 is not one of 1 to 4"),
    ("probe.json", put(iteration=99), "iteration 99 is not one of 1 to 4"),
    ("probe.json", put(shallowest=5), "depths 5 and 4 are not in order"),
    ("probe.json", put(shallowest=0), "depths 0 and 4 are not in order"),
    ("probe.json", put(deepest=10**6), "depths 1 and 1000000 are not in order"),
    ("probe.json", put(threshold=NAN), "NaN is no JSON number"),
    ("probe.json", put(threshold=None), "threshold is no number"),
    ("probe.json", put(log_odds=float("inf")), "Infinity is no JSON number"),
    ("probe.json", put(halts=1), "halts is no true or false"),
    ("probe.json", put(model={"model_hash": "abc", "d_model": "24"}), "d_model is no whole number"),
    ("probe.safetensors", without("mean"), "its weights are"),
    ("probe.safetensors", without("dims"), "lacks dims"),
    ("probe.safetensors", put(more=torch.zeros(1)), "its weights are"),
    ("probe.safetensors", put(dims=torch.tensor([0, 1, 24])), "no dimension 24"),
    ("probe.safetensors", put(dims=torch.tensor([0.0, 1.0, 2.0])), "no list of whole numbers"),
    ("probe.safetensors", put(scale=torch.ones(2)), "scale is .* of shape"),
    ("probe.safetensors", put(u=torch.tensor(1.0)), "of shape"),
    ("probe.safetensors", put(c=torch.tensor(NAN)), "c is not finite"),
    ("probe.safetensors", put(mean=torch.ones(3, dtype=torch.complex64)), "mean is torch.complex64"),
]


@pytest.mark.parametrize(("file", "change", "words"), DAMAGED, ids=[words for _, _, words in DAMAGED])
def test_damaged_probes_are_said_to_be(file, change, words, saved):
    """A wrong type, number or shape is an error of one line that names the probe."""
    config = json.loads((saved / "probe.json").read_text())
    tensors = load_file(saved / "probe.safetensors")
    assert len(tensors["dims"]) == 3
    change(config if file == "probe.json" else tensors)
    (saved / "probe.json").write_text(json.dumps(config))
    save_file(tensors, saved / "probe.safetensors")
    with pytest.raises(SSTError, match=words) as error:
        load_probe(saved)
    assert str(saved) in error.value.message
    assert "\n" not in error.value.message
    assert error.value.hint


@pytest.fixture
def saved(tmp_path):
    features, labels = states(strength=1.5, seed=4)
    probe = train_probe(RUN, features, labels, Design(dims=(3,), blocks=3))
    return probe.save(tmp_path / "probe")


@pytest.mark.parametrize("file", ["probe.json", "probe.safetensors"])
@pytest.mark.parametrize("contents", [b"{", b"no", b"[]", b"", None])
def test_files_that_are_no_probe_are_named(file, contents, saved):
    (saved / file).unlink()
    if contents is not None:
        (saved / file).write_bytes(contents)
    with pytest.raises(SSTError, match=file):
        load_probe(saved)


def test_a_probe_made_by_hand_is_held_to_the_same():
    _, _, probe = trained()
    for changes in ({"layer": -1}, {"threshold": NAN}, {"iteration": 5}, {"deepest": 0}):
        with pytest.raises(SSTError, match="cannot be used"):
            replace(probe, **changes)


@pytest.mark.parametrize("iteration", [1, 2])
@pytest.mark.parametrize("halts", [True, False])
def test_it_steers_generation_by_what_it_reads(halts, iteration):
    model = attach(tiny("llama"), alpha=0.2)
    tokens, pad = model.batch(prompts())
    stream = model.new_stream(pad, tokens.shape[1] + 8)
    model.prefill(stream, tokens[:, :-1])
    seen = look_ahead(model, stream, tokens[:, -1], iteration).resid_post[iteration - 1, 1]
    one = {"mean": torch.zeros(1), "scale": torch.ones(1), "w": torch.ones(1), "c": torch.zeros(())}
    middle = float(seen[:, 5].sort().values[:2].mean())
    probe = HaltingProbe(
        1, iteration, torch.tensor([5]), one, 1, 3, halts, 0.0, "made up", model_identity(model), middle
    )  # fmt: skip
    positive = seen[:, 5] > middle
    expected = torch.where(positive == halts, 1, 3).tolist()
    assert len(set(expected)) == 2
    out = model.generate(prompts(), max_new_tokens=6, stop_tokens=[], depth=probe)
    assert out.iterations == expected
    for prompt, depth, text in zip(prompts(), expected, out.tokens, strict=True):
        assert model.generate([prompt], depth, 6, stop_tokens=[]).tokens[0] == text


@pytest.mark.parametrize("always", [1, 3])
def test_a_probe_that_always_says_one_depth_is_that_flat_depth(always):
    model = attach(tiny("llama"), alpha=0.2)
    weights = {"mean": torch.zeros(1), "scale": torch.ones(1), "w": torch.zeros(1)}
    weights["c"] = torch.tensor(1.0 if always == 1 else -1.0)
    probe = HaltingProbe(
        0, 1, torch.tensor([0]), weights, 1, 3, True, 0.0, "always the same", model_identity(model)
    )
    out = model.generate(prompts(), max_new_tokens=8, stop_tokens=[], depth=probe)
    flat = model.generate(prompts(), always, 8, stop_tokens=[])
    assert (out.tokens, out.iterations) == (flat.tokens, flat.iterations)
