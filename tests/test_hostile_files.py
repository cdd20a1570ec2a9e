"""Files and folders as an accident or somebody's malice leaves them: one line, nothing else touched."""

import json
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_run
import torch
from refused import refused
from safetensors import SafetensorError

from sst_interp import files as durable
from sst_interp.errors import SSTError
from sst_interp.files import check_output, put_bytes, read_json
from sst_interp.questions import load_questions
from sst_interp.runs import manifest
from sst_interp.runs.store import open_run, publish
from sst_interp.runs.writer import RunWriter

pytest_plugins = ("hostile",)
DEEP = "[" * 100_000


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
    del contents["sha256"], contents["shards"]["1"], contents["shards"]["2"]
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
    assert damaged > 500


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
