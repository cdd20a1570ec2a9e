"""GPQA, kept the way its authors ask: read in memory, never written anywhere, shown by record id only.

Sources, in this order: `gpqa:PATH` (the official `dataset.zip`, or a CSV out of it), the file that
`$SST_INTERP_GPQA` names, the gated hub dataset `Idavidrein/gpqa` with the user's own token. The
archive's password is the one its authors publish; it keeps the questions out of crawled text.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
from pathlib import Path

from sst_interp.errors import SSTError
from sst_interp.questions.question import Item

PASSWORD = b"deserted-untie-orchid"
HUB_NAME = "Idavidrein/gpqa"
SPLITS = ("diamond", "main", "extended")
COLUMNS = (
    "Record ID",
    "Question",
    "Correct Answer",
    "Incorrect Answer 1",
    "Incorrect Answer 2",
    "Incorrect Answer 3",
)
HOW_TO_GET = (
    f"accept the terms of {HUB_NAME} on the hub and type `hf auth login`, or download dataset.zip from the "
    "authors' repository and give dataset = 'gpqa:/path/to/dataset.zip' (or set SST_INTERP_GPQA to it)"
)


def read_gpqa(path: str | None = None, split: str = "diamond") -> tuple[list[Item], str, str]:
    """The items (right answer first: shuffle them), the CSV's sha256, and a word on the source.

    Raises:
        SSTError: no such file, not GPQA, or no access to the hub. Never names a question's text.
    """
    given = path or os.environ.get("SST_INTERP_GPQA")
    if given:
        file = Path(given).expanduser()
        if not file.is_file():
            named_by = "" if path else " (named by SST_INTERP_GPQA)"
            raise SSTError(f"no GPQA file at {file}{named_by}", HOW_TO_GET)
        data = _from_zip(file, split) if zipfile.is_zipfile(file) else file.read_bytes()
        source = f"file {file.name}"
    else:
        data, source = _from_hub(split), f"hub {HUB_NAME}"
    return _parse(data, source), hashlib.sha256(data).hexdigest(), source


def _from_zip(path: Path, split: str) -> bytes:
    member = f"dataset/gpqa_{split}.csv"
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member, pwd=PASSWORD)
    except KeyError as error:
        with zipfile.ZipFile(path) as archive:
            has = ", ".join(name for name in archive.namelist() if name.endswith(".csv")) or "no CSV"
        raise SSTError(f"{path.name} has no {member}; it has {has}", HOW_TO_GET) from error
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile, OSError) as error:
        # a wrong password is a RuntimeError, or looks like damage
        raise SSTError(
            f"{path.name} is damaged or is not the authors' archive: {error}", HOW_TO_GET
        ) from error


def _from_hub(split: str) -> bytes:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_NAME, f"gpqa_{split}.csv", repo_type="dataset")).read_bytes()
    except Exception as error:  # gated, no token, offline, proxy, ...: each a class of its own
        response = getattr(error, "response", None)
        code = f" {response.status_code}" if response is not None else ""
        raise SSTError(
            f"could not get {HUB_NAME} from the hub ({type(error).__name__}{code})", HOW_TO_GET
        ) from None


def _parse(data: bytes, source: str) -> list[Item]:
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error):
        # not chained: a decoding error carries the text
        raise SSTError(f"{source} is not a UTF-8 CSV file", HOW_TO_GET) from None
    found = list(rows[0]) if rows else []
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        raise SSTError(f"{source} is not GPQA: it has no column {', '.join(map(repr, missing))}", HOW_TO_GET)
    items = []
    for number, row in enumerate(rows, 1):
        key, text, *choices = ((row[column] or "").strip() for column in COLUMNS)
        if not (key and text and all(choices)):
            raise SSTError(f"{source}: record {key or number} has an empty question, choice or id")
        items.append(Item(key, text, tuple(choices), 0))
    return items
