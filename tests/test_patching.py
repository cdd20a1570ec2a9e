"""Patches of a tiny captured run: what holds by construction, and that an interrupted study goes on."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from simulated_ray import SimulatedRay, simulated
from tiny_capture import recipe_for, tiny_llama, word_tokenizer, write_questions
from typer.testing import CliRunner

from sst_interp.cli import app
from sst_interp.errors import SSTError
from sst_interp.experiments import origin
from sst_interp.experiments.patching import run as study
from sst_interp.experiments.patching.effects import (
    DEEP,
    SHALLOW,
    Patches,
    interventions,
    read_text,
    spread,
    vectors,
    write,
)
from sst_interp.experiments.patching.finding import patching
from sst_interp.experiments.patching.run import Plan, patch_run, positions_of, read_patching
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import at
from sst_interp.models.model import attach
from sst_interp.runs.capture import capture
from sst_interp.runs.fleet import Fleet

PLAN = Plan(layers=3, windows=2, new_tokens=3)
PROMPT, TEXT = [5, 9, 40, 42, 77], [30, 31, 32, 33, 34]


@pytest.fixture(scope="module")
def model():
    return attach(tiny_llama(), word_tokenizer(), 0.3, name="tiny")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched")
    csv = write_questions(folder / "words.csv", 5)
    return capture(recipe_for(csv, depths=(1, 3)), model, folder / "own", progress=False)


@pytest.fixture(scope="module")
def rows(run, model, tmp_path_factory):
    return patch_run(run, tmp_path_factory.mktemp("rows"), 3, PLAN, model)


@pytest.fixture(scope="module")
def patched_once(run, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "rows"
    return folder, patch_run(run, folder, 2, PLAN, model)


@pytest.fixture
def patched(patched_once, tmp_path):
    """A folder of its own with two patched questions, and their rows."""
    folder, rows = patched_once
    return shutil.copytree(folder, tmp_path / "rows"), rows


def test_workers_patch_what_one_process_does(run, model, patched_once, tmp_path, monkeypatch):
    simulated(monkeypatch)
    monkeypatch.setattr(SimulatedRay, "roundtrip", True)
    rows = patch_run(run, tmp_path / "fleet", 2, PLAN, model, fleet=Fleet(2))
    assert rows.equals(patched_once[1])


def test_a_reading_is_the_replay(model):
    """Of a text that was written after a prompt: every rollout's states are those of the definition."""
    reading = read_text(model, PROMPT, TEXT, 3)
    for rollout, depth in ((DEEP, 3), (SHALLOW, 1)):
        tokens = [PROMPT + TEXT[:-1]]
        whole = model.replay(tokens, depth, "sequential", start=len(PROMPT) - 1).resid_post
        assert torch.allclose(reading.resid_post[:, rollout], whole[0, :, :, -1], atol=1e-9)
    assert torch.equal(reading.next_state[:, SHALLOW], reading.resid_post[:, SHALLOW])
    assert torch.equal(reading.before[1:], reading.next_state[:-1])
    assert torch.equal(reading.blended[:, SHALLOW], reading.before[:, SHALLOW])


@pytest.mark.parametrize("choices", [Choices(), Choices(kv="first"), Choices(carry="ffn_output")])
def test_without_a_patch_both_depths_go_on_as_they_would(choices):
    model = attach(tiny_llama(), word_tokenizer(), 0.3, choices)
    reading = read_text(model, PROMPT, TEXT, 3)
    written = write(model, reading, 2, Patches(), 2, 4)
    assert torch.equal(written.tokens[0], written.tokens[1])
    for row, depth in ((0, 3), (2, 1)):
        expected = model.generate([PROMPT], 1, 1).tokens  # a first call that leaves nothing behind
        assert len(expected[0]) == 1
        logits = model.replay([PROMPT + TEXT[:2]], depth, "sequential", start=len(PROMPT) - 1).logits
        assert torch.allclose(written.logits[row], logits[0, 2, -1], atol=1e-9)


def test_a_patch_is_the_edit_of_generate(model):
    """The same state put in by `generate(edit=...)` gives the same tokens."""
    first = model.generate([PROMPT], 1, 1, stop_tokens=[]).tokens[0]
    reading = read_text(model, PROMPT, [*first, 3], 3)
    state = reading.resid_post[0, SHALLOW, 1]
    patches = Patches()
    patches.put(0, 3, "resid_post", 1, 1, state)
    written = write(model, reading, 0, patches, 2, 4)
    edit = at(lambda x, **_: state[None].clone(), site="resid_post", layer=1, position=0, iteration=3)
    assert written.tokens[1].tolist() == model.generate([PROMPT], 3, 5, stop_tokens=[], edit=edit).tokens[0]
    assert written.tokens[0].tolist() == model.generate([PROMPT], 3, 5, stop_tokens=[]).tokens[0]


