"""Workers side by side give what one process gives, whoever dies, fails or comes late."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_ray import SimulatedRay, simulated
from tiny_capture import ALPHA, capture, capture_module, recipe_for, save_model, write_questions

from sst_interp.errors import SSTError
from sst_interp.questions import Question
from sst_interp.runs import fleet as fleet_module
from sst_interp.runs.fleet import Fleet, Tasks, Team, Unfit
from sst_interp.runs.writer import RunWriter


@pytest.fixture(autouse=True)
def _kept_variables(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a simulated worker sets its own


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(recipe, folder of an uninterrupted run of one process)."""
    here = tmp_path_factory.mktemp("fleet")
    save_model(here / "model")
    how = {"checkpoint": str(here / "model"), "alpha": ALPHA, "dtype": "float32", "max_new_tokens": 30}
    recipe = recipe_for(write_questions(here / "words.csv", 8), keep="all", controls=3, **how)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    capture(recipe, folder=here / "own", progress=False)
    torch.set_num_threads(threads)
    return recipe, here / "own"


def test_three_workers_one_of_them_killed_are_one_process(files, tmp_path, monkeypatch, capsys):
    recipe, whole = files
    killed = []

    def kill(words):
        for line in words:
            where, what = line.split(" ", 1)
            if not killed and what.startswith("batch"):
                killed.append(line)
                os.kill(int(where.rpartition(":")[2]), signal.SIGKILL)

    monkeypatch.setattr(fleet_module, "seen", kill)
    monkeypatch.setattr(fleet_module, "POLL", 0.05)
    folder = tmp_path / "own"
    capture(recipe, folder=folder, fleet=Fleet(3, threads=1))
    out, said = capsys.readouterr()
    assert out == ""
    assert killed
    assert "is tried again: its worker died" in said
    assert "100%" in said
    assert tiny_run.contents(folder) == tiny_run.contents(whole)
    assert not list(folder.rglob("*.tmp"))
    before = tiny_run.contents(folder)
    capture(recipe, folder=folder, verify=3, progress=False)
    assert "verified: 3 batches" in capsys.readouterr().err
    assert tiny_run.contents(folder) == before
    contents = json.loads((folder / "manifest.json").read_text())
    del contents["sha256"]
    contents["shards"]["1"]["pairs/0001.parquet"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(contents))
    monkeypatch.setattr(capture_module.RunWriter, "drop_corrupt", lambda self, verify: [])
    with pytest.raises(SSTError, match=r"captured again here, pairs/0001.parquet has another sha256"):
        capture(recipe, folder=folder, verify=4, progress=False)


# Orders of completion and failure, with Ray's part simulated

BAR = SimpleNamespace(n=0, update=lambda n: None, set_postfix_str=lambda s: None)
RECIPE = tiny_run.tiny_recipe(controls=3)


class TinyWork:
    """Gives the tables of a synthetic run, controls apart."""

    def __call__(self, step, told):
        what, number = step
        tables, states = tiny_run.batch(tiny_run.BATCHES[number], controls=3)
        own = {name: t for name, t in tables.items() if (name in tiny_run.CONTROLS) == (what == "controls")}
        told(1)
        return own, states

    def about(self):
        return "tiny"


def run_team(ray, folder, patch, workers=3):
    """A session; returns the steps that were skipped."""
    patch.setattr(fleet_module, "_connected", lambda fleet: (ray, True, {}, workers))
    with (
        Team(Fleet(workers), TinyWork) as team,
        RunWriter.open(folder, RECIPE, tiny_run.PROVENANCE, 3) as writer,
    ):
        assert team.first() == "tiny"
        steps = []
        for batch, questions in enumerate(tiny_run.BATCHES):
            due = any(q < 3 for q in questions)
            if batch not in writer.committed:
                steps.append(("batch", batch))
            elif due and writer.lacks(batch, "noise"):
                steps.append(("controls", batch))

        def done(step, result):
            what, batch = step
            if what == "controls":
                return writer.add(batch, result[0])
            writer.commit(batch, *result)
            return ("controls", batch) if batch < 2 else None

        skipped = team.run(steps, done, BAR)
        if not skipped:
            writer.finish()
        return skipped


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_order_of_commits_and_failures_ends_in_the_same_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("orders") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        unlucky = SimulatedRay(lambda n: data.draw(st.integers(0, n - 1)))
        skipped = run_team(unlucky, folder, patch)
        assert set(skipped.values()) <= {"its worker died", "ValueError: no luck"}
        listed = json.loads((folder / "manifest.json").read_text())["shards"]
        assert {str(b) for what, b in skipped if what == "batch"} == {"0", "1", "2"} - listed.keys()
        assert not run_team(SimulatedRay(lambda n: n - 1), folder, patch)
    whole = tiny_run.capture(tmp_path_factory.mktemp("whole") / "tiny", RECIPE)
    assert tiny_run.contents(folder) == tiny_run.contents(whole)


