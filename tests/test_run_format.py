"""Runs of version 0.1 (format 1) open, go on and are published under today's names; a run answers SQL."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny_run
from tiny_run import PROVENANCE, capture, tiny_recipe

from sst_interp import paths
from sst_interp.errors import SSTError
from sst_interp.models.choices import COMPARISONS
from sst_interp.runs.manifest import read_manifest
from sst_interp.runs.schema import CATEGORIES, KEYS, TABLES
from sst_interp.runs.store import open_run, publish
from sst_interp.runs.writer import RunWriter


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return capture(tmp_path_factory.mktemp("new") / "tiny")


@pytest.fixture
def old(new, tmp_path):
    folder = shutil.copytree(new, tmp_path / "old" / "tiny")
    tiny_run.as_version_1(folder)
    return folder


def format_of(folder):
    return json.loads((folder / "manifest.json").read_text())["format"]


def same_tables(a, b):
    for name in TABLES:
        pd.testing.assert_frame_equal(a.table(name), b.table(name))


def test_an_old_run_is_read_in_todays_names(old, new):
    assert (format_of(old), format_of(new)) == (1, 2)
    assert b"replayed" in (old / "pairs/0000.parquet").read_bytes()
    run = open_run(old)
    assert run.recipe == open_run(new).recipe
    assert run.recipe.fingerprint() == run.manifest["recipe_fingerprint"]
    same_tables(run, open_run(new))
    for comparison in COMPARISONS:
        assert len(run.table("pairs", comparison=comparison)) == len(run.pairs) / 3
    assert run.sql("select * from pairs order by all").equals(
        open_run(new).sql("select * from pairs order by all")
    )


def test_an_old_run_goes_on_in_todays_format(old, new):
    before = read_manifest(old)
    capture(old)
    assert read_manifest(old) == before, "a complete run is left as it is"
    (old / "pairs/0001.parquet").unlink()
    capture(old)
    assert format_of(old) == 2
    assert open_run(old).complete
    assert open_run(old).manifest["recipe"] == open_run(new).manifest["recipe"]
    same_tables(open_run(old), open_run(new))
    with pytest.raises(SSTError, match=r"choices\.initial_guess = \"shift\"; the recipe now says \"scan\""):
        RunWriter.open(old, tiny_recipe().with_settings(["choices.initial_guess=scan"]), PROVENANCE)


def test_an_old_run_is_published_as_it_is(old, new, tmp_path):
    copy = publish(open_run(old), tmp_path / "copy", bits=24)
    assert format_of(tmp_path / "copy") == 1
    same_tables(copy, publish(open_run(new), tmp_path / "other", bits=24))


def test_a_shipped_run_of_version_0_1_is_read():
    run = open_run(paths.shipped("runs") / "kinds-sst")
    assert run.manifest["format"] == 1
    counted = run.sql("select comparison, count(*) as n from outputs group by comparison")
    assert dict(counted.itertuples(index=False)) == run.outputs["comparison"].value_counts().to_dict()
    assert set(run.outputs["comparison"]) == set(COMPARISONS)


# SQL


@pytest.mark.parametrize("name", TABLES)
def test_sql_sees_every_table_as_the_run_gives_it(new, name):
    run = open_run(new)
    keys = KEYS[name]
    order = [f"list_position({list(CATEGORIES[k])}, {k})" if k in CATEGORIES else k for k in keys]
    rows = run.sql(f"select * from {name} order by {', '.join(order)}")
    frame = run.table(name)
    assert list(rows.columns) == list(frame.columns)
    for column in keys:
        assert rows[column].tolist() == frame[column].tolist()
    assert run.sql(f"select count(*) as n from {name}")["n"].item() == len(frame)


def test_sql_joins_tables_and_describes_them(new):
    run = open_run(new)
    shares = run.sql(
        "select q.correct, avg(p.cosine) as overlap from pairs p join questions q using (question) "
        "where p.comparison = 'within' and q.depth = 1 group by q.correct order by q.correct"
    )
    pairs = run.table("pairs", comparison="within").merge(run.questions.query("depth == 1"), on="question")
    assert shares["overlap"].tolist() == pytest.approx(pairs.groupby("correct")["cosine"].mean().tolist())
    assert set(run.sql("describe pairs")["column_name"]) == set(run.pairs.columns)


def test_sql_of_tables_without_rows(tmp_path):
    run = open_run(capture(tmp_path / "o'ne", tiny_recipe(controls=0)))
    assert run.sql("select * from noise").empty
    assert list(run.sql("select * from nudges").columns) == TABLES["nudges"].names
    assert len(run.sql("from steps")) == len(run.steps)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("selct 1", "syntax error"),
        ("select cosin from pairs", 'Referenced column "cosin" not found'),
        ("select * from pears", "pears does not exist"),
        ("select 1; select 2", "one SELECT"),
        ("", "one SELECT"),
        ("copy pairs to 'x.csv'", "one SELECT"),
        ("attach 'x.db'", "one SELECT"),
        ("set lock_configuration = false", "one SELECT"),
        ("drop view pairs", "one SELECT"),
        ("select * from read_text('{own}')", "Cannot access file"),
        ("select * from read_csv('/etc/passwd')", "Cannot access file"),
        ("select * from glob('/etc/*')", "Cannot access file"),
        ("select * from '/etc/passwd'", "does not exist"),
    ],
)
def test_a_wrong_query_is_one_line_and_reads_no_other_file(new, query, says):
    before = {p: p.read_bytes() for p in new.rglob("*") if p.is_file()}
    with pytest.raises(SSTError, match=says) as told:
        open_run(new).sql(query.format(own=Path(__file__)))
    assert "\n" not in told.value.message
    assert told.value.hint
    assert {p: p.read_bytes() for p in new.rglob("*") if p.is_file()} == before


def test_sql_of_a_damaged_run_names_the_shard(new, tmp_path):
    folder = shutil.copytree(new, tmp_path / "tiny")
    with open(folder / "steps/0001.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(SSTError, match=r"steps/0001\.parquet is damaged"):
        open_run(folder).sql("select 1")
    (folder / "steps/0001.parquet").write_bytes(b"x")
    with pytest.raises(SSTError, match="the query cannot be answered"):
        open_run(folder, verify=False).sql("select * from steps")


# What the terminal shows


ROWS = [
    {"name": "a\x1b[31m", "n": 3, "long": "word " * 60},
    {"name": "[bold]x[/bold] :cat:", "n": None, "long": "日本"},
]
PRINT = f"from sst_interp.tables import print_table; print_table({ROWS!r}); print_table([])"


def test_a_table_in_a_pipe_has_a_line_a_row_and_nothing_is_cut_or_drawn():
    shown = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True).stdout
    head, first, second, none = shown.splitlines()
    assert (head.split(), none) == (["name", "n", "long"], "none")
    assert first.startswith("a?[31m ")
    assert first.endswith(("word " * 60).strip())
    assert second.split() == ["[bold]x[/bold]", ":cat:", "None", "日本"]
    assert first.index(" 3 ") == second.index(" None ") == head.index(" n ")
