"""Contrast: one comparison of one run at one pair of depths. Every analysis is a function of one.

    c = Contrast.of(run, "within")       # iteration 1 against the deepest
    c.overlap                            # [pair], 1 is the same state
    c.grid.overlap                       # [question, position, layer]
    c.at(1, 2).threshold                 # another pair of iterations

Comparisons and depths are never pooled: that makes modes which none of them has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.result import pair_words
from sst_interp.analyses.statistics.bootstrap import Resampling, ratio
from sst_interp.analyses.statistics.modes import Modes, find_modes, question_histograms, to_v
from sst_interp.errors import SSTError, Untestable, unknown_name
from sst_interp.models.choices import COMPARISONS, Choices
from sst_interp.runs.schema import IDS, empty_table

PAPER_THRESHOLD = 0.99
"""The paper's division between stable and shifted (arXiv 2605.00206)."""

RESOLUTION = {"cosine": 1e-3, "relative_l2": 1e-2, "lens_jaccard": 0.1}
"""Differences of overlap that count as none when modes are counted. Cosine: above bf16 rounding through 30 to
60 layers, below the paper's 0.01. A relative L2 of 0.01 to 0.04 is the same angle. The Jaccard index of two
top-100 sets moves in steps of about 0.02."""

READ = ("entropy", "margin")
"""What `steps` records of a next-token distribution: entropy (nats) and margin (logits)."""

DEFAULT = Resampling()
BESIDE = ("blend_off", "reshuffled", "baseline", "beyond", "lens", "redraws")
"""Roles of companion runs: the start-up control, reshuffled choices, the matched baseline, more depths, the
logit-lens overlap of some of the questions, and re-draws (sampled answers) of the same model."""


class Tables:
    """The tables of a run, read one comparison at a time."""

    def __init__(self, run: Any) -> None:
        """`run` is a `Run`, or anything with DataFrames of that name (`pairs`, `outputs`, ...)."""
        self.run = run
        self._read: dict[str, tuple[str | None, pd.DataFrame]] = {}

    def __call__(self, name: str, comparison: str | None = None) -> pd.DataFrame:
        """The rows of a table, of one comparison if asked for; without its lists of token ids.

        Raises:
            Untestable: if the run has no such table, or no row in it.
            SSTError: if a shard of it is damaged.
        """
        if name not in self._read or self._read[name][0] != comparison:
            self._read.pop(name, None)  # one comparison is in memory at a time
            self._read[name] = (comparison, self._load(name, comparison))
        table = self._read[name][1]
        if not len(table):
            of = f" of comparison {comparison!r}" if comparison else ""
            raise Untestable(f"the run has no {name}{of}")
        return table

    def get(self, name: str, comparison: str | None = None) -> pd.DataFrame | None:
        """The same, or None where the run has none."""
        try:
            return self(name, comparison)
        except Untestable:
            return None

    def _load(self, name: str, comparison: str | None) -> pd.DataFrame:
        if hasattr(self.run, "table"):
            if columns := [c for c in self.run.columns(name) if c not in IDS]:
                return self.run.table(name, columns, comparison)
        elif (table := getattr(self.run, name, None)) is not None and len(table):
            return table if comparison is None else table[(table["comparison"] == comparison).to_numpy(bool)]
        return empty_table(name)


class Threshold(NamedTuple):
    """Overlap below which a (position, layer) pair counts as shifted, and where that comes from."""

    value: float
    provenance: str


