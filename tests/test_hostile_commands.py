"""The command line at its edges: options are checked at the door, Ctrl-C is one line."""

import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
from refused import refused

from sst_interp.errors import SSTError
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.store import open_run
from sst_interp.tables import fill

pytest_plugins = ("hostile",)


def test_ctrl_c_in_the_first_moments_is_one_line(here):
    command = Path(sys.executable).with_name("sst-interp")
    for wait in (0.15, 0.4, 1.0):
        started = subprocess.Popen(
            [command, "runs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(wait)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate()
        assert "Traceback" not in err
        assert started.returncode in (0, 1, 130)


def test_ctrl_c_that_a_library_turns_into_another_error_is_one_line(command, monkeypatch):
    app = importlib.import_module("sst_interp.cli.commands")

    def half_imported():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(app, "run", half_imported)
    assert command("runs") == (130, "", "error: stopped\n  the same command starts again\n")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a second one at exit does nothing


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("claims", "--run", "tiny", "--seed", "-5"), "'--seed'"),
        (("claims", "--run", "tiny", "--resamples", "9" * 23), "'--resamples'"),
        (("compare", "--runs", "tiny,tiny", "--seed", "-1"), "'--seed'"),
        (("evaluate", "m", "--questions", "0"), "'--questions'"),
        (("evaluate", "m", "--questions", "-1"), "'--questions'"),
        (("evaluate", "m", "--depths", "999999"), "depths go up to 127"),
        (("evaluate", "m", "--out", "file"), "file cannot be written"),
        (("evaluate", "m", "--out", ""), "an empty path"),
        (("train", "t.toml", "--out", ""), "an empty path"),
        (("publish", "--run", "tiny", ""), "an empty path"),
        (("claims", "--run", "tiny", "--document", "bin.md"), "bin.md is not UTF-8"),
        (("compare", "--runs", "tiny,tiny", "--document", "bin.md"), "bin.md is not UTF-8"),
    ],
)
def test_options_are_checked_at_the_door(run, command, words, says, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sst_interp.findings.of_run.ledger_of", lambda *_a, **_k: pytest.fail("worked first"))
    monkeypatch.setattr("sst_interp.experiments.kinds.compare_runs", lambda *_a: pytest.fail("worked first"))
    Path("bin.md").write_bytes(b"\x93\xff")
    Path("file").write_text("mine")
    code, _, err = command(*words)
    assert code == 2, err
    assert says in err
    assert "Traceback" not in err
    assert Path("file").read_text() == "mine"


def test_a_document_that_is_not_text_is_refused(here):
    Path("bin.md").write_bytes(b"fine \xff")
    with pytest.raises(SSTError, match=r"bin\.md is not UTF-8 \(byte 5\)"):
        fill("bin.md", {})


def test_a_run_is_named_with_or_without_the_option(run, command, monkeypatch):
    monkeypatch.setattr("sst_interp.cli.runs.ledger_with_bar", lambda run: SimpleNamespace(failed={}))
    monkeypatch.setattr(
        "sst_interp.findings.report.page.write_report", lambda run, path, ledger: f"{run.name}, {path}"
    )
    for words in (("tiny",), ("--run", "tiny"), ("-r", "tiny"), ("tiny", "--run", "tiny")):
        code, out, err = command("report", *words, "--html", "out.html")
        assert (code, out) == (0, "report: tiny, out.html\n"), err
    refused(command("report"), "no run is named")
    refused(command("report", "tiny", "--run", "other"), "two runs are named: tiny and other")
    for name in ("basin-shifts", "claims", "capture", "probe", "patch"):
        refused(command(name, "nosuchrun"), "unknown run 'nosuchrun'")


# Keys of a recipe, set on the command line


def test_settings_are_read_and_checked_like_a_recipe_s():
    recipe = tiny_run.tiny_recipe()
    changed = recipe.with_settings(
        [
            "questions=8",
            "depths=1,4",
            "alpha=0.5",
            "choices.kv=first",
            "name=other",
            "instruction=Answer: (A)",
        ]
    )
    assert changed == replace(
        recipe, questions=8, depths=(1, 4), alpha=0.5, choices=replace(recipe.choices, kv="first"),
        name="other", instruction="Answer: (A)",
    )  # fmt: skip
    assert Recipe.loads(changed.to_toml()) == changed
    assert recipe.with_settings(["depths=[1, 3]"]).depths == (1, 3)
    for wrong, says in (
        ("question=8", "unknown recipe key"),
        ("questions=many", "questions = 'many' is not a whole number"),
        ("depths=2,3", "is not a list of distinct whole numbers"),
        ("choices.kvs=first", "unknown"),
        ("questions", "sets nothing"),
        ("=8", "sets nothing"),
    ):
        with pytest.raises(SSTError, match=says):
            recipe.with_settings([wrong])


def test_a_setting_is_recorded_and_a_run_of_that_name_is_not_changed(here, command):
    capture = importlib.import_module("tiny_capture")
    importlib.import_module("test_loading").save_model(here / "bb", max_position_embeddings=256)
    capture.write_questions(here / "q.csv", n=4)
    Path("s.toml").write_text(
        'checkpoint="bb"\ndataset="q.csv"\ndepths=[1]\nmax_new_tokens=2\ndtype="float32"\nalpha=0.3\n'
    )
    assert command("capture", "s.toml", "--set", "questions=2", "--set", "depths=1,2")[0] == 0
    assert (open_run("s").recipe.questions, open_run("s").recipe.depths) == (2, (1, 2))
    assert Recipe.load("runs/s/run.toml").questions == 2
    assert command("capture", "s")[0] == 0  # goes on by what is recorded: nothing is left
    (here / "bb").rename(here / "away")  # the clash is told before anything is loaded
    hint = refused(command("capture", "s", "--set", "questions=3"), "questions = 2", "now says 3")
    assert "--set name=" in hint