@given(st.lists(st.booleans(), max_size=30))
def test_an_item_is_done_once_or_fails_three_times(fates):
    tasks, done, tries, fates = Tasks("abc"), [], [], iter(fates)
    while tasks:
        item = tasks.next()
        tries.append(item)
        if next(fates, True):
            done.append(item)
        else:
            tasks.failed(item, "why")
    assert sorted([*done, *tasks.skipped]) == ["a", "b", "c"]
    assert all(tries.count(item) == 3 for item in tasks.skipped)


def test_a_batch_that_fails_three_times_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    class Broken(TinyWork):
        def __call__(self, step, told):
            if step[1] == 1:
                raise AssertionError
            return super().__call__(step, told)

    def lucky(n):
        return n - 1

    ray = SimulatedRay(lucky)
    get = ray.get

    def told(ref):
        try:
            return get(ref)
        except AssertionError:
            raise ray.exceptions.RayTaskError("broken") from None

    ray.get = told
    monkeypatch.setitem(globals(), "TinyWork", Broken)
    skipped = run_team(ray, tmp_path / "tiny", monkeypatch)
    assert skipped == {("batch", 1): "RayTaskError: broken"}
    with pytest.raises(SSTError, match="run tiny: of batch 2 three attempts failed: RayTaskError: broken"):
        capture_module._refuse_failed("tiny", skipped, {})


def test_a_worker_that_is_not_like_the_others_takes_no_part(tmp_path, monkeypatch, capsys):
    simulated(monkeypatch)
    seen = []

    def accept(about):
        seen.append(about)
        if len(seen) == 1:
            raise Unfit("it has another model_hash", "make all machines alike")

    with Team(Fleet(2), TinyWork) as team:
        team.first()
        done = []
        team.run([("batch", 0)], lambda step, _: done.append(step), BAR, accept=accept)
    assert done == [("batch", 0)]
    assert "does not take part: it has another model_hash" in capsys.readouterr().err

    def nobody(about):
        raise Unfit("it has another model_hash", "make all machines alike")

    with Team(Fleet(2), TinyWork) as team:
        team.first()
        with pytest.raises(SSTError, match="another model_hash"):
            team.run([("batch", 0)], lambda step, _: None, BAR, accept=nobody)


def test_workers_that_die_while_they_start_are_not_started_for_ever(monkeypatch):
    ray = SimulatedRay(lambda n: 0)
    ray.get = lambda ref: (_ for _ in ()).throw(ray.exceptions.ActorDiedError())
    monkeypatch.setattr(fleet_module, "_connected", lambda fleet: (ray, True, {}, 1))
    with Team(Fleet(1), TinyWork) as team, pytest.raises(SSTError, match="workers die while they start"):
        team.first()
    assert ray.started == 3


# What else rides on it


def test_evaluations_are_those_of_one_process(tmp_path, monkeypatch):
    from sst_interp.training import evaluation
    from sst_interp.training.evaluation import evaluate_by_name

    asked = tuple(Question(str(n), "quorvex1 " * (1 + n), "A", "choice", 4) for n in range(4))
    monkeypatch.setattr(evaluation, "load_questions", lambda *_, **__: SimpleNamespace(questions=asked))
    model = str(save_model(tmp_path / "model", torch.bfloat16))
    given = model, [1], ["arc-easy", "arc-challenge"], 3
    alone = evaluate_by_name(*given, out=tmp_path / "alone")
    simulated(monkeypatch)
    monkeypatch.setattr(SimulatedRay, "roundtrip", True)
    assert evaluate_by_name(*given, out=tmp_path / "fleet", fleet=Fleet(2)).equals(alone)
    other = str(save_model(tmp_path / "other" / "model", torch.bfloat16, seed=1))
    with pytest.raises(SSTError, match="holds another model's measurements"):
        evaluate_by_name(other, [1], ["arc-easy"], 4, out=tmp_path / "fleet", fleet=Fleet(2))


