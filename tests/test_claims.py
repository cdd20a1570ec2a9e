import gc
import json
import math
import weakref

import numpy as np
import pandas as pd
import pytest
from synthetic import PAIR_TYPES, Planted, SyntheticRecipe, SyntheticRun, contrast, pairs_table
from synthetic_outputs import outputs_table, questions_table, steps_table

from sst_interp.analyses import contrast as contrast_module
from sst_interp.analyses import load
from sst_interp.analyses.result import analysis
from sst_interp.analyses.statistics.bootstrap import Interval
from sst_interp.errors import SSTError, Untestable
from sst_interp.findings.answers import BlendWeights, blend_weights, learned_blend, two_pass_error
from sst_interp.findings.claims import (
    CLAIMS,
    CONTRADICTED,
    EVERYWHERE,
    GRADES,
    INCOMPARABLE,
    INCONCLUSIVE,
    SATURATED,
    SUPPORTED,
    Claim,
    Evidence,
    Finding,
    Part,
    Row,
    claim,
    graded,
)
from sst_interp.findings.ledger import FAILED, after_holm, claims
from sst_interp.models.choices import COMPARISONS, Choices

DEPTHS = (1, 2, 4)
FEW = 200
"""Resamples: enough for these effects."""
NOISE = [c for c in PAIR_TYPES if c not in ("comparison", "a", "b", "same_prefix")]


def run_of(pairs, correct=(0.9, 0.7, 0.5), prompt="exact", seed=0, **effects):
    """A run with every table but nudges around a `pairs` table."""
    outputs = outputs_table(pairs, seed=seed, **effects)
    n = int(pairs["question"].max()) + 1 if len(pairs) else 0
    rng = np.random.default_rng([seed, 5])
    right = rng.random((n, 1)) < correct  # a right answer at a deeper depth was right at the first
    run = SyntheticRun("demo", pairs, questions_table(right, DEPTHS, seed=seed))
    run.recipe = SyntheticRecipe(choices=Choices(prompt=prompt), depths=DEPTHS)
    run.outputs, run.steps = outputs, steps_table(outputs, DEPTHS, seed=seed)
    rows = pairs[(pairs["comparison"] == "teacher_forced") & (pairs["b"] == 4)]
    noise = rows.assign(cosine=np.float32(0.9999), relative_l2=rows["relative_l2"] / 50)[NOISE]
    run.noise = pd.concat([noise.assign(kind=k, depth=np.int8(4)) for k in ("batch", "fp32")])
    run.nudges = pd.DataFrame()
    return run


def pairs_of(questions=24, seed=0, positions=12, layers=5, **options):
    return pairs_table(questions, positions, layers, (2, 4), COMPARISONS, seed=seed, **options)


def small():
    return pairs_of(questions=8, positions=6, layers=3)


def row_of(ledger, claim):
    return next(row for row in ledger.rows if row.claim.id == claim)


def finding(ledger, claim, comparison=None):
    row = row_of(ledger, claim)
    return row.finding if comparison in (None, row.comparison) else row.checks[comparison]


def grades(ledger, claim):
    """Of the comparison that decides, and of the checks."""
    row = row_of(ledger, claim)
    return {row.comparison: row.grade} | {name: found.grade for name, found in row.checks.items()}


def keys():
    """Analyses by comparison, then those of the run, as the registry orders them."""
    known = sorted(load().values(), key=lambda a: a.order)
    own = [f"{a.name}.{c}" for c in COMPARISONS for a in known if a.per == "comparison"]
    return own + [a.name for a in known if a.per == "run"]


@pytest.fixture(scope="module")
def planted():
    baseline = run_of(pairs_of(), correct=(0.3, 0.3, 0.3), seed=9)
    alpha = np.linspace(0.016, 0.09, 40) ** 1.0
    alpha[1:-1] = 0.025
    run = run_of(pairs_of(questions=60, planted=Planted(share=0.14, shifted=0.7)), ranks=(90, 2))
    return claims(run, baseline=baseline, alpha=blend_weights(alpha, 0.02), resamples=FEW)