def test_what_holds_by_construction(rows):
    whole = rows[(rows["place"] == "all") & (rows["what"] == "state")]
    assert len(whole) == 3 * 4 * 2  # questions, roles, directions
    assert np.allclose(whole["moved"], whole["gap"], atol=1e-9)
    assert whole["token_donors"].all()
    last = rows[(rows["place"] == "layer") & (rows["what"] == "state") & (rows["last"] == 2)]
    assert np.allclose(last["moved"], last["gap"], atol=1e-9)  # the last layer decides the logits
    assert not np.allclose(*rows[(rows["first"] == 0) & (rows["last"] == 0)][["moved", "gap"]].to_numpy().T)
    handed = rows[rows["place"] == "stream_out"]
    assert (handed["moved"] == 0).all()
    assert not handed["token_changed"].any()
    own = rows[rows["what"] == "own"]
    assert np.allclose(own["moved"], 0, atol=1e-9)
    assert (own["size"] == 0).all()
    assert (own["later_changed"] == 0).all()
    assert np.allclose(own["later_overlap_base"], 1)
    assert not own["answer_changed"].any()


def test_controls_have_the_size_of_what_they_stand_beside(rows):
    key = ["question", "position", "direction", "place", "first", "last"]
    same = rows[rows["what"].isin(["state", "random", "other"]) & (rows["place"] != "window")]
    sizes = same.pivot_table(index=key, columns="what", values="norm")
    assert np.allclose(sizes["random"], sizes["state"], rtol=1e-6)
    assert np.allclose(sizes["other"], sizes["state"], rtol=1e-6)
    moved = same.pivot_table(index=key, columns="what", values="moved")
    assert not np.allclose(moved["random"], moved["state"])
    assert rows[(rows["what"] == "random") & (rows["place"] == "layer")]["later_changed"].isna().all()


def test_rows_say_which_pairs_shifted(run, rows):
    pairs = run.table("pairs", comparison="teacher_forced")
    key = ["question", "position", "layer"]
    known = pairs.set_index(key)["cosine"]
    single = rows[rows["place"] == "layer"]
    expected = [known[(r.question, r.position, r.first)] for r in single.itertuples()]
    assert np.allclose(single["overlap"], expected)
    assert ((single["overlap"] < rows.attrs["threshold"]) == (single["shifted"] == 1)).all()


def test_an_interrupted_study_goes_on_and_is_the_same(run, model, rows, tmp_path):
    class StopError(Exception):
        pass

    def stop(done, _):
        if done == 2:
            raise StopError

    with pytest.raises(StopError):
        patch_run(run, tmp_path, 3, PLAN, model, stop)
    assert len(list(tmp_path.glob("q*.parquet"))) == 2
    again = patch_run(run, tmp_path, 3, PLAN, model)
    pd.testing.assert_frame_equal(again, rows)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("q*")}
    assert len(patch_run(run, tmp_path, 3, PLAN, model)) == len(rows)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("q*")}
    with pytest.raises(SSTError, match="another plan"):
        patch_run(run, tmp_path, 3, dataclasses.replace(PLAN, seed=1), model)


@pytest.mark.parametrize(
    ("name", "contents", "hint"),
    [("q*.parquet", b"", "only that question"), ("plan.json", b'{"plan"', "put a copy")],
)
def test_a_damaged_file_is_named_before_anything_is_patched(run, model, patched, name, contents, hint):
    folder, first = patched
    file = next(iter(folder.glob(name)))
    whole = file.read_bytes()
    file.write_bytes(contents)
    with pytest.raises(SSTError, match=f"{file} is damaged: ") as told:
        patch_run(run, folder, 4, PLAN, model, lambda *_: pytest.fail("began to patch"))
    assert hint in str(told.value.hint)
    file.unlink()
    if name == "plan.json":
        file.write_bytes(whole)
    pd.testing.assert_frame_equal(patch_run(run, folder, 2, PLAN, model), first)


def test_what_cannot_be_patched_is_an_error(run, model, tmp_path):
    with pytest.raises(SSTError, match="another alpha"):
        patch_run(run, tmp_path / "a", 1, PLAN, attach(model.backbone.model, word_tokenizer(), 0.2))
    with pytest.raises(SSTError, match="questions = 0"):
        patch_run(run, tmp_path / "b", 0, PLAN, model)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SSTError, match="cannot be written"):
        patch_run(run, tmp_path / "file", 1, PLAN, model)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SSTError, match="no patched questions"):
        read_patching(tmp_path / "c")


