"""Rows kept with a run come back as they were, for that capture and no other."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import tiny_run

from sst_interp import paths
from sst_interp.analyses.result import KeptResult, Result
from sst_interp.analyses.statistics.bootstrap import Interval
from sst_interp.findings.claims import CLAIMS, EVERYWHERE, Finding, Row, not_comparable
from sst_interp.findings.of_run import capture_of, keep_findings, kept_findings, ledger_of
from sst_interp.findings.report.page import render_report
from sst_interp.runs.store import open_run

C12, C13, C16 = (CLAIMS[id].claim for id in ("C12", "C13", "C16"))
TOLD = Row(
    C12, EVERYWHERE, Finding("supported", "29 of 48", "", Interval(0.6, 0.5, 0.7, 48), "beside it", 0.01)
)
UNKNOWN = Row(C13, EVERYWHERE, not_comparable("at chance"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return open_run(tiny_run.capture(tmp_path / "runs" / "tiny"))


def test_rows_come_back_as_they_were_and_stand_in_the_ledger(run, only):
    only()
    assert kept_findings(run).rows == []
    file = keep_findings(run, "probe", [TOLD, UNKNOWN], {"seed": 0})
    assert file == run.folder / "findings" / "probe.json"
    told, unknown = kept_findings(run).rows
    assert told == TOLD
    assert unknown.claim.id == "C13"
    assert unknown.finding.verdict == "not comparable: at chance"
    assert math.isnan(unknown.finding.figure.estimate)
    shown = ledger_of(run, resamples=20).table.set_index("claim")
    assert shown.loc["C12", "grade"] == "supported"
    assert shown.loc["C12", "this run"] == "29 of 48"


def test_rows_of_version_01_are_graded_or_say_what_they_lack(run):
    """C16 and C16b had each other's ids, a verdict and no grade."""

    def old(id, verdict, *ends):
        figure = dict(zip(("estimate", "low", "high"), ends, strict=True)) | {
            "n_questions": 40,
            "level": 0.95,
        }
        found = {
            "here": "a number",
            "verdict": verdict,
            "figure": figure | {"reason": None},
            "control": "beside",
        }
        about = {"id": id, "words": "old words", "paper": "", "rule": "", "value": None}
        return {"claim": about, "comparison": "-", "finding": found}

    rows = [
        old("C12", "not testable: at chance", 0.6, 0.5, 0.7), old("C13", "holds", 0.1, 0.0, 0.2),
        old("C16", "holds", 0.4, 0.3, 0.5), old("C16b", "does not hold", -0.4, -0.8, -0.1),
    ]  # fmt: skip
    file = keep_findings(run, "probe", [], {})
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": rows}))
    told = {row.claim.id: row for row in kept_findings(run).rows}
    assert told["C12"].finding.verdict == "not comparable: at chance"
    assert "kept by version 0.1 without what the rule asks" in told["C13"].reason
    assert (told["C16"].grade, told["C16"].finding.figure.estimate) == ("contradicted", -0.4)
    assert told["C16b"].grade == "not comparable"
    assert all(row.claim.words != "old words" for row in told.values())


def test_rows_of_another_capture_are_not_shown(run, tmp_path):
    keep_findings(run, "probe", [TOLD], {})
    other = open_run(tiny_run.capture(tmp_path / "more" / "tiny", tiny_run.tiny_recipe(seed=1), [[0, 1]]))
    (other.folder / "findings").mkdir()
    (run.folder / "findings" / "probe.json").rename(other.folder / "findings" / "probe.json")
    assert kept_findings(other).rows == []


def test_a_shipped_run_is_left_alone_and_own_rows_go_first(run, tmp_path, monkeypatch):
    keep_findings(run, "probe", [TOLD], {})
    monkeypatch.setattr(paths, "shipped", lambda kind: tmp_path / kind)
    newer = Row(C12, EVERYWHERE, Finding("contradicted", "30 of 48", "", Interval(0.5, 0.4, 0.6, 48)))
    assert keep_findings(run, "probe", [newer], {}) == Path("findings") / "tiny" / "probe.json"
    assert [row.finding.here for row in kept_findings(run).rows] == ["30 of 48"]