@dataclass(frozen=True, eq=False)
class Contrast:
    """One comparison of a run at one pair of depths (or iterations), with its overlap and threshold."""

    tables: Tables
    comparison: str
    pair: tuple[int, int] | None = None
    """Depths or iterations that are compared; None: 1 against the deepest. `a` and `b` are the two."""
    choices: Choices = field(default_factory=Choices)
    """Which overlap, and how shifted is told from stable."""
    fixed: float | None = None
    """A threshold that goes before that of the choices."""
    resampling: Resampling = DEFAULT
    beside: Mapping[str, Tables] = field(default_factory=dict)
    """Role (`BESIDE`) -> the tables of a run that stands beside this one."""
    token_class: Callable[[Iterable[int]], list[str]] | None = None
    """Token ids -> names of their classes, if the tokens are known."""
    _deepest_modes: dict[Any, Modes] = field(default_factory=dict, repr=False)
    """The modes of each comparison's deepest pair, shared by every contrast of the run."""

    @classmethod
    def of(
        cls,
        run: Any,
        comparison: str | None = None,
        a: int | None = None,
        b: int | None = None,
        choices: Choices | None = None,
        threshold: float | None = None,
        resamples: int = DEFAULT.resamples,
        seed: int = 0,
        beside: Mapping[str, Any] | None = None,
        token_class: Callable[[Iterable[int]], list[str]] | None = None,
    ) -> Contrast:
        """The contrast of a run; what is left out comes from its recipe.

        Args:
            run: a `Run`, or anything with its tables as DataFrames.
            comparison: which; default: the one that the choices lead with.
            a: depth or iteration of the first state; default: the pair (1, deepest).
            b: of the second.
            choices: default: those of the run's recipe.
            threshold: overlap below which a pair has shifted; default: by the choices.
            resamples: question resamples, shuffles and permutations.
            seed: of all three.
            beside: role (`BESIDE`) -> run.
            token_class: token ids -> names of their classes.

        Raises:
            SSTError: for an unknown comparison or role.
        """
        own: Choices = choices or getattr(getattr(run, "recipe", None), "choices", None) or Choices()
        comparison = comparison or own.comparison
        if comparison not in COMPARISONS:
            raise unknown_name("comparison", comparison, COMPARISONS)
        if unknown := set(beside or {}) - set(BESIDE):
            raise unknown_name("role", min(unknown), BESIDE)
        companions = {role: Tables(other) for role, other in (beside or {}).items() if other is not None}
        return cls(
            Tables(run), comparison, None if a is None or b is None else (a, b), own, threshold,
            Resampling(resamples, seed), companions, token_class,
        )  # fmt: skip

    def at(self, a: int, b: int) -> Contrast:
        """The same comparison at another pair of depths."""
        return replace(self, pair=(a, b))

    def to(self, comparison: str) -> Contrast:
        """Another comparison of the same run, at its deepest pair."""
        return replace(self, comparison=comparison, pair=None)

    def of_companion(self, role: str) -> Contrast | None:
        """The same contrast of a companion run, at its own deepest pair; None without such a run."""
        other = self.beside.get(role)
        return None if other is None else replace(self, tables=other, pair=None, beside={}, _deepest_modes={})

    # What is compared

    @property
    def kind(self) -> str:
        """Which overlap."""
        return self.choices.overlap

    @property
    def a(self) -> int:
        """Depth or iteration of the first state."""
        return self._pair[0]

    @property
    def b(self) -> int:
        """Of the second."""
        return self._pair[1]

    @cached_property
    def pairs_there(self) -> list[tuple[int, int]]:
        """The pairs (a, b) of this comparison that have rows, in order."""
        rows = self.all_rows
        codes = pd.unique(256 * rows["a"].to_numpy().astype(np.int16) + rows["b"].to_numpy())
        return [divmod(code, 256) for code in sorted(codes.tolist())]

    @property
    def compared(self) -> dict[str, Any]:
        """The fields of a `result.Compared`."""
        return {"comparison": self.comparison, "a": self.a, "b": self.b}

    @property
    def judged(self) -> dict[str, Any]:
        """The fields of a `result.Shifts`."""
        return self.compared | {"kind": self.kind, "threshold": self.threshold}

    @property
    def words(self) -> str:
        """`teacher-forced, depth 1 against depth 4`."""
        return pair_words(self.comparison, self.a, self.b)

    # Its rows

    @property
    def all_rows(self) -> pd.DataFrame:
        """`pairs` of this comparison, every pair of depths."""
        return self.tables("pairs", self.comparison)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """`pairs` of this comparison and this pair of depths."""
        a, b = self._pair
        return self._at(self.all_rows, a, b)

    @cached_property
    def overlap(self) -> np.ndarray:
        """Overlap of every row, float64 [pair]; NaN where there is none."""
        return overlap_of(self.rows, self.kind)

    @cached_property
    def there(self) -> np.ndarray:
        """Whether a row has an overlap, bool [pair].

        Raises:
            Untestable: if none has.
        """
        there = np.isfinite(self.overlap)
        if not there.any():
            raise Untestable(f"all {len(there):,} overlaps of comparison {self.comparison!r} are NaN")
        return there

    @cached_property
    def histograms(self) -> np.ndarray:
        """Pairs per question and bin of log(1 - overlap + resolution), [question, bin]."""
        codes, _ = pd.factorize(self.rows["question"].to_numpy()[self.there], sort=True)
        return question_histograms(codes, self.overlap[self.there], RESOLUTION[self.kind])

    @cached_property
    def modes(self) -> Modes:
        """One mode or two, with the antimode of two (`statistics.modes`)."""
        known = self._deepest_modes if self.pair is None else {}
        key = self.comparison, self.kind, self.resampling
        if key not in known:
            how = self.resampling._asdict()
            known[key] = find_modes(self.histograms, RESOLUTION[self.kind], **how)
        return known[key]

    @cached_property
    def division(self) -> Threshold:
        """The threshold between stable and shifted, and where it comes from.

        It is the same at every pair of depths: the antimode of the deepest pair, or the paper's 0.99 if that
        has one mode.
        """
        if self.fixed is not None:
            return Threshold(float(self.fixed), "given")
        if self.choices.threshold != "antimode":
            return Threshold(float(self.choices.threshold), "fixed by the user")
        modes = (self if self.pair is None else replace(self, pair=None)).modes
        if modes.antimode is None:
            why = {"one": "the distribution has one mode", "not tested": "modes not tested"}[modes.count]
            return Threshold(PAPER_THRESHOLD, f"the paper's {PAPER_THRESHOLD}: {why}")
        return Threshold(modes.antimode.estimate, "antimode of this run")

    @property
    def threshold(self) -> float:
        """Overlap below which a pair counts as shifted."""
        return self.division.value

    @cached_property
    def grid(self) -> Grid:
        """The overlaps as an array [question, position, layer]."""
        rows, there = self.rows, self.there
        axes = [pd.factorize(rows[c].to_numpy()[there], sort=True) for c in ("question", "position", "layer")]
        (q, questions), (p, positions), (layer, layers) = axes
        overlap = np.full((len(questions), len(positions), len(layers)), np.nan)
        overlap[q, p, layer] = self.overlap[there]
        return Grid(overlap, questions, positions, layers, self.a, self.b, self.kind)

    @cached_property
    def positions(self) -> pd.DataFrame:
        """A row per (question, position), sorted: `layers`, `shifted` (how many of them), `lowest` overlap
        (NaN where any is) and `last`, that of the last layer.
        """
        values, layer = self.overlap, self.rows["layer"].to_numpy()
        codes, keys = pd.factorize(position_key(self.rows), sort=True)
        lowest = np.full(len(keys), np.inf)
        with np.errstate(invalid="ignore"):
            np.minimum.at(lowest, codes, values)  # a NaN stays one
        last = np.full(len(keys), np.nan)
        at_last = layer == layer.max()
        last[codes[at_last]] = values[at_last]
        return pd.DataFrame(
            {
                "question": keys >> 32,
                "position": keys & 0xFFFFFFFF,
                "layers": np.bincount(codes, minlength=len(keys)),
                "shifted": np.bincount(codes, values < self.threshold, len(keys)).astype(int),
                "lowest": lowest,
                "last": last,
            }
        )

    # The outputs beside them

    @property
    def all_outputs(self) -> pd.DataFrame:
        """`outputs` of this comparison, every pair of depths."""
        return self.tables("outputs", self.comparison)

    @cached_property
    def outputs(self) -> pd.DataFrame:
        """`outputs` of this comparison and this pair of depths."""
        return self._at(self.all_outputs, self.a, self.b)

    @cached_property
    def readings(self) -> pd.DataFrame:
        """A row per (question, position): `entropy_a`, `entropy_b` (nats), `margin_a`, `margin_b` (logits);
        no rows if the run has no `steps`.
        """
        columns = ["question", "position", *(f"{name}_{side}" for name in READ for side in "ab")]
        steps = self.tables.get("steps")
        if steps is None or not {"text", "depth", "iteration", *READ} <= set(steps.columns):
            return pd.DataFrame(columns=columns, dtype=float)
        depth, iteration = steps["depth"].to_numpy(), steps["iteration"].to_numpy()
        if self.comparison == "within":
            deepest = depth.max()
            cells = ("own", deepest, self.a), ("own", deepest, self.b)
        else:
            text = "depth1" if self.comparison == "teacher_forced" else "own"
            cells = ("own", self.a, self.a), (text, self.b, self.b)
        sides = []
        for side, (of_text, of_depth, of_iteration) in zip("ab", cells, strict=True):
            here = (depth == of_depth) & (iteration == of_iteration)
            here &= (steps["text"] == of_text).to_numpy(bool)
            rows = steps.loc[here, ["question", "position", *READ]]
            sides.append(rows.rename(columns={name: f"{name}_{side}" for name in READ}))
        return sides[0].merge(sides[1], on=["question", "position"])[columns]

    def question_map(self, question: int) -> QuestionMap:
        """Where one question shifts: overlap and norm ratio by position and layer.

        Raises:
            SSTError: if the question has no such pairs.
        """
        here = (self.rows["question"] == question).to_numpy(dtype=bool)
        rows = self.rows[here]
        if rows.empty:
            raise SSTError(
                f"question {question} has no pairs, {self.words}",
                "questions are numbered from 0 in the run's questions table",
            )
        norms = (rows["norm_b"] / rows["norm_a"]).astype(float)
        values = rows.assign(overlap=self.overlap[here], norm_ratio=norms).set_index(["position", "layer"])
        return QuestionMap(values["overlap"].unstack(), values["norm_ratio"].unstack())

    @cached_property
    def _pair(self) -> tuple[int, int]:
        if self.pair is not None:
            return self.pair
        deepest = max((b for a, b in self.pairs_there if a == 1), default=None)
        if deepest is None:
            raise Untestable(f"no pairs of comparison {self.comparison!r}", "capture at least two depths")
        return 1, deepest

    def _at(self, table: pd.DataFrame, a: int, b: int) -> pd.DataFrame:
        keep = (table["a"].to_numpy() == a) & (table["b"].to_numpy() == b)
        if not keep.any():
            there = f"no pairs of comparison {self.comparison!r} between {a} and {b}"
            raise Untestable(there, "`run.pairs` says which there are")
        return table[keep]


