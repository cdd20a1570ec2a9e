"""What the commands print and write: plain tables and text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sst_interp.errors import SSTError


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys, under their keys, in columns; `none` if there are none."""
    if not rows:
        print("none")
        return
    cells = [[str(key) for key in rows[0]], *[[plain(v) for v in row.values()] for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def plain(value: Any) -> str:
    """One line of printable text, whatever a folder is called."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def write_text(path: Path, text: str) -> None:
    """Write a text file, its folder too. Raises SSTError if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SSTError(f"cannot write {path}: {error.strerror}", "choose another file") from None
