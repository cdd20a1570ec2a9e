"""What the commands print and write: plain tables, lines, progress bars and text files.

Text from data (ids, folder names, verdicts of kept findings) may hold anything. Whatever goes to a terminal
goes through `say`, `print_table` or `bar`, which let no control character, escape or bidi mark through.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path
from typing import Any, TextIO

from sst_interp.errors import SSTError
from sst_interp.guarded import put_bytes

_INVISIBLE = {"Cc", "Cf", "Cs", "Cn", "Co"}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys, under their keys, in columns; `none` if there are none."""
    if not rows:
        print("none")
        return
    cells = [[plain(key) for key in rows[0]], *[[plain(v) for v in row.values()] for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    for row in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say(text: object = "", file: TextIO | None = None) -> None:
    """Print text, line by line, each one `plain`. `file` is stdout when left out."""
    file = file or sys.stdout
    shown = "\n".join(map(plain, str(text).split("\n")))
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "replace").decode(encoding), file=file)


def bar(desc: str, **options: Any) -> Any:
    """A progress bar on stderr whose words are `plain`; the options are tqdm's."""
    from tqdm import tqdm

    class Bar(tqdm):
        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            super().set_postfix_str(plain(s), refresh)

    return Bar(desc=plain(desc), **options)


def plain(value: object) -> str:
    """One line of printable text, whatever a folder is called: everything else shows as `?`."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def visible(text: object, lines: bool = False) -> str:
    r"""Text in which control, bidi and unassigned characters show as `\u202e`; `lines` keeps newlines."""
    text = str(text)
    if text.isprintable():
        return text

    def show(c: str) -> str:
        if (lines and c in "\n\t") or unicodedata.category(c) not in _INVISIBLE:
            return c
        return f"\\u{ord(c):04x}"

    return "".join(map(show, text))


def visible_texts(value: Any) -> Any:
    """JSON-ready values with every text in them, keys too, made `visible`; newlines stay."""
    if isinstance(value, str):
        return visible(value, lines=True)
    if isinstance(value, dict):
        return {visible_texts(key): visible_texts(entry) for key, entry in value.items()}
    return [visible_texts(entry) for entry in value] if isinstance(value, list) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file, its folder too. Raises SSTError if that is not possible."""
    try:
        put_bytes(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise SSTError(f"cannot write {path}: {error.strerror}", "choose another file") from None
