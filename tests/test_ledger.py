"""The ledger of a run by name: its companions, its blend weights, the measured approximation."""

import json
from dataclasses import replace

import pytest
import tiny_run

from sst_interp.errors import SSTError
from sst_interp.findings.of_run import approximation_of, blend_of, companions, ledger_of
from sst_interp.models.choices import Choices
from sst_interp.runs.store import open_run
from sst_interp.tables import fill


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SST_INTERP_RUNS", str(tmp_path))
    tiny_run.capture(tmp_path / "tiny")
    return tmp_path


def test_companions_are_found_by_name(runs, only):
    only("overthinking")
    assert companions(open_run("tiny")).runs == {}
    blend_off = tiny_run.tiny_recipe("tiny-blend-off", choices=Choices(prompt="blend_off"))
    tiny_run.capture(runs / "tiny-blend-off", blend_off)
    tiny_run.capture(runs / "tiny-baseline", tiny_run.tiny_recipe("tiny-baseline"))
    found = companions(open_run("tiny"))
    assert {role: run.name for role, run in found.runs.items()} == {
        "blend_off": "tiny-blend-off",
        "baseline": "tiny-baseline",
    }
    assert not found.notes
    ledger = ledger_of(open_run("tiny"), resamples=20)
    assert ledger.results["overthinking"].baseline.n_questions == 6


def test_a_companion_of_other_questions_is_not_one_and_that_is_said(runs):
    tiny_run.capture(runs / "tiny-deep", tiny_run.tiny_recipe("tiny-deep", dataset="other"))
    found = companions(open_run("tiny"))
    assert found.runs == {}
    assert found.notes == ["tiny-deep is of other, not d"]


def test_a_companion_that_is_not_complete_is_left_out_and_that_is_said(runs):
    folder = tiny_run.capture(runs / "tiny-deep", tiny_run.tiny_recipe("tiny-deep"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256", None)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state": "capturing"}))
    assert companions(open_run("tiny")).notes == ["tiny-deep is not complete and is left out"]


def test_blend_weights_are_those_of_the_capture(runs):
    run = open_run("tiny")
    assert blend_of(run) is None
    run.manifest["provenance"] |= {"alpha_mean": 0.02, "alpha_range": [0.015, 0.03]}
    weights = blend_of(run)
    assert weights == (0.02, 0.015, 0.03, None, None)


def test_the_approximation_is_that_of_the_runs_backbone(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run("tiny")
    assert approximation_of(run) is None
    run.recipe = replace(run.recipe, checkpoint="smollm2-135m-sst")
    measured = approximation_of(run)
    assert set(measured["model"]) == {"smollm2-135m-sst", "smollm2-135m"}
    assert measured["alpha"].nunique() >= 4


def test_a_ledger_fills_the_places_of_its_run_and_no_others(runs, tmp_path, only):
    only()
    page = tmp_path / "page.md"
    kept = "<!-- gpqa verdict -->\nleft alone\n<!-- end of gpqa verdict -->\n"
    page.write_text("# Found\n<!-- tiny by claim -->\nstale\n<!-- end of tiny by claim -->\n" + kept)
    ledger = ledger_of(open_run("tiny"), resamples=20)
    assert fill(page, ledger.blocks(), others=True) == ["tiny by claim"]
    text = page.read_text()
    blocks = ledger.blocks()
    for row in ledger.rows:
        block = blocks[f"tiny {row.claim.id}"]
        assert row.finding.verdict in block
        assert row.finding.here in block
    assert "| claim | in words | paper | this run | grade |" in blocks["tiny by claim"]
    assert "stale" not in text
    assert kept in text
    assert text.count("\n| C") == len(ledger.by_claim) == 13
    with pytest.raises(SSTError, match="asks for a table 'gpqa verdict'"):
        fill(page, ledger.blocks())
