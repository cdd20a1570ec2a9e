"""Files and folders as an accident or somebody's malice leaves them: one line, nothing else touched."""

import importlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import plotly.graph_objects as go
import pytest
import tiny_run
import torch
from safetensors import SafetensorError

from sst_interp import files as durable
from sst_interp.analyses.result import KeptResult
from sst_interp.errors import SSTError
from sst_interp.files import check_output, put_bytes, read_json, read_whole
from sst_interp.findings.of_run import capture_of, kept_findings
from sst_interp.findings.report.page import _csv, result_page
from sst_interp.questions import load_questions
from sst_interp.questions.gpqa import COLUMNS, LARGEST, read_gpqa
from sst_interp.questions.item import Hidden, HiddenTokens
from sst_interp.runs import manifest
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.store import fetch_run, open_run, publish
from sst_interp.runs.writer import RunWriter
from sst_interp.tables import bar, fill, plain, say

DEEP = "[" * 100_000
ESCAPE, BIDI = "\x1b[31m", "\u202e"


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


def refused(result, *words):
    """Exit code 2, and the last two lines say what is wrong and what to type."""
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: "), err
    assert hint.startswith("  "), err
    for word in words:
        assert word in error, err
    return hint


# Iterations of a published copy


@pytest.fixture
def deep(here):
    """A run of depths 1 to 4 whose states name their iteration."""
    recipe = tiny_run.tiny_recipe("deep", depths=(1, 2, 4), questions=2, controls=0)
    tables, _ = tiny_run.batch([0, 1], "none", 0)
    states = {f"q{q}.position0": (torch.arange(1.0, 5) + 10 * q).expand(2, 3, 4).mT.mT for q in (0, 1)}
    states = {key: value.permute(0, 2, 1).contiguous() for key, value in states.items()}
    with RunWriter.open(here / "runs/deep", recipe, tiny_run.PROVENANCE, n_batches=1) as writer:
        writer.commit(0, tables, states)
        writer.finish()
    return open_run(here / "runs/deep")


def test_a_copy_s_iterations_keep_their_numbers(deep, here):
    copy = publish(deep, here / "copy", iterations=(4, 2))
    assert copy.manifest["published"]["iterations"] == [2, 4]
    assert (deep.kept_iterations, copy.kept_iterations) == ((1, 2, 3, 4), (2, 4))
    for question in (0, 1):
        for iteration in (2, 4):
            assert torch.equal(copy.state(question, iteration), deep.state(question, iteration))
            assert torch.equal(
                copy.states(question)[:, iteration - 1], deep.states(question)[:, iteration - 1]
            )
        assert copy.states(question)[:, [0, 2]].isnan().all()
        with pytest.raises(SSTError, match="no states of iteration 1") as told:
            copy.state(question, 1)
        assert "2, 4" in str(told.value.hint)
    again = publish(copy, here / "again", iterations=(4,))
    assert torch.equal(again.state(1, 4), deep.state(1, 4))
    with pytest.raises(SSTError, match="has no iteration 3"):
        publish(copy, here / "third", iterations=(3,))
    with pytest.raises(SSTError, match="iteration 1 is named twice"):
        publish(deep, here / "third", iterations=(1, 1))
    assert not (here / "third").exists()


# Links that somebody planted


def test_planted_links_are_not_followed(run, here, command):
    precious = here / "precious"
    precious.write_text("mine")
    planted = (".report.html.tmp", "report.html", ".manifest.json.tmp", ".writer", ".run.toml.tmp")
    for name in (*planted, "pairs/.0001.parquet.tmp"):
        (run.folder / name).symlink_to(precious)
    command("report", "tiny")
    with RunWriter.open(run.folder, run.recipe, tiny_run.PROVENANCE, n_batches=3, fresh=True) as writer:
        writer.commit(1, *tiny_run.batch([2, 3]))
    assert precious.read_text() == "mine"
    assert not (run.folder / "report.html").is_symlink()


@pytest.mark.parametrize("name", ["pairs", "states", ".lock"])
def test_a_run_whose_own_folder_is_a_link_is_not_written(run, here, name):
    elsewhere = here / "elsewhere"
    (run.folder / name).rename(elsewhere)
    (run.folder / name).symlink_to(elsewhere)
    before = sorted(p.name for p in elsewhere.iterdir()) if elsewhere.is_dir() else elsewhere.read_bytes()
    for fresh in (False, True):
        with pytest.raises(SSTError, match="is a link to somewhere else"):
            RunWriter.open(run.folder, run.recipe, tiny_run.PROVENANCE, n_batches=3, fresh=fresh)
    assert before == (
        sorted(p.name for p in elsewhere.iterdir()) if elsewhere.is_dir() else elsewhere.read_bytes()
    )
    assert (run.folder / "manifest.json").is_file()