class Grid(NamedTuple):
    """Overlaps of one comparison and one pair of depths as an array; all axes ascending."""

    overlap: np.ndarray
    """[question, position, layer] float64; NaN where the text has ended, or there is no overlap."""
    questions: np.ndarray
    """Index of each question in the run."""
    positions: np.ndarray
    layers: np.ndarray
    a: int
    b: int
    kind: str

    @property
    def there(self) -> np.ndarray:
        """Whether a cell has an overlap, bool [question, position, layer]."""
        return np.isfinite(self.overlap)

    def shifted(self, threshold: float) -> np.ndarray:
        """Whether a cell's overlap is below the threshold, bool [question, position, layer]."""
        return self.overlap < threshold  # NaN is not

    def distance(self) -> np.ndarray:
        """log(1 - overlap + r) of every cell, with the resolution r of `RESOLUTION`.

        Overlaps crowd at 1 and differ there by factors: on this scale they spread evenly. Larger is further.
        """
        v = to_v(np.where(self.there, self.overlap, 1.0), RESOLUTION[self.kind])
        return np.where(self.there, v, np.nan)

    def mean_distance(self) -> np.ndarray:
        """Mean of `distance` over layers, each centred first: [question, position]; NaN without pairs."""
        there, v = self.there, self.distance()
        filled = np.where(there, v, 0)
        filled -= np.where(there, filled.sum(axis=(0, 1)) / np.maximum(there.sum(axis=(0, 1)), 1), 0)
        return ratio(np.stack([filled.sum(axis=-1), there.sum(axis=-1)], axis=-1))

    def shifted_share(self, threshold: float) -> np.ndarray:
        """Share of the layers that shifted: [question, position]; NaN without pairs."""
        return ratio(np.stack([self.shifted(threshold).sum(-1), self.there.sum(-1)], -1).astype(float))

    def of_table(self, table: pd.DataFrame, column: str) -> np.ndarray:
        """A column of a table with a row per (question, position), on this grid: NaN where it has none."""
        rows = pd.Index(self.questions).get_indexer(pd.Index(table["question"]))
        columns = pd.Index(self.positions).get_indexer(pd.Index(table["position"]))
        here = (rows >= 0) & (columns >= 0)
        values = np.full(self.overlap.shape[:2], np.nan)
        values[rows[here], columns[here]] = table[column].to_numpy(dtype=float, na_value=np.nan)[here]
        return np.where(self.there.any(axis=-1), values, np.nan)

    def of_questions(self, rows: np.ndarray) -> Grid:
        """Of some questions, in the order given."""
        return self._replace(overlap=self.overlap[rows], questions=self.questions[rows])

    def where_also(self, other: Grid) -> Grid:
        """The cells that `other`, a grid of the same questions in the same order, has too."""
        mine, theirs = np.isin(self.positions, other.positions), np.isin(other.positions, self.positions)
        both = np.where(other.there[:, theirs], self.overlap[:, mine], np.nan)
        return self._replace(overlap=both, positions=self.positions[mine])


