"""A Latent Recurrent Transformer is trained, saved, loaded, captured and analysed as an SST is."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import lrt
from tiny_capture import recipe_for, save_model, tiny_llama, word_tokenizer, write_questions
from tiny_training import write_gsm8k

from sst_interp.analyses import Contrast, basin_shifts
from sst_interp.errors import SSTError
from sst_interp.experiments.patching.run import Plan, patch_run
from sst_interp.findings.of_run import ledger_of
from sst_interp.models.checkpoint import read_checkpoint, save_checkpoint
from sst_interp.models.choices import Choices
from sst_interp.models.kinds.lrt import MemoryDesign
from sst_interp.models.loading import load
from sst_interp.training.data import padded, refuse_short_batches
from sst_interp.training.recipe import TrainingRecipe
from sst_interp.training.trainer import Training

capture = importlib.import_module("sst_interp.runs.capture").capture


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("backbone") / "tiny", max_position_embeddings=256)


@pytest.fixture(params=["residual", "both"])
def saved(request, tmp_path, backbone):
    """(model, folder) of an LRT with random weights."""
    plain = load(backbone, dtype="float32")
    how = {"source": 1} if request.param == "both" else {}
    model = lrt(request.param, hf=plain.backbone.model, **how)
    model.kind = model.kind.to(torch.float32)
    return model, save_checkpoint(model, tmp_path / "lrt", str(backbone))


@torch.no_grad()
def test_a_loaded_checkpoint_is_the_saved_model(saved):
    model, folder = saved
    loaded = load(folder, dtype="float32")
    assert loaded.kind.digest() == model.kind.digest()
    assert json.loads((folder / "stream.json").read_text())["kind"] == "lrt"
    tokens = [[5, 6, 7, 8, 9, 5, 6]]
    assert torch.equal(loaded.replay(tokens, 2).logits, model.replay(tokens, 2).logits)
    assert "LRT" in repr(loaded)


def test_the_other_kind_is_refused_in_one_line(saved, tmp_path, backbone):
    _, folder = saved
    for how in ({"alpha": 0.1}, {"kind": "sst"}):
        with pytest.raises(SSTError, match="is a Latent Recurrent Transformer, not a State Stream") as error:
            load(folder, dtype="float32", **how)
        assert "\n" not in error.value.message
    stream = save_checkpoint(load(backbone, dtype="float32"), tmp_path / "sst", str(backbone))
    with pytest.raises(SSTError, match="is a State Stream Transformer, not a Latent Recurrent"):
        load(stream, kind="lrt")
    with pytest.raises(SSTError, match="has no memory"):
        load(backbone, kind="lrt")
    with pytest.raises(SSTError, match="blend"):
        load(folder, choices=Choices(blend="additive"), dtype="float32")
    weights = load_file(folder / "stream.safetensors")
    save_file({"gamma": weights["gamma"][:-1].clone()}, folder / "stream.safetensors")
    with pytest.raises(SSTError, match=r"gamma \[2\] must be finite numbers \[3\]"):
        load(folder, dtype="float32")
    save_file({"alpha": weights["gamma"]}, folder / "stream.safetensors")
    with pytest.raises(SSTError, match="holds \\['alpha'\\] where it must hold"):
        load(folder, dtype="float32")


def test_a_stream_saved_before_there_were_kinds_is_an_sst(tmp_path, backbone):
    folder = save_checkpoint(load(backbone, dtype="float32"), tmp_path / "sst", str(backbone))
    config = json.loads((folder / "stream.json").read_text())
    del config["kind"]
    (folder / "stream.json").write_text(json.dumps(config))
    assert read_checkpoint(folder)[1].name == "sst"


@pytest.fixture
def recipe(tmp_path, backbone):
    data = write_gsm8k(tmp_path / "train.jsonl")
    return TrainingRecipe(
        name="tiny", backbone=str(backbone), data=str(data), holdout=5, batch_size=3, dtype="float32", rank=2,
        lora_alpha=4, warmup=2, learning_rate=0.02, lrt_learning_rate=0.02, examples=9,
        method="interleaved", groups=2, lrt=MemoryDesign(pathway="both"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": "multi_refine", "groups": 1, "sweeps": 2, "loss_weights": (0, 1, 2)},
        {"method": "chunked", "groups": 1, "chunk": 8},
        {"method": "none", "groups": 1},
        {"lrt": None},
    ],
    ids=lambda how: how.get("method", str(how)),
)
def test_every_schedule_trains(recipe, tmp_path, how):
    training = Training(replace(recipe, **how), tmp_path / "out")
    training.run()
    losses = [line["loss"] for line in training.log if "loss" in line]
    assert losses[-1] < losses[0]
    model = load(tmp_path / "out", dtype="float32")
    assert model.kind.name == ("sst" if "lrt" in how else "lrt")
    assert model.kind.off == (how.get("method") == "none")
    assert model.kind.like(training.model.kind)
    if not model.kind.off and model.kind.name == "lrt":
        assert all(bool(w.any()) for w in model.kind.weights().values())


def test_more_groups_than_a_short_batch_has_positions_are_refused_before_the_first_step(recipe, tmp_path):
    """Of every batch, not of the longest: a training must not stop in the middle."""
    training = Training(recipe, tmp_path / "fine")
    longest = [max(len(training.split.train[i].tokens) for i in step) for step in training.schedule]
    width = padded(min(longest))
    as_many = Training(replace(recipe, groups=width), tmp_path / "as-many")
    as_many.done = longest.index(min(longest))
    as_many.step()
    with pytest.raises(SSTError, match=f"groups = {width + 1} is more than the {width} positions") as error:
        Training(replace(recipe, groups=width + 1), tmp_path / "more")
    assert f"at most {width}" in error.value.hint
    assert not (tmp_path / "more").exists()
    Training(replace(recipe, groups=width + 1, method="two_pass", lrt=None), tmp_path / "clamped")
    with pytest.raises(SSTError, match=r"is more than the 32 positions of the shortest batch \(step 2\)"):
        refuse_short_batches([90, 20, 65], 33)
    refuse_short_batches([90, 20, 65], 32)


def test_an_interrupted_training_takes_the_same_steps(recipe, tmp_path):
    whole = Training(recipe, tmp_path / "whole")
    whole.run()

    def end(training, _line):
        if training.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Training(recipe, tmp_path / "again").run(end)
    again = Training(recipe, tmp_path / "again")
    assert again.done == 2
    again.run()
    assert again.model.kind.digest() == whole.model.kind.digest()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = lrt("both", hf=tiny_llama())
    model.tokenizer, model.name = word_tokenizer(), "tiny"
    recipe = recipe_for(write_questions(folder / "words.csv"), controls=2, keep="all", max_new_tokens=5)
    return capture(recipe, model, folder / "run", progress=False), model


def test_a_run_is_captured_and_analysed_like_any_other(run):
    captured, model = run
    assert captured.manifest["provenance"]["kind"] == "lrt"
    assert captured.manifest["provenance"]["alpha_hash"] == model.kind.digest()
    pairs = captured.pairs
    assert set(pairs["layer"]) == {0, 1, 2}
    assert set(pairs["comparison"]) == {"teacher_forced", "within", "free_running"}
    assert (pairs["cosine"] < 0.999).any()  # iterating moves something
    found = basin_shifts(Contrast.of(captured, "teacher_forced"))
    assert found.verdict
    found = ledger_of(captured, resamples=50)
    assert {"C1", "C3", "C6"} <= {row.claim.id for row in found.rows}
    assert any("basin_shifts" in name for name in found.results)
    assert captured.noise["relative_l2"].max() < 1e-3
    nudges = captured.nudges
    assert {"output", "stream"} == set(nudges["site"])
    assert np.isfinite(nudges["kl"]).all()


@torch.no_grad()
def test_what_was_captured_is_what_the_model_does(run):
    captured, model = run
    from sst_interp.questions import load_questions

    question = load_questions(captured.recipe.dataset, instruction="").questions[0]
    prompt = model.chat(question.prompt)
    steps = captured.steps.query("question == 0 and text == 'own' and depth == 3")
    first = steps.query("position == 0").sort_values("iteration")["argmax"].tolist()
    replayed = model.replay([prompt], 1).logits  # the prompt is read once per token
    assert replayed[0, -1, 0].argmax() == first[0]
    generated = model.generate([prompt], 3, 5).tokens[0]
    last = steps[steps["iteration"] == 3].sort_values("position")["argmax"].tolist()
    assert last == generated


def test_a_recipe_with_alpha_is_refused(run, tmp_path):
    captured, model = run
    with pytest.raises(SSTError, match="Latent Recurrent Transformer has no alpha"):
        capture(replace(captured.recipe, alpha=0.1), model, tmp_path / "other", progress=False)


def test_patches_do_what_holds_by_construction(run, tmp_path):
    captured, model = run
    rows = patch_run(captured, tmp_path / "patched", 2, Plan(layers=2, windows=1, new_tokens=2), model)
    by = rows.set_index(["place", "what"]).sort_index()
    assert (by.loc[("all", "own"), "kl"] < 1e-9).all()
    assert (by.loc[("stream_out", "state"), "kl"] < 1e-9).all()  # this token was emitted before
    assert by.loc[("all", "state"), "token_donors"].all()
    assert {"stream_in", "stream_out", "layer", "window"} <= set(rows["place"])
    back = rows[(rows["place"] == "stream_in") & (rows["what"] == "state")]
    assert (back["kl"] > 1e-12).any()
