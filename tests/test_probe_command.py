"""`sst-interp probe`: what it prints, keeps and refuses."""

import errno
import importlib
import json
import os
import shutil
import sys

import pytest
import tiny_run
import torch

from sst_interp.experiments.probe.saved import load_probe
from sst_interp.runs.writer import RunWriter

cli = importlib.import_module("sst_interp.cli")
FAST = ("--permutations", 3)


@pytest.fixture
def run_cli(monkeypatch, capfd, tmp_path):
    """Run the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SST_INTERP_RUNS", str(tmp_path / "runs"))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sst-interp", "probe", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out = capfd.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    return capture(tmp_path_factory.mktemp("runs") / "own")


@pytest.fixture
def own(captured, tmp_path):
    """A run called `own` among the user's."""
    return shutil.copytree(captured, tmp_path / "runs" / "own")


def capture(folder, broken=lambda q: q % 3 == 0, state=None, keep="position0", last=12):
    """Questions right at depth 1, and at depth 2 unless `broken`; states of noise, or as given."""
    noise = torch.randn(12, tiny_run.LAYERS, 2, tiny_run.D_MODEL, generator=torch.Generator().manual_seed(0))
    recipe = tiny_run.tiny_recipe(folder.name, questions=12, keep=keep)
    with RunWriter.open(folder, recipe, tiny_run.PROVENANCE, n_batches=6) as writer:
        for number in range(last // 2):
            questions = [2 * number, 2 * number + 1]
            tables, states = tiny_run.batch(questions, keep)
            own = tables["questions"]
            right = [d == 1 or not broken(q) for q, d in zip(own["question"], own["depth"], strict=True)]
            own |= {"correct": right, "answer": ["A" if r else "B" for r in right]}
            for q, name in zip(questions, states, strict=False):
                states[name] = (noise[q].bfloat16() if state is None else state).clone()
            writer.commit(number, tables, states)
        if last == 12:
            writer.finish()
    return folder


def test_tables_verdicts_and_the_rows_of_the_ledger(run_cli, own, tmp_path):
    code, out, err = run_cli("--run", "own", *FAST, "--layer", 1, "--save", "kept")
    assert code == 0
    for words in (
        "two-layer probe", "logistic regression, L1", "prompt length", "always-halt", "never-halt",
        "4 of 12 questions positive", "flat depth 1 (always-halt)", "oracle over depths (not a policy)",
        "C12 (", "C13 (", "inconclusive",
    ):  # fmt: skip
        assert words in out
    assert "probing own" in err
    assert "3/3" in err
    assert load_probe(tmp_path / "kept").layer == 1


def test_json_is_everything_and_nothing_else(run_cli, own):
    code, out, _ = run_cli("--run", own, *FAST, "--json", "--label", "answer-changed")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"halting", "routing", "claims", "probe"}
    assert found["halting"]["n_positive"] == 4
    assert found["halting"]["permutations"] == 3
    assert [row["claim"] for row in found["claims"]] == ["C12", "C13"]
    assert "this probe tells answer-changed" in found["claims"][0]["why"]
    other = run_cli("--run", "own", *FAST, "--json", "--label", "answer-changed", "--seed", 1)[1]
    assert json.loads(other)["halting"]["scores"] != found["halting"]["scores"]


def test_a_run_that_is_not_whole_says_so(run_cli, tmp_path):
    capture(tmp_path / "runs" / "part", last=10)
    code, out, err = run_cli("--run", "part", "--permutations", 0)
    assert code == 0
    assert "note: part is not complete: 10 questions so far" in err
    assert "35 are needed" in out


def test_a_place_to_save_is_tried_before_the_permutations(run_cli, own, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    probing = "sst_interp.experiments.probe.saved.probe_run"
    monkeypatch.setattr(probing, lambda *_a, **_k: pytest.fail("probed"))
    code, out, err = run_cli("--run", "own", *FAST, "--save", "file")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["error: file cannot be written: Not a directory", "  give another --save"]
    for nowhere in ("", " ", "."):  # the working folder is none that was named
        code, out, err = run_cli("--run", "own", *FAST, "--save", nowhere)
        assert (code, out) == (2, "")
        assert err.splitlines()[0] == "error: --save names no folder"


def test_results_are_printed_and_kept_before_the_probe_is_saved(run_cli, own, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "kept/probe.safetensors")

    monkeypatch.setattr("sst_interp.experiments.probe.saved.stage", full)
    code, out, err = run_cli("--run", "own", "--permutations", 0, "--save", "kept")
    assert code == 2
    assert "C12 (" in out
    assert "error: the disk is full: kept/probe.safetensors" in err
    assert (own / "findings" / "probe.json").is_file()


BAD = {
    "a layer that is not there": ({}, ("--layer", 7), "layer 7 was not captured: there are layers 0 to 1"),
    "a layer that is no number": ({}, ("--layer", "first"), "neither auto nor a number"),
    "an unknown label": ({}, ("--label", "must-hlt"), "unknown label 'must-hlt'"),
    "labels all equal": ({"broken": lambda q: False}, (), "labels 'must-halt' are all equal: none of 12"),
    "a class of one": ({"broken": lambda q: q == 3}, (), "have 1 positive question of 12"),
    "constant features": ({"state": torch.ones(2, 2, 3)}, (), "features are constant: every layer"),
    "a constant layer": ({"state": torch.ones(2, 2, 3)}, ("--layer", 0), "features are constant: layer 0"),
    "no states": ({"keep": "none"}, (), "keeps no states"),
    "a run that is not there": ({}, ("--run", "other"), "unknown run 'other'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_a_clear_line_and_exit_code_2(what, run_cli, tmp_path, captured):
    changes, arguments, words = BAD[what]
    if changes:
        capture(tmp_path / "runs" / "own", **changes)
    else:
        shutil.copytree(captured, tmp_path / "runs" / "own")
    code, out, err = run_cli("--run", "own", *FAST, *arguments)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2
    assert out == ""
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in err
