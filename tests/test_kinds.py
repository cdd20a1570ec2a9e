"""Kinds of models on the same questions: known answers on synthetic tables, and tiny runs of each kind."""

import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import Planted, contrast, pairs_table
from tiny_kinds import WORDS, capture_kinds, models
from typer.testing import CliRunner

from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.settling import state_settling
from sst_interp.analyses.shifts import basin_shifts
from sst_interp.cli import app
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments import kinds as compare_kinds
from sst_interp.experiments.contraction import contraction_of, kinds_contraction, sweep_residuals
from sst_interp.experiments.kinds import (
    Compared,
    compare_runs,
    kinds,
    kinds_answers,
    open_together,
    settling_of,
)
from sst_interp.findings.report.page import result_page, script_hash
from sst_interp.runs.store import open_run

SHARES = {"few": 0.05, "many": 0.3}


def planted(share, seed=0, **how):
    how = {"questions": 40, "comparisons": ("teacher_forced", "free_running")} | how
    return pairs_table(planted=Planted(share=share), seed=seed, **how)


def compared(resamples=100, **tables):
    """A comparison of tables: run -> pairs."""
    return kinds(
        [
            Compared(name, f"kind of {name}", contrast(table, resamples=resamples))
            for name, table in tables.items()
        ]
    )


def rows_of(found):
    return found.table.set_index(["comparison", "run"])


def test_planted_shares_and_their_difference_lie_in_their_intervals():
    found = compared(300, few=planted(0.05), many=planted(0.3, seed=1))
    rows = rows_of(found)
    assert set(rows.index) == {(c, run) for c in ("teacher_forced", "free_running") for run in SHARES}
    for run, share in SHARES.items():
        row = rows.loc[("teacher_forced", run)]
        assert row["questions"] == 40
        assert row["low"] < share + 0.05  # a stable pair is seldom below 0.99
        assert row["high"] > share - 0.02
        assert row["stable"] == 1 - row["shifted"]
        assert row["median low"] <= row["median overlap"] <= row["median high"]
    apart = rows.loc[("teacher_forced", "many")]
    assert apart["difference low"] < 0.25 < apart["difference high"] + 0.05
    assert np.isnan(rows.loc[("teacher_forced", "few"), "difference"])  # the first is the reference
    assert (
        rows.loc[("free_running", "many"), "shifted"] < rows.loc[("teacher_forced", "many"), "shifted"]
    )  # never pooled
    assert found.verdict.startswith("In 1 of 1 run the shifted share differs from few's. 40 questions")


def test_every_number_is_the_one_that_basin_shifts_has():
    table = planted(0.3)
    row = rows_of(compared(a=table, b=table)).loc[("teacher_forced", "b")]
    alone = basin_shifts(contrast(table, "teacher_forced", resamples=100))
    assert row["modes"] == "two" == alone.distribution.modes.count
    assert row["antimode"] == alone.threshold
    for ours, theirs in (("shifted", alone.share_at_paper), ("shifted at antimode", alone.share)):
        assert row[ours] == theirs.estimate
    assert (row["low"], row["high"]) == (alone.share_at_paper.low, alone.share_at_paper.high)
    assert row["median overlap"] == alone.per_pair["median overlap"].iloc[-1]


def test_a_run_beside_itself_differs_by_nothing():
    table = planted(0.3)
    found = compared(a=table, b=table)
    rows = rows_of(found).xs("b", level="run")
    assert (rows[["difference", "difference low", "difference high"]] == 0).all(axis=None)
    assert found.verdict.startswith("In 0 of 1 run the shifted share differs from a's.")


