"""A damaged file is named with what to type, and a place is tried without leaving anything there."""

import json

import pandas as pd
import pytest
import tiny_run

from sst_interp.errors import SSTError
from sst_interp.files import check_place, read_json, read_table
from sst_interp.findings.of_run import approximation_of
from sst_interp.runs.store import open_run

DAMAGED = {"empty": b"", "text": b"nothing", "cut off": None}


def damaged(path, how, whole):
    path.write_bytes(DAMAGED[how] if DAMAGED[how] is not None else whole[:-3])
    return path


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_one_line_and_one_to_type(tmp_path, how):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "whole")
    table = damaged(tmp_path / "t.parquet", how, (tmp_path / "whole").read_bytes())
    text = damaged(tmp_path / "t.json", how, json.dumps({"x": 1}).encode())
    for read, path in ((read_table, table), (read_json, text)):
        with pytest.raises(SSTError) as told:
            read(path, "delete it")
        assert told.value.message.startswith(f"{path} is damaged: ")
        assert "\n" not in told.value.message
        assert told.value.hint == "delete it"
        assert told.value.__suppress_context__


def test_whole_files_come_back(tmp_path):
    table = pd.DataFrame({"x": [1, 2], "y": [0.5, None]})
    table.attrs = {"asked": 2}
    table.to_parquet(tmp_path / "t.parquet")
    again = read_table(tmp_path / "t.parquet", "", ["x"])
    pd.testing.assert_frame_equal(again, table)
    assert again.attrs == table.attrs
    (tmp_path / "t.json").write_text('{"x": [1]}')
    assert read_json(tmp_path / "t.json", "") == {"x": [1]}


def test_something_else_and_nothing_are_told_from_damage(tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(SSTError, match="another table: it has no column 'y'"):
        read_table(tmp_path / "t.parquet", "", ["x", "y"])
    with pytest.raises(SSTError, match="holds no object"):
        read_json(tmp_path / "t.json", "")
    for read in (read_table, read_json):
        with pytest.raises(SSTError, match="none is missing"):
            read(tmp_path / "none", "")


def test_a_place_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "new" / "folder", "relative/place", "."):
        check_place(tmp_path.__class__(place))
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(SSTError, match=f"{place} cannot be written: "):
            check_place(place, "name another")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_errors_of_the_approximation_are_named_with_the_run_s_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run(tiny_run.capture(tmp_path / "runs" / "tiny"))
    run.manifest["provenance"] |= {"model": "own", "alpha_mean": 0.1, "alpha_range": [0.1, 0.1]}
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "errors.parquet").write_bytes(b"PAR1")
    with pytest.raises(SSTError, match=r"errors\.parquet is damaged: ") as told:
        approximation_of(run)
    assert f"`sst-interp study run two-pass {run.recipe.checkpoint}`" in str(told.value.hint)
