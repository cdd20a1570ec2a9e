from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_interp.runs.schema import KEYS, OPTIONAL, TABLES, to_frame, to_table, write_parquet

DOCS = (Path(__file__).parents[1] / "docs" / "run-format.md").read_text()
SPELLING = {"int32", "int16", "int8", "float32", "string", "bool", "list of int32", "list of float32"}


@pytest.mark.parametrize("name", TABLES)
def test_the_schema_is_the_documented_one(name):
    section = DOCS.split(f"\n## {name}: ")[1].split("\n## ")[0]
    documented = {}
    for columns, kinds in re.findall(r"^\| ([a-z0-9_, ]+) \| ([^|]*) \|", section, re.MULTILINE):
        names, types = columns.split(", "), [k.strip() for k in kinds.split(",") if k.strip() != "or null"]
        types = types if len(types) == len(names) else types * len(names)
        documented |= {
            n: (t.removesuffix(" or null"), "or null" in kinds) for n, t in zip(names, types, strict=True)
        }
    documented.pop("column")

    def spelling(kind: pa.DataType) -> str:
        if pa.types.is_list(kind):
            return f"list of {spelling(kind.value_type)}"
        return "string" if pa.types.is_dictionary(kind) else str(kind).replace("float", "float32")

    spelled = {f.name: (spelling(f.type), f.nullable) for f in TABLES[name]}
    assert spelled == documented
    assert {kind for kind, _ in spelled.values()} <= SPELLING


@pytest.mark.parametrize("name", TABLES)
def test_missing_surplus_and_uneven_columns_are_refused(name):
    columns = tiny_run.columns(name, [0])
    assert to_table(name, columns).num_rows == len(tiny_run.rows(name, [0]))
    for column in columns:
        with pytest.raises(ValueError, match=f"missing columns .*{column}"):
            to_table(name, {k: v for k, v in columns.items() if k != column})
        with pytest.raises(ValueError, match="lengths"):
            to_table(name, columns | {column: columns[column][1:]})
    with pytest.raises(ValueError, match=r"surplus columns \['speed'\]"):
        to_table(name, columns | {"speed": [1]})


def test_unknown_tables_are_refused():
    with pytest.raises(ValueError, match="no table 'states'"):
        to_table("states", {})


@pytest.mark.parametrize("make", [list, np.array])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[("position", bad) for bad in (40_000, 0.5, None)],
        *[("a", bad) for bad in (128, -129)],
        *[("winner_rank", bad) for bad in (2**31, 2**70)],
        *[("replaced", bad) for bad in ("x", float("nan"))],
        *[("comparison", bad) for bad in ("freely", None)],
        *[("same_prefix", None), ("argmax_changed", "yes"), ("kl", "x")],
    ],
)
def test_what_does_not_fit_its_type_is_refused_not_changed(make, column, value):
    columns = tiny_run.columns("outputs", [0])
    with pytest.raises(ValueError, match=f"table 'outputs', column '{column}'"):
        to_table("outputs", columns | {column: make([value] * len(columns["a"]))})


@settings(max_examples=40)
@given(st.lists(st.integers(-(2**15), 2**15 - 1), max_size=20), st.data())
def test_what_fits_comes_back_the_same_from_lists_and_arrays(values, data):
    n = len(values)
    rows = tiny_run.columns("outputs", [0])
    columns = {k: v[:1] * n for k, v in rows.items()} | {"replaced": values}
    columns["comparison"] = data.draw(
        st.lists(st.sampled_from(["free_running", "within"]), min_size=n, max_size=n)
    )
    as_arrays = {k: np.array(v) if n else v for k, v in columns.items()}
    assert to_table("outputs", columns).equals(to_table("outputs", as_arrays))
    frame = to_frame(to_table("outputs", columns))
    assert frame.replaced.tolist() == values
    assert frame.replaced.dtype == np.int16
    assert (frame.comparison == "free_running").tolist() == [
        c == "free_running" for c in columns["comparison"]
    ]


@pytest.mark.parametrize("name", TABLES)
def test_a_shard_reads_back_equal_and_is_the_same_bytes_each_time(name, tmp_path):
    table = to_table(name, tiny_run.columns(name, [0, 1]))
    for file in "ab":
        write_parquet(table, tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = pq.read_table(tmp_path / "a")
    assert to_frame(back).equals(to_frame(table))
    assert not (back.schema.metadata or {}).get(b"pandas")


def test_nulls_stay_nulls_and_integers_integers():
    columns = tiny_run.columns("steps", [0, 1])
    frame = to_frame(to_table("steps", columns))
    assert frame.token.isna().tolist() == [t is None for t in columns["token"]]
    assert str(frame.token.dtype) == "Int32"
    assert [None if t is None else list(t) for t in frame.top100] == columns["top100"]
    assert list(frame.columns) == TABLES["steps"].names


def test_top100_may_be_a_matrix():
    n = len(tiny_run.rows("steps", [0]))
    ids = np.arange(100 * n).reshape(n, 100)
    table = to_table("steps", tiny_run.columns("steps", [0]) | {"top100": ids})
    assert np.array_equal(np.stack(to_frame(table).top100.to_list()), ids)
    with pytest.raises(ValueError, match="top100"):
        to_table("steps", tiny_run.columns("steps", [0]) | {"top100": ids + 0.5})


def test_lists_of_floats_may_be_of_different_length():
    rows = tiny_run.columns("nudges", [0])
    lengths = {len(values) for values in rows["cosine"]}
    assert lengths == {1, tiny_run.LAYERS}
    frame = to_frame(to_table("nudges", rows))
    for column in ("cosine", "relative_l2"):
        assert [v.tolist() for v in frame[column]] == [np.float32(v).tolist() for v in rows[column]]
    with pytest.raises(ValueError, match="'cosine'"):
        to_table("nudges", rows | {"cosine": [["x"]] * len(rows["a"])})


def test_optional_columns_and_keys_are_columns():
    columns = tiny_run.columns("pairs", [0])
    assert OPTIONAL & set(columns) == set()
    table = to_table("pairs", columns | {"lens_jaccard": columns["cosine"]})
    assert table.column_names == TABLES["pairs"].names
    assert all(set(KEYS[name]) <= set(TABLES[name].names) for name in TABLES)
