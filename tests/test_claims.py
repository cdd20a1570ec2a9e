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
from sst_interp.experiments.studies.errors import ApproximationError
from sst_interp.findings.answers import blend_weights, learned_blend, two_pass_error
from sst_interp.findings.claims import (
    CLAIMS,
    EVERYWHERE,
    FAILS,
    HOLDS,
    LEAST,
    UNTESTED,
    Claim,
    Evidence,
    Finding,
    Row,
    claim,
    judged,
    reaches,
    too_wide,
)
from sst_interp.findings.ledger import FAILED, claims
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


def states(ledger, claim):
    return {row.comparison: row.state for row in ledger.rows if row.claim.id == claim}


def finding(ledger, claim, comparison="teacher_forced"):
    return next(r.finding for r in ledger.rows if (r.claim.id, r.comparison) == (claim, comparison))


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
    run = run_of(pairs_of(planted=Planted(share=0.14, shifted=0.7)), ranks=(90, 2))
    return claims(run, baseline=baseline, alpha=blend_weights(alpha, 0.02), resamples=FEW)


def test_planted_effects_hold(planted):
    for name in ("C1", "C2", "C4", "C5", "C7"):
        assert states(planted, name)["teacher_forced"] == HOLDS, finding(planted, name)
    assert states(planted, "C10") == {EVERYWHERE: HOLDS}
    assert states(planted, "C14") == {EVERYWHERE: HOLDS}
    assert finding(planted, "C1").figure.estimate == pytest.approx(0.14, abs=0.05)
    assert "moved by +0.00" in finding(planted, "C14", EVERYWHERE).control
    # An oracle of answers that only ever get worse is the first depth, and no better than blind new guesses.
    assert states(planted, "C11") == {EVERYWHERE: FAILS}


def test_every_claim_has_its_rows_and_every_analysis_its_result(planted):
    table = planted.table
    for name, entry in CLAIMS.items():
        if entry.per == "comparison":
            assert table.loc[table["claim"] == name, "comparison"].tolist() == list(COMPARISONS)
    assert table["claim"].unique().tolist() == [f"C{i}" for i in (*range(1, 12), 14, 15)]
    assert planted.failed == {}
    assert list(planted.missing) == ["state_settling"], "it needs four iterations"
    assert list(planted.results) == keys()[:-1]
    assert (table[["paper", "this run", "holds if", "verdict"]] != "").all(axis=None)
    known = table["verdict"].isin([HOLDS, FAILS]) | table["verdict"].str.startswith(f"{UNTESTED}: ")
    assert known.all()
    tested = table[table["verdict"].isin([HOLDS, FAILS])]
    assert (tested["control"] != "").all()
    assert (tested.loc[tested["claim"] != "C14", "questions"] >= LEAST).all()
    finite = tested.dropna(subset=["low"])
    assert ((finite["low"] <= finite["estimate"]) & (finite["estimate"] <= finite["high"])).all()
    assert sum(planted.counts.values()) == len(table)


def test_a_quiet_run_refutes_what_it_can_and_makes_up_nothing():
    planted = Planted(share=0, stable=0.0005)
    quiet = run_of(pairs_of(planted=planted), correct=(0.6, 0.6, 0.6), changed=(0, 0))
    ledger = claims(quiet, resamples=FEW)
    for name in ("C1", "C2", "C3", "C8"):
        assert set(states(ledger, name).values()) == {FAILS}, name
    for name, why in (("C4", "no position shifts"), ("C5", "never changes"), ("C6", "never changes")):
        assert why in finding(ledger, name).verdict
    assert states(ledger, "C10") == {EVERYWHERE: FAILS}
    assert finding(ledger, "C11", EVERYWHERE).verdict == (
        "not testable: no run of the matched baseline was given"
    )


def test_noise_as_large_as_the_change_refutes_it(only):
    only("bf16_noise")
    run = run_of(pairs_of())
    assert states(claims(run, resamples=FEW), "C7")["teacher_forced"] == HOLDS
    run.noise = run.noise.assign(relative_l2=50 * run.noise["relative_l2"])
    assert states(claims(run, resamples=FEW), "C7")["teacher_forced"] == FAILS


