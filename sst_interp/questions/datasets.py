"""Loading questions: datasets that have names, the Hugging Face hub's, the user's own CSV and JSONL files.

A named dataset is one file, here or a plugin's, with a reader under `@dataset`:

    @dataset("riddles", "twelve riddles", "CC0", splits=("test",))
    def riddles(split: str, path: str | None) -> Records:
        return Records(items, sha256, "file riddles.json")
"""

from __future__ import annotations

import csv
import hashlib
import io
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple, TypeVar

from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import from_json, read_whole
from sst_interp.paths import user_path
from sst_interp.questions.item import (
    INSTRUCTIONS,
    LIKELIHOOD,
    Hidden,
    HiddenBytes,
    Item,
    QuestionSet,
    ask,
)
from sst_interp.questions.scoring import check_scoring


class Records(NamedTuple):
    """Items in the dataset's own order, the sha256 of their file, and its name in words without a folder."""

    items: list[Item]
    sha256: str
    source: str


Reader = Callable[[str, str | None], Records]
"""(split, path or None) -> its records. Raises SSTError that names the record, and never its text."""


@dataclass(frozen=True)
class Dataset:
    """A dataset with a name."""

    name: str
    read: Reader
    about: str
    licence: str
    splits: tuple[str, ...]
    """The first is the default."""
    restricted: bool = False
    """Its text must not be published: no token id is recorded, and only record ids are shown."""
    takes_path: bool = False
    """`NAME:PATH` names the file to read."""


_DATASETS: dict[str, Dataset] = {}
R = TypeVar("R", bound=Reader)


def dataset(name: str, about: str, licence: str, splits: Sequence[str], **how: bool) -> Callable[[R], R]:
    """Register a reader as the dataset of that name; `how` may say `restricted` and `takes_path`.

    Raises:
        SSTError: if another reader has the name.
    """

    def register(read: R) -> R:
        known = _DATASETS.get(name)
        if known is not None and known.read.__module__ != read.__module__:
            raise SSTError(
                f"two datasets are called {name!r}: of {known.read.__module__} and {read.__module__}",
                "give one of them another name",
            )
        _DATASETS[name] = Dataset(name, read, about, licence, tuple(splits), **how)
        return read

    return register


def known_datasets() -> dict[str, Dataset]:
    """Every named dataset, after importing every module beside this one."""
    for module in pkgutil.iter_modules(import_module("sst_interp.questions").__path__):
        import_module(f"sst_interp.questions.{module.name}")
    return _DATASETS


def load_questions(
    dataset: str,
    n: int | None = None,
    seed: int = 0,
    split: str | None = None,
    columns: Columns | None = None,
    instruction: str | None = None,
    scoring: str | None = None,
) -> QuestionSet:
    """The first `n` questions of a dataset, in its own order.

    Args:
        dataset: a name of `known_datasets()`, the path of a `.csv` or `.jsonl` file, `gpqa:PATH`, or
            `hf:OWNER/NAME:CONFIGURATION` of the Hugging Face hub (`read_hub`).
        n: how many; None for all.
        seed: of the order of the choices, per question by its id.
        split: one of the dataset's; None for the first it lists (of the hub: `test`).
        columns: for a file or a hub dataset that uses other column names, see `read_file`.
        instruction: replaces the default of `item.INSTRUCTIONS`.
        scoring: how answers are graded (`sst_interp.questions.scoring`); None: by the kind of question.

    Raises:
        SSTError: there is no such dataset, split or scoring, or not so many questions; a file is not as
            described.
    """
    if n is not None and n < 1:
        raise SSTError(f"cannot ask {n} questions", "give a number from 1 up, or none for all")
    known = known_datasets().get(dataset.partition(":")[0])
    check_scoring(scoring)
    if instruction and scoring in LIKELIHOOD:
        raise SSTError("scored by likelihood, a question is asked without an instruction", "leave it out")
    if known is not None and columns is not None:
        hint = "columns is for .csv and .jsonl files and for hf: datasets"
        raise SSTError(f"dataset {dataset!r} has its own columns", hint)
    if dataset.startswith(HUB):
        items, provenance = _of_hub(dataset, split, columns)
    else:
        items, provenance = _named(dataset, known, split) if known else _own_file(dataset, split, columns)
    _check_ids(dataset, items)
    if not items:
        raise SSTError(f"dataset {dataset!r} has no questions")
    if n is not None and n > len(items):
        said = f"dataset {dataset!r} has {len(items)} questions, not {n}"
        raise SSTError(said, f"give {len(items)} or fewer")
    restricted = known is not None and known.restricted
    questions = tuple(ask(item, seed, instruction, not restricted, scoring) for item in items[:n])
    kinds = sorted({question.kind for question in questions})
    provenance |= {
        "n": len(questions),
        "available": len(items),
        "seed": seed,
        "instruction": {}
        if scoring in LIKELIHOOD
        else {
            kind: next((t for t in (instruction, items[0].instruction) if t is not None), INSTRUCTIONS[kind])
            for kind in kinds
        },
    }
    if scoring is not None:
        provenance["scoring"] = scoring
    return QuestionSet(provenance["dataset"], questions, restricted, provenance)


