"""Documents whose tables are written by the tool that measured them: no number in them is typed in.

A table stands between two comments, `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sst_interp.durable import replace_bytes
from sst_interp.errors import SSTError
from sst_interp.guarded import check_output, read_whole

NOT_YET = "Not measured yet."


def fill(document: str | Path, blocks: Mapping[str, str], others: bool = False) -> list[str]:
    """Put each block between its comments; returns the names the document has a place for.

    Args:
        document: a text file with comments, replaced in one step.
        blocks: name -> text.
        others: leave places alone that there is no block for.

    Raises:
        SSTError: it cannot be read, or names a block that there is none of.
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
    """The names that a document has a place for.

    Raises:
        SSTError: it cannot be read.
    """
    return re.findall(r"<!-- end of (.+?) -->", _text(Path(document)))


def check_document(document: Path) -> None:
    """Try whether a document can be filled.

    Raises:
        SSTError: it cannot be read, is not UTF-8, or cannot be written.
    """
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
