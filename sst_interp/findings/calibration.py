"""How often do the rules of the claims err? Runs with known truths are simulated and judged by the rules
themselves.

    sst-interp study run calibration --seeds 200

A *world* says what is true: one as the paper describes its model, and worlds in which a claim is false in
the way that is hardest to tell. Questions differ, layers go together (an autoregression of 0.9), and only
the tables that a claim reads are made. The study goes on where it was stopped: a batch of replicates of
one world and size is one job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from scipy.stats import norm

from sst_interp.analyses.answers import answers_of
from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.plots import Dot, dots
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import Interval, percent_text
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.patching.finding import size_regression
from sst_interp.experiments.probe.fit import Design, Inputs
from sst_interp.experiments.probe.routing import Costs, Routed, scored
from sst_interp.experiments.probe.validate import auc_in_folds
from sst_interp.experiments.studies.study import Finding as Found
from sst_interp.experiments.studies.study import Progress, Study, register_study
from sst_interp.experiments.table import Table
from sst_interp.findings import state  # noqa: F401 (it registers claims)
from sst_interp.findings.answers import folds_grade, routed_grade
from sst_interp.findings.claims import (
    CONTRADICTED,
    GRADES,
    SUPPORTED,
    Evidence,
    Finding,
    Part,
    graded,
    number,
)
from sst_interp.tables import markdown

SIZES, ANSWERED = (24, 50, 198), (24, 50, 198, 1000)
BATCH, REPLICATES = 10, 200
RESAMPLES = 199
"""Of the tests of one simulated run: enough for p < 0.05, and the intervals need none."""
POSITIONS, LAYERS, STEPS = 24, 4, 3
ALPHAS = (0.005, 0.01, 0.027, 0.05, 0.1)


CONTENT = 0.17  # of `State.content`: a correlation of 0.09 beyond position where 29% shift


class State(NamedTuple):
    """A world of states, as the paper describes its model unless something else is said."""

    share: float = 0.105
    """Of the positions that shift, in nearly all of their layers; with position 0 that is 14%."""
    far: float = 0.4
    """1 - overlap in the middle of the lower mode; its 1% quantile is 0.30."""
    modes: str = "two"
    """`two`; `one` mode, of which 0.99 cuts off the same share; or one with a `tail` of that share."""
    content: float = 0.7
    """How much of where a question shifts is shared with its reshuffled second run."""
    first: bool = True
    """Whether position 0 shifts in every question."""
    smooth: bool = False
    """Whether argmax and tokens only read off a distance that grows in step, as for random changes of its
    norm.
    """
    noise: float = 2.0
    """Of another batch shape, in bf16 roundings, as `change`."""
    change: float = 15.0
    deepest: float = 2.0
    """The deepest layer's change over that of the others."""


class World(NamedTuple):
    """What is true, which claims are judged in it, and at which sizes."""

    words: str
    judge: Callable[[np.random.Generator, int, Sequence[str]], dict[str, Finding]]
    """(random numbers, questions, claims) -> findings."""
    claims: tuple[str, ...]
    true: bool = False
    """Whether these claims are true in it."""
    sizes: tuple[int, ...] = SIZES


def states(world: State) -> Callable[[np.random.Generator, int, Sequence[str]], dict[str, Finding]]:
    """Judges claims about the state in a world."""

    def judge(rng: np.random.Generator, n: int, claims: Sequence[str]) -> dict[str, Finding]:
        run, again = simulated(rng, n, world)
        c = Contrast.of(run, "teacher_forced", resamples=RESAMPLES, beside={"reshuffled": again})
        e = Evidence(c)
        return {id: e.finding(id) for id in claims}

    return judge


def layered(rng: np.random.Generator, n: int) -> np.ndarray:
    """Standard normal [question, position, layer]: layers go together, and each question has a part of its
    own.
    """
    own = rng.normal(size=(n, POSITIONS, LAYERS))
    for layer in range(1, LAYERS):
        own[..., layer] = 0.9 * own[..., layer - 1] + np.sqrt(1 - 0.81) * own[..., layer]
    parts = ((n, 1, 1), 0.4), ((n, POSITIONS, 1), 0.4), ((n, 1, LAYERS), 0.2)
    return 0.8 * own + sum(weight * rng.normal(size=shape) for shape, weight in parts)


