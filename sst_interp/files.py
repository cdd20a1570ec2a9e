"""Files: written so that a crash leaves the old one or the new, read so that a damaged one is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sst_interp.errors import SSTError

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 1 << 30
"""Bytes of a file of somebody's that are read into memory at most."""


def temporary(path: Path) -> Path:
    """Where `path` is staged: a hidden file, which readers of a folder of Parquet skip."""
    return path.with_name(f".{path.name}.tmp")


def stage(path: Path, fill: Callable[[Path], object]) -> Path:
    """Let `fill` write the temporary file of `path`, flush it to the disk, and return where it is.

    Raises:
        OSError: also where safetensors reports it in its own way. The temporary file is then gone.
    """
    staged = temporary(path)
    staged.unlink(missing_ok=True)
    create(staged)
    try:
        fill(staged)
        sync(staged)
    except SafetensorError as error:
        staged.unlink(missing_ok=True)
        code = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if code is None:
            raise
        number = int(code[1] or code[2])
        raise OSError(number, os.strerror(number), str(path)) from error
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return staged


def create(path: Path, data: bytes = b"") -> None:
    """Write a file that is not there yet. Raises FileExistsError if anything is there, a link too."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb") as file:
        file.write(data)


def put_in_place(path: Path) -> None:
    """Put the staged file of `path` in its place, and make the rename itself survive a power cut."""
    os.replace(temporary(path), path)
    sync(path.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace a small file in one step."""
    stage(path, lambda staged: staged.write_bytes(data))
    put_in_place(path)


def replace_json(path: Path, value: Any) -> None:
    """`replace_bytes` of the canonical JSON of `value`: sorted keys, two spaces, a final newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    replace_bytes(path, text.encode() + b"\n")


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_table(path: Path, hint: str, columns: Iterable[str] = ()) -> pd.DataFrame:
    """A Parquet file that holds at least `columns`; `hint` says what to type if it does not.

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
    """A JSON file that holds an object; `hint` says what to type if it does not.

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
    """The error of a file that cannot be read or is damaged."""
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
        _try(folder)
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
        _try(path.absolute().parent)
    except OSError as error:
        raise SSTError(f"cannot write {path}: {error.strerror}", hint) from None


def _try(folder: Path) -> None:
    near = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=near):
        pass


def put_bytes(path: Path, data: bytes) -> None:
    """Write a file that a person named, its folder too; a device or pipe is written to and not replaced."""
    if written_through(path):
        with open(path, "wb") as file:
            file.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, data)


def written_through(path: Path) -> bool:
    """Whether a file must stay: a device, a pipe, or one of the system's (`/dev/stdout` may be a link)."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    inside = Path(os.path.realpath(path.parent))
    systems = any(inside.is_relative_to(place) for place in ("/dev", "/proc", "/sys"))
    return systems or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
