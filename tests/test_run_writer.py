from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import BATCHES, PROVENANCE, batch, capture, capture_small, contents, tiny_recipe

from sst_interp import files as disk
from sst_interp.errors import SSTError
from sst_interp.runs.manifest import damage, read_manifest
from sst_interp.runs.schema import KEYS, TABLES
from sst_interp.runs.store import open_run
from sst_interp.runs.writer import RunWriter

KILL_EVERYWHERE = """
import itertools, os, signal, sys
from pathlib import Path
import tiny_run
from sst_interp import files as disk
from sst_interp.errors import SSTError
from sst_interp.runs.writer import RunWriter

root = Path(sys.argv[1])

with RunWriter.open(root / "locked", tiny_run.tiny_recipe(), tiny_run.PROVENANCE):
    if os.fork() == 0:
        try:
            tiny_run.capture(root / "locked")
        except SSTError as error:
            print(os.getppid(), error.message, flush=True)
        os._exit(0)
    os.wait()

def killed_at(point):
    "Die at the point-th flush (half of the file is lost) or rename."
    sync, replace = lambda path: None, os.replace
    steps = itertools.count()
    def reached():
        return next(steps) == point
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    def dying_sync(path):
        if reached():
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            die()
        sync(path)
    def dying_replace(old, new):
        if reached():
            die()
        replace(old, new)
    disk.sync, os.replace = dying_sync, dying_replace

for point in itertools.count():
    pid = os.fork()
    if pid == 0:
        killed_at(point)
        tiny_run.capture_small(root / str(point))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A killed process loses no page cache; what a power cut loses, the tests take away themselves."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory) -> tuple[Path, str]:
    """A folder of runs, each killed one step later than the one before, and what the driver printed."""
    root = tmp_path_factory.mktemp("crashed")
    paths = os.pathsep.join([str(Path(tiny_run.__file__).parent), *sys.path])
    command = [sys.executable, "-c", KILL_EVERYWHERE, str(root)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root, done.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    return contents(capture(tmp_path_factory.mktemp("whole") / "tiny", batches=BATCHES[:2]))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    return contents(capture_small(tmp_path_factory.mktemp("small") / "tiny"))


def test_killed_anywhere_a_run_resumes_to_the_same_bytes(crashed, small):
    runs = sorted((p for p in crashed[0].iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    assert len(runs) > 30
    done = []
    for folder in runs:
        manifest = read_manifest(folder) or {"shards": {}}
        done.append(len(manifest["shards"]))
        if done[-1]:
            assert open_run(folder).questions.question.nunique() == 2 * done[-1]
            for files in manifest["shards"].values():
                assert all(damage(folder, file, entry) is None for file, entry in files.items())
        assert contents(capture_small(folder)) == small
    assert done == sorted(done)
    assert set(done) == {0, 1, 2}


def test_files_reach_the_disk_before_their_names_and_all_of_them_before_the_manifest(tmp_path, monkeypatch):
    flushed, listed, replace = [], [], os.replace
    monkeypatch.setattr(disk, "sync", lambda path: flushed.append(path))

    def checked(old, new):
        assert flushed.count(old) == 1, "renamed before it was flushed"
        if new.name == "manifest.json":
            entries = json.loads(old.read_bytes())["shards"].values()
            listed[:] = [tmp_path / "r" / file for files in entries for file in files]
            assert all(file.exists() and file.parent in flushed for file in listed)
        flushed.clear() if new.name == "manifest.json" else flushed.remove(old)
        replace(old, new)

    monkeypatch.setattr(os, "replace", checked)
    with RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE) as writer:
        writer.commit(0, *batch([0]))
    assert len(listed) == 8
    assert flushed == [tmp_path / "r"], "the manifest's own name"


def test_a_second_process_is_told_who_writes(crashed):
    pid, message = crashed[1].split(maxsplit=1)
    assert message.strip() == f"run locked is being written by another process (pid {pid})"


def test_a_second_writer_in_the_same_process_is_refused_until_the_first_is_done(tmp_path):
    with RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE):
        for _ in range(2):
            with pytest.raises(SSTError, match=f"another process .pid {os.getpid()}."):
                RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE, fresh=True)
    capture(tmp_path / "r")
    assert not (tmp_path / "r" / ".writer").exists()


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path, monkeypatch, small):
    for point in range(100):
        code = (errno.ENOSPC, errno.EIO)[point % 2]
        folder = tmp_path / str(point)
        left = iter(range(point + 1))

        def failing(path, left=left, code=code):
            if next(left, None) is None:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(disk, "sync", failing)
        try:
            capture_small(folder)
            break
        except SSTError as error:
            message = error.message
        assert message.startswith("the disk is full: " if code == errno.ENOSPC else "cannot write run")
        assert str(folder) in message
        assert list(folder.rglob("*.tmp")) == []
        monkeypatch.setattr(disk, "sync", lambda path: None)
        if (folder / "manifest.json").exists():
            before = contents(folder)["manifest.json"]["shards"]
            with RunWriter.open(folder, tiny_recipe(depths=(1,), controls=0), PROVENANCE) as writer:
                assert writer.manifest["shards"] == before
        assert contents(capture_small(folder)) == small
    assert point > 15


def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path):
    from safetensors import SafetensorError

    def fill(path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as error:
        disk.stage(tmp_path / "x", fill)
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def damaged(path: Path, how: str) -> None:
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("table", [*TABLES, "states"])
def test_a_damaged_shard_is_named_and_only_its_batch_is_captured_again(
    tmp_path, how, table, uninterrupted, caplog
):
    folder = capture(tmp_path / "tiny", batches=BATCHES[:2])
    file = "states/0001.safetensors" if table == "states" else f"{table}/0001.parquet"
    damaged(folder / file, how)
    run = open_run(folder)
    with pytest.raises(SSTError, match=f"run tiny: {file} is damaged") as error:
        run.states(2) if table == "states" else run.table(table)
    assert "sst-interp capture --run tiny" in (error.value.hint or "")
    assert len(run.pairs if table != "pairs" else run.outputs), "what is not damaged can be read"
    with RunWriter.open(folder, tiny_recipe(), PROVENANCE) as writer:
        assert writer.committed == {0}
        assert writer.manifest["state"] == "capturing"
        assert file in caplog.text
        writer.commit(1, *batch(BATCHES[1]))
        writer.finish()
    assert contents(folder) == uninterrupted


def test_opening_a_complete_run_changes_nothing(tmp_path):
    folder = capture(tmp_path / "tiny")
    before = (folder / "manifest.json").read_bytes()
    capture(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_a_recipe_that_differs_is_refused_field_by_field_and_changes_nothing(tmp_path):
    folder = capture(tmp_path / "demo")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SSTError) as error:
        RunWriter.open(folder, tiny_recipe("demo", depths=(1, 2, 4)), PROVENANCE)
    assert error.value.message == "run demo was captured with depths = [1, 2]; the recipe now says [1, 2, 4]"
    assert "--fresh" in (error.value.hint or "")
    with pytest.raises(
        SSTError, match=r"with alpha = \(left out\), seed = 0; the recipe now says alpha = 0.5, seed = 1"
    ):
        RunWriter.open(folder, tiny_recipe(alpha=0.5, seed=1), PROVENANCE)
    with pytest.raises(SSTError, match="was captured with model_hash abc; now it is xyz"):
        RunWriter.open(folder, tiny_recipe(), PROVENANCE | {"model_hash": "xyz"})
    with pytest.raises(SSTError, match="in 3 batches; now there are 4"):
        RunWriter.open(folder, tiny_recipe(), PROVENANCE, n_batches=4)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    RunWriter.open(folder, tiny_recipe("another-name"), PROVENANCE).close()


def test_a_hand_written_recipe_is_kept_and_an_edit_is_noticed(tmp_path):
    text = "# mine\n" + tiny_recipe().to_toml()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/run.toml").write_text(text)
    with pytest.raises(SSTError, match=r"its run.toml says seed = 0; this capture seed = 1"):
        capture(tmp_path / "tiny", tiny_recipe(seed=1))
    folder = capture(tmp_path / "tiny")
    RunWriter.open(folder, tiny_recipe(), PROVENANCE, fresh=True).close()
    assert (folder / "run.toml").read_text() == text
    capture(folder)
    (folder / "run.toml").write_text(tiny_recipe(depths=(1, 2, 3)).to_toml())
    with pytest.raises(SSTError, match=r"captured with depths = \[1, 2\]; its run.toml now says \[1, 2, 3\]"):
        open_run(folder)


def test_fresh_erases_the_run_and_nothing_else(tmp_path):
    folder = capture(tmp_path / "tiny", tiny_recipe(seed=7, keep="all"), [[0], [1], [2], [3]])
    (folder / "notes.md").write_text("mine")
    with RunWriter.open(folder, tiny_recipe(), PROVENANCE, n_batches=3, fresh=True) as writer:
        assert writer.committed == set()
    capture(folder)
    assert contents(folder) == contents(capture(tmp_path / "other")) | {"notes.md": b"mine"}


def test_each_session_is_recorded_with_what_was_different(tmp_path):
    now = {
        "model_hash": "abc",
        "versions": {"torch": "3"},
        "host": "there",
        "dtype": "bfloat16",
        "threads": (1, 2),
    }
    with RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE, n_batches=2) as writer:
        writer.commit(1, *batch([2, 3]))
    with RunWriter.open(tmp_path / "r", tiny_recipe(), now) as writer:
        assert writer.committed == {1}
        first, second = writer.manifest["sessions"]
    assert writer.manifest["provenance"] == {"model_hash": "abc", "dtype": "bfloat16"}
    assert first.keys() == {"started", "versions", "host"}
    assert second | {"started": ""} == {
        "started": "",
        "versions": {"torch": "3"},
        "host": "there",
        "threads": [1, 2],
    }


def test_a_run_is_complete_when_every_batch_is_there(tmp_path):
    with RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE) as writer:
        with pytest.raises(ValueError, match="n_batches"):
            writer.finish()
        writer.commit(1, *batch([2, 3]))
        with pytest.raises(SSTError, match="2 of 3 batches are missing"):
            writer.finish(3)
        with pytest.raises(ValueError, match="n_batches"):
            writer.finish(1)
        writer.commit(0, *batch([0, 1]))
        writer.finish(2)
    run = open_run(tmp_path / "r")
    assert run.complete
    assert run.manifest["n_batches"] == 2


def test_commits_that_make_no_sense_are_refused_and_write_nothing(tmp_path):
    tables, kept = batch([0, 1])
    with RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE, n_batches=2) as writer:
        for number in (-1, 2):
            with pytest.raises(ValueError, match="batch"):
                writer.commit(number, tables, kept)
        with pytest.raises(ValueError, match="no tables"):
            writer.commit(0, tables | {"states": {}}, kept)
        with pytest.raises(ValueError, match="surplus"):
            writer.commit(0, tables | {"pairs": tables["pairs"] | {"x": [1]}}, kept)
        assert not (tmp_path / "r" / "pairs").exists()
        writer.commit(0, tables, kept)
        with pytest.raises(ValueError, match="already committed"):
            writer.commit(0, tables, kept)


def test_states_may_be_views_of_one_tensor(tmp_path):
    whole = torch.randn(2, 2, 3, 4).to(torch.bfloat16)
    with RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE, n_batches=1) as writer:
        views = {"q0.position0": whole[0].transpose(0, 1), "q1.position0": whole[1].transpose(0, 1)}
        writer.commit(0, batch([0, 1])[0], views)
        writer.finish()
    assert torch.equal(open_run(tmp_path / "r").states(1), whole[1].transpose(0, 1))


def test_a_manifest_from_the_future_or_from_nowhere_is_an_error(tmp_path):
    folder = capture(tmp_path / "r")
    for text, says in [
        ('{"format": 3}', "reads formats 1 to 2"),
        ('{"format": 0}', "not a run's manifest"),
        ("{", "is damaged"),
        ("[]", "not a run's manifest"),
    ]:
        (folder / "manifest.json").write_text(text)
        for act in (open_run, capture):
            with pytest.raises(SSTError, match=says):
                act(folder)
    RunWriter.open(folder, tiny_recipe(), PROVENANCE, fresh=True).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SSTError, match="cannot write run"):
        RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE)


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(SSTError, match="cannot write run"):
        RunWriter.open(tmp_path / "r", tiny_recipe(), PROVENANCE)


def test_controls_are_tables_that_only_some_batches_have(tmp_path):
    folder = capture(tmp_path / "r", tiny_recipe(controls=3))
    shards = read_manifest(folder)["shards"]
    assert [sum("noise" in file or "nudges" in file for file in shards[b]) for b in "012"] == [2, 2, 0]
    run = open_run(folder)
    for table in tiny_run.CONTROLS:
        keys = run.table(table)[KEYS[table]].itertuples(index=False, name=None)
        assert list(keys) == tiny_run.rows(table, [0, 1, 2])
        assert getattr(run, table).equals(run.table(table))


def test_a_run_without_controls_has_empty_ones(tmp_path):
    run = open_run(capture(tmp_path / "r", tiny_recipe(controls=0)))
    for table in tiny_run.CONTROLS:
        assert not (tmp_path / "r" / table).exists()
        empty = getattr(run, table)
        assert empty.empty
        assert list(empty.columns) == TABLES[table].names
        assert list(run.table(table, columns=["question", "position"]).columns) == ["question", "position"]


def test_fresh_erases_controls(tmp_path):
    folder = capture(tmp_path / "r")
    RunWriter.open(folder, tiny_recipe(controls=0), PROVENANCE, fresh=True).close()
    assert not any((folder / table).exists() for table in tiny_run.CONTROLS)
