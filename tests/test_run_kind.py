"""Listings, the report and the ledger say which kind of model a run is of."""

import html
import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_run
from tiny_capture import save_model, write_questions
from tiny_kinds import WORDS, capture_kinds, models

from sst_interp import paths
from sst_interp.cli import app
from sst_interp.errors import SSTError
from sst_interp.findings import of_run
from sst_interp.findings.report.page import render_report
from sst_interp.models.checkpoint import save_checkpoint
from sst_interp.runs import provenance
from sst_interp.runs.provenance import _of_the_stream, kind_words, run_kind
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.store import list_runs, open_run

capture = importlib.import_module("sst_interp.runs.capture").capture


def printed(capsys, *arguments):
    """What a command prints."""
    app(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    return capture_kinds(tmp_path_factory.mktemp("kinds"), controls=2)


def test_a_run_says_what_it_was_captured_from(captured):
    for kind, run in captured.items():
        assert run.kind == run.summary()["kind"] == open_run(run.folder).kind == kind
        assert kind_words(run.kind) == WORDS[kind]
    assert run_kind(tiny_run.tiny_recipe(), tiny_run.PROVENANCE) == "sst"  # before there were kinds
    off = captured["lrt"].manifest["provenance"] | {"off": True}
    assert run_kind(captured["lrt"].recipe, off) == "backbone"


def test_a_memory_that_is_off_is_recorded_as_none():
    model = models()["lrt"]
    assert "off" not in _of_the_stream(model)
    model.kind = model.kind.with_weights({k: 0 * w for k, w in model.kind.weights().items()})
    assert _of_the_stream(model)["off"] is True


def test_a_recipe_without_data_says_what_it_can(tmp_path):
    recipe = tiny_run.tiny_recipe(checkpoint="smollm2-135m")
    assert run_kind(recipe, {}) == "backbone"  # a blend is asked for by its alpha
    assert run_kind(replace(recipe, alpha=0.03), {}) == "sst"
    assert run_kind(replace(recipe, alpha=0), {}) == "backbone"
    assert run_kind(replace(recipe, kind="looped"), {}) == "looped"
    backbone = save_model(tmp_path / "tiny")
    for kind, model in models().items():
        folder = save_checkpoint(model, tmp_path / kind, str(backbone))
        assert run_kind(replace(recipe, checkpoint=str(folder)), {}) == kind
    assert run_kind(replace(recipe, checkpoint="owner/somewhere"), {}) is None
    (tmp_path / "sst" / "stream.json").write_text("{")
    assert run_kind(replace(recipe, checkpoint=str(tmp_path / "sst")), {}) is None
    assert kind_words(None) == ""


def test_listings_name_the_kind(captured, monkeypatch, capsys):
    monkeypatch.setenv("SST_INTERP_RUNS", str(captured["sst"].folder.parent))
    rows = {row["name"]: row["kind"] for row in list_runs()}
    assert {kind: rows[kind] for kind in WORDS} == {kind: kind for kind in WORDS}
    assert {row["name"]: row["kind"] for row in json.loads(printed(capsys, "runs", "--json"))} == rows
    listing = printed(capsys, "runs")
    for kind, words in WORDS.items():
        (line,) = (line for line in listing.splitlines() if line.split()[:1] == [kind])
        assert words in line


@pytest.mark.parametrize("kind", ["sst", "looped"])
def test_the_report_names_the_kind_and_claims_of_a_blend_need_one(captured, kind, monkeypatch, tmp_path):
    run = captured[kind]
    shipped = tmp_path / "studies"
    shipped.mkdir()
    monkeypatch.setattr(paths, "studies_dir", lambda: shipped)
    name = run.recipe.checkpoint
    measured = [
        {"model": name, "layers": "all", "alpha": a, "alpha_low": a, "alpha_high": a} for a in (0.1, 0.2)
    ]
    pd.DataFrame(measured).to_parquet(shipped / "errors.parquet")
    assert len(of_run.approximation_of(run)) == 2
    monkeypatch.setattr(of_run, "approximation_of", lambda run: None)  # a table of two numbers is no study
    found = of_run.ledger_of(run, resamples=50)
    about_the_blend = {row.claim.id: row.finding for row in found.rows if row.claim.id in ("C14", "C15")}
    assert len(about_the_blend) == 2
    if kind == "sst":
        assert about_the_blend["C14"].here.startswith("0.2, [0.1, 0.3]")
    else:
        for finding in about_the_blend.values():
            assert finding.grade == "not comparable"
            assert f"a {WORDS[kind]} has no blend".lower() in finding.verdict.lower()
    page = html.unescape(render_report(run, found))
    for other, words in WORDS.items():
        assert (f">{words}<" in page) == (other == kind), other


def test_the_printed_summary_names_the_kind(captured, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    summary = printed(capsys, "basin-shifts", "--run", str(captured["looped"].folder), "--html", "r.html")
    assert summary.startswith(f"looped: {WORDS['looped']}, tiny, 3 questions\n")


def test_a_looped_run_is_analysed_like_any_other(captured):
    run = captured["looped"]
    assert (run.pairs["cosine"] < 0.999).any()
    assert run.noise["relative_l2"].max() < 1e-3
    assert set(run.nudges["site"]) == {"output"}  # nothing is handed in from the position before
    assert np.isfinite(run.nudges["kl"]).all()
    assert "stream" in set(captured["sst"].nudges["site"])


def test_a_backbone_without_a_stream_does_the_same_at_every_depth(captured):
    assert captured["backbone"].pairs["relative_l2"].max() < 1e-12
    assert captured["looped"].pairs["relative_l2"].max() > 0.1


def test_a_recipe_asks_for_the_loop(tmp_path):
    backbone = save_model(tmp_path / "tiny", max_position_embeddings=256)
    csv = write_questions(tmp_path / "words.csv", 2)
    recipe = Recipe(
        name="own", checkpoint=str(backbone), dataset=str(csv), depths=(1, 2), max_new_tokens=3,
        dtype="float32", instruction="", kind="looped",
    )  # fmt: skip
    run = capture(recipe, folder=tmp_path / "own", progress=False)
    assert run.kind == "looped"
    assert Recipe.loads(recipe.to_toml()) == recipe
    plain = replace(recipe, kind=None)
    assert plain.fingerprint() != recipe.fingerprint()
    assert recipe.differences(plain) == [("kind", "looped", None)]
    with pytest.raises(SSTError, match="the recipe's kind is 'looped'"):
        capture(replace(recipe, dtype="float64"), models()["sst"], tmp_path / "other", progress=False)
    with pytest.raises(SSTError, match=r"kind = 'spiral' is not one of dory, .*looped, lrt, ouro, sst"):
        replace(recipe, kind="spiral")
    with pytest.raises(SSTError, match="kind = 'looped': a depth-looped model has no alpha"):
        replace(recipe, alpha=0.1)


def test_a_capture_from_a_checkout_notes_its_revision(monkeypatch, tmp_path):
    """The module's place in the tree is part of how it finds the checkout."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "sst_interp" / "runs" / "provenance.py"))
    asked = []

    def run(command, **_):
        asked.append(command[2])
        return SimpleNamespace(stdout="abc\n")

    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert provenance._git_revision() == "abc"
    assert asked == [str(tmp_path)]
