"""What every analysis returns: a table, a figure and one computed sentence.

A result is a frozen dataclass. The command line prints its verdict and table, the report draws its
figures, a notebook shows it as HTML: all from the same object.
"""

from __future__ import annotations

import html
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.statistics.bootstrap import questions_words
from sst_interp.errors import SSTError


class Result(ABC):
    """A finding: `table`, `verdict`, `figure()`. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def table(self) -> pd.DataFrame:
        """The numbers, one row per thing compared."""
        ...

    @property
    @abstractmethod
    def verdict(self) -> str:
        """One sentence, computed from the numbers."""
        ...

    @abstractmethod
    def figure(self) -> go.Figure:
        """The one figure that shows the finding."""

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return type(self).__name__

    def figures(self) -> dict[str, go.Figure]:
        """Every figure of this result by name; by default the one."""
        return {"figure": self.figure()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the verdict, the table's rows, and every field (NaN and infinities as None)."""
        own = {f.name: getattr(self, f.name) for f in fields(self)} if is_dataclass(self) else {}
        return json_ready(
            {"result": type(self).__name__, "verdict": self.verdict, "table": self.table, **own}
        )

    def _repr_html_(self) -> str:
        table = table_html(self.table)
        return f"<h3>{html.escape(self.title)}</h3><p>{html.escape(self.verdict)}</p>{table}"


@dataclass(frozen=True, eq=False)
class Compared(Result):
    """A result about one comparison of a run, at one pair of depths."""

    named: ClassVar[str]
    """What the title begins with."""
    shown: ClassVar[str]
    """The field that is the table."""
    comparison: str
    a: int
    b: int
    """Depths or iterations that are compared."""
    n_questions: int

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return pair_words(self.comparison, self.a, self.b)

    @property
    def title(self) -> str:
        """What was compared."""
        return f"{self.named}: {self.words}"

    @property
    def table(self) -> pd.DataFrame:
        """The field called `shown`."""
        return getattr(self, self.shown)

    @property
    def subtitle(self) -> str:
        """What every figure says."""
        return f"{self.words}; {questions_words(self.n_questions)}"


@dataclass(frozen=True, eq=False)
class Shifts(Compared):
    """A result in which pairs count as shifted or stable."""

    kind: str
    """Which overlap."""
    threshold: float
    """Overlap below which a pair counts as shifted."""

    @property
    def subtitle(self) -> str:
        """What every figure says, the threshold included."""
        return f"{super().subtitle}; shifted: overlap below {self.threshold:.4g}"


def pair_words(comparison: str, a: int, b: int) -> str:
    """`teacher-forced, depth 1 against depth 4`: what a figure or a sentence says was compared."""
    if comparison == "within":
        return f"within one pass, iteration {a} against iteration {b}"
    return f"{comparison_words(comparison)}, depth {a} against depth {b}"


def comparison_words(comparison: str) -> str:
    """The comparison as a reader says it."""
    return {"teacher_forced": "teacher-forced", "free_running": "free-running"}.get(comparison, comparison)


@dataclass(frozen=True, eq=False)
class KeptResult(Result):
    """A stored result: what can be shown of it, without the fields it was computed from."""

    heading: str
    sentence: str
    numbers: pd.DataFrame
    drawn: dict[str, dict[str, Any]]
    """Figure -> plotly's JSON."""

    @property
    def title(self) -> str:
        """Of the stored result."""
        return self.heading

    @property
    def verdict(self) -> str:
        """Of the stored result."""
        return self.sentence

    @property
    def table(self) -> pd.DataFrame:
        """Of the stored result."""
        return self.numbers

    def figure(self) -> go.Figure:
        """The first figure."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """Every stored figure."""
        return {name: go.Figure(drawn) for name, drawn in self.drawn.items()}

    @classmethod
    def of(cls, result: Result) -> KeptResult:
        """What can be shown of a result."""
        drawn = {name: json.loads(str(figure.to_json())) for name, figure in result.figures().items()}
        return cls(result.title, result.verdict, result.table, drawn)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `from_json` reads it. Figures are a list: the first one shows the finding."""
        table = {"columns": [str(name) for name in self.table.columns], "rows": self.table.to_numpy(object)}
        return {
            "title": self.title, "verdict": self.verdict, "table": json_ready(table),
            "figures": [[name, figure] for name, figure in self.drawn.items()],
        }  # fmt: skip

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> KeptResult:
        """What `to_json` wrote."""
        table = pd.DataFrame(kept["table"]["rows"], columns=kept["table"]["columns"])
        return cls(kept["title"], kept["verdict"], table, dict(kept["figures"]))


def table_html(table: pd.DataFrame, digits: int = 4) -> str:
    """A DataFrame as an HTML table, every cell and header escaped."""

    def cell(value: Any) -> str:
        if isinstance(value, float | np.floating):
            return f"{value:.{digits}g}" if math.isfinite(value) else ""
        return "" if value is None else html.escape(str(value))

    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in table.columns)
    rows = (
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>"
        for row in table.itertuples(index=False, name=None)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def json_ready(value: Any) -> Any:
    """Plain JSON types: tables as lists of rows, arrays as lists, numbers that are not finite as None."""
    if isinstance(value, pd.DataFrame):
        columns = [str(c) for c in value.columns]
        rows = value.itertuples(index=False, name=None)
        return [dict(zip(columns, (json_ready(v) for v in row), strict=True)) for row in rows]
    if isinstance(value, np.ndarray | pd.Series):
        return json_ready(value.tolist())
    if isinstance(value, np.generic):
        return json_ready(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(item) for item in value]
    if isinstance(value, Result):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: json_ready(getattr(value, f.name)) for f in fields(value)}
    if value is None or isinstance(value, str | bool | int):
        return value
    return str(value)


@dataclass(frozen=True)
class Analysis:
    """A question that is asked of a run: what computes the answer, and what the report says of it."""

    name: str
    call: Callable[..., Result]
    """`Contrast` -> its result; raises `Untestable` where there is none."""
    heading: str
    asks: str
    """The question, as a reader would put it."""
    claims: tuple[str, ...] = ()
    """Claims of the ledger that rest on it."""
    needs: tuple[str, ...] = ("pairs",)
    """Tables without which there is no answer."""
    per: Literal["comparison", "run"] = "comparison"
    """Whether each comparison has its own answer, or the run has one."""
    captions: Mapping[str, str] = field(default_factory=dict)
    """Figure -> what to see in it."""
    order: float = 100
    """Where it stands in the report, small numbers first."""


ANALYSES: dict[str, Analysis] = {}
"""Name -> every analysis that has been registered."""

C = TypeVar("C", bound=Callable[..., Result])


def analysis(heading: str, asks: str, *, name: str | None = None, **about: Any) -> Callable[[C], C]:
    """Register a function of a `Contrast` as an analysis; the fields of `Analysis` say what `about` may be.

        @analysis("Dwell", "How long does a layer stay stable between shifts?")
        def dwell(c: Contrast) -> Dwell: ...

    The command line, the claims ledger, the report and the contract tests take it from there.

    Raises:
        SSTError: if another analysis has the name.
    """

    def register(call: C) -> C:
        entry = Analysis(name or call.__name__, call, heading, asks, **about)
        known = ANALYSES.get(entry.name)
        if known is not None and known.call.__module__ != call.__module__:
            raise SSTError(
                f"two analyses are called {entry.name!r}: {known.call.__module__} and {call.__module__}",
                "give one of them another name",
            )
        ANALYSES[entry.name] = entry
        return call

    return register