def test_fresh_leaves_notes_inside_a_table_s_folder(run):
    (run.folder / "pairs/notes.txt").write_text("mine")
    RunWriter.open(run.folder, run.recipe, tiny_run.PROVENANCE, fresh=True).close()
    assert [p.name for p in (run.folder / "pairs").iterdir()] == ["notes.txt"]
    assert not (run.folder / "steps").exists()


# Outputs


def test_devices_and_pipes_are_written_to_and_never_replaced(here):
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_bytes()))
    reader.start()
    check_output(Path("pipe"))
    put_bytes(Path("pipe"), b"page")
    reader.join()
    assert read == [b"page"]
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    for device in ("/dev/null", "/dev/stdout"):
        before = os.lstat(device)
        put_bytes(Path(device), b"")
        assert os.lstat(device).st_ino == before.st_ino
        assert stat.S_IFMT(os.lstat(device).st_mode) == stat.S_IFMT(before.st_mode)
    with pytest.raises(OSError, match="No space left"):
        put_bytes(Path("/dev/full"), b"page")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_standard_output_that_is_a_file_is_written_through(here):
    code = "import sst_interp.files as g, pathlib as p; g.put_bytes(p.Path('/dev/stdout'), b'x')"
    before = os.lstat("/dev/stdout").st_ino
    with open("out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert Path("out").read_bytes() == b"x"
    assert os.lstat("/dev/stdout").st_ino == before


@pytest.mark.parametrize("name", [".", "/", "", "runs/tiny/run.toml/x.html"])
@pytest.mark.parametrize("words", [("report",), ("basin-shifts",), ("compare", "--runs", "tiny,tiny")])
def test_an_output_that_cannot_be_is_refused_before_the_work(run, command, monkeypatch, words, name):
    monkeypatch.setattr("sst_interp.findings.of_run.ledger_of", lambda *_a, **_k: pytest.fail("worked first"))
    monkeypatch.setattr("sst_interp.experiments.kinds.compare_runs", lambda *_a: pytest.fail("worked first"))
    which = () if words[0] == "compare" else ("tiny",)
    refused(command(*words, *which, "--html", name), "cannot write" if name else "an empty path")


# Manifests


def written(folder, contents):
    (folder / manifest.FILE).write_text(json.dumps(contents))


def test_a_manifest_s_own_checksum_finds_every_flipped_bit(run):
    file = run.folder / manifest.FILE
    whole, draws = file.read_bytes(), random.Random(0)
    for _ in range(400):
        changed = bytearray(whole)
        changed[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        file.write_bytes(changed)
        told, after = told_of(lambda: manifest.read_manifest(run.folder))
        assert (told is None) == (after == run.manifest)  # white space between the values
    file.write_bytes(whole)


def told_of(read):
    """(the one line of its SSTError, what it returns): one of them is None."""
    try:
        return None, read()
    except SSTError as error:
        if "\n" in error.message:
            raise
        return error.message, None


def places(value, path=()):
    """Every place inside a JSON value."""
    yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


def test_a_manifest_with_a_value_of_another_type_is_one_line_wherever_it_is(run):
    contents = json.loads((run.folder / manifest.FILE).read_text())
    del contents["sha256"]
    damaged = 0
    for path in list(places(contents))[1:]:
        for value in (None, [], {}, "x", -1, 2.5, True, float("inf"), "\ud800"):
            changed = json.loads(json.dumps(contents))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            written(run.folder, changed)
            told, opened = told_of(lambda: open_run(run.folder, verify=False))
            damaged += told is not None
            if opened is not None:
                assert opened.summary()["kind"] == opened.kind
                assert opened.kept_iterations is not None
    assert damaged > 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"].update({"00": {}}),
        lambda m: m["shards"].update({"x": {}}),
        lambda m: m["shards"]["0"].update({"pairs/../x": {"bytes": 1, "sha256": "", "rows": 1}}),
        lambda m: m["shards"]["0"].update({"pairs/0001.parquet": {"bytes": 1, "sha256": "", "rows": 1}}),
        lambda m: m["shards"]["0"]["pairs/0000.parquet"].pop("bytes"),
        lambda m: m.update({"state": "done"}),
        lambda m: m.update({"n_batches": 0}),
        lambda m: m["provenance"].update({"alpha_range": [1]}),
        lambda m: m.update({"published": {"iterations": [0]}}),
    ],
)
def test_one_bad_manifest_hides_no_other_run(run, here, command, change):
    tiny_run.capture(here / "runs" / "other")
    contents = json.loads((run.folder / manifest.FILE).read_text())
    del contents["sha256"]
    change(contents)
    written(run.folder, contents)
    code, out, err = command("runs", "--json")
    assert code == 0, err
    rows = {row["name"]: row["state"] for row in json.loads(out)}
    assert rows["other"] == "complete"
    assert "is damaged" in rows["tiny"]
    assert "`sst-interp capture --run tiny --fresh`" in rows["tiny"]
    refused(command("report", "tiny"), "manifest.json is damaged")