def test_planted_effects_are_seen(planted):
    for name in ("C1", "C2"):
        assert grades(planted, name)["teacher_forced"] == SUPPORTED, finding(planted, name)
    assert finding(planted, "C1").figure.estimate == pytest.approx(0.14, abs=0.05)
    assert finding(planted, "C4").verdict.startswith("not comparable: at shifts beyond random changes")
    assert finding(planted, "C8").grade == CONTRADICTED, "position 0 is as any other"
    assert finding(planted, "C9").verdict == "not comparable: no second run was given"
    assert finding(planted, "C10").verdict == "inconclusive: 60 questions, and 260 are needed"
    assert "no re-draws were captured" in finding(planted, "C11").verdict
    assert finding(planted, "C14").verdict.startswith("not comparable: one start")


def test_every_claim_has_one_row_and_every_analysis_its_result(planted):
    table = planted.table
    assert table["claim"].tolist() == [f"C{i}" for i in (*range(1, 12), 14, 15)]
    for name, entry in CLAIMS.items():
        if entry.per == "comparison":
            assert row_of(planted, name).comparison == "teacher_forced"
            assert set(row_of(planted, name).checks) == set(COMPARISONS) - {"teacher_forced"}
    assert planted.failed == {}
    assert list(planted.missing) == ["state_settling"], "it needs four iterations"
    assert list(planted.results) == keys()[:-1]
    assert (table[["paper", "this run", "supported if", "grade"]] != "").all(axis=None)
    assert table["grade"].isin(GRADES).all()
    assert (table.loc[~table["grade"].isin((SUPPORTED, CONTRADICTED)), "why"] != "").all()
    assert (table["this run"].str.count(";") <= 2).all(), "at most three numbers"
    finite = table.dropna(subset=["low"])
    assert ((finite["low"] <= finite["estimate"]) & (finite["estimate"] <= finite["high"])).all()
    assert sum(planted.counts.values()) == len(table)
    assert planted.verdict.endswith("13 claims, 60 questions; teacher-forced text decides.")


def test_a_quiet_run_contradicts_what_it_can_and_makes_up_nothing():
    planted = Planted(share=0, stable=0.0005)
    quiet = run_of(pairs_of(questions=60, planted=planted), correct=(0.6, 0.6, 0.6), changed=(0, 0))
    ledger = claims(quiet, resamples=FEW)
    for name in ("C1", "C2", "C8"):
        assert grades(ledger, name)["teacher_forced"] == CONTRADICTED, name
    for name, why in (("C3", "no pair shifts"), ("C5", "never changes"), ("C6", "never changes")):
        assert finding(ledger, name).verdict.startswith(INCOMPARABLE)
        assert why in finding(ledger, name).verdict


def test_one_comparison_decides_and_the_others_are_checks(only):
    """Shifts planted in one comparison count in that one alone."""
    only("basin_shifts")
    pairs = pairs_of(questions=60, planted=Planted(share=0.14))
    first = (pairs["position"] == 0) & (pairs["comparison"] == "teacher_forced")
    ledger = claims(run_of(pairs.assign(cosine=pairs["cosine"].mask(first, 0.3))), resamples=FEW)
    assert grades(ledger, "C8") == {
        "teacher_forced": SUPPORTED, "within": CONTRADICTED, "free_running": CONTRADICTED
    }  # fmt: skip
    assert "within contradicted; free-running contradicted" in row_of(ledger, "C8").checked
    alone = run_of(pairs)
    alone.pairs = alone.pairs[alone.pairs["comparison"] == "within"]
    without = claims(alone, resamples=FEW)
    assert grades(without, "C1")["teacher_forced"] == INCOMPARABLE
    assert grades(without, "C1")["within"] != INCOMPARABLE