def test_comparisons_are_not_pooled(only):
    """Shifts planted in one comparison count in that one alone."""
    only("basin_shifts", "position_zero")
    pairs = pairs_of(planted=Planted(share=0.14))
    first = (pairs["position"] == 0) & (pairs["comparison"] == "teacher_forced") & (pairs["layer"] == 1)
    ledger = claims(run_of(pairs.assign(cosine=pairs["cosine"].mask(first, 0.3))), resamples=FEW)
    assert states(ledger, "C8")["teacher_forced"] == HOLDS
    assert states(ledger, "C8")["free_running"] == FAILS
    assert "free_running" in ledger.differ["C8"][FAILS]
    assert "The comparison decides" in ledger.verdict
    assert "C8 (holds: teacher-forced; does not hold:" in ledger.verdict
    alone = run_of(pairs)
    alone.pairs = alone.pairs[alone.pairs["comparison"] == "teacher_forced"]
    only = claims(alone, resamples=FEW)
    whole = claims(run_of(pairs), resamples=FEW)
    assert finding(only, "C1").here == finding(whole, "C1").here
    assert set(states(only, "C1").values()) == {finding(whole, "C1").verdict, UNTESTED}


def test_the_state_that_moves_with_the_argmax_is_not_before_it(only):
    """Shifts planted at the step before the argmax changes hold; argmax changes without a shift do not."""
    only("precedence")
    rng = np.random.default_rng(0)
    pairs = pairs_of(planted=Planted(share=0, stable=0.0005))
    chosen = rng.random((24, 12)) < 0.3
    at = chosen[pairs["question"], pairs["position"]]
    pairs = pairs.assign(cosine=pairs["cosine"].mask(at, 0.4))
    run = run_of(pairs)
    here = chosen[run.outputs["question"], run.outputs["position"]]
    later = here & (run.outputs["b"] == 4).to_numpy()
    run.outputs = run.outputs.assign(argmax_changed=later, winner_rank=later.astype(int))
    ledger = claims(run, resamples=FEW)
    assert states(ledger, "C6") == dict.fromkeys(COMPARISONS, HOLDS)
    run.outputs = run.outputs.assign(argmax_changed=~here, winner_rank=(~here).astype(int))
    assert states(claims(run, resamples=FEW), "C6") == dict.fromkeys(COMPARISONS, FAILS)


def test_accuracy_of_blind_guesses_cannot_be_broken(only):
    only("overthinking")
    ledger = claims(run_of(pairs_of(), correct=(0.25, 0.1, 0.05)), resamples=FEW)
    assert "not above blind guessing (25.0%)" in finding(ledger, "C10", EVERYWHERE).verdict


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
    assert len(ledger.rows) == 9 * 3 + 4
    json.dumps(ledger.to_dict(), allow_nan=False)
    assert [len(f.data) > 0 or len(f.layout.annotations) > 0 for f in ledger.figures().values()] == [True] * 2
    if name in ("one question", "one depth", "all NaN"):
        assert {row.claim.id for row in ledger.rows if row.state == HOLDS} <= {"C10"}  # it needs no pairs
        assert all(r.state == UNTESTED for r in ledger.rows if r.claim.id in ("C1", "C2", "C4", "C6", "C9"))
    if name == "one question":
        assert ledger.counts[UNTESTED] == len(ledger.rows)
        assert ledger.verdict.startswith("not testable: no row can be decided. 31 rows")
    if name == "all shifts":
        assert set(states(ledger, "C1").values()) == {FAILS}
        assert "no position is stable" in finding(ledger, "C4").verdict


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
        "steps": {"C4", "C5", "C9"},
        "noise": {"C7"},
        "nudges": {"C6"},
    }[table]
    said = {row.claim.id for row in ledger.rows if f"{table} is damaged" in row.finding.verdict}
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
    assert set(ledger.failed) == {f"token_replacement.{c}" for c in COMPARISONS}
    assert all(error.startswith("KeyError: ") for error in ledger.failed.values())
    assert "(output_change.py, line " in ledger.failed["token_replacement.free_running"]
    assert finding(ledger, "C4").verdict == finding(ledger, "C5").verdict == f"{UNTESTED}: {FAILED}"
    assert not finding(ledger, "C6").verdict.endswith(FAILED)
    assert "3 analyses failed" in ledger.verdict
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
        return Finding("no", judged(True, e("planted_crash")))

    ledger = claims(run_of(small()), resamples=20)
    keys = {f"planted_crash.{c}" for c in COMPARISONS}
    why = FAILED if failed else error.message
    assert {key: ledger.missing[key] for key in keys} == dict.fromkeys(keys, why)
    assert set(ledger.failed) == (keys if failed else set())
    assert all("\n" not in said and "(test_claims.py, line " in said for said in ledger.failed.values())
    assert finding(ledger, "X1").verdict == f"{UNTESTED}: {why}"
    assert ("3 analyses failed" in ledger.verdict) == failed


