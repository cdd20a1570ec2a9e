"""The claims ledger: each claim of the paper, this run's figure, a verdict by a stated rule, and its control.

To add a claim that is read from a run: write its `Claim` in `rules` (the rule in words, before looking at
data), a function from the `Suite` of analyses to a `Finding` (as in `state`; raise `SSTError` where
it is not testable), and a line in `PER_COMPARISON` or in `_of_run` here. A claim that is measured elsewhere
(C12 and C13 come from the halting probe) is added by its caller:

    row = Row(Claim("C12", words, paper, rule), EVERYWHERE, Finding(here, judged(holds, auc), auc, control))
    claims(run, more=[row])

An analysis that only wants to be kept with the others is a line in `suite.analyse`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import claims as claim_figures
from sst_interp.analyses.ledger import answers as claim_answers
from sst_interp.analyses.ledger import rules
from sst_interp.analyses.ledger import state as claim_state
from sst_interp.analyses.ledger.answers import BlendWeights, blend_weights
from sst_interp.analyses.ledger.rules import (
    EVERYWHERE,
    FAILS,
    HOLDS,
    UNTESTED,
    Claim,
    Finding,
    Row,
    untestable,
)
from sst_interp.analyses.ledger.suite import Progress, Suite, analyse
from sst_interp.analyses.parts.token_classes import TokenClass
from sst_interp.analyses.result import Result, json_ready
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, questions_words
from sst_interp.documents import markdown
from sst_interp.errors import SSTError

if TYPE_CHECKING:
    from sst_interp.experiments.studies.errors import ApproximationError

PER_COMPARISON: tuple[tuple[Claim, Callable[[Suite, str], Finding]], ...] = (
    (rules.C1, claim_state.share_shifted),
    (rules.C2, claim_state.two_modes),
    (rules.C3, claim_state.lowest_overlap),
    (rules.C4, claim_answers.replaced),
    (rules.C5, claim_answers.deepest_winner),
    (rules.C6, claim_state.state_first),
    (rules.C7, claim_state.above_rounding),
    (rules.C8, claim_state.shift_at_zero),
    (rules.C9, claim_state.tied_to_content),
)
"""Claims that have a row for every comparison, and what reads them from the analyses."""


@dataclass(frozen=True, eq=False)
class Ledger(Result):
    """The paper's claims beside one run. All intervals resample questions; comparisons are never pooled."""

    name: str
    """Of the run."""
    kind: str
    """Which overlap."""
    n_questions: int
    """Questions of the run; every row says how many its own figure rests on."""
    rows: tuple[Row, ...] = ()
    results: dict[str, Result] = field(default_factory=dict)
    """`analysis.comparison`, or `analysis` where there is one for the run -> its result."""
    missing: dict[str, str] = field(default_factory=dict)
    """Analyses without a result -> why."""

    @property
    def title(self) -> str:
        """The run and its size."""
        return f"Claims ledger: {self.name}, {questions_words(self.n_questions)}"

    @property
    def table(self) -> pd.DataFrame:
        """A row per claim and comparison: the paper's figure, this run's, rule, verdict, control. `estimate`,
        `low` and `high` are the one number of `this run` that is set beside the paper's in the figure.
        """
        records = [
            {
                "claim": row.claim.id,
                "in words": row.claim.words,
                "comparison": row.comparison,
                "paper": row.claim.paper,
                "this run": row.finding.here,
                "estimate": row.finding.figure.estimate,
                "low": row.finding.figure.low,
                "high": row.finding.figure.high,
                "questions": row.finding.figure.n_questions,
                "holds if": row.claim.rule,
                "verdict": row.finding.verdict,
                "control": row.finding.control,
            }
            for row in self.rows
        ]
        return pd.DataFrame(records)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows hold, do not hold, are not testable."""
        found = Counter(row.state for row in self.rows)
        return {state: found[state] for state in (HOLDS, FAILS, UNTESTED)}

    @property
    def by_claim(self) -> list[dict[str, str]]:
        """A row per claim: the paper's figure and the verdict in each comparison, in one or two words."""
        columns = [*dict.fromkeys(row.comparison for row in self.rows if row.comparison != EVERYWHERE)]
        found: dict[str, dict[str, str]] = {}
        for row in self.rows:
            start = {"claim": row.claim.id, "in words": row.claim.words, "paper": row.claim.paper}
            line = found.setdefault(row.claim.id, start | dict.fromkeys(columns, ""))
            for column in columns if row.comparison == EVERYWHERE else [row.comparison]:
                line[column] = row.state
        return list(found.values())

    @property
    def differ(self) -> dict[str, dict[str, list[str]]]:
        """Claims that hold in one comparison and not in another -> verdict -> comparisons."""
        found: dict[str, dict[str, list[str]]] = {}
        for row in self.rows:
            if row.comparison != EVERYWHERE:
                found.setdefault(row.claim.id, {}).setdefault(row.state, []).append(row.comparison)
        return {claim: states for claim, states in found.items() if {HOLDS, FAILS} <= states.keys()}

    @property
    def verdict(self) -> str:
        """Counts, and which claims depend on the comparison."""
        holds, fails, not_testable = self.counts.values()
        words = (
            f"{questions_words(self.n_questions)}: of {len(self.rows)} rows (claim by comparison) {holds} "
        )
        words += f"{'holds' if holds == 1 else 'hold'}, {fails} {'does' if fails == 1 else 'do'} not hold, "
        words += f"{not_testable} {'is' if not_testable == 1 else 'are'} not testable. "
        if holds + fails == 0:
            return f"{UNTESTED}: {words}".rstrip()
        if not self.differ:
            return words + "No claim holds in one comparison and fails in another."
        parts = [
            f"{claim} (" + "; ".join(f"{state}: {', '.join(where)}" for state, where in states.items()) + ")"
            for claim, states in self.differ.items()
        ]
        return f"{words}The verdict depends on the comparison for {', '.join(parts)}."

    def blocks(self) -> dict[str, str]:
        """Texts for a document: `RUN claims`, `RUN by claim`, `RUN verdict`, and `RUN ANALYSIS`, verdicts."""
        shown = ["claim", "comparison", "paper", "this run", "verdict", "control"]
        found = {
            "claims": markdown(
                [{name: row[name] for name in shown} for row in self.table.to_dict("records")]
            ),
            "by claim": markdown(self.by_claim),
            "verdict": self.verdict,
        } | {name: result.verdict for name, result in self.results.items()}
        return {f"{self.name} {name}": text for name, text in found.items()}

    def figure(self) -> go.Figure:
        """Claims by comparisons, coloured by verdict."""
        return claim_figures.verdicts(self)

    def figures(self) -> dict[str, go.Figure]:
        """verdicts, and beside_paper: this run's figures over the paper's."""
        return {"verdicts": self.figure(), "beside_paper": claim_figures.beside_paper(self)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the rows, counts, what differs, and the verdict of every analysis (a result's own
        `to_dict` has the rest).
        """
        own = {"result": type(self).__name__, "verdict": self.verdict, "table": self.table}
        own |= {"name": self.name, "kind": self.kind, "n_questions": self.n_questions}
        own |= {"counts": self.counts, "differ": self.differ, "missing": self.missing}
        return json_ready(own | {"analyses": {name: found.verdict for name, found in self.results.items()}})


def claims(
    run: Any,
    blend_off: Any = None,
    reshuffled: Any = None,
    baseline: Any = None,
    beyond: Any = None,
    lens: Any = None,
    alpha: Any = None,
    approximation: ApproximationError | None = None,
    no_blend: str | None = None,
    token_class: TokenClass | None = None,
    more: Sequence[Row] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Ledger:
    """The ledger of a run. Nothing in a run makes it fail: what cannot be tested is a row that says why.

    Args:
        run: a `Run`, or anything with its tables and `recipe`.
        blend_off: a run of the same recipe with prompt = "blend_off": the start-up control of C8.
        reshuffled: a run of the same questions with reshuffled choices, for C9.
        baseline: a run of the matched baseline, for C11.
        beyond: a run with more depths, for `overthinking` and `settling`.
        lens: a run of the same questions that measured `lens_jaccard`, for `token_replacement` by layer.
        alpha: the learned blend weights [layer, d_model], or their `BlendWeights`, for C14.
        approximation: of `approximation_error`, for C15.
        no_blend: why the claims about the blend (C14, C15) do not apply to the run's model; None: they do.
        token_class: token id -> class name, for C9.
        more: rows of claims that were measured elsewhere.
        resamples: question resamples, shuffles and permutations.
        seed: of all three.
        progress: told how many analyses are done, of how many, and which is next.
    """
    suite = analyse(
        run, blend_off, reshuffled, baseline, beyond, lens, token_class, resamples, seed, progress
    )
    rows = [
        Row(claim, comparison, _attempt(read, suite, comparison))
        for claim, read in PER_COMPARISON
        for comparison in suite.order
    ]
    if alpha is not None and not isinstance(alpha, BlendWeights):
        alpha = blend_weights(alpha)
    rows += [
        Row(claim, EVERYWHERE, f) for claim, f in _of_run(suite, baseline, alpha, approximation, no_blend)
    ]
    rows = sorted([*rows, *more], key=lambda row: _number(row.claim.id))
    questions = next((t for t in ("questions", "pairs") if len(suite.tables[t])), None)
    n = int(suite.tables[questions]["question"].nunique()) if questions else 0
    name = str(getattr(run, "name", "run"))
    return Ledger(name, suite.choices.overlap, n, tuple(rows), suite.results, suite.missing)


def _of_run(
    suite: Suite,
    baseline: Any,
    alpha: BlendWeights | None,
    approximation: ApproximationError | None,
    no_blend: str | None,
) -> list[tuple[Claim, Finding]]:
    """Claims that do not depend on a comparison."""
    found = [
        (rules.C10, _attempt(claim_answers.broken, suite)),
        (rules.C11, _attempt(claim_answers.oracle_beats, suite, baseline is not None)),
    ]
    if no_blend:
        return found + [(claim, rules.untestable(no_blend)) for claim in (rules.C14, rules.C15)]
    found.append((rules.C14, claim_answers.learned_blend(alpha)))
    return found + [(rules.C15, finding) for finding in claim_answers.two_pass_error(approximation)]


def _attempt(read: Callable[..., Finding], *given: Any) -> Finding:
    """A finding, or why there is none."""
    try:
        return read(*given)
    except SSTError as error:
        return untestable(error.message)


def _number(claim: str) -> int:
    found = re.search(r"\d+", claim)
    return int(found[0]) if found else 10**6
