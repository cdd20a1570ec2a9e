"""Files that were kept earlier, read so that a damaged one is named; and places, tried before the work.

What a hand, a full disk or a broken copy did to a file is found where it is read: the error names the file
and says what to type, whoever reads it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from sst_interp.errors import SSTError


def read_table(path: Path, hint: str, columns: Iterable[str] = ()) -> pd.DataFrame:
    """A Parquet file that holds at least `columns`.

    Args:
        hint: what to type if it does not.

    Raises:
        SSTError: it is missing or damaged, or holds something else.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error, hint) from None
    if lacking := [name for name in columns if name not in table.columns]:
        raise SSTError(f"{path} holds another table: it has no column {lacking[0]!r}", hint)
    return table


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        hint: what to type if it does not.

    Raises:
        SSTError: it is missing or damaged, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint) from None
    if not isinstance(values, dict):
        raise SSTError(f"{path} is damaged: it holds no object", hint)
    return values


def unreadable(path: Path, error: Exception, hint: str) -> SSTError:
    """The error of a file that the system does not give, or that is not what it was."""
    if isinstance(error, FileNotFoundError):
        return SSTError(f"{path} is missing", hint)
    if isinstance(error, OSError) and error.strerror:
        return SSTError(f"{path} cannot be read: {error.strerror}", hint)
    said = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, KeyError):
        said = f"it lacks {said}"
    return SSTError(f"{path} is damaged: {said}", hint)


def check_place(folder: Path, hint: str = "give another folder") -> None:
    """Try whether files can be written into a folder, which need not exist yet. Nothing is left there.

    Raises:
        SSTError: they cannot.
    """
    try:
        near = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as error:
        raise SSTError(f"{folder} cannot be written: {error.strerror}", hint) from None


def check_output(path: Path, hint: str = "choose another file") -> None:
    """Try whether a file can be written that a person named. Nothing is left there.

    Raises:
        SSTError: it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise SSTError(f"cannot write {path}: it is a folder", hint)
    check_place(path.parent, hint)