def test_a_claim_that_crashes_is_one_too(only):
    only()

    @claim("X2", "it can be read", "yes", "it can", per="run")
    def crashes(e: Evidence):
        return e.beside["nothing of the kind"]

    ledger = claims(run_of(small()), resamples=20)
    assert set(ledger.failed) == {"X2"}
    assert finding(ledger, "X2", EVERYWHERE).verdict == f"{UNTESTED}: {FAILED}"


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
        claim("C1", "another", "", "")(lambda e: Finding("", HOLDS))
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
    assert (first["verdict"] == second["verdict"]).all()
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
    assert "with the prompt read without the recurrence" in finding(ledger, "C8").control
    assert "second run" not in finding(ledger, "C9").control
    assert "another batch shape alone shifts 0.0%" in finding(ledger, "C1").control
    assert "on one text" in finding(ledger, "C1", "free_running").control
    assert "own prompt was read without" in finding(claims(off, resamples=20), "C8").control


def test_rows_measured_elsewhere_take_their_place(only):
    only()
    told = Claim("C12", "a probe tells", "29/48", "the AUC is above one half", 0.6)
    row = Row(told, EVERYWHERE, Finding("0.7", judged(True, Interval(0.7, 0.6, 0.8, 20)), control="null"))
    ids = claims(run_of(small()), more=[row], resamples=20).table["claim"].tolist()
    assert ids.index("C11") < ids.index("C12") < ids.index("C14")


def beside(**given):
    return Evidence(contrast(small()), {}, {}, given)


def test_learned_weights():
    def judge(alpha, **options):
        return learned_blend(beside(alpha=blend_weights(alpha), **options))

    assert judge(np.full((3, 4), 0.027)).verdict == (
        "not testable: all weights are equal: the blend was set, not learned"
    )
    assert judge([0.3, 0.4]).verdict == FAILS
    assert judge([0.015, 0.02, 0.1]).verdict == HOLDS
    for odd in ([], [math.nan, 0.02]):
        assert judge(odd).verdict.startswith(UNTESTED)
    with pytest.raises(Untestable, match="no blend weights"):
        learned_blend(beside())
    with pytest.raises(Untestable, match="a backbone has no blend"):
        judge([0.3, 0.4], no_blend="a backbone has no blend")


def approximation(low, high, n=20):
    row = {"model": "m", "layers": "all", "n_layers": 30, "alpha": 0.027, "groups": 1, "sweeps": 1}
    row |= {"argmax": 0.4, "loss_change": 0.1}
    return ApproximationError(
        pd.DataFrame([row]), pd.DataFrame(), headline={"m": Interval((low + high) / 2, low, high, n)}
    )


def test_the_two_pass_error_is_set_against_the_papers():
    def judge(*ends, **options):
        return two_pass_error(beside(approximation=approximation(*ends, **options)))

    for ends, state in (((0.2, 0.3), FAILS), ((1e-4, 1e-3), HOLDS), ((1e-3, 2e-3), UNTESTED)):
        [found] = judge(*ends)
        assert found.verdict.split(":")[0] == state
        assert "m, alpha 0.027 in 30 layers" in found.here
    assert judge(0.2, 0.3, n=2)[0].verdict.startswith(UNTESTED)
    with pytest.raises(Untestable, match="no measurement"):
        two_pass_error(beside())


def test_rules_decide_by_intervals():
    wide, few = Interval(0.2, 0.0, 0.9, 50), Interval(0.2, 0.15, 0.25, LEAST - 1)
    assert judged(True, few).startswith("not testable: 5 questions cannot")
    assert judged(True, Interval(0.2, math.nan, math.nan, 1, reason="one question")).endswith("one question")
    assert too_wide(wide, 0.1, 0.3) is not None
    assert too_wide(few, 0.1, 0.3) is None
    assert reaches(wide, 0.8, 0.95)
    assert not reaches(few, 0.3)
    assert (judged(True, wide), judged(False, wide)) == (HOLDS, FAILS)