def test_positions_have_the_roles_they_are_named_for():
    overlaps = pd.DataFrame([[0.1, 0.1], [0.9, 0.9], [0.2, 0.4], [0.5, 0.5], [0.95, 0.97]])
    roles = positions_of(overlaps, 4, (0, 0))
    assert {role: roles[role] for role in ("first", "shift", "stable")} == {
        "first": 0,
        "shift": 2,
        "stable": 4,
    }
    assert roles["random"] in (1, 3)
    assert positions_of(overlaps, 0, (0, 0)) == {"first": 0}
    assert positions_of(overlaps, 1, (0, 0)) == {"first": 0, "shift": 1}


def test_layers_are_spread_and_windows_cover_all():
    assert spread(30, 6) == [4, 9, 14, 19, 24, 29]
    assert spread(3, 9) == [0, 1, 2]
    todo = interventions(30, spread(30, 6), 5, True)
    assert [layer for i in todo if i.place == "window" for layer in i.layers] == list(range(30))
    assert not any(i.place == "stream_in" for i in interventions(3, [2], 1, False))


def test_vectors_are_what_they_are_called():
    base, donor, other_base, other_donor = torch.randn(4, 3, 8, dtype=torch.float64)
    given = (base, donor, other_base, other_donor)
    assert torch.equal(vectors("state", *given, (0,)), donor)
    assert torch.equal(vectors("own", *given, (0,)), base)
    assert torch.equal(vectors("stranger", *given, (0,)), other_donor)
    random = vectors("random", *given, (0,))
    assert torch.equal(random, vectors("random", *given, (0,)))
    assert not torch.equal(random, vectors("random", *given, (1,)))
    other = vectors("other", *given, (0,)) - base
    assert torch.allclose(
        torch.cosine_similarity(other, other_donor - other_base), torch.ones(3, dtype=torch.float64)
    )
    assert torch.allclose((random - base).norm(dim=-1), (donor - base).norm(dim=-1))


def test_the_command_patches_and_prints(run, model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "load", lambda *_a, **_k: model)
    command = ["patch", "--run", str(run.folder), "--questions", "1", "--out", str(tmp_path / "rows")]
    command += ["--layers", "3", "--tokens", "3"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    assert printed["n_questions"] == 1
    assert patching(rows).n_questions == 3
    assert "1 question," in printed["verdict"]


def test_what_ships_is_taken_over_and_only_of_the_same_plan(run, model, patched, tmp_path, monkeypatch):
    folder, first = patched
    shipped = tmp_path / "shipped"
    shutil.copytree(folder, shipped / "patching" / run.name)
    monkeypatch.setattr(study.paths, "shipped", lambda kind: shipped / kind)
    began = []
    monkeypatch.setattr(study._Patching, "__call__", lambda *_: began.append(1))
    again = patch_run(run, tmp_path / "again", 2, PLAN)
    assert not began, "nothing is patched twice"
    pd.testing.assert_frame_equal(again, first)
    other = dataclasses.replace(PLAN, windows=1)
    with pytest.raises(AttributeError):  # the stand-in above returns no rows: it was asked to patch
        patch_run(run, tmp_path / "other", 2, other, model)
    assert began


CHANGES = {
    "budget": {"max_new_tokens": 5},
    "choices": {"choices": Choices(kv="first", prompt="blend_off")},
    "questions": {"seed": 1},
    "threshold": {"choices": Choices(threshold=0.5)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_patches_of_another_capture_of_that_name_are_refused(run, model, patched, tmp_path, change):
    """Whatever the rows depend on: another capture in the same place does not get them (nor its claim)."""
    folder, _ = patched
    recipe = dataclasses.replace(run.recipe, **CHANGES[change])
    other = attach(model.backbone.model, word_tokenizer(), 0.3, recipe.choices, name="tiny")
    again = capture(recipe, other, tmp_path / run.name, progress=False)
    assert again.name == run.name
    with pytest.raises(SSTError, match=r"another plan or run: .* differ") as told:
        patch_run(again, folder, 2, PLAN, other, lambda *_: pytest.fail("began to patch"))
    assert "give another --out" in str(told.value.hint)


def test_rows_without_their_plan_are_refused(run, model, patched):
    """Nobody knows what they are of."""
    folder, _ = patched
    (folder / "plan.json").unlink()
    with pytest.raises(SSTError, match=r"plan\.json is missing"):
        patch_run(run, folder, 2, PLAN, model)


def test_the_same_capture_made_again_goes_on(run, model, patched, tmp_path):
    """A fingerprint is of what rows depend on, and of nothing else: not of when or where it was captured."""
    folder, first = patched
    again = capture(run.recipe, model, tmp_path / run.name, progress=False)
    pd.testing.assert_frame_equal(patch_run(again, folder, 2, PLAN), first)


def test_an_empty_name_is_no_folder(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["patch", "--run", str(run.folder), "--out", ""])
    assert done.exception.message == "an empty path was given"
    assert not list(tmp_path.iterdir())
