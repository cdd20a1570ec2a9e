"""Tables of a study on disk: rows that an interrupted study goes on with, and the plan they belong to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from sst_interp.durable import publish, replace_json, stage
from sst_interp.errors import SSTError
from sst_interp.guarded import read_json, read_table

AGAIN = "delete it: what it held is measured again"


def read_rows(path: Path) -> pd.DataFrame:
    """The rows there are; an empty table where there is no file yet.

    Raises:
        SSTError: the file is damaged.
    """
    return read_table(path, AGAIN) if path.is_file() else pd.DataFrame()


def put_rows(path: Path, rows: pd.DataFrame, keys: list[str]) -> None:
    """Add rows to a table, in place of those with the same `keys`. Readers find the old table or the new."""
    before = read_rows(path)
    if len(before):
        again = pd.MultiIndex.from_frame(before[keys]).isin(pd.MultiIndex.from_frame(rows[keys]))
        rows = pd.concat([before[~again], rows], ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    stage(path, lambda staged: rows.to_parquet(staged, compression="zstd"))
    publish(path)


def same_plan(path: Path, plan: Any) -> None:
    """Note the plan (a dataclass) of a study in the JSON file `path`.

    Raises:
        SSTError: the file holds another one.
    """
    now = json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        then = read_json(path, "put a copy back, or delete the folder: the study then starts again")
        for key in [key for key in then | now if then.get(key) != now.get(key)]:
            raise SSTError(
                f"{path.parent} holds a study with {key} = {then.get(key)}, not {now.get(key)}",
                "undo the change, or give another folder",
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, now)
