"""One question of a run in a notebook: the explorer, its table, its map."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import PAPER_THRESHOLD, Contrast, QuestionMap
from sst_interp.analyses.shifts import question_figure
from sst_interp.errors import SSTError, Untestable, unknown_name
from sst_interp.files import replace_bytes
from sst_interp.findings.report.explorer import Threshold, explorer_data
from sst_interp.findings.report.page import EXPLORER_SCRIPTS, page
from sst_interp.models.choices import COMPARISONS
from sst_interp.runs.provenance import tokenizer_of

HEIGHT = 900
"""Pixels of the frame in a notebook."""


@dataclass(frozen=True, eq=False)
class QuestionView:
    """A question of a run. In a notebook it shows the explorer, in a sandboxed frame."""

    run: Any = field(repr=False)
    question: int
    """Index in the run."""
    id: str
    """Record id in the dataset."""
    threshold: float
    """Overlap below which a cell is marked as shifted."""
    provenance: str
    tokenizer: Any = field(default=None, repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """The question's rows of the `pairs` table."""
        pairs = self.run.pairs
        return pairs[(pairs["question"] == self.question).to_numpy(dtype=bool)].reset_index(drop=True)

    def map(self, comparison: str | None = None) -> QuestionMap:
        """Overlap and norm ratio by position and layer, at 1 and the deepest; SSTError without pairs."""
        return Contrast.of(self.run, comparison).question_map(self.question)

    def figure(self, comparison: str | None = None) -> go.Figure:
        """The overlap by position and layer, at 1 and the deepest."""
        c = Contrast.of(self.run, comparison)
        words = f"question {self.question}; {c.words}"
        return question_figure(c.question_map(self.question).overlap, words)

    @property
    def html(self) -> str:
        """The explorer of this question as a page."""
        thresholds = {}
        for comparison in COMPARISONS:
            c = Contrast.of(self.run, comparison)
            try:
                thresholds[comparison] = Threshold(self.threshold, self.provenance, c.a, c.b)
            except Untestable:
                continue
        tokenizer = self.tokenizer or tokenizer_of(self.run)
        data = explorer_data(self.run, thresholds, tokenizer, questions=[self.question])
        return page(
            "question.html",
            (*EXPLORER_SCRIPTS, "question.js"),
            data | {"lead": self.run.recipe.choices.comparison},
            title=f"{self.run.name}, question {self.question}: {self.id}",
        )

    def write(self, path: str | Path) -> Path:
        """Write `html` to a file."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, self.html.encode(errors="backslashreplace"))
        except OSError as error:
            raise SSTError(f"cannot write {path}: {error.strerror}", "choose another path") from None
        return path

    def _repr_html_(self) -> str:
        page = html.escape(self.html.encode(errors="backslashreplace").decode(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="{html.escape(self.id, quote=True)}" '
            f'width="100%" height="{HEIGHT}" style="border:0"></iframe>'
        )


def question_view(
    run: Any, question: int | str, threshold: float | None = None, tokenizer: Any = None
) -> QuestionView:
    """A question by its index or record id.

    Args:
        run: name, recipe, manifest and tables.
        question: index in the run, or record id.
        threshold: overlap below which a cell is marked (None: the recipe's if it is a number, else 0.99).
        tokenizer: for token texts, if the run's data may be shown (None: looked up).

    Raises:
        SSTError: if the run has no such question.
    """
    ids = run.questions.drop_duplicates("question").set_index("question")["id"]
    index = question
    if isinstance(question, str):
        matches = ids.index[(ids == question).to_numpy(dtype=bool)]
        if not len(matches):
            raise unknown_name(f"question of run {run.name}", question, ids.tolist())
        index = int(matches[0])
    if index not in ids.index:
        raise SSTError(
            f"run {run.name} has no question {question}",
            f"it has {len(ids)}, from {ids.index.min()} to {ids.index.max()}",
        )
    fixed = run.recipe.choices.threshold
    provenance = "given"
    if threshold is None:
        provenance = "fixed by the recipe" if fixed != "antimode" else f"the paper's {PAPER_THRESHOLD}"
        threshold = PAPER_THRESHOLD if fixed == "antimode" else float(fixed)
    return QuestionView(run, int(index), str(ids.loc[index]), float(threshold), provenance, tokenizer)