def test_permutations_are_those_of_one_process(monkeypatch):
    from sst_interp.experiments.probe import validate
    from sst_interp.experiments.probe.fit import Design, Inputs

    states = torch.randn(12, 3, 8, generator=torch.Generator().manual_seed(0))
    positive = np.arange(12) % 3 == 0
    given = Design(layers=(0, 1, 2)), Inputs(states), positive, 9
    monkeypatch.setattr(validate, "AT_ONCE", 48)  # four permutations at once
    alone, told = validate.null_scores(*given, None), []
    simulated(monkeypatch)
    monkeypatch.setattr(SimulatedRay, "roundtrip", True)
    progress = lambda what, done, of: told.append((done, of))  # noqa: E731
    assert validate.null_scores(*given, progress, Fleet(2)).equals(alone)
    assert told[-1] == (9, 9)


def test_what_fails_three_times_is_named(monkeypatch):
    simulated(monkeypatch, lambda n: 1 if n == 4 else n - 1)
    with pytest.raises(SSTError, match=r"three attempts failed at question 7: ValueError: no luck"):
        fleet_module.each(Fleet(1), TinyWork, [7], print, lambda q: f"question {q}")


# Mistakes


def test_another_folder_address_or_no_ray_is_one_line(files, tmp_path, monkeypatch):
    recipe, whole = files
    job = capture_module.Job(recipe, whole, owner="not its pid")
    with pytest.raises(Unfit, match="is not the run's folder there"):
        job(("batch", 0), lambda n: None)
    with pytest.raises(SSTError, match=r"no Ray cluster answers at 127.0.0.1:1: ") as error:
        capture(recipe, folder=tmp_path / "own", fleet=Fleet(address="127.0.0.1:1"))
    assert "ray start" in error.value.hint
    monkeypatch.setattr(fleet_module, "find_spec", lambda name: None)
    with pytest.raises(SSTError, match="not installed") as error:
        capture(recipe, folder=tmp_path / "own", fleet=Fleet(2))
    assert "sst-interp[ray]" in error.value.hint
    assert not (tmp_path / "own").exists()


def test_other_hardware_is_refused_unless_mixed_and_every_batch_says_whose_it_is(
    files, tmp_path, monkeypatch, capsys
):
    recipe, whole = files
    real, folder = capture_module.numerics, tmp_path / "own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "numerics", lambda model: real(model) | {"device": "another"})
        from tiny_capture import interrupt

        interrupt(patch, capture_module, "capture_batch", 2)
        with pytest.raises(KeyboardInterrupt):
            capture(recipe, folder=folder, progress=False)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SSTError, match="was captured with device another, now ") as error:
        capture(recipe, folder=folder, progress=False)
    assert "--mixed" in error.value.hint
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    capture(recipe, folder=folder, progress=False, mixed=True)
    mixed = tiny_run.contents(folder)["manifest.json"]
    assert {mixed["numerics"][d]["device"] == "another" for d in mixed["captured_on"].values()} == {
        True,
        False,
    }
    assert mixed["captured_on"].keys() == mixed["shards"].keys() == {"0", "1", "2", "3"}
    assert mixed["shards"] == tiny_run.contents(whole)["manifest.json"]["shards"]
    # A manifest of before there were fingerprints goes on, with a line.
    contents = json.loads((folder / "manifest.json").read_text())
    for key in ("sha256", "numerics", "captured_on"):
        del contents[key]
    del contents["shards"]["2"]
    (folder / "manifest.json").write_text(json.dumps(contents | {"state": "capturing"}))
    capsys.readouterr()
    capture(recipe, folder=folder, progress=False)
    assert "does not say what 3 of its batches were captured on" in capsys.readouterr().err
