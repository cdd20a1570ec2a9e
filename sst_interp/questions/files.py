"""The user's own questions: a CSV or JSONL file.

    id,question,A,B,C,answer          choices in columns A, B, ... or choice_1, choice_2, ...
    q1,Which is a metal?,tin,wood,ice,A

    {"question": "Which is a metal?", "choices": ["tin", "wood"], "answer": "tin"}

In a CSV, one column `choices` may hold a JSON list or texts separated by `|`. Without choices the answer
is a number, or a worked answer that ends in `#### 72`. The answer to choices is a letter or the exact text of
one; `id` defaults to the row number.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from sst_interp.errors import SSTError
from sst_interp.files import from_json, read_whole
from sst_interp.questions.item import Hidden, HiddenBytes, Item

NEEDED = (
    "it needs `question` and `answer`, and for multiple choice `A`, `B`, ... or `choice_1`, ... or `choices`"
    "; a CSV names them in its first line"
)
USUAL = (
    r"[a-z]|id|index|question|prompt|text|query|answers?|choices|options|choice_\d+|option_?\d+|opt_?\d+"
    r"|label|solution|target|gold|key|correct|explanation|subject|category|source|difficulty"
)
"""Column names that an error may show: a word of a question would not be among them."""
LARGEST = 512 << 20
"""Bytes of a file of questions at most."""
Columns = Mapping[str, str | list[str]]


def read_file(path: Path, columns: Columns | None = None) -> tuple[list[Item], str]:
    """The items in file order, and the file's sha256.

    Args:
        path: a `.csv` or `.jsonl` file in UTF-8.
        columns: where the file uses other names: `{"question": "Prompt", "choices": ["opt1", "opt2"]}`.

    Raises:
        SSTError: names the file and the row, line or column that is wrong, and never what stands in a cell:
            it may be a text that must not be shown, and a file without a header has one in its first line.
    """
    try:
        data = HiddenBytes(read_whole(path, LARGEST))
        text = Hidden(data.decode("utf-8-sig"))
    except OSError as error:
        raise SSTError(
            f"cannot read {path}: {error.strerror}", "give the path of a .csv or .jsonl file"
        ) from error
    except UnicodeDecodeError as error:
        raise SSTError(f"{path.name} is not UTF-8 (byte {error.start})", "save it again as UTF-8") from None
    rows = _jsonl(path.name, text) if path.suffix == ".jsonl" else _csv(path.name, text)
    if not rows:
        raise SSTError(f"{path.name} has no questions", NEEDED)
    return [_item(where, row, columns or {}, i) for i, (where, row) in enumerate(rows, 1)], hashlib.sha256(
        data
    ).hexdigest()


def _csv(name: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise SSTError(f"{name} line 1 names a column twice", "give each column a name of its own")
        for row in reader:
            where = f"{name} line {reader.line_num}"
            if None in row:
                raise SSTError(f"{where} has more cells than the header", "put cells with commas in quotes")
            rows.append((where, _hidden(row)))
    except csv.Error as error:
        raise SSTError(f"{name} line {reader.line_num} is not CSV: {error}") from None
    return rows


def _jsonl(name: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(map(Hidden, text.split("\n")), 1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except ValueError as error:
            raise SSTError(f"{name} line {number} is not JSON: {error}", "one JSON object per line") from None
        if not isinstance(row, dict):
            raise SSTError(f"{name} line {number} is not a JSON object", "one JSON object per line")
        rows.append((f"{name} line {number}", _hidden(row)))
    return rows


def _hidden(row: dict[str, Any]) -> dict[str, Any]:
    return {name: Hidden(cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _item(where: str, row: dict[str, Any], columns: Columns, number: int) -> Item:
    if {"Canary String", "Incorrect Answer 1"} & set(row):
        raise SSTError(
            f"{where}: these are GPQA's columns", "give dataset = 'gpqa:PATH', so that no text is stored"
        )

    def cell(name: str) -> str:
        value = row.get(str(columns.get(name, name)))
        if isinstance(value, dict | list | bool):
            raise SSTError(f"{where}: {columns.get(name, name)!r} is not a text", 'for example "Which?"')
        return "" if value is None else str(value).strip()

    if any(map(_broken, row.values())):
        raise SSTError(
            f"{where} holds half a character (a lone surrogate)", "write that character as a whole"
        )
    for name in ("question", "answer"):
        if columns.get(name, name) not in row:
            raise SSTError(f"{where} has no {columns.get(name, name)!r}{_shown(row)}", NEEDED)
        if not cell(name):
            raise SSTError(f"{where} has an empty {columns.get(name, name)!r}")
    choices = _choices(where, row, columns)
    if not choices:
        worked, hashes, short = cell("answer").rpartition("####")  # as GSM8K writes it
        answer = short.strip() if hashes and worked else cell("answer")
        return Item(cell("id") or str(number), cell("question"), (), answer, cell("answer"))
    if len(choices) < 2:
        raise SSTError(f"{where} has a single choice", "give two or more, or none for a number")
    answer = _index(where, cell("answer"), choices)
    return Item(cell("id") or str(number), cell("question"), tuple(text for _, text in choices), answer)


def _choices(where: str, row: dict[str, Any], columns: Columns) -> list[tuple[str, str]]:
    """`(label, text)` of every choice that is not empty; the label is what an answer letter refers to."""
    named = columns.get("choices", "choices")
    if isinstance(named, str) and named in row:
        value = row[named]
        if isinstance(value, str):
            value = _json_list(value) or (value.split("|") if value.strip() else [])
        if value is None:
            value = []
        if not isinstance(value, list) or any(isinstance(v, dict | list | bool | None) for v in value):
            raise SSTError(
                f"{where}: {named!r} is not a list of texts", 'for example ["tin", "wood"] or tin|wood'
            )
        texts = [str(v) for v in value]
    elif isinstance(named, list) or "choices" in columns:
        names = [named] if isinstance(named, str) else named
        missing = [name for name in names if name not in row]
        if missing:
            raise SSTError(f"{where} has no {missing[0]!r}{_shown(row)}", NEEDED)
        texts = [row[name] or "" for name in names]
    else:
        numbered = sorted((n for n in row if re.fullmatch(r"choice_\d+", n)), key=lambda n: int(n[7:]))
        texts = [str(row[name] or "") for name in (numbered or [n for n in ascii_uppercase if n in row])]
    if len(texts) > len(ascii_uppercase):
        raise SSTError(f"{where} has {len(texts)} choices; at most 26 can be lettered")
    return [(a, str(t).strip()) for a, t in zip(ascii_uppercase, texts, strict=False) if str(t).strip()]


def _shown(row: Mapping[str, Any]) -> str:
    """The columns of a row, as far as they are names that columns usually have."""
    usual = [name for name in row if re.fullmatch(USUAL, str(name), re.IGNORECASE)]
    others = f"{len(row) - len(usual)} other columns" if len(row) > len(usual) else ""
    return f"; it has {', '.join([*usual, *([others] if others else [])])}" if row else ""


def _broken(value: Any) -> bool:
    """Whether a text, or one in a list, cannot be written as UTF-8."""
    if isinstance(value, list):
        return any(map(_broken, value))
    return isinstance(value, str) and value != value.encode(errors="replace").decode()


def _json_list(value: str) -> list[Any] | None:
    try:
        parsed = from_json(value)
    except ValueError:
        return None
    return parsed if isinstance(parsed, list) else None


def _index(where: str, answer: str, choices: list[tuple[str, str]]) -> int:
    """Which choice an answer names, by letter or by its text."""
    by_letter = [i for i, (label, _) in enumerate(choices) if label == answer]
    by_text = [i for i, (_, text) in enumerate(choices) if text == answer]
    named = set(by_letter) | set(by_text)
    if len(named) != 1:
        wrong = "names more than one of its choices" if named else "is not one of its choices"
        raise SSTError(f"{where}: the answer {wrong}", "give a letter, or the exact text of a choice")
    return named.pop()
