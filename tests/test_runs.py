from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_run
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import BATCHES, PASSES, POSITIONS, PROVENANCE, batch, capture, columns, rows, state, tiny_recipe

from sst_interp import paths
from sst_interp.errors import SSTError
from sst_interp.models.choices import COMPARISONS
from sst_interp.runs.schema import KEYS, TABLES, to_frame, to_table
from sst_interp.runs.store import list_runs, open_run
from sst_interp.runs.writer import RunWriter


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, with runs in `runs` and shipped data in `shipped`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SST_INTERP_RUNS", raising=False)
    monkeypatch.setattr(paths, "shipped", lambda kind: tmp_path / "shipped" / kind)
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return capture(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return capture(tmp_path_factory.mktemp("runs") / "tiny", tiny_recipe(keep="all"))


@pytest.mark.parametrize("name", TABLES)
def test_what_was_committed_is_what_is_read(tiny, name):
    frame = getattr(open_run(tiny), name)
    assert frame.equals(to_frame(to_table(name, columns(name, list(range(6))))))
    assert [tuple(row) for row in frame[KEYS[name]].itertuples(index=False)] == rows(name, list(range(6)))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(6)), st.sets(st.integers(1, 5)), st.randoms())
def test_tables_do_not_depend_on_the_batches(tiny, order, cuts, random):
    parts = np.split(np.array(order), sorted(cuts))
    with tempfile.TemporaryDirectory() as folder:
        with RunWriter.open(folder, tiny_recipe(), PROVENANCE, n_batches=len(parts)) as writer:
            for number in random.sample(range(len(parts)), len(parts)):
                writer.commit(number, *batch(parts[number].tolist()))
            writer.finish()
        run, reference = open_run(folder), open_run(tiny)
        for name in TABLES:
            assert run.table(name).equals(reference.table(name))
        some = {"columns": ["cosine", "layer"], "comparison": "free_running"}
        assert run.table("pairs", **some).equals(reference.table("pairs", **some))
        for question in order:
            assert torch.equal(run.states(question), reference.states(question))


@pytest.mark.parametrize("comparison", [None, *COMPARISONS])
@pytest.mark.parametrize("wanted", [["cosine"], ["comparison", "a"], ["norm_a", "question", "cosine"], None])
def test_a_part_of_a_table_is_that_part_of_the_whole(tiny, comparison, wanted):
    run = open_run(tiny)
    part = run.table("pairs", wanted, comparison)
    whole = run.pairs if comparison is None else run.pairs[run.pairs.comparison == comparison]
    whole = whole.reset_index(drop=True)
    assert len(whole)
    assert part.equals(whole if wanted is None else whole[wanted])
    assert "pairs" not in vars(open_run(tiny))


def test_a_part_of_a_table_needs_only_its_part_of_the_memory(tiny, monkeypatch):
    read = []
    monkeypatch.setattr("sst_interp.runs.run._order", lambda table, keys: read.append(table))
    run = open_run(tiny)
    n, keys = len(run.pairs), 4 + 1 + 2 + 2 + 1 + 1
    part = run.table("pairs", ["cosine"])
    free = run.table("pairs", ["cosine"], "free_running")
    assert [table.num_rows for table in read] == [n, n, n // 3]
    assert [set(table.column_names) - set(KEYS["pairs"]) for table in read[1:]] == [{"cosine"}] * 2
    dictionaries = 1000
    assert read[0].nbytes > n * (keys + 5 * 4)
    assert read[1].nbytes < n * (keys + 4) + dictionaries
    assert read[2].nbytes < n // 3 * (keys + 4) + dictionaries
    assert part.memory_usage(index=False).sum() == 4 * n
    assert free.memory_usage(index=False).sum() == 4 * n // 3


def test_any_tool_reads_a_table(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "pairs/.0003.parquet.tmp").write_bytes(b"half a shard")
    plain = pd.read_parquet(folder / "pairs")
    assert (plain.comparison == "free_running").sum() == len(plain) / 3
    assert plain.equals(open_run(folder).pairs)


def test_unlisted_shards_do_not_exist(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["shards"]["1"], manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = open_run(folder)
    assert set(run.steps.question) == {0, 1, 4, 5}
    with pytest.raises(SSTError, match="no question 2"):
        run.states(2)
    for files in manifest["shards"].values():
        files.pop(next(f for f in files if f.startswith("outputs/")))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SSTError, match="run copy has no table outputs"):
        _ = open_run(folder).outputs


def test_verification_can_be_left_out_and_is_done_once(tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    with open(folder / "pairs/0000.parquet", "ab") as file:
        file.write(b"PAR1")
    with pytest.raises(SSTError, match=r"pairs/0000.parquet is damaged"):
        _ = open_run(folder).pairs
    assert len(open_run(folder, verify=False).questions) == 12
    run = open_run(tiny)
    assert len(run.table("pairs"))
    monkeypatch.setattr("sst_interp.runs.manifest.sha256", lambda path: "not computed again")
    assert len(run.table("pairs"))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"name": "pears"}, "unknown table 'pears'"),
        ({"name": "pairs", "columns": ["cosin"]}, "unknown column of pairs 'cosin'"),
        ({"name": "pairs", "columns": ["lens_jaccard"]}, "unknown column of pairs"),
        ({"name": "pairs", "comparison": "fre"}, "unknown comparison in pairs 'fre'"),
        ({"name": "steps", "comparison": "free_running"}, "unknown comparison in steps"),
    ],
)
def test_what_is_not_in_a_table_is_an_error(tiny, ask, says):
    with pytest.raises(SSTError, match=says):
        open_run(tiny).table(**ask)


