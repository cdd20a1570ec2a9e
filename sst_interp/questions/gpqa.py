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
import zlib
from pathlib import Path

from sst_interp.errors import SSTError
from sst_interp.files import read_whole
from sst_interp.paths import user_path
from sst_interp.questions.datasets import Records, dataset
from sst_interp.questions.item import Hidden, HiddenBytes, Item

PASSWORD = b"deserted-untie-orchid"
LARGEST = 64 << 20  # bytes of the archive, and of a CSV in it: the largest of the authors' has 4 MB
HUB_NAME = "Idavidrein/gpqa"
SPLITS = ("diamond", "main", "extended")
COLUMNS = ("Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
HOW_TO_GET = (
    f"accept the terms of {HUB_NAME} on the hub and type `hf auth login`, or download dataset.zip from the "
    "authors' repository and give dataset = 'gpqa:/path/to/dataset.zip' (or set SST_INTERP_GPQA to it)"
)


@dataset(
    "gpqa",
    "graduate-level science, restricted: its text is never stored or shown",
    "CC BY 4.0",
    SPLITS,
    restricted=True,
    takes_path=True,
)
def read_gpqa(split: str = "diamond", path: str | None = None) -> Records:
    """The records; the right answer comes first in each, so shuffle them.

    Raises:
        SSTError: no such file, not GPQA, or no access to the hub. It never quotes a question.
    """
    given = path or os.environ.get("SST_INTERP_GPQA")
    if given:
        file = user_path(given)
        if not file.is_file():
            named_by = "" if path else " (named by SST_INTERP_GPQA)"
            raise SSTError(f"no GPQA file at {file}{named_by}", HOW_TO_GET)
        data = _from_zip(file, split) if zipfile.is_zipfile(file) else _from_file(file)
        source = f"file {file.name}"
    else:
        data, source = _from_hub(split), f"hub {HUB_NAME}"
    return Records(_parse(data, source), hashlib.sha256(data).hexdigest(), source)


def _from_file(path: Path) -> HiddenBytes:
    try:
        return HiddenBytes(read_whole(path, LARGEST))
    except OSError as error:
        raise SSTError(f"cannot read {path}: {error.strerror}", HOW_TO_GET) from None


def _from_zip(path: Path, split: str) -> HiddenBytes:
    member = f"dataset/gpqa_{split}.csv"
    try:
        if path.stat().st_size > LARGEST:
            raise OSError(f"it is larger than {LARGEST >> 20} MB")
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".csv")]
            if member not in names:
                shown = ", ".join(names[:10]) or "no CSV"
                raise SSTError(f"{path.name} has no {member}; it has {shown}", HOW_TO_GET)
            with archive.open(member, pwd=PASSWORD) as packed:
                data = HiddenBytes(packed.read(LARGEST + 1))
            if len(data) > LARGEST:
                raise OSError(f"{member} is larger than {LARGEST >> 20} MB")
            return data
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        # a wrong password is a RuntimeError, or looks like damage
        said = f"{path.name} is damaged or is not the authors' archive: {error}"
        raise SSTError(said, HOW_TO_GET) from None


def _from_hub(split: str) -> HiddenBytes:
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(HUB_NAME, f"gpqa_{split}.csv", repo_type="dataset"))
        return HiddenBytes(read_whole(file, LARGEST))
    except Exception as error:  # gated, no token, offline, proxy, ...: each a class of its own
        response = getattr(error, "response", None)
        code = f" {response.status_code}" if response is not None else ""
        said = f"could not get {HUB_NAME} from the hub ({type(error).__name__}{code})"
        raise SSTError(said, HOW_TO_GET) from None


def _parse(data: HiddenBytes, source: str) -> list[Item]:
    items: list[Item] = []
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        names = [Hidden(name) for name in next(rows, [])]
        if missing := [column for column in COLUMNS if column not in names]:
            shown = ", ".join(map(repr, missing))
            raise SSTError(f"{source} is not GPQA: it has no column {shown}", HOW_TO_GET)
        places = [names.index(Hidden(column)) for column in COLUMNS]
        hidden = ([Hidden(cell.strip()) for cell in row] for row in rows if row)
        for number, row in enumerate(hidden, 1):
            if max(places) >= len(row) or not all(row[place] for place in places):
                raise SSTError(f"{source}: record {number} has an empty question, choice or id")
            items.append(Item(str(row[places[0]]), row[places[1]], tuple(row[p] for p in places[2:]), 0))
    except (UnicodeDecodeError, csv.Error):
        # not chained: a decoding error carries the text
        raise SSTError(f"{source} is not a UTF-8 CSV file", HOW_TO_GET) from None
    return items
