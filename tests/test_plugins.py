"""An analysis and a claim from outside stand in the ledger and the report; a broken file is one line."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run

from sst_interp import cli
from sst_interp.analyses import ANALYSES
from sst_interp.errors import SSTError
from sst_interp.findings.of_run import ledger_of
from sst_interp.findings.report.page import render_report
from sst_interp.plugins import VARIABLE, load_plugins
from sst_interp.runs.store import open_run

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
PLUGIN = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]  # type: ignore[index]
"""The example of the documentation."""


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


def test_a_plugin_stands_in_the_report(only, plugin, runs, monkeypatch, capsys):
    only("basin_shifts", "bimodality")
    run = open_run("tiny")
    ledger = ledger_of(run, resamples=20)
    assert "halves.within" in ledger.results
    brief = {key: r for key, r in ledger.results.items() if key.startswith(("halves", "basin", "bimodality"))}
    page = render_report(run, replace(ledger, results=brief, missing={}))
    for words in ("Two halves", "Which half of the text shifts?", "One half is no effect.", "X1"):
        assert words in page
    headings = [page.index(f">{h}</bdi></h2>") for h in ("Basin shifts", "Two halves", "Two modes or one")]
    assert headings == sorted(headings), "where its order says"
    crashed = replace(ledger, results={}, failed={"halves.free_running": "KeyError: 'x' (halves.py, line 1)"})
    page = render_report(run, crashed)
    assert "1 analysis failed: a fault of the instrument" in page
    monkeypatch.setattr("sst_interp.cli.runs.ledger_with_bar", lambda run, *how: crashed)
    monkeypatch.setattr("sst_interp.findings.report.page.write_report", lambda run, path, ledger: path)
    for command in ("report", "claims"):
        assert run_command(monkeypatch, command, "--run", "tiny") == 3
        assert "failed: halves.free_running: KeyError: 'x' (halves.py, line 1)" in capsys.readouterr().err


def test_the_command_shows_a_plugin_and_tells_a_crash_by_its_exit_code(
    only, plugin, runs, monkeypatch, capsys
):
    only()
    once = 'if c.comparison == "free_running": c.nothing_of_the_kind\n    rows = c.rows['
    plugin.write_text(PLUGIN.replace("rows = c.rows[", once))
    assert run_command(monkeypatch, "claims", "--run", "tiny", "--resamples", "20", "--json") == 3
    out, err = capsys.readouterr()
    told = json.loads(out)
    [row] = [row for row in told["table"] if row["claim"] == "X1"]
    assert row["grade"] == "inconclusive", "6 questions"
    assert row["checks"] == "within inconclusive; free-running not comparable"
    assert "failed: halves.free_running: AttributeError: " in err
    assert f"({plugin.name}, line " in err
    assert "please report these lines, with `sst-interp claims --run tiny`" in err


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