class QuestionMap(NamedTuple):
    """One question by position (rows) and layer (columns): overlap, and norm_b / norm_a."""

    overlap: pd.DataFrame
    norm_ratio: pd.DataFrame


def overlap_of(pairs: pd.DataFrame, kind: str = "cosine") -> np.ndarray:
    """Overlap of every row, float64 [pair]; 1 is the same state.

    Args:
        pairs: rows of the `pairs` table.
        kind: "cosine", in [-1, 1]; "relative_l2": 1 - |b - a| / |a|, at most 1; "lens_jaccard": Jaccard index
            of the logit-lens top-100 sets.

    Raises:
        SSTError: if `kind` is unknown, or was not captured.
    """
    if kind not in RESOLUTION:
        raise unknown_name("overlap", kind, RESOLUTION)
    if kind not in pairs.columns or (kind == "lens_jaccard" and len(pairs) and pairs[kind].isna().all()):
        raise SSTError(
            f"this run did not record {kind}", f'capture it with overlap = "{kind}", or choose "cosine"'
        )
    values = pairs[kind].to_numpy(dtype=float)
    return 1 - values if kind == "relative_l2" else values


def position_key(rows: pd.DataFrame) -> np.ndarray:
    """Question and position in one int64, in that order."""
    return (rows["question"].to_numpy(dtype=np.int64) << 32) | rows["position"].to_numpy(dtype=np.int64)


def at_positions(table: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """`table` with the columns of `other` at the same question and position; NaN where there is none."""
    keys = {"question": "int64", "position": "int64"}
    fresh = [c for c in other.columns if c in keys or c not in table.columns]
    return table.astype(keys).merge(other[fresh].astype(keys), on=[*keys], how="left")


def same_questions(
    one: Grid, other: Grid, ids: pd.DataFrame | None = None, other_ids: pd.DataFrame | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of two grids are the same question: two index arrays of equal length.

    Args:
        one: the grid of one run.
        other: of another run.
        ids: the first run's `questions` table, to pair by record id; by index without both tables.
        other_ids: of the other run.
    """
    sides = []
    for grid, table in ((one, ids), (other, other_ids)):
        keys: pd.Series = pd.Series(grid.questions)
        if ids is not None and other_ids is not None and table is not None:
            keys = keys.map(table.drop_duplicates("question").set_index("question")["id"])
        side = pd.DataFrame({"key": keys, "row": np.arange(len(keys))}).dropna()
        sides.append(side.drop_duplicates("key", keep=False))  # an id that two questions share names neither
    common = sides[0].merge(sides[1], on="key")
    return common["row_x"].to_numpy(dtype=int), common["row_y"].to_numpy(dtype=int)
