"""The datasets that have names, and the one function that loads questions.

A named dataset is one file, here or a plugin's, with a reader under `@dataset`:

    @dataset("riddles", "twelve riddles", "CC0", splits=("test",))
    def riddles(split: str, path: str | None) -> Records:
        return Records(items, sha256, "file riddles.json")
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from sst_interp.errors import SSTError, unknown_name
from sst_interp.paths import user_path
from sst_interp.questions.files import Columns, read_file
from sst_interp.questions.item import Item, QuestionSet
from sst_interp.questions.prompts import INSTRUCTIONS, ask


class Records(NamedTuple):
    """What a reader finds."""

    items: list[Item]
    """In the dataset's own order."""
    sha256: str
    """Of the file they were read from."""
    source: str
    """Which file that was, in words that name no folder of this machine."""


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
    for module in pkgutil.iter_modules(
        import_module("sst_interp.questions").__path__, "sst_interp.questions."
    ):
        import_module(module.name)
    return _DATASETS


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
        dataset: a name of `known_datasets()`, the path of a `.csv` or `.jsonl` file, or `gpqa:PATH`.
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
    known = known_datasets().get(dataset.partition(":")[0])
    if known is not None and columns is not None:
        raise SSTError(f"dataset {dataset!r} has its own columns", "columns is for .csv and .jsonl files")
    items, provenance = _named(dataset, known, split) if known else _own_file(dataset, split, columns)
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
        raise SSTError(f"dataset {name!r}: only gpqa takes a path", "for example gpqa:/path/to/dataset.zip")
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
        raise unknown_name("dataset", dataset, [*known_datasets(), "FILE.csv", "FILE.jsonl", "gpqa:PATH"])
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