def simulated(rng: np.random.Generator, n: int, world: State) -> tuple[Any, Any]:
    """The tables of a run of n questions, and of its second run."""
    shape = n, POSITIONS
    shared, z = rng.normal(size=shape), layered(rng, n)
    level = norm.ppf(world.share) * np.sqrt(1.16)

    def shifts() -> np.ndarray:
        own = np.sqrt(world.content) * shared + np.sqrt(1 - world.content) * rng.normal(size=shape)
        moved = own + 0.4 * rng.normal(size=(n, 1)) < level
        moved[:, 0] |= world.first
        return moved

    moved = shifts()
    start = rng.choice(STEPS, p=(0.5, 0.3, 0.2), size=shape)
    begun = moved[..., None] & (start[..., None] <= np.arange(STEPS))  # [question, position, step]
    few = rng.random(z.shape) < 0.02  # layers that do not go along
    u = np.empty((STEPS, *z.shape))
    far = world.modes == "two" and not world.smooth
    for k in range(STEPS):
        stable = 0.003 * np.exp(0.5 * z) * (0.8 + 0.1 * k)
        if world.modes == "one":  # the 14% below 0.99 are the end of one spread
            stable = 0.01 * np.exp(1.1 * (z + level / np.sqrt(1.16))) * (0.8 + 0.1 * k)
        u[k] = stable
        if far:
            u[k] = np.where(begun[..., k, None] & ~few, world.far * np.exp(0.24 * layered(rng, n)), stable)
        if world.modes == "tail":
            u[k] = np.where(begun[..., k, None] & ~few, rng.random(z.shape), stable)
        if world.smooth:
            grown = np.exp(0.3 * rng.normal(size=(*shape, 1))) * (0.6 + 0.2 * k)
            u[k] = 0.006 * grown * np.exp(z)
    u = np.minimum(u, 2)
    last = u[..., -1]  # [step, question, position]
    told = rng.random(shape) < 0.95
    argmax = np.stack([moved & told & (start + 1 <= k) for k in range(STEPS)])
    flips = last * np.exp(0.4 * rng.normal(size=last.shape)) > np.quantile(last[-1], 0.85)
    tokens = np.where(moved & far, rng.normal(54, 10, shape), rng.poisson(1, shape))
    by_distance = 54 * (1 - np.exp(-((last[-1] / 0.01) ** 4)))
    deep = np.ceil(50 * rng.random(last.shape) ** 3).astype(int)
    shallow = np.ceil(10 * rng.random(last.shape) ** 3).astype(int)
    if world.smooth:
        argmax, tokens = flips, by_distance + rng.normal(0, 3, shape)
    asked = np.arange(n) < 24  # controls
    random_tokens = np.where(last[-1] > 0.01, rng.normal(25, 8, shape), rng.poisson(1, shape))
    random = last * np.exp(0.4 * rng.normal(size=last.shape)) > np.quantile(last[-1], 0.85)
    if world.smooth:
        random_tokens = by_distance + rng.normal(0, 3, shape)
    change = np.exp(0.3 * layered(rng, n)) * world.change / 256
    change[..., -1] *= world.deepest
    q, p, layer = (part.ravel() for part in np.indices(z.shape))
    fixed = {"comparison": "teacher_forced", "a": 1, "same_prefix": True}
    cells = {"question": q, "position": p, "layer": layer, "norm_a": 100.0, "norm_b": 100.0} | fixed
    cells |= {"relative_l2": change.ravel(), "bf16_ratio": 256 * change.ravel()}
    each = [pd.DataFrame(cells | {"b": k + 2, "cosine": 1 - u[k].ravel()}) for k in range(STEPS)]
    pairs = pd.concat(each, ignore_index=True)
    q2, p2 = (part.ravel() for part in np.indices(shape))
    at = {"question": q2, "position": p2}

    def rows(
        k: int, changed: np.ndarray, rank: np.ndarray, replaced: np.ndarray, **more: Any
    ) -> pd.DataFrame:
        ranks, top = np.where(changed[k], rank[k], 0), np.clip(np.rint(replaced), 0, 100)
        own = {"b": k + 2, "argmax_changed": changed[k].ravel(), "winner_rank": ranks.ravel()}
        return pd.DataFrame(at | fixed | own | {"replaced": top.ravel()} | more)

    outputs = pd.concat([rows(k, argmax, deep, tokens) for k in range(STEPS)], ignore_index=True)
    other = random, deep[:, ::-1] if world.smooth else shallow, random_tokens
    nudges, of_controls = [], asked[q2]
    for direction, said in (("true", (argmax, deep, tokens)), ("random", other)):
        for k in range(STEPS):
            seen = rows(k, *said, site="output", direction=direction, seed=0)[of_controls]
            nudges.append(seen.assign(cosine=list(1 - last[k].ravel()[of_controls][:, None])))
    here = asked[q]
    noise = pd.DataFrame({"question": q, "position": p, "layer": layer, "kind": "batch", "depth": 4})[here]
    size = world.noise / 256 * np.exp(0.3 * layered(rng, n)).ravel()[here]
    noise = noise.assign(cosine=0.99999, relative_l2=size, bf16_ratio=256 * size)
    second = np.where(shifts()[..., None] & (rng.random(z.shape) > 0.02), 0.5, 0.999)
    again = pairs[pairs["b"] == STEPS + 1].assign(cosine=second.ravel())
    run = SimpleNamespace(
        pairs=pairs, outputs=outputs, nudges=pd.concat(nudges, ignore_index=True), noise=noise
    )
    return run, SimpleNamespace(pairs=again)


