"""What holds for every analysis in the registry, whatever it asks. Its own test has what it alone promises.

A run with every table is made, and its analyses are asked again when something about the run has changed that
must not matter, or that leaves nothing to ask.
"""

import json
import math
import re
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from synthetic import Planted, pairs_table
from synthetic_outputs import outputs_table, questions_table, steps_table

from sst_interp.analyses import load
from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.result import Result
from sst_interp.errors import SSTError, Untestable
from sst_interp.models.choices import COMPARISONS, Choices
from sst_interp.runs.schema import DIRECTIONS, NOISE_KINDS, SITES

ANALYSES = load()
NAMES = [analysis.name for analysis in sorted(ANALYSES.values(), key=lambda analysis: analysis.order)]
EACH = pytest.mark.parametrize("name", NAMES)
CASES = [
    (name, comparison)
    for name in NAMES
    for comparison in (COMPARISONS if ANALYSES[name].per == "comparison" else COMPARISONS[:1])
]
EACH_COMPARISON = pytest.mark.parametrize(("name", "comparison"), CASES, ids=[".".join(c) for c in CASES])
QUESTIONS, POSITIONS, LAYERS = 12, 10, 4


def run_of(questions: int = QUESTIONS, seed: int = 0, depths: tuple[int, ...] = (2, 3, 4)) -> SimpleNamespace:
    """A run with every table, in all three comparisons; `within` has the steps between, too."""
    planted = Planted(share=0.3, persistence=0.3)
    pairs = pairs_table(questions, POSITIONS, LAYERS, depths, COMPARISONS, planted, seed=seed)
    steps = pairs[(pairs["comparison"] == "within") & (pairs["b"] > 2)]
    pairs = pd.concat([pairs, steps.assign(a=steps["b"] - 1)], ignore_index=True).astype(
        pairs.dtypes.to_dict()
    )
    outputs = outputs_table(pairs, seed=seed)
    rng = np.random.default_rng([seed, 9])
    steps = steps_table(outputs, (1, *depths), seed=seed)
    steps["token"] = pd.array(rng.integers(0, 50, len(steps)), dtype="Int32")
    right = rng.random((questions, 1 + len(depths))) < 0.6
    return SimpleNamespace(
        pairs=pairs, outputs=outputs, steps=steps, questions=questions_table(right, (1, *depths), seed=seed),
        noise=noise_of(pairs, rng), nudges=perturbations_of(outputs, pairs, rng),
    )  # fmt: skip