def test_position0_states_say_where_they_are_from(tiny):
    run = open_run(tiny)
    for question in range(6):
        assert torch.equal(run.states(question), state(question, tiny_run.DEPTHS[-1])[0])
    assert run.states(0).dtype == torch.bfloat16
    for ask in ({"position": 1}, {"position": None}, {"depth": 1}, {"text": "depth1"}):
        with pytest.raises(SSTError, match="states at position 0 of depth 2's own text only") as error:
            run.states(0, **ask)
        assert "--keep all" in (error.value.hint or "")


@pytest.mark.parametrize(("text", "depth"), PASSES)
def test_all_states_say_where_they_are_from(everything, text, depth):
    run = open_run(everything)
    for question in (0, 3, 5):
        whole = run.states(question, None, depth, text)
        assert whole.shape == (POSITIONS, tiny_run.LAYERS, depth, tiny_run.D_MODEL)
        assert torch.equal(whole, state(question, depth))
        for position in range(POSITIONS):
            assert torch.equal(run.states(question, position, depth, text), whole[position])
    assert torch.equal(run.states(1), run.states(1, 0, 2, "own"))
    for position in (-1, POSITIONS):
        with pytest.raises(SSTError, match="has no position"):
            run.states(0, position, depth, text)


def test_states_that_do_not_exist_are_errors(everything, tmp_path):
    run = open_run(everything)
    with pytest.raises(SSTError, match=r"unknown states in run tiny 'q0.depth1.d1'"):
        run.states(0, text="depth1", depth=1)
    with pytest.raises(SSTError, match="no question 6"):
        run.states(6)
    with pytest.raises(SSTError, match="run none has no states") as error:
        open_run(capture(tmp_path / "none", tiny_recipe(keep="none"))).states(0)
    assert "--keep all" in (error.value.hint or "")


def test_a_name_is_a_run_of_the_user_before_a_shipped_one_and_a_path_is_a_path(here):
    capture(here / "shipped/runs/demo", tiny_recipe("demo"))
    assert open_run("demo").folder == here / "shipped/runs/demo"
    capture(here / "runs/demo", tiny_recipe("demo"))
    assert open_run("demo").folder == Path("runs/demo")
    assert open_run(here / "shipped/runs/demo").folder == here / "shipped/runs/demo"
    assert open_run("runs/demo").name == "demo"
    shutil.move(here / "runs/demo", here / "moved")
    assert open_run("moved").name == "moved"


@pytest.mark.parametrize("name", ["dmeo", "", "..", "no/where", "é"])
def test_unknown_runs_are_errors_with_the_nearest_names(here, name):
    capture(here / "runs/demo")
    with pytest.raises(SSTError, match="unknown run") as error:
        open_run(name)
    assert "demo" in (error.value.hint or "")
    assert "`sst-interp runs`" in (error.value.hint or "")


def test_runs_without_data_say_what_to_type(here):
    (here / "runs/demo").mkdir(parents=True)
    (here / "runs/demo/run.toml").write_text(tiny_recipe("demo").to_toml())
    (here / "runs/file.toml").write_text(tiny_recipe("file").to_toml())
    RunWriter.open(here / "runs/begun", tiny_recipe("begun"), PROVENANCE).close()
    for name in ("demo", "file", "begun", "runs/demo"):
        with pytest.raises(SSTError, match=f"run {Path(name).name} has no data yet") as error:
            open_run(name)
        assert f"`sst-interp capture --run {Path(name).name}`" in (error.value.hint or "")


def test_the_list_has_runs_recipes_and_what_cannot_be_read(here):
    capture(here / "runs/whole", tiny_recipe("whole"))
    with RunWriter.open(here / "runs/part", tiny_recipe("part"), PROVENANCE, n_batches=3) as writer:
        writer.commit(2, *batch(BATCHES[2]))
    capture(here / "shipped/runs/published")
    for path in ("shipped/recipes/planned", "shipped/recipes/whole"):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / f"{path}.toml").write_text(tiny_recipe(seed=5).to_toml())
    (here / "runs/bad").mkdir()
    (here / "runs/bad/manifest.json").write_text("{")
    (here / "runs/typo.toml").write_text("checkpoint = 3")
    listed = {row["name"]: row for row in list_runs()}
    assert json.loads(json.dumps(listed)) == listed
    assert list(listed) == sorted(listed)
    assert {name: row["state"].split(":")[0] for name, row in listed.items()} == {
        "whole": "complete",
        "part": "partial 1 of 3",
        "published": "complete",
        "planned": "not captured",
        "bad": "unreadable",
        "typo": "unreadable",
    }
    size = sum(p.stat().st_size for p in (here / "runs/whole").glob("*/*"))
    assert listed["whole"]["bytes"] == size > listed["part"]["bytes"] > 0 == listed["planned"]["bytes"]
    for name, row in listed.items():
        assert Path(row["where"]).exists()
        if row["state"] in ("complete", "partial 1 of 3"):
            assert open_run(name).summary() == row


def test_without_any_runs_the_list_is_empty(here):
    assert list_runs() == []


def test_a_notebook_shows_a_run_and_runs_no_markup(here):
    run = open_run(capture(here / "runs/demo", tiny_recipe(dataset="<script>alert(1)</script>")))
    assert "<script>" not in run._repr_html_()
    assert "&lt;script&gt;" in run._repr_html_()
    assert "demo" in repr(run)
    assert "complete" in repr(run)
