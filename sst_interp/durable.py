"""Files that are either the old one or the new one, whatever happens in between.

`stage` writes and flushes a hidden temporary file next to its destination, `publish` renames it into
place and flushes the folder entry. No link is followed on the way: one that was put where the temporary
file goes, or in the destination's place, is replaced, and what it points to stays. Nothing here knows what a
run is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

CHUNK = 1 << 20


def temporary(path: Path) -> Path:
    """Where `path` is staged: hidden, so that readers of a whole folder of Parquet do not see it."""
    return path.with_name(f".{path.name}.tmp")


def stage(path: Path, fill: Callable[[Path], object]) -> Path:
    """Let `fill` write the temporary file of `path`, flush it to the disk, and return where it is.

    Raises OSError, also for what the system told safetensors, which reports it in its own way; the temporary
    file is then gone.
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


def publish(path: Path) -> None:
    """Put the staged file of `path` in its place, and make the rename itself survive a power cut."""
    os.replace(temporary(path), path)
    sync(path.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace a small file: a reader, or a crash, finds the old contents or the new, never a mixture."""
    stage(path, lambda staged: staged.write_bytes(data))
    publish(path)


def replace_json(path: Path, value: Any) -> None:
    """`replace_bytes` of the canonical JSON of `value`: sorted keys, two spaces, a final newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    replace_bytes(path, text.encode() + b"\n")


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk. (Windows cannot open a folder: nothing to do.)"""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read a megabyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
