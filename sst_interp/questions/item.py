"""What a question is: as its dataset has it (`Item`), and as a model is asked it (`Question`).

The texts are never part of a `repr`: a question in a traceback, a log line or a notebook's last line
shows its id and its gold answer only. For GPQA that is a promise to its authors. Where a text or its tokens
are a value of their own, they are a `Hidden`, `HiddenBytes` or `HiddenTokens`: a traceback with local
variables (pytest -l, IPython's Verbose) shows their size. What is made from
them (a part, a join, a tensor) is plain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["choice", "number"]


class Hidden(str):
    """Text that shows its length and not itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<text of {len(self)} characters>"


class HiddenBytes(bytes):
    """A file's contents that show their length and not themselves."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


class HiddenTokens(list[int]):
    """Token ids that show their number and not themselves: they decode to a text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} tokens>"


@dataclass(frozen=True)
class Item:
    """One record of a dataset, before it is put to a model."""

    id: str
    text: str = field(repr=False)
    choices: tuple[str, ...] = field(repr=False)
    """In the dataset's order; empty for a question whose answer is a number."""
    answer: int | str
    """Index into `choices`, or the number as the dataset writes it."""
    worked: str = field(default="", repr=False)
    """The worked answer, for a dataset that has one: what a training learns to write."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", Hidden(self.text))
        object.__setattr__(self, "choices", tuple(map(Hidden, self.choices)))
        object.__setattr__(self, "worked", Hidden(self.worked))


@dataclass(frozen=True)
class Question:
    """One question as it is asked."""

    id: str
    """The dataset's own record id."""
    prompt: str = field(repr=False)
    """The user's message; the chat template is applied by whoever generates."""
    gold: str
    """A letter, or a number in the form of `grading.canonical_number`."""
    kind: Kind
    n_choices: int
    """0 for a number."""
    choices: tuple[str, ...] = field(default=(), repr=False)
    """Their texts in the order asked; for `grading.grade`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", Hidden(self.prompt))
        object.__setattr__(self, "choices", tuple(map(Hidden, self.choices)))


@dataclass(frozen=True)
class QuestionSet:
    """Questions in dataset order, and where they came from."""

    name: str
    questions: tuple[Question, ...]
    restricted: bool
    """The text must not be logged, stored or published (GPQA)."""
    provenance: dict[str, Any]
    """JSON-ready: dataset, split, source, sha256, licence, n, available, seed, instruction."""

    def __len__(self) -> int:
        return len(self.questions)