def load_items(name: str, split: str | None = None) -> tuple[list[Item], dict[str, Any]]:
    """The records of a dataset that has a name, as it has them, and their provenance.

    Raises:
        SSTError: unknown name or split.
    """
    known = known_datasets().get(name.partition(":")[0])
    if known is None:
        raise unknown_name("dataset", name, known_datasets())
    return _named(name, known, split)


def _named(name: str, known: Dataset, split: str | None) -> tuple[list[Item], dict[str, Any]]:
    _, has_path, path = name.partition(":")
    if has_path and not (known.takes_path and path):
        raise SSTError(
            f"dataset {name!r}: {known.name} takes nothing after the colon", f"dataset = {known.name!r}"
        )
    split = split or known.splits[0]
    if split not in known.splits:
        raise unknown_name(f"split of {known.name}", split, known.splits)
    items, sha256, source = known.read(split, path or None)
    about = {"dataset": known.name, "split": split, "source": source}
    return items, about | {"sha256": sha256, "licence": known.licence}


def _own_file(dataset: str, split: str | None, columns: Columns | None) -> tuple[list[Item], dict[str, Any]]:
    path = user_path(dataset)
    if path.suffix not in (".csv", ".jsonl"):
        if path.exists():
            raise SSTError(f"{dataset} is neither .csv nor .jsonl", "GPQA's archive is given as gpqa:PATH")
        other = ("FILE.csv", "FILE.jsonl", "gpqa:PATH", "hf:OWNER/NAME:CONFIGURATION")
        raise unknown_name("dataset", dataset, [*known_datasets(), *other])
    if split is not None:
        raise SSTError(f"{path.name} has no splits", "leave split out")
    items, sha256 = read_file(path, columns)
    about = {"dataset": path.stem, "split": None, "source": f"file {path.name}"}
    return items, about | {"sha256": sha256, "licence": None}


def _check_ids(dataset: str, items: list[Item]) -> None:
    seen: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        if (first := seen.setdefault(item.id, number)) != number:
            said = f"dataset {dataset!r} has two questions with one id: numbers {first} and {number}"
            raise SSTError(said, "make the ids unique")


