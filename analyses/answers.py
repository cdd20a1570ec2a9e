"""Answers (claims C10, C11): does thinking longer about every question help or break the answer?

Accuracy at each flat depth; which right answers of the shallowest depth are broken at a deeper one and which
wrong ones mended; and the best of the depths. The last is an *oracle*, not a policy: it needs the right
answer to choose the depth, and it rises with every depth however random the answers are (four blind guesses
among four choices contain the right one in 68% of cases). Its controls stand beside it.

A missing answer (null) is wrong, and is an answer of its own where answers are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, add_line, canvas
from sst_interp.analyses.result import Result, analysis
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    mean_over_questions,
    none_seen_bound,
    nothing,
    percent_text,
    points_text,
    questions_words,
)
from sst_interp.analyses.statistics.permutation import holm, sign_test
from sst_interp.errors import Untestable

NO_ANSWER = -1
"""Code of an answer that was not found."""


@dataclass(frozen=True, eq=False)
class Overthinking(Result):
    """Accuracy by depth, what depth breaks and mends, and the oracle. All intervals resample questions."""

    base: int
    """The shallowest depth."""
    deepest: int
    by_depth: pd.DataFrame
    """A row per depth (`depth_table`)."""
    accuracy: Interval
    """At the base ..."""
    deep_accuracy: Interval
    """... at the deepest depth, for every question ..."""
    difference: Interval
    """... and what depth adds."""
    right: int
    """Questions right at the base."""
    broken: int
    """Of those, wrong at the deepest depth."""
    mended: int
    """Questions wrong at the base and right at the deepest depth."""
    broken_share: Interval
    """Broken, of those right at the base."""
    p_value: float
    """Exact McNemar test of broken against mended."""
    p_depths: float
    """Permutation test that accuracy does not depend on depth at all (`depths_permutation`)."""
    changed: Interval
    """Share of questions whose answer is another one at some depth."""
    oracle: Interval
    """Share of questions that are right at some depth. This and the next four: `Oracle`."""
    guessing: float
    unrelated: Interval
    blind: Interval
    beyond_blind: Interval
    choices: int | None
    """How many lettered choices a question has; None: not lettered."""
    baseline: Interval
    """Accuracy of the matched baseline on the same questions, at its shallowest depth."""
    over_baseline: Interval
    """oracle - baseline."""
    base_over_baseline: Interval
    """Accuracy at the base - baseline, which needs no oracle."""
    of_question: pd.DataFrame
    """Columns question, id, kind (right, broken, mended, wrong: base against deepest) and right_at, at how
    many depths it is right."""
    n_questions: int
    n_excluded: int
    """Questions left out: a depth is missing."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Thinking longer: accuracy by flat depth"

    @property
    def table(self) -> pd.DataFrame:
        """A row per depth."""
        return self.by_depth

    @property
    def verdict(self) -> str:
        """Whether depth helps, what it breaks and mends, and the oracle with its controls."""
        answer = "Thinking longer changes accuracy by no more than chance."
        if self.p_value < 0.05:
            answer = f"Thinking longer {'costs' if self.broken > self.mended else 'gains'} right answers."
        words = f"{answer} {questions_words(self.n_questions)}: accuracy "
        words += f"{percent_text(self.accuracy.estimate)} at depth {self.base}, "
        words += f"{percent_text(self.deep_accuracy.estimate)} at depth {self.deepest} "
        words += f"({points_text(self.difference)}). {self.broken} of {self.right} right answers are broken, "
        words += f"{self.mended} of {self.n_questions - self.right} wrong ones mended (exact McNemar "
        words += f"p = {self.p_value:.2g})."
        if not self.broken and self.right:
            words += f" At most {percent_text(none_seen_bound(self.right))} of right answers break (95%)."
        words += f" The best of the depths, an oracle and not a policy, has {self.oracle.text(percent=True)}"
        if math.isfinite(self.blind.estimate):
            words += f"; had each new answer been a blind guess, {percent_text(self.blind.estimate)}"
        words += f"; were the depths unrelated, {percent_text(self.unrelated.estimate)}."
        if math.isfinite(self.baseline.estimate):
            words += f" The matched baseline has {percent_text(self.baseline.estimate)}; depth {self.base} "
            words += f"alone is {points_text(self.base_over_baseline)} from it."
        if self.n_excluded:
            words += f" {questions_words(self.n_excluded)} without a row at every depth left out."
        return words

    def figure(self) -> go.Figure:
        """Accuracy by flat depth; the oracle over depths and its controls as lines."""
        figure = canvas(
            "Accuracy by flat depth", f"every question at that depth; {questions_words(self.n_questions)}",
            "iteration depth", "share of questions right",
        )  # fmt: skip
        add_line(figure, self.by_depth["depth"], self.by_depth, "accuracy", "flat depth", BLUE)
        ends = [self.base - 0.3, self.deepest + 0.3]
        for value, name, colour, dash in (
            (self.oracle.estimate, "oracle over depths (not a policy)", VERMILLION, "dash"),
            (self.blind.estimate, "oracle, new answers guessed", ORANGE, "dot"),
            (self.unrelated.estimate, "oracle, depths unrelated", GREEN, "dot"),
            (self.guessing, "oracle over blind guesses", GREY, "dot"),
            (self.baseline.estimate, "matched baseline", SKY, "solid"),
        ):
            if math.isfinite(value):
                figure.add_scatter(
                    x=ends, y=[value, value], mode="lines", name=f"{name} {value:.1%}", hoverinfo="name",
                    line={"color": colour, "dash": dash, "width": 2},
                )  # fmt: skip
        figure.update_xaxes(tickvals=self.by_depth["depth"])
        figure.update_yaxes(tickformat=".0%", rangemode="tozero")
        legend = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
        return figure.update_layout(legend=legend, margin={"t": 80})

    def figures(self) -> dict[str, go.Figure]:
        """`accuracy`, and `broken_and_mended` from the shallowest depth to each."""
        figure = canvas(
            "Answers broken and mended",
            f"from depth {self.base}: {self.right} right, {self.n_questions - self.right} wrong; "
            f"{questions_words(self.n_questions)}",
            "iteration depth",
            "questions (broken below 0)",
        )
        deeper = self.by_depth.iloc[1:]
        for column, sign, colour in (("mended", 1, BLUE), ("broken", -1, VERMILLION)):
            figure.add_bar(
                x=deeper["depth"], y=sign * deeper[column], name=column, marker={"color": colour},
                customdata=deeper[[column, "p"]],
                hovertemplate="depth %{x}: %{customdata[0]} " + column
                + "<br>exact McNemar p = %{customdata[1]:.2g}<extra></extra>",
            )  # fmt: skip
        figure.update_xaxes(tickvals=deeper["depth"])
        figure.update_layout(barmode="relative")
        return {"accuracy": self.figure(), "broken_and_mended": figure}


