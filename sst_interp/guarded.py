"""Files that were kept earlier, read so that a damaged one is named; and places, tried before the work.

What a hand, a full disk or a broken copy did to a file is found where it is read: the error names the file
and says what to type, whoever reads it. Outputs that a person names are tried before the work that fills
them; devices and pipes are written to and never replaced.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sst_interp.durable import replace_bytes
from sst_interp.errors import SSTError

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 1 << 30
"""Bytes that are read into memory at most, of a file that somebody made."""


def read_table(path: Path, hint: str, columns: Iterable[str] = ()) -> pd.DataFrame:
    """A Parquet file that holds at least `columns`.

    Args:
        hint: what to type if it does not.

    Raises:
        SSTError: it is missing or damaged, or holds something else.
    """
    import pandas as pd
    import pyarrow as pa

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
        values = from_json(read_whole(path))
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint) from None
    if not isinstance(values, dict):
        raise SSTError(f"{path} is damaged: it holds no object", hint)
    return values


def read_whole(path: Path, largest: int = LARGEST) -> bytes:
    """The bytes of an ordinary file. A pipe or device is not waited for.

    Raises:
        OSError: it cannot be read, is no ordinary file, or is larger than `largest` bytes.
    """

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        with open(path, "rb", opener=without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
            if about.st_size > largest:
                raise OSError(errno.EFBIG, f"it is larger than {largest >> 20} MB", str(path))
            return file.read(largest + 1)
    except ValueError:  # a NUL in the name
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from None


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for NaN, infinity and very deep nesting."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


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
        SSTError: it cannot: a folder, a place that does not exist or may not be written.
    """
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, "it is a folder")
        if written_through(path):
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        near = next(place for place in path.absolute().parents if place.exists())
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as error:
        raise SSTError(f"cannot write {path}: {error.strerror}", hint) from None


def put_bytes(path: Path, data: bytes) -> None:
    """Write a file that a person named, its folder too: a device or pipe is written to, anything else is
    replaced in one step. Raises OSError.
    """
    if written_through(path):
        with open(path, "wb") as file:
            file.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, data)


def written_through(path: Path) -> bool:
    """Whether what stands at a place must stay: a device, a pipe, or anything of the system's own folders
    (`/dev/stdout`, which may be a link to an ordinary file).
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    inside = Path(os.path.realpath(path.parent))
    systems = any(inside.is_relative_to(place) for place in ("/dev", "/proc", "/sys"))
    return systems or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