JOINT = {(True, True): 71, (True, False): 30, (False, True): 14, (False, False): 83}
"""The paper's answers at depth 1 and 4, of 198 questions."""


def answered(rng: np.random.Generator, n: int, real: bool) -> tuple[np.ndarray, np.ndarray]:
    """Right answers [question, 4 depths] and re-draws [question, 4 draws]; without an effect both are
    re-draws.
    """
    if not real:
        chance = rng.beta(0.6, 0.6, size=(n, 1))
        return rng.random((n, 4)) < chance, rng.random((n, 4)) < chance
    kinds = np.array(list(JOINT))[rng.choice(4, p=np.array(list(JOINT.values())) / 198, size=n)]
    between = np.where(rng.random((n, 2)) < 0.5, kinds[:, :1], kinds[:, 1:]) | (rng.random((n, 2)) < 0.02)
    correct = np.column_stack([kinds[:, 0], between, kinds[:, 1]])
    return correct, rng.random((n, 4)) < np.where(kinds[:, :1], 0.97, 0.01)


def answers(real: bool) -> Callable[[np.random.Generator, int, Sequence[str]], dict[str, Finding]]:
    """Judges C10 to C13 where depth, probe and routing do what the paper says, or nothing."""

    def judge(rng: np.random.Generator, n: int, claims: Sequence[str]) -> dict[str, Finding]:
        correct, drawn = answered(rng, n, real or "C13" in claims)
        tables = [
            pd.DataFrame(
                {
                    "question": np.repeat(np.arange(n), 4), "id": np.repeat(np.arange(n), 4),
                    "depth": np.tile(np.arange(1, 5), n), "correct": right.ravel(),
                }
            )
            for right in (correct, drawn)
        ]  # fmt: skip
        redraws = SimpleNamespace(questions=tables[1])
        e = Evidence(Contrast.of(SimpleNamespace(questions=tables[0]), beside={"redraws": redraws}))
        found = {id: e.finding(id) for id in claims if id in ("C10", "C11")}
        must = np.any((np.cumsum(correct, axis=1) > 0) & ~correct, axis=1)
        told = must if real else rng.permutation(must)
        few = int(min(must.sum(), (~must).sum()))
        if "C12" in claims:
            found["C12"] = _probed(rng, told, must, few)
        if "C13" in claims:
            score = rng.normal(size=n) + 0.954 * told  # an AUC of 0.75
            place = np.where(score > np.quantile(score, 1 - must.mean()), 0, 3)
            costs = Costs(answers_of(tables[0]), np.ones(correct.shape))
            row: dict[str, Any] = scored(Routed("probe", "policy", place), costs, resamples=2)
            low, at, high = (float(row[f"spared{end}"]) for end in ("_low", "", "_high"))
            found["C13"] = routed_grade(Interval(at, low, high, n), float(row["dealt_broken"]), few)
        return found

    return judge