def test_nesting_is_one_line(run, here, command):
    (run.folder / manifest.FILE).write_text(DEEP)
    refused(command("report", "tiny"), "nested too deeply")
    Path("deep.json").write_text(DEEP)
    with pytest.raises(SSTError, match="nested too deeply"):
        read_json(Path("deep.json"), "delete it")
    Path("deep.jsonl").write_text('{"question": "x", "answer": 1}\n{"question": ' + DEEP)
    with pytest.raises(SSTError, match=r"deep\.jsonl line 2 is not JSON: it is nested too deeply"):
        load_questions("deep.jsonl")
    Path("deep.csv").write_text(f"question,choices,answer\nx,{DEEP},A\n")
    with pytest.raises(SSTError, match=r"deep\.csv line 2 has a single choice"):
        load_questions("deep.csv")


@pytest.mark.parametrize("files", [{}, "pairs"])
def test_a_batch_that_lacks_a_table_is_told_and_captured_again(run, files):
    contents = json.loads((run.folder / manifest.FILE).read_text())
    del contents["sha256"]
    if files:
        del contents["shards"]["1"]["pairs/0001.parquet"]
    else:
        contents["shards"]["1"] = {}
    written(run.folder, contents)
    with pytest.raises(SSTError, match="batch 1 has no"):
        open_run(run.folder).check()
    with pytest.raises(SSTError, match="batch 1 has no pairs"):
        _ = open_run(run.folder).pairs
    with RunWriter.open(run.folder, run.recipe, tiny_run.PROVENANCE, n_batches=3) as writer:
        assert writer.committed == {0, 2}


def test_a_table_with_other_rows_than_its_manifest_says_is_refused(run):
    contents = json.loads((run.folder / manifest.FILE).read_text())
    del contents["sha256"]
    contents["shards"]["1"]["pairs/0001.parquet"]["rows"] += 1
    written(run.folder, contents)
    with pytest.raises(SSTError, match="table pairs is not the one that its manifest lists"):
        _ = open_run(run.folder).pairs


def test_a_folder_in_a_shard_s_place_is_named(run):
    (run.folder / "steps/0001.parquet").unlink()
    (run.folder / "steps/0001.parquet").mkdir()
    with (
        RunWriter.open(run.folder, run.recipe, tiny_run.PROVENANCE, n_batches=3) as writer,
        pytest.raises(SSTError, match=r"steps/0001\.parquet: Is a directory"),
    ):
        writer.commit(1, *tiny_run.batch([2, 3]))


# Disks


@pytest.mark.parametrize("number", [27, 28, 122])
def test_what_the_system_told_safetensors_is_an_error_of_the_system(here, number):
    def fail(path):
        path.write_bytes(b"half")
        raise SafetensorError(
            f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        )

    with pytest.raises(OSError, match=os.strerror(number)) as told:
        durable.stage(Path("states"), fail)
    assert told.value.errno == number
    assert not list(here.iterdir())


@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_copy_on_a_full_disk_is_not_there_and_the_same_command_goes_on(run, here, monkeypatch, after):
    calls, real = [], durable.sync

    def full(path):
        calls.append(path)
        if len(calls) > after:
            raise OSError(28, os.strerror(28))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", full)
        with pytest.raises(SSTError, match="No space left") as told:
            publish(run, here / "copies/copy")
    assert "the same command" in str(told.value.hint)
    assert not list((here / "copies").iterdir())
    (here / "copies/.copy.part").symlink_to(run.folder)  # planted
    assert publish(run, here / "copies/copy").complete
    assert open_run(run.folder).complete


# Questions


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
    files = [*(root / "cli").glob("*.py"), root / "runs" / "capture.py", root / "assets" / "wheels.py"]
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


# The command line


