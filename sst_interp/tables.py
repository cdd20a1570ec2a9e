"""Tables and text as a terminal, a Markdown document or a page shows them."""

from __future__ import annotations

import io
import math
import re
import shutil
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sst_interp.errors import SSTError
from sst_interp.files import check_output, put_bytes, read_whole, replace_bytes

_INVISIBLE = {"Cc", "Cf", "Cs", "Cn", "Co"}
WIDE = 1 << 20
"""Columns of an output that is no terminal: no cell is longer."""


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys, under their keys, in columns; `none` if there are none.

    A terminal gets lines as wide as it is, cells wrapped; a file or pipe gets a line per row.
    """
    if not rows:
        print("none")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for key in rows[0]:
        table.add_column(Text(plain(key)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(value)) for value in row.values()))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
    drawn = io.StringIO()
    Console(file=drawn, width=width, color_system=None).print(table)
    say("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()))


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
    """One line of printable text: every other character shows as `?`."""
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


NOT_YET = "Not measured yet."


def fill(document: str | Path, blocks: Mapping[str, str], others: bool = False) -> list[str]:
    """Put each block between its comments (`<!-- end of NAME -->`); returns the names that have a place.

    Args:
        document: a text file, replaced in one step.
        blocks: name -> text.
        others: leave places alone that have no block.

    Raises:
        SSTError: it cannot be read, or has a place without a block.
    """
    document = Path(document)
    text = _text(document)
    names = [name for name in places(document) if name in blocks or not others]
    for name in names:
        if name not in blocks:
            raise SSTError(f"{document} asks for a table {name!r}", f"there are {', '.join(blocks)}")
        place = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)"
        block = blocks[name]
        text = re.sub(place, lambda m, b=block: f"{m[1]}\n{b}\n\n{m[2]}", text, flags=re.DOTALL)
    replace_bytes(document, text.encode())
    return names


def places(document: str | Path) -> list[str]:
    """The names that a document has a place for. Raises SSTError if it cannot be read."""
    return re.findall(r"<!-- end of (.+?) -->", _text(Path(document)))


def check_document(document: Path) -> None:
    """Raise SSTError if a document cannot be read, is not UTF-8, or cannot be written."""
    _text(document)
    check_output(document, "name a Markdown file")


def _text(document: Path) -> str:
    try:
        return read_whole(document).decode("utf-8")
    except OSError as error:
        raise SSTError(f"cannot read {document}: {error.strerror}", "name a Markdown file") from None
    except UnicodeDecodeError as error:
        raise SSTError(f"{document} is not UTF-8 (byte {error.start})", "name a Markdown file") from None


def markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; numbers keep three digits, and what is missing stays empty."""
    if not rows:
        return NOT_YET
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([cell(row[name]) for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """One cell: 3 digits, no numbers that are not finite, no end of the cell inside it."""
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else ""
    return str(value).replace("|", "\\|").replace("\n", " ")