def test_free_running_counts_while_both_have_read_the_same_tokens(only):
    only("basin_shifts")
    pairs = pairs_of(questions=60, planted=Planted(share=0.14))  # nothing shifts before the texts part
    ledger = claims(run_of(pairs), resamples=FEW)
    assert finding(ledger, "C1", "free_running").figure.estimate < 0.02
    assert finding(ledger, "C1", "within").figure.estimate > 0.1


def test_accuracy_of_blind_guesses_cannot_be_broken(only):
    only("overthinking")
    ledger = claims(run_of(pairs_of(), correct=(0.25, 0.1, 0.05)), resamples=FEW)
    assert "not above blind guessing (25.0%)" in finding(ledger, "C10").verdict


ODD = {
    "one question": lambda p: p[p["question"] == 0],
    "one depth": lambda p: p.iloc[:0],
    "all shifts": lambda p: p.assign(cosine=np.float32(0.5)),
    "bit-identical": lambda p: p.assign(cosine=np.float32(1), relative_l2=0.0, bf16_ratio=0.0),
    "one layer": lambda p: p[p["layer"] == 0],
    "one position": lambda p: p[p["position"] == 0],
    "no position 0": lambda p: p[p["position"] > 0],
    "a NaN in ten": lambda p: p.assign(cosine=p["cosine"].mask(np.arange(len(p)) % 10 == 0)),
    "all NaN": lambda p: p.assign(cosine=np.float32(np.nan), relative_l2=np.nan, bf16_ratio=np.nan),
    "one comparison": lambda p: p[p["comparison"] == "within"],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_give_a_ledger(name):
    pairs = small()
    run = run_of(pairs)
    run.pairs = ODD[name](pairs).reset_index(drop=True)
    if name == "one question":
        for table in ("outputs", "steps", "questions", "noise"):
            setattr(run, table, getattr(run, table).query("question == 0"))
    if name == "one depth":
        run.outputs, run.questions = run.outputs.iloc[:0], run.questions.query("depth == 1")
    ledger = claims(run, resamples=50)
    assert ledger.failed == {}
    assert len(ledger.rows) == 13
    json.dumps(ledger.to_dict(), allow_nan=False)
    assert [len(f.data) > 0 or len(f.layout.annotations) > 0 for f in ledger.figures().values()] == [True] * 2
    decided = {row.claim.id for row in ledger.rows if row.grade in (SUPPORTED, CONTRADICTED)}
    assert not decided, "8 questions decide nothing"


@pytest.mark.parametrize("table", ["pairs", "outputs", "steps", "questions", "noise", "nudges"])
def test_a_missing_table_costs_only_what_needs_it(table):
    run = run_of(small())

    class Broken(SyntheticRun):
        def __getattribute__(self, name):
            if name == table:
                raise SSTError(f"{table} is damaged")
            return super().__getattribute__(name)

    broken = object.__new__(Broken)
    broken.__dict__.update(run.__dict__)
    ledger = claims(broken, resamples=50)
    needing = {
        "pairs": {"C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9"},
        "outputs": {"C4", "C5", "C6"},
        "questions": {"C10", "C11"},
        "steps": set(),
        "noise": {"C7"},
        "nudges": {"C4", "C5", "C6"},
    }[table]
    said = {
        row.claim.id for row in ledger.rows
        if f"{table} is damaged" in row.finding.verdict
    }  # fmt: skip
    assert said == needing
    assert ledger.failed == {}
    delattr(run, table) if table in ("noise", "nudges") else setattr(run, table, pd.DataFrame())
    assert len(claims(run, resamples=50).rows) == len(ledger.rows)


def test_a_crash_is_not_a_finding(only):
    """A column that is missing is a run of another making: a KeyError, and said to be one."""
    only("token_replacement", "precedence")
    run = run_of(small())
    run.outputs = run.outputs.drop(columns="replaced")
    ledger = claims(run, resamples=50)
    keys = {f"{name}.{c}" for c in COMPARISONS for name in ("token_replacement", "C4")}
    assert set(ledger.failed) == keys
    assert all(error.startswith("KeyError: ") for error in ledger.failed.values())
    assert "(output_change.py, line " in ledger.failed["token_replacement.free_running"]
    assert finding(ledger, "C4").verdict == f"{INCOMPARABLE}: {FAILED}"
    assert not finding(ledger, "C6").verdict.endswith(FAILED)
    assert "analyses failed" in ledger.verdict
    assert ledger.to_dict()["failed"] == ledger.failed


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (TypeError("of two\n kinds"), True),
        (ZeroDivisionError(), True),
        (SSTError("pairs/0000 is damaged"), False),
        (Untestable("three depths are needed"), False),
    ],
)
def test_what_an_analysis_raises_is_told_apart(only, error, failed):
    only()

    @analysis("Planted", "Does it crash?", claims=("X1",))
    def planted_crash(c):
        raise error

    @claim("X1", "it does not crash", "never", "it does not")
    def not_crashed(e: Evidence):
        return graded(Part("no", e("planted_crash")))

    ledger = claims(run_of(small()), resamples=20)
    keys = {f"planted_crash.{c}" for c in COMPARISONS}
    why = FAILED if failed else error.message
    assert {key: ledger.missing[key] for key in keys} == dict.fromkeys(keys, why)
    assert set(ledger.failed) == (keys if failed else set())
    assert all("\n" not in said and "(test_claims.py, line " in said for said in ledger.failed.values())
    assert finding(ledger, "X1").verdict == f"{INCOMPARABLE}: {why}"
    assert ("3 analyses failed" in ledger.verdict) == failed


