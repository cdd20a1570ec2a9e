"""What a reader wrote beside a run: the JSON file that the report exports and imports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sst_interp.errors import SSTError
from sst_interp.files import read_json
from sst_interp.tables import visible

PLACE = re.compile(r"(q=\d{1,9}|claim=[\w.-]{1,40})")
"""Where a note stands: a question by its index, or a claim."""
LONGEST, MOST = 20_000, 2_000
"""Characters of a note, and notes of a file, at most."""


def read_notes(file: Path, capture: str | None) -> dict[str, str]:
    """The notes of a file: place (`q=12`, `claim=C8`) -> text.

    Args:
        file: JSON with `of` (the capture that the notes are about), `run` and `notes`.
        capture: `content_hash` of the run that they are to stand beside; None takes any.

    Raises:
        SSTError: the file cannot be read, holds no notes, or is about another capture.
    """
    hint = 'export notes from a report: the button is under "Notes"'
    contents = read_json(file, hint)
    notes: Any = contents.get("notes")
    if not isinstance(notes, dict) or len(notes) > MOST:
        raise SSTError(f"{file} holds no notes", hint)
    for place, text in notes.items():
        if not PLACE.fullmatch(place) or not isinstance(text, str) or len(text) > LONGEST:
            raise SSTError(f"{file}: {visible(place)[:80]!r} is no note on a question or claim", hint)
    if capture is not None and contents.get("of") != capture:
        said = f"{file} is about another capture, of {visible(contents.get('run', 'a run'))[:80]}"
        raise SSTError(said, "choose the run that the notes are about")
    return {place: visible(text, lines=True) for place, text in notes.items()}