@dataclass(frozen=True, eq=False)
class Measured(Result):
    """A result with what a table and a text can hold."""

    title = "Patched <b>"

    @property
    def table(self):
        return pd.DataFrame({"name": ["a<script>", None], "share": [0.25, np.nan], "n": [3, 4]})

    @property
    def verdict(self):
        return "Two <i>rows</i>. One has no share."

    def figure(self):
        return go.Figure(go.Bar(x=[1, 2], y=np.array([0.5, 0.25])), layout={"title": {"text": "bars"}})

    def figures(self):
        return {"first": self.figure(), "second": go.Figure()}


def test_a_result_comes_back_as_it_was_and_has_its_section_in_the_report(run, only):
    only("basin_shifts")
    given = Measured()
    keep_findings(run, "patching", [], {}, {"patching": given})
    back = kept_findings(run).results["patching"]
    assert (back.title, back.verdict) == (given.title, given.verdict)
    pd.testing.assert_frame_equal(back.table, given.table)
    assert list(back.figures()) == ["first", "second"]
    assert json.loads(back.figure().to_json()) == json.loads(given.figure().to_json())
    ledger = ledger_of(run, resamples=20)
    assert ledger.results["patching"].verdict == given.verdict
    page = render_report(run, ledger)
    assert "Causal patching" in page
    assert "Two &lt;i&gt;rows&lt;/i&gt;." in page
    assert "a&lt;script&gt;" in page
    assert "a<script>" not in page


def test_keeping_a_kept_result_again_changes_nothing():
    once = KeptResult.of(Measured()).to_json()
    assert KeptResult.of(KeptResult.from_json(once)).to_json() == once


WHOLE = {"of": None, "rows": [], "results": {}}
DAMAGED = {
    "cut off": '{"of": "12',
    "empty": "",
    "a list": "[]",
    "no rows": json.dumps({"of": None}),
    "rows of something else": json.dumps(WHOLE | {"rows": 5}),
    "rows without a claim": json.dumps(WHOLE | {"rows": [{}]}),
    "results of something else": json.dumps(WHOLE | {"results": [1]}),
    "a result without its table": json.dumps(WHOLE | {"results": {"halting": {"title": "t"}}}),
    "a figure that is none": json.dumps(
        WHOLE
        | {
            "results": {
                "halting": {
                    "title": "t", "verdict": "v", "table": {"columns": [], "rows": []},
                    "figures": {"figure": {"nothing": 1}},
                }
            }
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_costs_its_own_rows_and_nothing_else(run, how):
    keep_findings(run, "patching", [Row(C16, EVERYWHERE, TOLD.finding)], {})
    file = Path("findings") / "tiny" / "probe.json"
    file.parent.mkdir(parents=True)
    file.write_text(DAMAGED[how].replace('"of": null', f'"of": "{capture_of(run)}"'))
    told = {row.claim.id: row.finding.verdict for row in kept_findings(run).rows}
    assert told.pop("C16") == "supported"
    assert set(told) == {"C12", "C13"}
    for verdict in told.values():
        assert verdict.startswith(f"not comparable: {file} is damaged: ")
        assert "\n" not in verdict
        assert "`sst-interp probe --run tiny`" in verdict


def test_the_ledger_names_a_damaged_file(run, only):
    only()
    file = keep_findings(run, "probe", [TOLD], {})
    file.write_bytes(file.read_bytes()[:-40])
    shown = ledger_of(run, resamples=20).table.set_index("claim")
    assert str(file) in shown.loc["C12", "why"]
    assert shown.loc["C1", "grade"] != ""