@analysis(
    "Thinking longer",
    "What do more iterations do to the answers?",
    claims=("C10", "C11"),
    needs=("questions",),
    per="run",
    order=120,
)
def overthinking(c: Contrast) -> Overthinking:
    """What depth does to the answers of a run, beside the matched baseline if there is one.

    Raises:
        Untestable: if the run has one depth, or no question has a row at every depth.
    """
    answers = answers_of(c.tables("questions"))
    correct, codes = answers.correct, answers.codes
    if not len(correct):
        raise Untestable("no question has a row at every depth")

    def mean(values: np.ndarray, where: np.ndarray | None = None) -> Interval:
        return mean_of(values, where, *c.resampling)

    first, last, base = correct[:, 0], correct[:, -1], int(answers.depths[0])
    if len(answers.depths) < 2:
        there = f"accuracy there is {mean(first).text(percent=True)} of {questions_words(len(correct))}"
        raise Untestable(f"the run has one depth, {base}; {there}")
    broken, mended = int((first & ~last).sum()), int((last & ~first).sum())
    kind = np.select([first & last, first, last], ["right", "broken", "mended"], default="wrong")
    of_question = {"question": answers.questions, "id": answers.ids, "kind": kind}
    changed = nothing("no answers were recorded")
    if codes is not None:
        changed = mean((codes != codes[:, :1]).any(axis=1))
    best = oracle(answers, *c.resampling)
    return Overthinking(
        base,
        int(answers.depths[-1]),
        by_depth=depth_table(answers, *c.resampling),
        accuracy=mean(first),
        deep_accuracy=mean(last),
        difference=mean(last * 1 - first),
        right=int(first.sum()),
        broken=broken,
        mended=mended,
        broken_share=mean(~last, first),
        p_value=float(mcnemar(broken, mended)),
        p_depths=depths_permutation(correct, *c.resampling),
        changed=changed,
        oracle=best.share,
        guessing=best.guessing,
        unrelated=best.unrelated,
        blind=best.blind,
        beyond_blind=best.beyond_blind,
        choices=answers.choices,
        **_beside_baseline(c, answers),
        of_question=pd.DataFrame(of_question | {"right_at": correct.sum(axis=1)}),
        n_questions=len(correct),
        n_excluded=answers.n_excluded,
    )