def test_no_difference_is_found_at_the_nominal_rate():
    """Two runs of the same process on the same number of questions, questions independent."""
    apart = 0
    for seed in range(40):
        small = {"questions": 30, "positions": 4, "layers": 3, "comparisons": ("teacher_forced",)}
        tables = [planted(0.2, seed=2 * seed + k, **small) for k in (0, 1)]
        row = rows_of(compared(100, a=tables[0], b=tables[1])).loc[("teacher_forced", "b")]
        apart += not row["difference low"] <= 0 <= row["difference high"]
    assert apart <= 7  # 5% of 40 is 2; more than 7 has a chance of 0.1%


def test_the_order_of_rows_changes_nothing_and_little_data_is_said():
    table = planted(0.2)
    mixed = table.sample(frac=1, random_state=1)
    once, again = (compared(50, a=table, b=t).table for t in (table, mixed))
    pd.testing.assert_frame_equal(once, again)
    one = compared(50, a=table[table["question"] == 0], b=table[table["question"] == 0])
    assert np.isnan(one.table["low"]).all()
    assert "no interval: one question" in one.verdict
    with pytest.raises(Untestable, match="the run has no pairs of comparison 'teacher_forced'"):
        compared(50, a=table[:0], b=table[:0])
    half = compared(50, a=table, b=table[table["comparison"] == "free_running"])
    assert set(half.missing) == {"teacher_forced, b", "within, a", "within, b"}
    assert "Not testable: teacher_forced, b (the run has no pairs" in half.verdict


def answered(right, n=40):
    """A `questions` table: `right` by depth is how many of n are right; who is not has no answer."""
    rows = [
        {"question": q, "depth": d, "correct": q < k, "answer": "A" if q < k else None}
        for d, k in right.items()
        for q in range(n)
    ]
    return pd.DataFrame(rows)


def test_answers_are_counted_and_a_change_is_of_the_same_questions():
    found = kinds_answers({"same": answered({1: 20, 4: 20}), "worse": answered({1: 20, 4: 4})}, 300)
    rows = found.table.set_index(["run", "depth"])
    assert rows.loc[("worse", 4), "right"] == rows.loc[("worse", 4), "read"] == 0.1
    same, worse = rows.loc[("same", 4)], rows.loc[("worse", 4)]
    assert (same["change"], same["change_low"], same["change_high"]) == (0, 0, 0)
    assert worse["change"] == pytest.approx(-0.4)
    assert worse["change_high"] < 0
    assert found.verdict.startswith("The deepest depth changes accuracy in 1 of 2 runs. 40 questions")
    assert "same 0.0% [0.0%, 0.0%]" in found.verdict
    assert "Most replies of worse have no answer" in found.verdict
    for nothing in ({"one": answered({1: 20})}, {}):
        with pytest.raises(Untestable):
            kinds_answers(nothing, 50)
    found.figure()


def sweeps(factor, texts=6, n=10, noise=0.1, seed=0, depth=4):
    rng = np.random.default_rng(seed)
    rows = [
        (text, 48, depth, k, 0.1 * factor**k * np.exp(noise * rng.normal()), False)
        for text in range(texts)
        for k in range(1, n + 1)
    ]
    return pd.DataFrame(rows, columns=["text", "tokens", "depth", "sweep", "residual", "settled"])


def test_a_planted_factor_lies_in_its_interval():
    at_once = sweeps(1, n=1).assign(residual=0.0, settled=True)
    found = kinds_contraction({"half": sweeps(0.5), "none": sweeps(1.0), "exact": at_once}, 300)
    rows = found.rates.set_index("run")
    assert rows.loc["half", "factor_low"] < 0.5 < rows.loc["half", "factor_high"]
    assert rows.loc["none", "factor"] == pytest.approx(1, abs=0.02)
    assert (rows.loc[["half", "none"], "settled"] == 0).all()
    assert rows.loc["exact", "at_once"] == rows.loc["exact", "settled"] == 6
    assert found.shown[2]["factor per sweep"] == "no residual after the first"
    assert found.verdict.startswith("A sweep shrinks the residual in 2 of 3 models and depths.")
    assert "none at depth 4 1" in found.verdict
    with pytest.raises(Untestable):
        kinds_contraction({})
    found.figure()


