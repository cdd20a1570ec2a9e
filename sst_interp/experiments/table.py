"""A table on disk from which an interrupted experiment goes on, and the experiment's plan.

An experiment is a list of jobs. Each job writes its rows in one step, and a job with rows in the table is not
done again: kill the process anywhere and start it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.errors import SSTError
from sst_interp.files import put_in_place as publish
from sst_interp.files import read_json, read_table, replace_json, stage

AGAIN = "delete it: its rows are measured again"


@dataclass(frozen=True)
class Table:
    """One Parquet file in an experiment's folder."""

    file: str
    keys: tuple[str, ...]
    """Columns that name a job: new rows take the place of rows with the same values here."""

    def read(self, folder: str | Path) -> pd.DataFrame:
        """The rows that are there; an empty table where there is no file yet.

        Raises:
            SSTError: the file is damaged.
        """
        path = Path(folder) / self.file
        return read_table(path, AGAIN) if path.is_file() else pd.DataFrame()

    def put(self, folder: str | Path, rows: pd.DataFrame) -> None:
        """Add rows. A reader finds the old table or the new one, never a mixture."""
        path, keys, before = Path(folder) / self.file, list(self.keys), self.read(folder)
        if len(before):
            again = pd.MultiIndex.from_frame(before[keys]).isin(pd.MultiIndex.from_frame(rows[keys]))
            rows = pd.concat([before[~again], rows], ignore_index=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        stage(path, lambda staged: rows.to_parquet(staged, compression="zstd"))
        publish(path)

    def missing(self, folder: str | Path, jobs: Sequence[Mapping[str, Any]]) -> list[bool]:
        """For each job, whether the table lacks it. A job is named by its values of `keys`."""
        rows = self.read(folder)
        done = set(zip(*(rows[key] for key in self.keys), strict=True)) if len(rows) else set()
        return [tuple(job[key] for key in self.keys) not in done for job in jobs]

    def refuse_another(
        self, folder: str | Path, about: Mapping[str, Any], names: Sequence[str], hashed: str
    ) -> None:
        """Refuse to go on with rows of another model that has the same `names`.

        Args:
            about: the names and the hash of the model that is measured.
            names: columns that name it.
            hashed: column with the hash of its weights.

        Raises:
            SSTError: there are rows of that name with another hash.
        """
        rows = self.read(folder)
        same = np.ones(len(rows), dtype=bool)
        for name in names if len(rows) else ():
            same &= (rows[name] == about[name]).to_numpy(dtype=bool)
        if len(rows) and (rows.loc[same, hashed] != about[hashed]).any():
            raise SSTError(
                f"{Path(folder) / self.file} holds measurements of another {about['model']!r}",
                "delete it, or give another --out",
            )


def same_plan(path: Path, plan: Any) -> None:
    """Note the plan (a dataclass) of an experiment in the JSON file `path`, or check the one noted there.

    Raises:
        SSTError: the file holds another plan, or is damaged.
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
