"""Fixtures of the tests of hostile files: a working folder, a run in it, and the command as one types it."""

import importlib
import sys

import pytest
import tiny_run

from sst_interp.runs.store import open_run


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SST_INTERP_RUNS", "runs")
    monkeypatch.setenv("SST_INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(here):
    return open_run(tiny_run.capture(here / "runs" / "tiny"))


@pytest.fixture
def command(monkeypatch, capfd):
    """Type a command: (exit code, stdout, stderr)."""
    cli = importlib.import_module("sst_interp.cli")

    def type_it(*words):
        monkeypatch.setattr(sys, "argv", ["sst-interp", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return type_it