@torch.no_grad()
def test_residuals_are_those_of_the_sweeps_and_nothing_is_left_without_a_stream():
    texts = [[5, 6, 7, 8, 9, 10, 11, 12], [9, 8, 7, 6, 5]]
    for kind, model in models().items():
        rows = sweep_residuals(model, texts, (1, 3))
        assert set(zip(rows["text"], rows["depth"], strict=True)) == {(t, d) for t in (0, 1) for d in (1, 3)}
        last = rows.groupby(["text", "depth"]).tail(1).set_index(["text", "depth"])["sweep"]
        if kind == "backbone":
            assert (last == 1).all()
        if kind == "looped":  # at depth 1 it is the backbone
            assert (last.xs(1, level="depth") == 1).all()
            assert (last.xs(3, level="depth") > 2).all()
        if kind in ("sst", "lrt"):
            assert (last > 2).all()
        assert rows.groupby(["text", "depth"])["settled"].sum().max() <= 1


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    runs = capture_kinds(folder, 3)
    how = {"csv": folder / "words.csv", "only": ["sst"]}
    fewer = capture_kinds(tmp_path_factory.mktemp("fewer"), questions=2, **how)
    other = capture_kinds(tmp_path_factory.mktemp("other"), seed=1, **how)
    shallow = capture_kinds(tmp_path_factory.mktemp("shallow"), depths=(1, 2), **how)
    return runs, fewer["sst"], other["sst"], shallow["sst"]


def folders(runs):
    return [str(run.folder) for run in runs.values()]


def test_runs_of_each_kind_are_compared(captured):
    found = compare_runs(folders(captured[0]), resamples=50)
    rows = rows_of(found)
    assert set(rows.index) == {
        (c, kind) for c in ("teacher_forced", "within", "free_running") for kind in WORDS
    }
    assert {kind: rows.loc[("teacher_forced", kind), "kind"] for kind in WORDS} == WORDS
    assert (rows.xs("backbone", level="run")["shifted"] == 0).all()
    assert (rows.xs("looped", level="run")["shifted"] > 0).all()
    assert "backbone has no stream" in found.verdict
    assert "has no stream" not in compare_runs(folders(captured[0])[1:], resamples=50).verdict
    assert json.dumps(found.to_dict())


def test_what_cannot_be_compared_is_one_clear_line(captured):
    runs, *others = captured
    fewer, other, shallow = (str(run.folder) for run in others)
    for names, said in (
        ([], "needs two runs"),
        (folders(runs)[:1], "needs two runs"),
        ([folders(runs)[0]] * 2, "run backbone is named twice"),
        ([folders(runs)[0], "demo-loopde"], "unknown run 'demo-loopde'"),
        ([folders(runs)[0], fewer], "runs backbone and sst are of different questions"),
        ([folders(runs)[0], other], "runs backbone and sst are of different questions"),
        ([folders(runs)[0], shallow], r"differ in depths: \(1, 2, 3\) and \(1, 2\)"),
    ):
        with pytest.raises(SSTError, match=said) as error:
            open_together(names)
        assert "\n" not in error.value.message
    for texts, said in ((0, "0 texts are none"), (99999, "99999 texts are more than the runs' 3 questions")):
        with pytest.raises(SSTError, match=said):
            contraction_of(folders(runs), texts)