QUICK = Design(kind="l2", layers=(0,), penalties=(0.01,), blocks=6)


def _probed(rng: np.random.Generator, told: np.ndarray, positive: np.ndarray, few: int) -> Finding:
    """C12 from the probe itself, on 8 dimensions that tell `told` questions with an AUC of 0.80."""
    if few < 2:
        return folds_grade(Interval(0.5, 0.0, 1.0, len(told)), 1.0, few, 39)
    states = rng.normal(size=(len(told), 1, 8))
    states[:, 0, 0] += 1.19 * told
    inputs = Inputs(torch.from_numpy(states).float())
    area, p = auc_in_folds(QUICK, inputs, positive, repeats=3, permutations=39)
    return folds_grade(area, p, few, 39)


def approximations(slope: float) -> Callable[[np.random.Generator, int, Sequence[str]], dict[str, Finding]]:
    """Judges C15 where the error goes as alpha to the power of `slope`; n counts texts."""

    def judge(rng: np.random.Generator, n: int, claims: Sequence[str]) -> dict[str, Finding]:
        rows = []
        for text, own in enumerate(rng.normal(size=n)):
            for alpha in ALPHAS:
                error = 500 * alpha**slope * np.exp(0.3 * own + 0.15 * rng.normal(size=2))
                row = {"method": "sweeps", "groups": 1, "sweeps": 1, "reference": "layerwise", "n_layers": 30}
                row |= dict.fromkeys(("alpha", "alpha_low", "alpha_high"), alpha) | {"question": text}
                rows.append(row | {"error2": error[0] ** 2, "norm2": 1, "state": error[1], "positions": 1})
        e = Evidence(Contrast.of(SimpleNamespace()), beside={"approximation": pd.DataFrame(rows)})
        return {id: e.finding(id) for id in claims}

    return judge


def patched(effect: float) -> Callable[[np.random.Generator, int, Sequence[str]], dict[str, Finding]]:
    """Judges C16 where a shift adds `effect` to the log effect of a patch of its size."""

    def judge(rng: np.random.Generator, n: int, claims: Sequence[str]) -> dict[str, Finding]:
        size, own = rng.normal(size=(n, 24)), rng.normal(size=(n, 1))
        shifted = size + rng.normal(size=(n, 24)) > 0.5
        kl = 1.4 * size + effect * shifted + 0.8 * own + rng.normal(size=(n, 24))
        rows = pd.DataFrame(
            {
                "question": np.repeat(np.arange(n), 24), "direction": "back",
                "last": np.tile(np.arange(6), 4 * n), "size": np.exp(size).ravel(),
                "shifted": shifted.ravel().astype(int), "kl": np.exp(kl).ravel(),
            }
        )  # fmt: skip
        _, extra = size_regression(rows)
        return {"C16": graded(Part("log KL", extra, low=0), least=40)}

    return judge