def _beside_baseline(c: Contrast, answers: Answers) -> dict[str, Interval]:
    """Accuracy of the baseline on the same records, and the oracle and the base depth minus it."""
    names = ("baseline", "over_baseline", "base_over_baseline")
    beside = c.beside.get("baseline")
    table = None if beside is None else beside.get("questions")
    if table is None:
        return dict.fromkeys(names, nothing("no run of the matched baseline was given"))
    theirs = answers_of(table[(table["depth"] == table["depth"].min()).to_numpy(dtype=bool)])
    by_id = pd.Series(theirs.correct[:, 0], index=theirs.ids).groupby(level=0).first().reindex(answers.ids)
    both = by_id.notna().to_numpy()
    if not both.any():
        return dict.fromkeys(names, nothing("the baseline has none of these questions"))
    other, correct = by_id.to_numpy()[both].astype(float), answers.correct[both]
    values = other, correct.any(axis=1) - other, correct[:, 0] - other
    return {name: mean_of(of, None, *c.resampling) for name, of in zip(names, values, strict=True)}


class Answers(NamedTuple):
    """The answers of the questions that have a row at every depth."""

    questions: np.ndarray
    """Index of each question in the run, ascending [question]."""
    ids: np.ndarray
    """Record id of each question [question]; its index where the table has none."""
    depths: np.ndarray
    """Ascending [depth]."""
    correct: np.ndarray
    """[question, depth], bool."""
    codes: np.ndarray | None
    """[question, depth]: equal numbers are equal answers, `NO_ANSWER` is none. None: no answers recorded."""
    choices: int | None
    """How many lettered choices a question has, as far as the right answers tell; None: not lettered."""
    n_excluded: int
    """Questions left out: a depth is missing, or its `correct` is."""


def answers_of(questions: pd.DataFrame) -> Answers:
    """The answers of a `questions` table (docs/run-format.md).

    Columns question, depth and correct are needed; `id`, `answer` and `gold` are used where they are there.
    Of re-draws (column `draw`), the first counts.
    """
    if "draw" in questions.columns:
        questions = questions[questions["draw"] == 1]
    depths = np.sort(questions["depth"].unique())
    correct = questions.pivot(index="question", columns="depth", values="correct")
    whole = correct.notna().all(axis=1)
    correct, keep = correct[whole], correct.index[whole]
    codes = None
    if "answer" in questions.columns:
        coded = questions.assign(code=pd.factorize(questions["answer"])[0])
        codes = coded.pivot(index="question", columns="depth", values="code").loc[keep].to_numpy(dtype=int)
    names = keep
    if "id" in questions.columns:
        names = questions.drop_duplicates("question").set_index("question")["id"].loc[keep]
    return Answers(
        questions=keep.to_numpy(),
        ids=names.to_numpy(),
        depths=depths,
        correct=correct.to_numpy(dtype=bool),
        codes=codes,
        choices=_choices(questions),
        n_excluded=int((~whole).sum()),
    )