HUB, DEFAULT = "hf:", "default"
"""The prefix of a dataset of the hub, and the configuration of one that has no other."""
CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps every public dataset as CONFIGURATION/SPLIT/0000.parquet."""


def _of_hub(dataset: str, split: str | None, columns: Columns | None) -> tuple[list[Item], dict[str, Any]]:
    name, _, configuration = dataset.removeprefix(HUB).partition(":")
    split = split or "test"
    items, digest, source = read_hub(name, configuration or DEFAULT, split, columns or {})
    about = {"dataset": f"{HUB}{name}", "split": split, "source": source}
    return items, about | {"sha256": digest, "licence": None}


def read_hub(name: str, configuration: str, split: str, columns: Columns) -> tuple[list[Item], str, str]:
    """A dataset of the Hugging Face hub, from its Parquet files: nothing of it is run.

    The columns are those of `read_file`. A column inside a column is named with a dot (`choices.text`).
    Choices with labels beside them (`{"text": [...], "label": [...]}`, as ARC has them) are told by their
    labels; an answer that is a whole number counts the choices from 0.

    Args:
        name: OWNER/NAME, or a folder (`./NAME`) that is laid out like one: CONFIGURATION/SPLIT/*.parquet, or
            CONFIGURATION/SPLIT-*.parquet.
        configuration: of the dataset.

    Returns:
        (items, sha256 of the files, their source in words).

    Raises:
        SSTError: it cannot be had (offline, gated, no such name), or has no such configuration or split.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    local = name.startswith((".", "/", "~"))
    folder = user_path(name) if local else _from_hub(name, configuration, split)
    files = _parquet_files(folder, configuration, split)
    if not files:
        there = sorted({str(path.relative_to(folder)) for path in folder.rglob("*.parquet")})
        said = f"{name} has no Parquet files of configuration {configuration!r}, split {split!r}"
        hint = f"it has {', '.join(there[:10])}" if there else "its page on the hub lists what it has"
        raise SSTError(said, f'{hint}; a dataset is hf:OWNER/NAME:CONFIGURATION, with split = "test"')
    digest, rows = hashlib.sha256(), []
    for path in files:
        try:
            digest.update(read_whole(path, LARGEST))
            rows += pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            said = f"cannot read {path.name} of {name}: {type(error).__name__}"
            raise SSTError(said, "fetch it again") from None
    short = Path(name).name if local else name
    where = f"{short} {configuration} {split} row"
    items = [_item(f"{where} {i}", _flat(row, columns), columns, i) for i, row in enumerate(rows, 1)]
    return items, digest.hexdigest(), f"{'folder' if local else 'hub'} {short} {configuration}"


def _from_hub(name: str, configuration: str, split: str) -> Path:
    """The folder that the hub's cache keeps these files in, after fetching what is missing."""
    from huggingface_hub import snapshot_download

    wanted = [f"{configuration}/{split}/*.parquet", f"{configuration}/{split}-*.parquet"]
    error: Exception | None = None
    for revision in (CONVERTED, "main"):
        try:
            folder = Path(
                snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted)
            )
        except Exception as raised:  # gated, no token, offline, no such name: each a class of its own
            error = error or raised
            continue
        if _parquet_files(folder, configuration, split) or revision == "main":
            return folder
    response = getattr(error, "response", None)
    code = f" {response.status_code}" if response is not None else ""
    said = f"could not get {name} from the hub ({type(error).__name__}{code})"
    hint = (
        "check the name and the connection, or download its Parquet files and give hf:./FOLDER:CONFIGURATION"
    )
    raise SSTError(said, hint)


def _parquet_files(folder: Path, configuration: str, split: str) -> list[Path]:
    """The files of a split in the first place that has any; without a configuration, `data/` is one."""
    places = [configuration, *(["data", "."] if configuration == DEFAULT else [])]
    patterns = (f"{split}/*.parquet", f"{split}-*.parquet", f"{split}.parquet")
    tried = (sorted((folder / place).glob(pattern)) for place in places for pattern in patterns)
    return next((files for files in tried if files), [])


def _flat(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """A row of the hub as a file would have it: no column inside a column, an answer by letter or text."""
    flat = _hidden(row)
    for name, cell in row.items():
        if isinstance(cell, dict):
            flat |= {f"{name}.{part}": value for part, value in _hidden(cell).items()}
    choices, answer = columns.get("choices", "choices"), str(columns.get("answer", "answer"))
    texts: Any = choices if isinstance(choices, list) else row.get(choices)
    labels: list[str] = []
    if isinstance(texts, dict) and {"text", "label"} <= texts.keys():
        labels = [str(label) for label in texts["label"]]
        flat[str(choices)] = texts = texts["text"]
    said = flat.get(answer)
    if str(said) in labels:
        flat[answer] = ascii_uppercase[labels.index(str(said))]
    elif isinstance(texts, list) and type(said) is int and 0 <= said < len(texts):
        flat[answer] = ascii_uppercase[said]
    return flat


NEEDED = (
    "it needs `question` and `answer`, and for multiple choice `A`, `B`, ... or `choice_1`, ... or `choices`"
    "; a CSV names them in its first line"
)
USUAL = (
    r"[a-z]|id|index|question|prompt|text|query|answers?|choices|options|choice_\d+|option_?\d+|opt_?\d+"
    r"|label|solution|target|gold|key|correct|explanation|subject|category|source|difficulty"
)
"""Column names that an error may show: a word of a question would not be among them."""
LARGEST = 512 << 20  # bytes of a file of questions
Columns = Mapping[str, str | list[str]]


def read_file(path: Path, columns: Columns | None = None) -> tuple[list[Item], str]:
    """The user's own questions in file order, and the file's sha256.

        id,question,A,B,C,answer          choices in columns A, B, ... or choice_1, choice_2, ...
        q1,Which is a metal?,tin,wood,ice,A

        {"question": "Which is a metal?", "choices": ["tin", "wood"], "answer": "tin"}

    In a CSV, a column `choices` may hold a JSON list or texts separated by `|`. The answer is the letter or
    the exact text of a choice; without choices a number, or a worked answer that ends in `#### 72`. `id`
    defaults to the row number.

    Args:
        path: a `.csv` or `.jsonl` file in UTF-8.
        columns: where the file uses other names: `{"question": "Prompt", "choices": ["opt1", "opt2"]}`.

    Raises:
        SSTError: names the file and the row, line or column that is wrong, never what stands in a cell, which
            may be a text that must not be shown.
    """
    try:
        data = HiddenBytes(read_whole(path, LARGEST))
        text = Hidden(data.decode("utf-8-sig"))
    except OSError as error:
        hint = "give the path of a .csv or .jsonl file"
        raise SSTError(f"cannot read {path}: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise SSTError(f"{path.name} is not UTF-8 (byte {error.start})", "save it again as UTF-8") from None
    rows = _jsonl(path.name, text) if path.suffix == ".jsonl" else _csv(path.name, text)
    if not rows:
        raise SSTError(f"{path.name} has no questions", NEEDED)
    items = [_item(where, row, columns or {}, i) for i, (where, row) in enumerate(rows, 1)]
    return items, hashlib.sha256(data).hexdigest()


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
        hint = "give dataset = 'gpqa:PATH', so that no text is stored"
        raise SSTError(f"{where}: these are GPQA's columns", hint)

    def cell(name: str) -> str:
        value = row.get(str(columns.get(name, name)))
        if isinstance(value, dict | list | bool):
            raise SSTError(f"{where}: {columns.get(name, name)!r} is not a text", 'for example "Which?"')
        return "" if value is None else str(value).strip()

    if any(map(_broken, row.values())):
        said = f"{where} holds half a character (a lone surrogate)"
        raise SSTError(said, "write that character as a whole")
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
        value = [] if value is None else value
        if not isinstance(value, list) or any(isinstance(v, dict | list | bool | None) for v in value):
            hint = 'for example ["tin", "wood"] or tin|wood'
            raise SSTError(f"{where}: {named!r} is not a list of texts", hint)
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