PAPER = "as the paper says"
WORLDS: dict[str, World] = {
    PAPER: World(
        "two modes, 14% in the lower one, and all that follows",
        states(State()), tuple(f"C{i}" for i in range(1, 10)), True),
    "one mode": World(
        "one spread, of which 0.99 cuts off 14%",
        states(State(0.14, modes="one", first=False)), ("C1", "C2", "C3")),
    "a tail": World(
        "one mode with a tail of 14%, even in the overlap",
        states(State(0.14, modes="tail", first=False)), ("C1", "C2", "C3")),
    "at the ends": World(
        "just outside the regions: 29% shifted, 1% quantile 0.46, correlation 0.09, twice the noise",
        states(State(0.29, 0.305, content=CONTENT, first=False, change=3.5, deepest=1.5)),
        ("C1", "C3", "C7", "C9")),
    "everywhere": World(
        "all positions shift, position 0 as any", states(State(0.985, first=False)), ("C8",)),
    "smooth": World(
        "output and argmax read off a distance, as for random changes",
        states(State(smooth=True)), ("C4", "C5", "C6")),
    "no content": World(
        "shifts by chance, position 0 as any, the change as large as noise",
        states(State(0.14, content=0.0, first=False, change=2.0, deepest=1.0)), ("C7", "C8", "C9")),
    "answers as the paper says": World(
        "30 of 101 broken, a probe of AUC 0.80", answers(True), ("C10", "C11", "C12", "C13"), True, ANSWERED),
    "re-draws": World("depths are re-draws of one model", answers(False), ("C10", "C11"), sizes=ANSWERED),
    "noise labels": World("the probe knows nothing", answers(False), ("C12", "C13"), sizes=ANSWERED),
    "order two": World("the error goes as alpha squared", approximations(2.0), ("C15",), True, (8, 24)),
    "order one and a half": World("it goes as alpha^1.5", approximations(1.5), ("C15",), sizes=(8, 24)),
    "a shift matters": World("half a log unit beyond its size", patched(0.5), ("C16",), True, (40, 50, 198)),
    "only its size": World("nothing beyond its size", patched(0.0), ("C16",), sizes=(40, 50, 198)),
}  # fmt: skip
COUNTS = Table("calibration.parquet", ("world", "n", "batch"))