def margin_changes(questions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """How iterating changes the margin of the right choice, and of a wrong one, by question.

    The margin of a choice is its score less the best other one's (`choice_scores`, a run by likelihood); its
    change is the deepest depth's less the shallowest's. A question's wrong choices count with their mean:
    a change that does not know the right answer has the same.

    Raises:
        Untestable: the run has no scores of choices, or no question has them at both depths.
    """
    if "choice_scores" not in questions.columns:
        raise Untestable("no score of each choice was kept: `scoring` by likelihood keeps them")
    ends = sorted(questions["depth"].unique())[:: max(questions["depth"].nunique() - 1, 1)]
    scores = questions.pivot(index="question", columns="depth", values="choice_scores")[ends].dropna()
    gold = questions.drop_duplicates("question").set_index("question")["gold"].loc[scores.index]
    if len(ends) < 2 or not len(scores):
        raise Untestable("no question has scores at two depths")
    right, wrong = np.empty((2, len(scores)))
    for k, (pair, letter) in enumerate(zip(scores.to_numpy(), gold, strict=True)):
        shallow, deep = (np.array(values, dtype=float) for values in pair)
        at = ord(letter) - ord("A")
        change = _margins(deep) - _margins(shallow)
        right[k], wrong[k] = change[at], np.delete(change, at).mean()
    return right, wrong


def _margins(scores: np.ndarray) -> np.ndarray:
    """Each choice's score less the best of the others."""
    best, second = np.sort(scores)[::-1][:2]
    first = np.arange(len(scores)) == scores.argmax()
    return scores - np.where(first, second, best)


def _choices(questions: pd.DataFrame) -> int | None:
    """The highest letter that is ever right or given; None if some right answer is not a single capital."""
    if "gold" not in questions.columns:
        return None
    gold = questions["gold"].dropna().astype(str)
    if not len(gold) or not gold.str.fullmatch("[A-Z]").all():
        return None
    seen = set(gold)
    if "answer" in questions.columns:
        given = questions["answer"].dropna().astype(str)
        seen |= set(given[given.str.fullmatch("[A-Z]")])
    return max(2, ord(max(seen)) - ord("A") + 1)


def mcnemar(broken: ArrayLike, mended: ArrayLike) -> np.ndarray:
    """Exact two-sided McNemar test, the sign test of the questions that changed [...]; 1 where none did."""
    return np.nan_to_num(sign_test(broken, mended), nan=1.0)


def depths_permutation(correct: np.ndarray, resamples: int, seed: int = 0) -> float:
    """P-value of "depth makes no difference to accuracy": right and wrong permuted over depths in a question.

    The statistic is the variance of the accuracy over depths (Cochran's Q). NaN if no question is right at
    some depths only.
    """
    mixed = correct[correct.any(axis=1) & ~correct.all(axis=1)].astype(np.int8)
    if not len(mixed):
        return float("nan")
    rng, count = np.random.default_rng(seed), 0
    seen = mixed.sum(axis=0).var()
    step = max(1, 10_000_000 // mixed.size)
    for start in range(0, resamples, step):
        drawn = np.broadcast_to(mixed, (min(step, resamples - start), *mixed.shape))
        sums = rng.permuted(drawn, axis=2).sum(axis=1, dtype=np.int64)
        count += int((sums.var(axis=1) >= seen - 1e-9).sum())
    return (count + 1) / (resamples + 1)


def depth_table(answers: Answers, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """A row per depth: accuracy, and what changes from the shallowest depth to this one.

    Returns:
        Columns depth, right, `accuracy` and `difference` (from the shallowest; both with `_low` and `_high`),
        broken, `without_answer` (of those, without an answer here), mended, `p` (exact McNemar), `p_holm`,
        `changed` (share of answers other than at the shallowest) and `unanswered`; the last three and
        `without_answer` are NaN where they are not known.
    """
    correct, codes, records = answers.correct, answers.codes, []
    base = correct[:, 0]
    for k, depth in enumerate(answers.depths):
        here = correct[:, k]
        broken, mended = base & ~here, here & ~base
        accuracy, difference = (mean_of(x, None, resamples, seed) for x in (here, here * 1 - base))
        record = {"depth": int(depth), "right": int(here.sum())}
        record |= as_columns(accuracy=accuracy, difference=difference)
        record |= {"broken": int(broken.sum()), "mended": int(mended.sum())}
        record["p"] = float(mcnemar(broken.sum(), mended.sum())) if k else np.nan
        known = codes is not None
        record["without_answer"] = float((broken & (codes[:, k] == NO_ANSWER)).sum()) if known else np.nan
        record["changed"] = float((codes[:, k] != codes[:, 0]).mean()) if known else np.nan
        record["unanswered"] = float((codes[:, k] == NO_ANSWER).mean()) if known else np.nan
        records.append(record)
    table = pd.DataFrame(records)
    table.insert(list(table.columns).index("p") + 1, "p_holm", holm(table["p"].to_numpy(dtype=float)))
    return table


def mean_of(
    values: np.ndarray, where: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over questions, or over those of a mask: values [question]; the interval resamples questions."""
    return mean_over_questions(values if where is None else values[where], resamples, seed)


class Oracle(NamedTuple):
    """Right at some depth, beside its controls."""

    share: Interval
    """Share of questions that are right at some depth."""
    guessing: float
    """The same for as many independent blind guesses as there are depths; NaN if answers are not lettered."""
    unrelated: Interval
    """... were the depths as accurate as they are, and unrelated: 1 - prod(1 - accuracy)."""
    blind: Interval
    """... had each new answer been a blind guess (`blind_oracle`)."""
    beyond_blind: Interval
    """share - blind: what depth finds beyond merely changing the answer."""


def oracle(answers: Answers, resamples: int = RESAMPLES, seed: int = 0) -> Oracle:
    """The oracle over depths and its controls; intervals resample questions."""
    some, blind = np.asarray(answers.correct.any(axis=1)), blind_oracle(answers)

    def unrelated(totals: np.ndarray) -> np.ndarray:
        return 1 - np.prod(1 - totals[..., :-1] / totals[..., -1:], axis=-1)

    sums = np.column_stack([answers.correct, np.ones(len(some))])
    depths, none = len(answers.depths), nothing("answers are not lettered, or were not recorded")
    return Oracle(
        share=mean_of(some, None, resamples, seed),
        guessing=1 - (1 - 1 / answers.choices) ** depths if answers.choices else math.nan,
        unrelated=cluster_bootstrap(sums, unrelated, resamples, seed=seed),
        blind=none if blind is None else mean_of(blind, None, resamples, seed),
        beyond_blind=none if blind is None else mean_of(some - blind, None, resamples, seed),
    )


def blind_oracle(answers: Answers) -> np.ndarray | None:
    """Chance per question that some depth would be right had each *new* answer been a blind guess [question].

    The first depth keeps its answer. Every other answer is replaced by a random one of the remaining choices,
    as many different ones as there were: C, B, B, D gets two guesses out of three. None if answers are not
    lettered or not recorded.
    """
    if answers.codes is None or answers.choices is None:
        return None
    first = answers.codes[:, :1]
    ordered = np.sort(np.where(answers.codes == NO_ANSWER, first, answers.codes), axis=1)
    guesses = (np.diff(ordered, axis=1) != 0).sum(axis=1)  # different answers, without the first
    without = answers.codes[:, 0] == NO_ANSWER
    left = np.where(without, answers.choices, answers.choices - 1)
    return np.where(answers.correct[:, 0], 1.0, np.minimum(1.0, guesses / left))