def test_a_claim_that_crashes_is_one_too(only):
    only()

    @claim("X2", "it can be read", "yes", "it can", per="run")
    def crashes(e: Evidence):
        return e.beside["nothing of the kind"]

    ledger = claims(run_of(small()), resamples=20)
    assert set(ledger.failed) == {"X2"}
    assert finding(ledger, "X2").verdict == f"{INCOMPARABLE}: {FAILED}"


def test_too_little_memory_is_no_finding_either(only):
    only()

    @analysis("Greedy", "How much memory is there?", per="run")
    def greedy(c):
        raise MemoryError

    with pytest.raises(SSTError, match="not enough memory for greedy with 200 resamples") as error:
        claims(run_of(small()), resamples=200)
    assert "--resamples 20" in error.value.hint


@pytest.mark.parametrize("options", [{"resamples": 1}, {"seed": -5}, {"nudged": None}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(SSTError):
        claims(run_of(small()), **options)


def test_a_name_belongs_to_one_module(registries):
    with pytest.raises(SSTError, match="two claims are called 'C1'"):
        claim("C1", "another", "", "")(lambda e: Finding(SUPPORTED))
    with pytest.raises(SSTError, match="two analyses are called 'precedence'"):
        analysis("Another", "", name="precedence")(lambda c: None)


def test_one_comparison_is_held_at_a_time_and_its_modes_are_found_once(only, monkeypatch):
    only("basin_shifts", "layer_profile", "dwell")
    held, alive, found = [], [], []
    find_modes = contrast_module.find_modes
    monkeypatch.setattr(contrast_module, "find_modes", lambda *a, **b: found.append(1) or find_modes(*a, **b))

    @analysis("Held", "Is the one before still there?", order=0)
    def keeps(c):
        gc.collect()
        alive.extend(one() is not None for one in held)
        held.append(weakref.ref(c))
        raise Untestable("it only looks")

    claims(run_of(small()), resamples=20)
    assert alive == [False] * 3
    assert len(found) == len(COMPARISONS)


def test_rows_in_any_order_and_a_second_time_give_the_same_ledger():
    run = run_of(small())
    first = claims(run, resamples=50).table
    run.pairs = run.pairs.sample(frac=1, random_state=0).reset_index(drop=True)
    run.outputs = run.outputs.sample(frac=1, random_state=1).reset_index(drop=True)
    second = claims(run, resamples=50).table
    assert (first["grade"] == second["grade"]).all()
    assert np.allclose(first["estimate"], second["estimate"], equal_nan=True)


def test_progress_counts_up_to_the_number_of_analyses():
    told = []
    ledger = claims(run_of(small()), resamples=20, progress=lambda *now: told.append(now))
    done = [now[0] for now in told]
    assert done == sorted(done)
    of = len(keys())
    assert told[-1] == (of, of, "done")
    assert {name for _, _, name in told[:-1]} == set(ledger.results) | set(ledger.missing)


def test_controls_are_beside_the_figure(only):
    only("basin_shifts", "position_zero", "content", "divergence")
    run = run_of(pairs_of(planted=Planted(share=0.3)))
    off = run_of(pairs_of(planted=Planted(share=0.3), seed=1), prompt="blend_off")
    ledger = claims(run, blend_off=off, reshuffled=off, resamples=FEW)
    assert "with the prompt read without recurrence" in finding(ledger, "C8").control
    assert "of the same question" in finding(ledger, "C9").control
    assert "noise alone shifts 0.0% (24 questions)" in finding(ledger, "C1").control


def test_rows_measured_elsewhere_take_their_place(only):
    only()
    told = Claim("C12", "a probe tells", "29/48", "the AUC is above one half", 0.6)
    row = Row(told, EVERYWHERE, graded(Part("AUC", Interval(0.7, 0.6, 0.8, 30), low=0.5), note="null"))
    ids = claims(run_of(small()), more=[row], resamples=20).table["claim"].tolist()
    assert ids.index("C11") < ids.index("C12") < ids.index("C14")


def beside(**given):
    return Evidence(contrast(small()), {}, {}, given)


def test_learned_weights():
    def judge(*given, **options):
        return learned_blend(beside(alpha=given, **options))

    free = [BlendWeights(0.027, 0.015, 0.1, start) for start in (0.01, 0.05)]
    assert judge(*free).grade == SUPPORTED
    assert judge(*(weights._replace(largest=0.4) for weights in free)).grade == CONTRADICTED
    assert judge(free[0], free[1]._replace(largest=0.4)).grade == INCONCLUSIVE
    for odd, why in (
        ([blend_weights(np.full((3, 4), 0.027), 0.01)], "set, not learned"),
        ([free[0]], "one start"),
        ([free[0], free[1]._replace(start=0.015)], "one start"),
        ([free[0], free[1]._replace(bounds=(0.015, 0.1))], "between 0.015 and 0.1"),
        ([blend_weights([])], "not all numbers"),
        ([blend_weights([math.nan, 0.02])], "not all numbers"),
    ):
        found = judge(*odd)
        assert found.grade == INCOMPARABLE
        assert why in found.verdict
    with pytest.raises(Untestable, match="no blend weights"):
        learned_blend(beside())
    with pytest.raises(Untestable, match="a backbone has no blend"):
        judge(*free, no_blend="a backbone has no blend")


def errors_of(slope, alphas=(0.005, 0.01, 0.027, 0.05), texts=8, noise=0.05):
    """Two-pass errors that go as alpha to the power of `slope`."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "method": "sweeps", "groups": 1, "sweeps": 1, "reference": "layerwise", "n_layers": 30,
            "alpha": alpha, "alpha_low": alpha, "alpha_high": alpha, "question": text, "norm2": 1.0,
            "positions": 1,
            "error2": (alpha**slope * np.exp(noise * rng.normal())) ** 2,
            "state": alpha**slope * np.exp(noise * rng.normal()),
        }
        for text in range(texts) for alpha in alphas
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_order_of_the_two_pass_error_is_its_slope():
    def judge(*given, **options):
        return two_pass_error(beside(approximation=errors_of(*given, **options)))

    assert judge(2.0).grade == SUPPORTED
    assert judge(1.2).grade == CONTRADICTED
    assert judge(1.7, noise=0.3).grade == INCONCLUSIVE
    assert judge(2.0, texts=4).verdict == "inconclusive: 4 texts, and 8 are needed"
    with pytest.raises(Untestable, match="4 alphas are needed"):
        judge(2.0, alphas=(0.01, 0.027))
    with pytest.raises(Untestable, match="no two-pass error"):
        two_pass_error(beside())


def between(least, most, n=100, **region):
    return Part("it", Interval((least + most) / 2, least, most, n), **region)


def test_an_interval_inside_supports_and_one_outside_contradicts():
    region = {"low": 0.1, "high": 0.3}
    assert graded(between(0.15, 0.25, **region)).grade == SUPPORTED
    assert graded(between(0.31, 0.5, **region)).grade == CONTRADICTED
    assert graded(between(0.05, 0.25, **region)).grade == INCONCLUSIVE
    assert graded(between(0.0, 0.9, **region)).grade == INCONCLUSIVE, "few questions make nothing easier"
    assert (
        graded(between(0.15, 0.25, n=23, **region)).verdict == "inconclusive: 23 questions, and 24 are needed"
    )
    assert graded(between(0.15, 0.25, **region), saturated="a placebo does").grade == SATURATED
    assert graded(between(0.15, 0.25, **region), why="at chance").verdict == "not comparable: at chance"
    assert graded(between(0.15, 0.25, **region), p=0.06).grade == INCONCLUSIVE


def test_without_its_control_a_claim_can_be_contradicted_and_not_supported():
    gone = Part("beyond random", Interval(math.nan, math.nan, math.nan, 0, reason="not captured"), low=0)
    assert (
        graded(between(1, 2, low=0.5), control=gone).verdict == "not comparable: beyond random: not captured"
    )
    assert graded(between(0.1, 0.2, low=0.5), control=gone).grade == CONTRADICTED
    assert graded(between(1, 2, low=0.5), control=between(0.1, 0.3, low=0)).grade == SUPPORTED
    assert graded(between(1, 2, low=0.5), control=between(-0.3, -0.1, low=0)).grade == CONTRADICTED
    assert graded(between(1, 2, low=0.5), control=between(-0.1, 0.3, low=0)).grade == INCONCLUSIVE


def test_inconclusive_says_how_many_questions_would_decide():
    # Half the distance to the end: four times as many questions.
    found = graded(between(-0.1, 0.3, n=100, low=0))
    assert found.verdict == "inconclusive: about 400 questions would decide"
    apart = graded(between(-0.1, 0.02, n=50, low=0))
    assert apart.verdict == "inconclusive: about 120 questions would decide"
    assert "hardly" in graded(between(-0.1, 0.1, low=0)).verdict


def test_holm_over_the_claims_with_a_p_value():
    rows = [
        Row(Claim(f"C{i}", "", "", ""), EVERYWHERE, Finding(SUPPORTED, p=p))
        for i, p in enumerate((0.03, 0.001, math.nan), 1)
    ]
    assert [row.grade for row in after_holm(rows)] == [SUPPORTED] * 3
    more = [*rows, Row(Claim("C4", "", "", ""), EVERYWHERE, Finding(CONTRADICTED, p=0.9))]
    third = after_holm(more)[0]
    assert third.finding.verdict == "inconclusive: p = 0.03 is 0.06 after Holm over 3 claims"
    aside = [*rows, Row(Claim("C4", "", "", ""), EVERYWHERE, Finding(INCOMPARABLE, p=0.9))]
    assert after_holm(aside)[0].grade == SUPPORTED
