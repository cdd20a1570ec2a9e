"""Rows kept with a run come back as they were, for that capture and no other."""

import math

import pytest
import tiny_run

from sst_interp import places
from sst_interp.analyses.ledger.rules import C12, C13, EVERYWHERE, Finding, Row, untestable
from sst_interp.analyses.statistics.resampling import Interval
from sst_interp.kept_rows import keep_rows, kept_rows
from sst_interp.ledger import ledger_of
from sst_interp.runs import open_run

TOLD = Row(C12, EVERYWHERE, Finding("29 of 48", "holds", Interval(0.6, 0.5, 0.7, 48), "beside it"))
UNKNOWN = Row(C13, EVERYWHERE, untestable("at chance"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return open_run(tiny_run.capture(tmp_path / "runs" / "tiny"))


def test_rows_come_back_as_they_were_and_stand_in_the_ledger(run):
    assert kept_rows(run) == []
    file = keep_rows(run, "probe", [TOLD, UNKNOWN], {"seed": 0})
    assert file == run.folder / "findings" / "probe.json"
    told, unknown = kept_rows(run)
    assert told == TOLD
    assert unknown.claim.id == "C13"
    assert unknown.finding.verdict == "not testable: at chance"
    assert math.isnan(unknown.finding.figure.estimate)
    shown = ledger_of(run, resamples=20).table.set_index("claim")
    assert shown.loc["C12", "verdict"] == "holds"
    assert shown.loc["C12", "this run"] == "29 of 48"


def test_rows_of_another_capture_are_not_shown(run, tmp_path):
    keep_rows(run, "probe", [TOLD], {})
    other = open_run(tiny_run.capture(tmp_path / "more" / "tiny", tiny_run.tiny_recipe(seed=1), [[0, 1]]))
    (other.folder / "findings").mkdir()
    (run.folder / "findings" / "probe.json").rename(other.folder / "findings" / "probe.json")
    assert kept_rows(other) == []


def test_a_shipped_run_is_left_alone_and_own_rows_go_first(run, tmp_path, monkeypatch):
    keep_rows(run, "probe", [TOLD], {})
    monkeypatch.setattr(places, "shipped", lambda kind: tmp_path / kind)
    newer = Row(C12, EVERYWHERE, Finding("30 of 48", "does not hold", Interval(0.5, 0.4, 0.6, 48)))
    assert keep_rows(run, "probe", [newer], {}) == places.Path("findings") / "tiny" / "probe.json"
    assert [row.finding.here for row in kept_rows(run)] == ["30 of 48"]