def test_the_command_prints_writes_and_fills(captured, capsys, tmp_path):
    names = ",".join(folders(captured[0]))
    document = tmp_path / "kinds.md"
    document.write_text(
        "# Kinds\n\n<!-- shares -->\n\n<!-- end of shares -->\n\n<!-- x -->1<!-- end of x -->\n"
    )
    page = tmp_path / "page.html"
    how = ["--resamples", "50", "--html", str(page), "--document", str(document)]
    app(["compare", "--runs", names, *how], standalone_mode=False)
    printed = capsys.readouterr().out
    assert all(words in printed for words in WORDS.values())
    assert "shifted (below 0.99)" in document.read_text()
    assert "<!-- x -->1<" in document.read_text()
    html = page.read_text()
    assert html.count('class="plot"') == 2
    assert 'src="http' not in html
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert policy.startswith("default-src 'none'; script-src ")
    admitted = policy.partition("script-src ")[2].partition(";")[0].split()
    assert sorted(admitted) == sorted(map(script_hash, scripts))
    app(["compare", "--runs", names, "--resamples", "50", "--json"], standalone_mode=False)
    written = json.loads(capsys.readouterr().out)
    assert {row["run"] for row in written["shares"]["table"]} == set(WORDS)
    assert "steps from one iteration to the next are needed" in written["settling"]["verdict"]


def test_settling_is_each_runs_own():
    names = ["kinds-backbone", "kinds-sst", "kinds-looped"]
    result = settling_of(names, 50)
    rows = result.table.set_index("run")
    assert "kinds-backbone (no question's state changes" in result.verdict
    for run in map(open_run, names[1:]):
        alone = state_settling(Contrast.of(run, resamples=50))
        assert rows.loc[run.name, "said"] == alone.kind
        assert rows.loc[run.name, "pace"] == alone.pace.estimate
        assert f"{run.name}: {alone.kind}" in result.verdict
    assert [row["run"] for row in result.shown] == names[1:]
    assert len(result.figure().data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--html", ""], "empty path"),
        (["--html", "/"], "is a folder"),
        (["--html", "blocked/page.html"], "cannot write"),
        (["--document", "binary.md"], "binary.md is not UTF-8"),
        (["--document", "none.md"], "cannot read none.md"),
        (["--contraction", "99999"], "99999 texts are more than the runs' 3 questions"),
    ],
)
def test_what_cannot_be_written_or_measured_is_said_before_the_work(
    captured, options, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocked").write_text("a file where a folder should be")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(compare_kinds, "kinds", lambda *_: pytest.fail("began to measure"))
    with pytest.raises(SSTError, match=said) as error:
        app(["compare", "--runs", ",".join(folders(captured[0])), *options], standalone_mode=False)
    assert "\n" not in error.value.message


def test_a_seed_below_0_is_refused(captured):
    done = CliRunner().invoke(app, ["compare", "--runs", ",".join(folders(captured[0])), "--seed", "-1"])
    assert done.exit_code == 2
    assert "'--seed'" in done.output


def test_what_is_not_testable_does_not_hide_the_rest(captured, capsys, monkeypatch):
    def nothing(*_):
        raise Untestable("there are answers at one depth only")

    monkeypatch.setattr(compare_kinds, "kinds_answers", nothing)
    names = ",".join(folders(captured[0]))
    app(["compare", "--runs", names, "--resamples", "50"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "answers: not testable: there are answers at one depth only." in printed
    assert "shifted (below 0.99)" in printed
    app(["compare", "--runs", names, "--resamples", "50", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["answers"] == {
        "verdict": "not testable: there are answers at one depth only."
    }


@pytest.mark.browser
def test_the_page_runs_its_own_scripts_alone_and_fits_a_phone(captured, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("SST_INTERP_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("no Chromium: set SST_INTERP_CHROMIUM to its path, or install chromium")
    hostile = "</script><script>window.hacked = 1</script>\u202e" + 90 * "long"
    found = compare_runs(folders(captured[0]), resamples=50)
    found = replace(found, shares=found.shares.replace({"run": {"looped": hostile}}), floor=hostile)
    path = tmp_path / "page.html"
    path.write_text(result_page(hostile, [found]))
    trouble = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 375, "height": 800})
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        assert page.locator(".plot .main-svg").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.evaluate("window.hacked") is None
        assert "\\u202e" in page.inner_text("h1")
        browser.close()
    assert trouble == []
