"""An analysis and a claim from outside stand in the ledger and the report; a broken file is one line."""

import json
import sys

import pytest
import tiny_run

from sst_interp import cli
from sst_interp.analyses import ANALYSES
from sst_interp.errors import SSTError
from sst_interp.findings.of_run import ledger_of
from sst_interp.plugins import VARIABLE, load_plugins
from sst_interp.report import render_report
from sst_interp.runs import open_run

PLUGIN = """
from dataclasses import dataclass
import pandas as pd
import plotly.graph_objects as go
from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.result import Result, analysis
from sst_interp.analyses.statistics.bootstrap import Interval, share
from sst_interp.findings.claims import Evidence, Finding, claim, judged

@dataclass(frozen=True, eq=False)
class Halves(Result):
    first: Interval

    table = property(lambda self: pd.DataFrame([self.first.to_dict()]))
    verdict = property(lambda self: f"Some of it is the first half. {self.first.text(percent=True)}.")

    def figure(self):
        return go.Figure(go.Bar(x=["first"], y=[self.first.estimate]))

@analysis("Two halves", "Which half of the text shifts?", claims=("X7",), order=15,
          captions={"figure": "Half is no effect."})
def halves(c: Contrast) -> Halves:
    rows = c.rows[c.overlap < c.threshold]
    return Halves(share(rows["question"].to_numpy(), rows["position"].to_numpy() < 2, *c.resampling))

@claim("X7", "the first half shifts as often", "not in the paper", "the interval reaches one half", 0.5)
def as_often(e: Evidence) -> Finding:
    first = e("halves").first
    return Finding(first.text(percent=True), judged(first.low <= 0.5 <= first.high, first), first, "none")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch, registries):
    file = tmp_path / "halves.py"
    file.write_text(PLUGIN)
    monkeypatch.setenv(VARIABLE, str(file))
    return file


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SST_INTERP_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny_run.capture(tmp_path / "tiny")


def run_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sst-interp", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_a_plugin_stands_in_the_ledger_and_in_the_report(plugin, runs, monkeypatch, capsys):
    assert not run_command(monkeypatch, "claims", "--run", "tiny", "--resamples", "50", "--json")
    told = json.loads(capsys.readouterr().out)
    rows = [row for row in told["table"] if row["claim"] == "X7"]
    assert [row["comparison"] for row in rows] == ["replayed", "within", "free"]
    assert all(row["verdict"] in ("holds", "does not hold") for row in rows)
    assert "halves.within" in told["analyses"]
    run = open_run("tiny")
    ledger = ledger_of(run, resamples=50)
    page = render_report(run, ledger)
    for words in ("Two halves", "Which half of the text shifts?", "Half is no effect.", "X7"):
        assert words in page
    headings = [page.index(f">{h}</bdi></h2>") for h in ("Basin shifts", "Two halves", "Two modes or one")]
    assert headings == sorted(headings), "where its order says"


def test_a_crash_is_told_on_stderr_and_by_the_exit_code(plugin, runs, monkeypatch, capsys):
    plugin.write_text(PLUGIN.replace("rows = c.rows[", "rows = c.no_such_rows["))
    for words in (["claims", "--run", "tiny", "--resamples", "20"], ["report", "--run", "tiny"]):
        assert run_command(monkeypatch, *words) == 3
        err = capsys.readouterr().err
        assert "failed: halves.free: AttributeError: " in err
        assert "please report these lines, with `sst-interp claims --run tiny`" in err
    assert "failed in the analysis" in (open_run("tiny").folder / "report.html").read_text()


def test_a_plugin_is_imported_once(plugin):
    load_plugins()
    first = ANALYSES["halves"]
    plugin.write_text("raise RuntimeError('a second time')")
    load_plugins()
    assert ANALYSES["halves"] is first


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: "),
        ("def (", "SyntaxError: "),
        (None, "No such file"),
    ],
)
def test_a_broken_plugin_is_one_line(plugin, text, why, monkeypatch, capsys, runs):
    plugin.write_text(text) if text else plugin.unlink()
    with pytest.raises(SSTError, match="cannot be imported") as error:
        load_plugins()
    assert why in error.value.message
    assert "\n" not in error.value.message
    assert run_command(monkeypatch, "claims", "--run", "tiny") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: the plugin {plugin} cannot be imported: ")
    assert f"take it out of {VARIABLE}" in err


def test_installed_packages_name_modules(monkeypatch, tmp_path, registries):
    class Entry:
        name, value, dist = "mine", "a_module_of_a_plugin", None

    (tmp_path / "a_module_of_a_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sst_interp.plugins.entry_points", lambda group: [Entry()])
    load_plugins()
    assert ANALYSES["halves"].call.__module__ == "a_module_of_a_plugin"