@register_study
class CalibrationStudy(Study):
    """The rules of the ledger, on simulated runs with known truths."""

    name = "calibration"
    question = "How often does each rule of the ledger err, and how often does it see what the paper says?"
    page = "docs/claims.md"
    options = ("seeds",)
    tables = {"counts": COUNTS}  # noqa: RUF012
    findings = (
        Found("calibration", lambda rows: calibration(rows["counts"]), {"error rates": lambda r: r.text}),
    )

    def __init__(self, worlds: Mapping[str, World] | None = None) -> None:
        self.worlds = WORLDS if worlds is None else worlds

    def run(
        self,
        folder: str | Path,
        *,
        seeds: Sequence[int] = range(REPLICATES),
        progress: Progress | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Simulate what is missing, all worlds and sizes of one batch before the next.

        Args:
            seeds: replicates; their number is rounded up to whole batches.
            progress: called with (world, jobs done, in all).
        """
        batches = range(-(-len(seeds) // BATCH))
        jobs = [
            {"world": name, "n": n, "batch": batch}
            for batch in batches for name, world in self.worlds.items() for n in world.sizes
        ]  # fmt: skip
        lacks = COUNTS.missing(folder, jobs)
        todo = [job for job, lack in zip(jobs, lacks, strict=True) if lack]
        for done, job in enumerate(todo):
            if progress is not None:
                progress(f"{job['world']}, {job['n']} questions", done, len(todo))
            COUNTS.put(folder, self._batch(job))
        if progress is not None:
            progress("done", len(todo), len(todo))
        return self.read(folder)

    def _batch(self, job: Mapping[str, Any]) -> pd.DataFrame:
        world, name = self.worlds[job["world"]], crc32(str(job["world"]).encode())
        counts: dict[str, Counter[str]] = {id: Counter() for id in world.claims}
        for replicate in range(BATCH):
            rng = np.random.default_rng([11, name, job["n"], job["batch"], replicate])
            with np.errstate(all="ignore"):
                for id, found in world.judge(rng, job["n"], world.claims).items():
                    counts[id][found.grade] += 1
        rows = [
            {**job, "claim": id, "true": world.true, "replicates": BATCH, **{g: of[g] for g in GRADES}}
            for id, of in counts.items()
        ]  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Calibration(Result):
    """Rates of each rule by world and number of questions."""

    rates: pd.DataFrame
    """A row per claim, world and n: true (whether the claim is), replicates, and the share of each grade."""

    @property
    def table(self) -> pd.DataFrame:
        """`rates`."""
        return self.rates

    @property
    def verdict(self) -> str:
        """The worst rate of false support, and the least of true support at 198 questions."""
        false: Any = self.rates[
            (~self.rates["true"].astype(bool) & (self.rates["n"] >= 24)).to_numpy(dtype=bool)
        ]
        worst: Any = false.loc[false[SUPPORTED].idxmax()]
        words = f"A false claim is supported in at most {percent_text(worst[SUPPORTED])} of simulated runs "
        words += f"({worst['claim']}, {worst['n']} questions)."
        seen: Any = self.rates[(self.rates["world"] == PAPER) & (self.rates["n"] == SIZES[-1])]
        if len(seen):
            least: Any = seen.loc[seen[SUPPORTED].idxmin()]
            words += " A run as the paper says is supported on C1 to C9 in "
            words += f"{percent_text(least[SUPPORTED])} or more ({least['claim']}) at {SIZES[-1]}."
        return f"{words} {int(self.rates['replicates'].min())} replicates or more of each."

    def figure(self) -> go.Figure:
        """False support and true support by claim, at the largest number of questions."""
        shown = []
        for row in self.rates.to_dict("records"):
            series = "true" if row["true"] else "false"
            shown.append(Dot(f"{row['claim']}, n = {row['n']}", series, row[SUPPORTED], np.nan, np.nan))
        return dots("Supported, of simulated runs", self.verdict, "share of runs", shown, reference=0.07)

    @property
    def text(self) -> str:
        """A Markdown table: a row per claim and world, supported and contradicted by number of questions."""
        rows = []
        for (claim, world), own in self.rates.groupby(["claim", "world"], sort=False):
            shown = [f"{r[SUPPORTED]:.1%} / {r[CONTRADICTED]:.1%}" for r in own.to_dict("records")]
            said = {
                "claim": claim,
                "world": world,
                "the claim is": "true" if own["true"].iloc[0] else "false",
            }
            said["questions: supported / contradicted"] = "; ".join(
                f"{n}: {both}" for n, both in zip(own["n"], shown, strict=True)
            )
            rows.append(said | {"runs": int(own["replicates"].min())})
        return markdown(rows)


def calibration(counts: pd.DataFrame) -> Calibration:
    """The rates from the study's table. Raises Untestable without rows."""
    if counts.empty:
        raise Untestable("nothing was simulated")
    keys = ["claim", "world", "true", "n"]
    total = counts.groupby(keys, sort=False)[["replicates", *GRADES]].sum().reset_index()
    for grade in GRADES:
        total[grade] /= total["replicates"]
    total = total.assign(at=[number(claim) for claim in total["claim"]])
    total = total.sort_values(
        ["at", "true", "world", "n"], ascending=[True, False, True, True], kind="stable"
    )
    return Calibration(total.drop(columns="at").reset_index(drop=True))


@lru_cache(maxsize=4)
def _measured(file: Path, when: float) -> pd.DataFrame:
    return calibration(COUNTS.read(file.parent)).rates


def rates_at(claim: str, n: int) -> str:
    """How often a rule errs, at the nearest simulated number of questions that is not above n."""
    try:
        folder = CalibrationStudy().folder()
        file = folder / COUNTS.file
        rates = _measured(file, file.stat().st_mtime)
    except (SSTError, OSError):
        return ""
    own = rates[(rates["claim"] == claim).to_numpy(dtype=bool)]
    if own.empty:
        return ""
    there = own["n"].unique()
    at = max((m for m in there if m <= n), default=min(there))
    own = own[(own["n"] == at).to_numpy(dtype=bool)]
    false, true = (own[own["true"].to_numpy(dtype=bool) == side] for side in (False, True))
    words = f"at {at} {'texts' if claim == 'C15' else 'questions'}"
    if len(false):
        words += f" supported in {percent_text(float(false[SUPPORTED].max()))} of runs simulated as false"
    if len(true):
        words += f", in {percent_text(float(true[SUPPORTED].min()))} of those as true"
        words += f" (contradicted in {percent_text(float(true[CONTRADICTED].max()))})"
    return f"{words}; {int(own['replicates'].min())} runs each"
