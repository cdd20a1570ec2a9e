"""Hostile questions, and hostile text on the terminal and in pages: told in one line, never quoted, inert."""

import json
import os
import sys
import zipfile
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from refused import refused

from sst_interp.analyses.result import KeptResult
from sst_interp.errors import SSTError
from sst_interp.files import read_whole
from sst_interp.findings.of_run import capture_of, kept_findings
from sst_interp.findings.report.page import _csv, result_page
from sst_interp.questions import load_questions
from sst_interp.questions.gpqa import COLUMNS, LARGEST, read_gpqa
from sst_interp.questions.item import Hidden, HiddenTokens
from sst_interp.runs import manifest
from sst_interp.runs.store import fetch_run
from sst_interp.tables import bar, plain, say

pytest_plugins = ("hostile",)
ESCAPE, BIDI = "\x1b[31m", "\u202e"


SECRET = "a question nobody may see"


@pytest.mark.parametrize(
    "text",
    [
        f'r1,"{SECRET}",a,b\nr2,x,y,z\n',
        f'question,answer,A,B\n"{SECRET}",C,u,v\n',
        f"question,answer\n{SECRET},some\n",
        f"id,question,answer\n{SECRET},x,1\n{SECRET},y,2\n",
        f"{SECRET},{SECRET}\nx,1\n",
        f"question,answer\n{SECRET},1,2\n",
    ],
)
def test_an_error_about_a_data_row_never_quotes_it(here, text):
    Path("own.csv").write_text(text)
    with pytest.raises(SSTError) as told:
        load_questions("own.csv")
    assert "own.csv" in told.value.message or "question" in told.value.message
    assert not any(word in str(told.value) for word in ("nobody", "may see"))


@pytest.mark.parametrize(
    "row",
    [
        '{"question": "a \\ud800", "choices": ["x", "y"], "answer": "A"}',
        '{"question": "a", "choices": ["x", "\\udfff"], "answer": "A"}',
        '{"id": "\\ud800", "question": "a", "answer": 1}',
    ],
)
def test_half_a_character_is_told_with_its_line(here, row):
    Path("own.jsonl").write_text('{"question": "fine", "answer": 1}\n' + row)
    with pytest.raises(SSTError, match=r"own\.jsonl line 2 holds half a character"):
        load_questions("own.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("own.csv", "question,question,answer\nx,y,1\n", "line 1 names a column twice"),
        ("own.jsonl", '{"question": {"a": 1}, "answer": 1}', "line 1: 'question' is not a text"),
    ],
)
def test_ambiguous_rows_are_refused(here, name, text, says):
    Path(name).write_text(text)
    with pytest.raises(SSTError, match=says):
        load_questions(name)


def test_a_folder_whose_name_is_not_text_is_one_line(run, command):
    folder = os.fsdecode(b"runs/d\xff")
    os.rename(run.folder, folder)
    refused(command("report", folder), "runs/d?: the folder's name is not UTF-8")
    code, out, err = command("runs")
    assert code == 0, err
    assert "not UTF-8" in out


@pytest.mark.parametrize("name", ["~nosuchuser/x.csv", "x\0.csv", "x" * 5000 + ".csv", "gpqa:~nosuchuser/x"])
def test_names_that_no_file_has_are_one_line(here, name):
    with pytest.raises(SSTError, match="is no file's name") as told:
        load_questions(name)
    assert len(told.value.message) < 300


def test_pipes_are_not_waited_for(here):
    os.mkfifo("q.csv")
    os.mkfifo("manifest.json")
    with pytest.raises(SSTError, match="no ordinary file"):
        load_questions("q.csv")
    with pytest.raises(SSTError, match="no ordinary file"):
        manifest.read_manifest(here)
    Path("big").write_bytes(b"x" * (2 << 20))
    with pytest.raises(OSError, match="larger than"):
        read_whole(Path("big"), 1 << 20)


def gpqa_file(rows):
    lines = [",".join(COLUMNS), *(",".join(row) for row in rows)]
    return "\n".join(lines) + "\n"


def test_a_zip_bomb_is_not_read_whole(here, monkeypatch):
    read = []
    real = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: (read.append(n), real(self, n))[1])
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset/gpqa_diamond.csv", b"\0" * (LARGEST + 100))
    assert Path("bomb.zip").stat().st_size < 1 << 20
    with pytest.raises(SSTError, match="is larger than 64 MB"):
        read_gpqa(path="bomb.zip")
    assert read
    assert all(0 < n <= LARGEST + 1 for n in read)