def noise_of(pairs: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Noise of both kinds at depths 1 and 4, a fifth of the change."""
    rows = pairs[(pairs["comparison"] == "teacher_forced") & (pairs["b"] == 4) & (pairs["question"] < 6)]
    columns = ["question", "position", "layer", "cosine", "relative_l2", "norm_a", "norm_b", "bf16_ratio"]
    tables = []
    for kind in NOISE_KINDS:
        for depth in (1, 4):
            size = rows["relative_l2"] / 5 * np.exp(0.2 * rng.normal(size=len(rows))).astype("float32")
            same = rows[columns].assign(kind=kind, depth=np.int8(depth), cosine=1 - size**2 / 2)
            tables.append(same.assign(relative_l2=size, bf16_ratio=256 * size))
    return pd.concat(tables, ignore_index=True)


def perturbations_of(outputs: pd.DataFrame, pairs: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Norm-matched perturbations of every site and direction at every output of six questions."""
    places = outputs.loc[outputs["question"] < 6].drop(columns="same_prefix")
    size = pairs.groupby(["question", "comparison", "position", "a", "b"], observed=True)[
        "relative_l2"
    ].last()
    places = places.merge(size.rename("size").reset_index())
    tables = []
    for site in SITES:
        for direction in DIRECTIONS:
            for seed in range(1 if direction == "true" else 2):
                flipped = rng.random(len(places)) < 0.2
                table = places.assign(
                    site=site, direction=direction, seed=np.int8(seed), argmax_changed=flipped
                )
                table["cosine"] = list((1 - 0.1 * rng.random((len(places), LAYERS))).astype("float32"))
                table["relative_l2"] = list(rng.random((len(places), LAYERS)).astype("float32"))
                tables.append(table.assign(winner_rank=flipped.astype(int)))
    return pd.concat(tables, ignore_index=True)


def token_class(ids) -> list[str]:
    return ["digit" if i < 10 else "word" for i in ids]


RUN = run_of()
BESIDE = {
    "blend_off": run_of(seed=1),
    "reshuffled": run_of(seed=2),
    "baseline": run_of(seed=3),
    "beyond": run_of(seed=4, depths=(2, 3, 4, 5)),
}


def ask(
    name: str, run: SimpleNamespace, comparison: str = "teacher_forced", beside=None, **options
) -> Result:
    """The answer of an analysis, with few resamples."""
    options = {"resamples": 40, "token_class": token_class} | options
    contrast = Contrast.of(run, comparison, beside=BESIDE if beside is None else beside, **options)
    with np.errstate(all="ignore"):
        return ANALYSES[name].call(contrast)


@lru_cache
def whole(name: str, comparison: str = "teacher_forced") -> Result:
    """The answer of an analysis for the run as it is."""
    return ask(name, RUN, comparison)


def works(result: Result) -> Result:
    """Everything that a report, a notebook and the command line do with a result."""
    assert isinstance(result, Result)
    assert result.verdict.endswith(".")
    assert result.title
    assert isinstance(result.table, pd.DataFrame)
    figures = result.figures()
    assert all(isinstance(figure, go.Figure) and figure.to_json() for figure in figures.values())
    assert isinstance(result.figure(), go.Figure)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["verdict"] == result.verdict
    assert "<table>" in result._repr_html_()
    return result


def works_or_says_why(name: str, run: SimpleNamespace, comparison: str = "teacher_forced", **options) -> None:
    """A result that works, or an `Untestable` with a reason."""
    try:
        result = ask(name, run, comparison, **options)
    except Untestable:
        return
    works(result)


def each_table(run: SimpleNamespace, change) -> SimpleNamespace:
    """The run with every table changed."""
    return SimpleNamespace(**{name: change(table) for name, table in vars(run).items()})


def same(one, other, where: str = "") -> None:
    """Two JSON values are equal, numbers to nine digits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(one, float) and isinstance(other, float):
        assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12), f"{where}: {one} and {other}"
    else:
        assert one == other, where


def test_the_registry_says_what_every_analysis_is():
    assert {
        "basin_shifts",
        "bimodality",
        "position_zero",
        "dwell",
        "content",
        "bf16_noise",
    } <= ANALYSES.keys()
    assert len({analysis.order for analysis in ANALYSES.values()}) == len(ANALYSES)
    for name, analysis in ANALYSES.items():
        assert analysis.name == name
        assert analysis.heading[0].isupper()
        assert analysis.asks.endswith("?")
        assert set(analysis.needs) <= vars(RUN).keys()


@EACH_COMPARISON
def test_a_whole_run_has_a_result_that_works(name, comparison):
    result = works(whole(name, comparison))
    assert not result.table.empty
    answer = re.split(r"[.:;] ", result.verdict)[0]
    assert len(answer.split()) <= 12, f"more than twelve words that answer: {answer}"


@EACH_COMPARISON
def test_figures_name_what_is_compared_and_how_many_questions(name, comparison):
    result = whole(name, comparison)
    assert set(ANALYSES[name].captions) <= result.figures().keys()
    for figure in result.figures().values():
        title = str(figure.to_dict()["layout"]["title"])
        if ANALYSES[name].per == "comparison":
            assert getattr(result, "words", comparison) in title or "not testable" in title
        assert "question" in title or "not testable" in title
        assert figure.layout.xaxis.title.text or figure.layout.yaxis.title.text or "not testable" in title


@EACH_COMPARISON
def test_the_same_twice_and_in_any_order_of_rows(name, comparison):
    def mixed(table):
        return table.sample(frac=1, random_state=1).reset_index(drop=True)

    beside = {role: each_table(run, mixed) for role, run in BESIDE.items()}
    first = whole(name, comparison).to_dict()
    assert ask(name, RUN, comparison).to_dict() == first
    same(ask(name, each_table(RUN, mixed), comparison, beside=beside).to_dict(), first)


@EACH
def test_the_numbering_of_questions_and_categories_change_nothing(name):
    def changed(table):
        table = table.assign(question=(table["question"] * 3 + 7).astype("int32"))
        return (
            table.assign(comparison=pd.Categorical(table["comparison"])) if "comparison" in table else table
        )

    beside = {role: each_table(run, changed) for role, run in BESIDE.items()}
    other = ask(name, each_table(RUN, changed), beside=beside)
    assert other.verdict == whole(name).verdict


@pytest.mark.parametrize(
    "name", [name for name, analysis in ANALYSES.items() if analysis.per == "comparison"]
)
def test_comparisons_are_never_pooled(name):
    def alone(table):
        return table[table["comparison"] == "teacher_forced"] if "comparison" in table else table

    assert ask(name, each_table(RUN, alone)).to_dict() == whole(name).to_dict()


@EACH
def test_some_overlaps_that_are_missing_cost_no_more_than_those(name):
    holes = RUN.pairs.copy()
    gone = np.random.default_rng(0).random(len(holes)) < 0.1
    holes.loc[gone, ["cosine", "relative_l2", "bf16_ratio"]] = np.nan
    works(ask(name, SimpleNamespace(**vars(RUN) | {"pairs": holes})))


@EACH
@pytest.mark.parametrize(
    "change",
    [
        {"cosine": np.nan, "relative_l2": np.nan, "bf16_ratio": np.nan},
        {"cosine": 1.0, "relative_l2": 0.0, "bf16_ratio": 0.0},
        {"cosine": 0.1, "relative_l2": 1.5},
        {"layer": 0},
        {"position": 0},
    ],
    ids=["nothing is known", "nothing moves", "all shift", "one layer", "one position"],
)
def test_an_extreme_run_has_a_result_or_a_reason(name, change):
    keys = ["question", "comparison", "position", "layer", "a", "b"]
    pairs = RUN.pairs.assign(**change).astype(RUN.pairs.dtypes.to_dict()).drop_duplicates(keys)
    works_or_says_why(name, SimpleNamespace(**vars(RUN) | {"pairs": pairs}))


@EACH_COMPARISON
def test_one_question_has_a_result_without_intervals_or_a_reason(name, comparison):
    one = each_table(RUN, lambda table: table[table["question"] == 3])
    works_or_says_why(name, one, comparison, beside={role: one for role in BESIDE})
    works_or_says_why(name, one, comparison, beside={})


@EACH
def test_without_rows_and_with_one_depth_it_is_untestable(name):
    for rows in (lambda t: t[:0], lambda t: t[t["depth"] == 1] if "depth" in t else t[:0]):
        with pytest.raises(Untestable):
            ask(name, each_table(RUN, rows), beside={})


@EACH
def test_without_a_table_that_it_needs_it_is_untestable_and_without_another_it_works(name):
    for table in vars(RUN):
        run = SimpleNamespace(**vars(RUN) | {table: None})
        if table in ANALYSES[name].needs:
            with pytest.raises(Untestable):
                ask(name, run, beside={})
        else:
            works(ask(name, run))
    works(ask(name, RUN, beside={}, token_class=None))


@EACH
def test_an_overlap_or_a_comparison_that_is_not_there_is_an_error_to_read(name):
    with pytest.raises(SSTError, match="unknown comparison"):
        ask(name, RUN, "fre")
    if "pairs" in ANALYSES[name].needs and ANALYSES[name].per == "comparison":
        works_or_says_why(name, RUN, choices=Choices(overlap="relative_l2", threshold=0.9))