def test_ctrl_c_in_the_first_moments_is_one_line(here):
    command = Path(sys.executable).with_name("sst-interp")
    for wait in (0.15, 0.4, 1.0):
        started = subprocess.Popen(
            [command, "runs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(wait)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate()
        assert "Traceback" not in err
        assert started.returncode in (0, 1, 130)


def test_ctrl_c_that_a_library_turns_into_another_error_is_one_line(command, monkeypatch):
    app = importlib.import_module("sst_interp.cli.common")

    def half_imported():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(app, "run", half_imported)
    assert command("runs") == (130, "", "error: stopped\n  the same command starts again\n")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a second one at exit does nothing


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("claims", "--run", "tiny", "--seed", "-5"), "'--seed'"),
        (("claims", "--run", "tiny", "--resamples", "9" * 23), "'--resamples'"),
        (("compare", "--runs", "tiny,tiny", "--seed", "-1"), "'--seed'"),
        (("evaluate", "m", "--questions", "0"), "'--questions'"),
        (("evaluate", "m", "--questions", "-1"), "'--questions'"),
        (("evaluate", "m", "--depths", "999999"), "depths go up to 127"),
        (("evaluate", "m", "--out", "file"), "file cannot be written"),
        (("evaluate", "m", "--out", ""), "an empty path"),
        (("train", "t.toml", "--out", ""), "an empty path"),
        (("publish", "--run", "tiny", ""), "an empty path"),
        (("claims", "--run", "tiny", "--document", "bin.md"), "bin.md is not UTF-8"),
        (("compare", "--runs", "tiny,tiny", "--document", "bin.md"), "bin.md is not UTF-8"),
    ],
)
def test_options_are_checked_at_the_door(run, command, words, says, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sst_interp.findings.of_run.ledger_of", lambda *_a, **_k: pytest.fail("worked first"))
    monkeypatch.setattr("sst_interp.experiments.kinds.compare_runs", lambda *_a: pytest.fail("worked first"))
    Path("bin.md").write_bytes(b"\x93\xff")
    Path("file").write_text("mine")
    code, _, err = command(*words)
    assert code == 2, err
    assert says in err
    assert "Traceback" not in err
    assert Path("file").read_text() == "mine"


def test_a_document_that_is_not_text_is_refused(here):
    Path("bin.md").write_bytes(b"fine \xff")
    with pytest.raises(SSTError, match=r"bin\.md is not UTF-8 \(byte 5\)"):
        fill("bin.md", {})


def test_a_run_is_named_with_or_without_the_option(run, command, monkeypatch):
    monkeypatch.setattr("sst_interp.cli.runs.ledger_with_bar", lambda run: SimpleNamespace(failed={}))
    monkeypatch.setattr(
        "sst_interp.findings.report.page.write_report", lambda run, path, ledger: f"{run.name}, {path}"
    )
    for words in (("tiny",), ("--run", "tiny"), ("-r", "tiny"), ("tiny", "--run", "tiny")):
        code, out, err = command("report", *words, "--html", "out.html")
        assert (code, out) == (0, "report: tiny, out.html\n"), err
    refused(command("report"), "no run is named")
    refused(command("report", "tiny", "--run", "other"), "two runs are named: tiny and other")
    for name in ("basin-shifts", "claims", "capture", "probe", "patch"):
        refused(command(name, "nosuchrun"), "unknown run 'nosuchrun'")


# Keys of a recipe, set on the command line


def test_settings_are_read_and_checked_like_a_recipe_s():
    recipe = tiny_run.tiny_recipe()
    changed = recipe.with_settings(
        [
            "questions=8",
            "depths=1,4",
            "alpha=0.5",
            "choices.kv=first",
            "name=other",
            "instruction=Answer: (A)",
        ]
    )
    assert changed == replace(
        recipe, questions=8, depths=(1, 4), alpha=0.5, choices=replace(recipe.choices, kv="first"),
        name="other", instruction="Answer: (A)",
    )  # fmt: skip
    assert Recipe.loads(changed.to_toml()) == changed
    assert recipe.with_settings(["depths=[1, 3]"]).depths == (1, 3)
    for wrong, says in (
        ("question=8", "unknown recipe key"),
        ("questions=many", "questions = 'many' is not a whole number"),
        ("depths=2,3", "is not a list of distinct whole numbers"),
        ("choices.kvs=first", "unknown"),
        ("questions", "sets nothing"),
        ("=8", "sets nothing"),
    ):
        with pytest.raises(SSTError, match=says):
            recipe.with_settings([wrong])


def test_a_setting_is_recorded_and_a_run_of_that_name_is_not_changed(here, command):
    capture = importlib.import_module("test_capture")
    importlib.import_module("test_loading").save_model(here / "bb", max_position_embeddings=256)
    capture.write_questions(here / "q.csv", n=4)
    Path("s.toml").write_text(
        'checkpoint="bb"\ndataset="q.csv"\ndepths=[1]\nmax_new_tokens=2\ndtype="float32"\nalpha=0.3\n'
    )
    assert command("capture", "s.toml", "--set", "questions=2", "--set", "depths=1,2")[0] == 0
    assert (open_run("s").recipe.questions, open_run("s").recipe.depths) == (2, (1, 2))
    assert Recipe.load("runs/s/run.toml").questions == 2
    assert command("capture", "s")[0] == 0  # goes on by what is recorded: nothing is left
    (here / "bb").rename(here / "away")  # the clash is told before anything is loaded
    hint = refused(command("capture", "s", "--set", "questions=3"), "questions = 2", "now says 3")
    assert "--set name=" in hint