def test_texts_hide_in_a_traceback_with_locals(here):
    Path("g.csv").write_text(
        gpqa_file([("r1", SECRET, "w", "x", "y", "z"), ("r2", SECRET, "w", "", "y", "z")])
    )
    frames = []
    with pytest.raises(SSTError, match="record 2 has an empty question, choice or id") as told:
        read_gpqa(path="g.csv")
    trace = told.value.__traceback__
    while trace is not None:
        if "sst_interp" in trace.tb_frame.f_code.co_filename:
            frames += map(repr, trace.tb_frame.f_locals.values())
        trace = trace.tb_next
    assert len(frames) > 5
    assert not any("nobody" in shown for shown in frames)
    Path("g.csv").write_text(gpqa_file([("r1", SECRET, "w", "x", "y", "z")]))
    (question,) = load_questions("gpqa:g.csv").questions
    assert SECRET in question.prompt
    assert "nobody" not in repr(
        (question.prompt, question.choices, [question.prompt], {"a": question.prompt})
    )
    assert repr([HiddenTokens([1, 2])]) == "[<2 tokens>]"
    assert json.loads(json.dumps(Hidden("x"))) == "x"


@pytest.mark.parametrize("url", ["jupyter://x/y", "generic://x", "zip://a::github://b:c@/d.zip", "ssh://h/x"])
def test_runs_come_from_named_protocols_only(here, url):
    with pytest.raises(SSTError, match="is not read") as told:
        fetch_run(url)
    assert "hf" in str(told.value.hint)


# Text on the terminal and in pages


def test_text_from_data_is_inert_on_the_terminal(capsys):
    nasty = f"{ESCAPE}red{BIDI}\udcff\x07"
    say(f"run {nasty}\nsecond line")
    with bar(nasty, total=1, file=sys.stderr) as shown:
        shown.set_postfix_str(nasty)
        shown.update()
    out, err = capsys.readouterr()
    assert out == "run ?[31mred???\nsecond line\n"
    assert "?[31mred" in err
    for character in ("\x1b[3", BIDI, "\udcff", "\x07"):
        assert character not in out + err
    assert plain("tab\tand é") == "tab?and é"


def test_an_error_s_data_is_inert(here, command):
    Path("a.jsonl").write_text(json.dumps({"id": f"{ESCAPE}X", "question": "a", "answer": "x"}))
    Path("a.toml").write_text('checkpoint = "smollm2-135m"\ndataset = "a.jsonl"\n')
    result = command("capture", "a.toml")
    refused(result, "?[31mX")
    assert "\x1b" not in result[2]


def test_every_print_of_the_commands_is_inert():
    """Data is printed by `say` and `print_table`, and bars are `bar`; JSON escapes what is not ASCII."""
    root = Path(__file__).parent.parent / "sst_interp"
    files = [*(root / "cli").glob("*.py"), root / "runs" / "capture.py", root / "assets" / "__init__.py"]
    assert len(files) > 6
    for file in files:
        for line in file.read_text().splitlines():
            bare = "tqdm" in line or ("print(" in line and "json" not in line)
            assert not bare or "error: stopped" in line, f"{file.name}: {line}"


@pytest.fixture
def poisoned():
    """A kept result whose every text is hostile."""
    nasty = f"=cmd{BIDI}{ESCAPE}<script>alert(1)</script>"
    figure = go.Figure(go.Scatter(x=[1], y=[2], text=[nasty], name=nasty), layout={"title": {"text": nasty}})
    table = pd.DataFrame({nasty: [nasty], "@n": ["-0.34; lowest"], "number": [-2]})
    return KeptResult(nasty, nasty, table, {"one": json.loads(str(figure.to_json()))})


def test_a_page_admits_its_own_scripts_and_shows_no_raw_mark(poisoned):
    page = result_page(f"title {BIDI}", [poisoned])
    head = page[: page.index("</title>")]
    assert "default-src 'none'; script-src 'sha256-" in head
    assert "unsafe-eval" not in head
    assert "unsafe-inline" not in head.partition("style-src")[0]
    assert head.partition("script-src ")[2].partition(";")[0].count("sha256-") == page.count("<script>")
    assert 'name="viewport"' in head
    assert BIDI not in page
    assert ESCAPE not in page
    assert "<script>alert" not in page


def test_a_table_s_download_holds_no_formula(poisoned):
    names, cells = _csv("claims", poisoned.table)["text"].splitlines()
    assert names.startswith("'=cmd\\u202e")
    assert cells.startswith("'=cmd\\u202e")
    assert ",'@n," in names
    assert ",'-0.34; lowest,-2" in cells


def test_texts_of_kept_findings_are_inert_where_they_are_read(run, poisoned):
    kept = {"of": capture_of(run), "made": {}, "rows": [], "results": {"halting": poisoned.to_json()}}
    (run.folder / "findings").mkdir()
    (run.folder / "findings/probe.json").write_text(json.dumps(kept))
    read = kept_findings(run).results["halting"]
    shown = repr(
        (read.verdict, read.title, read.table.to_csv(), [f.to_json() for f in read.figures().values()])
    )
    assert "=cmd" in shown
    assert BIDI not in shown
    assert BIDI.encode("unicode_escape").decode() in read.verdict
    assert "\x1b" not in read.verdict
