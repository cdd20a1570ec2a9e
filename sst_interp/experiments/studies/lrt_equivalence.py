"""The study `lrt-equivalence`: how far an LRT's schedules are from sequential unrolling.

Interleaved and multi-refine passes (`training.objective`) are compared on one text with the definition, exact
back-propagation through time token by token: in states, in the loss and in gradients. Equivalence was claimed
for them (arXiv 2605.26797) and not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.analyses.plots import canvas
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    mean_over_questions,
    questions_words,
    ratio,
)
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.studies.fit import EXACT, Schedule, label_loss, label_loss_of_passes
from sst_interp.experiments.studies.flipflop import INTERLEAVED, LrtPlan, lrt_training, pretrained
from sst_interp.experiments.studies.show import (
    POSITION,
    Across,
    add_series,
    groups_of,
    interval,
    logarithmic,
    number,
    questions_of,
    spread,
    table,
)
from sst_interp.experiments.studies.study import Finding, Progress, Study, register_study
from sst_interp.experiments.studies.tasks import Labelled
from sst_interp.experiments.studies.two_pass import by_position
from sst_interp.experiments.table import Table
from sst_interp.files import check_place
from sst_interp.models.checkpoint import add_adapters, checkpoint_folder, trainable
from sst_interp.models.kinds.lrt import MemoryDesign, build_memory
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.models.stream import Kind
from sst_interp.training.data import encode, make_batch, read_items
from sst_interp.training.objective import Pass, answer_loss, mean_over_passes, newest, run_passes

LRT_SCHEDULES = (
    *(Schedule("interleaved", groups=s) for s in (1, 2, 4, 8)),
    *(Schedule("multi_refine", sweeps=k) for k in (1, 2, 3, 4)),
)
"""S = 1 and K = 1 are the same two passes."""
SMALL = "small"
"""The name of the small LRT that is trained on the spot."""
RANK = 16
"""Of the fresh adapters whose gradient is compared: that of the weights, seen through a random projection."""


MODEL, SCHEDULE = ["model", "memory"], ["method", "n"]
EQUIVALENT = 0.01
"""What is called equivalent here: states within 1%, and a cosine of gradients within 1% of 1."""
NAMES = {"interleaved": "interleaved S = {}", "multi_refine": "multi-refine K = {}"}
NEWEST, EVERY_PASS = "newest outputs", "every pass"
"""Which loss: that of the positions' newest outputs, as sequential unrolling has it; or the mean over all
passes, the first one without a memory included, which is what these schedules minimise."""
DEFAULT = ("interleaved", 2)
"""The schedule that was published as the default."""
BY_POSITION = (DEFAULT, ("interleaved", 8), ("multi_refine", 1), ("multi_refine", 4))


@dataclass(frozen=True, eq=False)
class LatentEquivalence(Result):
    """An LRT's schedules against sequential unrolling. Intervals are over questions; models stay apart."""

    schedules: pd.DataFrame
    """A row per model, memory and schedule: `questions`, `passes` over all positions, `state` (relative L2
    error of the last layer's output, all positions together), `last` (the same at the last bin of positions),
    `loss_exact`, and `loss_change` (that of the newest outputs minus the exact one, nats), with `_low` and
    `_high`."""
    gradients: pd.DataFrame
    """A row per model, memory, schedule, loss (`of`: newest outputs, or the mean over every pass, which is
    trained on) and part (`weights`: of the backbone or adapters on it; `memory`: all of the LRT's own, and
    each by name): `cosine` with the exact gradient and `norm_ratio`, means over questions with `_low` and
    `_high`, and `lowest_cosine`."""
    positions: pd.DataFrame
    """A row per model, memory, schedule and bin of positions: `state` with `_low` and `_high`."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Equivalence of an LRT's training schedules"

    @property
    def table(self) -> pd.DataFrame:
        """States and loss by model and schedule; cosine and norm of the gradient that is trained on."""
        return self.beside(self.schedules, EVERY_PASS)

    def beside(self, rows: pd.DataFrame, of: str, prefix: str = "") -> pd.DataFrame:
        """Rows with the gradients of one loss: `weights_cosine`, `memory_norm_ratio` and so on, with ends."""
        for part in ("weights", "memory"):
            own = self.gradients[(self.gradients["of"] == of) & (self.gradients["part"] == part)]
            ends = [f"{c}{end}" for c in ("cosine", "norm_ratio") for end in ("", "_low", "_high")]
            columns = {end: f"{prefix}{part}_{end}" for end in ends}
            rows = rows.merge(own.rename(columns=columns)[[*MODEL, *SCHEDULE, *columns.values()]])
        return rows

    @property
    def verdict(self) -> str:
        """Model by model: which schedules are equivalent by the 1% stated here, and the published default."""
        by = groups_of(self.table, MODEL, sort=False)
        return " ".join(self._told(model, memory, rows) for (model, memory), rows in by)

    def _told(self, model: str, memory: str, rows: pd.DataFrame) -> str:
        sentences = [f"{model} ({memory}), {questions_words(int(rows['questions'].max()))}."]
        same = rows[(rows["state"] < EQUIVALENT) & (rows["loss_change"].abs() < EQUIVALENT)]
        limits = f"within {EQUIVALENT:.0%} in states and {EQUIVALENT} nats in loss"
        if same.empty:
            best = rows.sort_values("state").iloc[0]
            nearest = schedule_words(best)
            sentences.append(f"No schedule is {limits}; the nearest is {nearest} ({best['state']:.2g} off).")
        else:
            turned = 1 - same[["weights_cosine", "memory_cosine"]].min(axis=1)
            names, true = (
                ", ".join(map(schedule_words, own.to_dict("records")))
                for own in (same, same[turned < EQUIVALENT])
            )
            sentences.append(f"Equivalent, {limits}: {names}.")
            sentences.append(f"In the direction of gradients too: {true or 'none'}.")
        for row in rows[(rows["method"] == DEFAULT[0]) & (rows["n"] == DEFAULT[1])].to_dict("records"):
            sentences.append(
                f"With {schedule_words(row)} the last layer is {spread(row, 'state')} off, the loss "
                f"{spread(row, 'loss_change', '+.2g')} nats. The gradient that is trained on has a cosine "
                f"with the exact one of {spread(row, 'weights_cosine')} for the weights and "
                f"{spread(row, 'memory_cosine')} for the memory's own."
            )
        return " ".join(sentences)

    def figure(self) -> go.Figure:
        """Error of the last layer against the number of groups or sweeps."""
        y = "relative error of the last layer (L2), log scale"
        return logarithmic(self._lines("States against sequential unrolling", self.schedules, "state", y))

    def figures(self) -> dict[str, go.Figure]:
        """States, gradients that are trained on, and for every model the error by position."""
        drawn = {"states": self.figure()}
        for part, words in (("weights", "weights"), ("memory", "the memory's own weights")):
            rows = self.gradients[(self.gradients["of"] == EVERY_PASS) & (self.gradients["part"] == part)]
            figure = self._lines(f"Gradient of {words}", rows, "cosine", "cosine with the exact gradient")
            drawn[f"gradient, {part}"] = figure.update_xaxes(type="log")
        for (model, memory), own in groups_of(self.positions, MODEL, sort=False):
            y = "relative error of the last layer (L2), log scale"
            figure = canvas("Error by position", f"{model} ({memory}); {questions_of(own)}", POSITION, y)
            by = groups_of(own[own["position"] > 0], SCHEDULE)
            named = {schedule_words({"method": m, "n": n}): rows for (m, n), rows in by}
            add_series(figure, "position", "state", named)
            drawn[f"by position, {model}, {memory}"] = logarithmic(figure)
        return drawn

    def _lines(self, title: str, rows: pd.DataFrame, column: str, y: str) -> go.Figure:
        """A line per model and method, by the number of groups or sweeps."""
        figure = canvas(title, questions_of(self.schedules), "S (groups) or K (sweeps), log scale", y)
        by = groups_of(rows, [*MODEL, "method"], sort=False)
        named = {f"{str(m).replace('_', '-')}, {model} ({memory})": own for (model, memory, m), own in by}
        add_series(figure, "n", column, named)
        return figure


def schedule_words(row: Mapping[Any, Any] | pd.Series) -> str:
    """The schedule of a table's row: `interleaved S = 2`."""
    return NAMES[str(row["method"])].format(int(row["n"]))


def latent_equivalence(
    states: pd.DataFrame, gradients: pd.DataFrame, resamples: int = RESAMPLES
) -> LatentEquivalence:
    """Means over questions, with intervals that resample questions, from the tables of the study.

    Questions with numbers that are not finite are left out. Raises Untestable if there is no other.
    """
    if states.empty or gradients.empty:
        raise Untestable("nothing has been measured yet")
    of = [*MODEL, "id"]
    bad = pd.concat([
        states.loc[~np.isfinite(states["error2"].to_numpy(dtype=float)), of],
        gradients.loc[~np.isfinite(gradients["loss"].to_numpy(dtype=float)), of],
    ])  # fmt: skip
    states, gradients = (
        t[~pd.MultiIndex.from_frame(t[of]).isin(pd.MultiIndex.from_frame(bad))] for t in (states, gradients)
    )
    if states.empty or gradients.empty:
        raise Untestable("no question has finite states and losses")
    by, records, positions, turned = [*MODEL, *SCHEDULE], [], [], []
    losses = gradients[gradients["of"] == NEWEST].drop_duplicates([*by, "id"]).set_index(by).sort_index()
    for names, own in groups_of(states, by, sort=False):
        about = dict[str, Any](zip(by, names, strict=True))
        here = losses.loc[[names]]
        end = own[own["position"] == own["position"].max()]
        change = mean_over_questions((here["loss"] - here["loss_exact"]).to_numpy(), resamples)
        record = about | {"questions": own["id"].nunique(), "loss_exact": float(here["loss_exact"].mean())}
        record |= {"passes": 2 if about["method"] == "interleaved" else 1 + int(about["n"])}
        intervals = as_columns(state=_error(own, resamples), last=_error(end, resamples), loss_change=change)
        records.append(record | intervals)
        for position, rows in own.groupby("position"):
            record = about | {"position": position, "questions": rows["id"].nunique()}
            positions.append(record | as_columns(state=_error(rows, resamples)))
    for names, own in groups_of(gradients, [*by, "of", "part"], sort=False):
        record = dict(zip([*by, "of", "part"], names, strict=True)) | {"questions": own["id"].nunique()}
        for name in ("cosine", "norm_ratio"):
            record |= as_columns(**{name: mean_over_questions(own[name].to_numpy(), resamples)})
        turned.append(record | {"lowest_cosine": own["cosine"].min()})
    return LatentEquivalence(*map(pd.DataFrame, (records, turned, positions)))


def _error(rows: pd.DataFrame, resamples: int) -> Interval:
    """Relative L2 error, all positions together: sqrt(sum of squared errors / sum of squared norms)."""
    sums = rows.groupby("id")[["error2", "norm2"]].sum().to_numpy(dtype=float)
    return cluster_bootstrap(sums, lambda totals: np.sqrt(ratio(totals)), resamples)


def _distinct(rows: pd.DataFrame) -> pd.DataFrame:
    """Without interleaved S = 1, which is multi-refine K = 1."""
    return rows[(rows["method"] != "interleaved") | (rows["n"] != 1)]


SHOWN: dict[str, Any] = {"model": "model", "memory": "memory", "schedule": schedule_words}


def states_table(result: LatentEquivalence) -> str:
    """A row per model, memory and schedule."""
    columns = {
        "passes": "passes", "last layer": interval("state"), "exact loss": "loss_exact",
        "loss change, nats": interval("loss_change", "+.2g"), "questions": "questions",
    }  # fmt: skip
    return table(_distinct(result.schedules), SHOWN | columns)


def positions_table(result: LatentEquivalence) -> str:
    """A row per model and some of its schedules, a column per bin of positions."""
    rows = result.positions
    rows = rows[pd.MultiIndex.from_frame(rows[SCHEDULE]).isin(BY_POSITION)]
    return table(rows, SHOWN | {"from {}": Across("position", number("state", ".1g"))})


def gradients_table(result: LatentEquivalence) -> str:
    """A row per model and schedule: the gradient that is trained on, and the newest outputs' alone."""
    columns = dict(SHOWN)
    for part in ("weights", "memory"):
        columns[f"{part}: cosine"] = interval(f"{part}_cosine")
        columns[f"{part}: norm ratio"] = interval(f"{part}_norm_ratio")
        columns[f"{part}: cosine, newest outputs"] = interval(f"newest_{part}_cosine")
    return table(_distinct(result.beside(result.table, NEWEST, "newest_")), columns)


@register_study
class LrtEquivalence(Study):
    """Schedules of an LRT against sequential unrolling, in states, loss and gradients."""

    name = "lrt-equivalence"
    question = "Are an LRT's training schedules equivalent to sequential unrolling?"
    page = "docs/lrt.md"
    options = ("model", "questions", "sizes")
    tables = {  # noqa: RUF012
        "states": Table("latent-states.parquet", ("model", "memory", "id", "method", "n")),
        "gradients": Table("latent-gradients.parquet", ("model", "memory", "id", "method", "n")),
    }
    findings = (
        Finding(
            "latent equivalence",
            lambda rows: latent_equivalence(rows["states"], rows["gradients"]),
            {
                "latent states": states_table,
                "latent positions": positions_table,
                "latent gradients": gradients_table,
            },
        ),
    )

    def __init__(self, plan: LrtPlan | None = None, schedules: Sequence[Schedule] = LRT_SCHEDULES) -> None:
        self.plan = LrtPlan() if plan is None else plan
        """Of the small model."""
        self.schedules = schedules

    def run(
        self,
        folder: str | Path,
        *,
        model: str | None = None,
        questions: int = 4,
        sizes: Sequence[float] = (0.005, 0.02),
        data: str = "gsm8k",
        progress: Progress | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Measure what is missing, question by question, in float32.

        Args:
            model: a checkpoint of a Latent Recurrent Transformer; a backbone, which is given random memories;
                or `small`, the model of the study `lrt-schedules`, trained exactly and interleaved.
            questions: texts, the shortest of the data; of `small`, sequences.
            sizes: of a backbone's random memories.
            data: questions with worked answers (`training.data.read_items`).
            progress: called with (what is measured, texts done, in all).

        Raises:
            SSTError: no model or an unknown one, a checkpoint of the other kind, or a folder that holds
                another model of that name.
        """
        if model is None:
            raise SSTError("equivalence is measured on a model", f"sst-interp study run {self.name} {SMALL}")
        check_place(Path(folder), "give another --out")
        self.read(folder)
        for size in sizes:
            if not 0 < size < float("inf"):
                raise SSTError(f"size = {size} of a random memory is not above 0", "for example 0.005")
        last = self.tables["gradients"]  # written last: a text that is in it is done
        for label, memory, measured, texts, weights in self._models(model, questions, sizes, data):
            about = {"model": label, "memory": memory, "fingerprint": measured.kind.digest()[:16]}
            last.refuse_another(folder, about, MODEL, "fingerprint")
            for done, text in enumerate(texts, 1):
                asked = [s for s in self.schedules if _fits(s, text)]
                jobs = [about | {"id": text.id, "method": s.method, "n": s.n} for s in asked]
                if any(last.missing(folder, jobs)):
                    compared = compare_schedules(measured, text, weights, self.schedules)
                    self.tables["states"].put(folder, compared.states.assign(**about))
                    last.put(folder, compared.gradients.assign(**about))
                if progress is not None:
                    progress(f"{label}, {memory}", done, len(texts))
        return self.read(folder)

    def _models(
        self, name: str, questions: int, sizes: Sequence[float], data: str
    ) -> Iterator[tuple[str, str, StateStreamModel, list[Sample], Mapping[str, Tensor]]]:
        """(label, memory in words, model, texts, weights whose gradient is compared) of all by a name."""
        if name == SMALL:
            for arm in (EXACT, INTERLEAVED):
                model = lrt_training(self.plan, pretrained(self.plan.small, 0), arm, 0).finish()
                weights = dict(model.backbone.model.named_parameters())
                yield SMALL, f"trained, {arm.name}", model, sequences(model, self.plan, questions), weights
            return
        trained = checkpoint_folder(name) is not None
        if not trained and not sizes:
            raise SSTError(f"{name} has no memory", "give sizes of random ones, for example 0.005")
        how: dict[str, Any] = {"kind": "lrt"} if trained else {"alpha": 0.0}
        model = load(name, dtype="float32", **how)
        texts = shortest_texts(model, questions, data)
        weights = trainable(add_adapters(model.backbone.model, RANK, 2 * RANK, (), 0))
        if trained:
            yield Path(name).name, "trained", model, texts, weights
            return
        for size in sizes:
            model.kind = random_memory(model, size)
            yield name, f"random, size {size:g}", model, texts, weights


@dataclass(frozen=True)
class Sample:
    """One text, and what is minimised on it."""

    id: str
    tokens: Int[Tensor, "1 position"]
    loss: Callable[[Float[Tensor, "1 position d_model"]], Tensor]
    """Mean loss in nats, from the last layer's outputs."""
    loss_of_passes: Callable[[Sequence[Pass]], Tensor]
    """The same, mean over passes: what the schedule trains on."""


class Compared(NamedTuple):
    """Tables of one text."""

    states: pd.DataFrame
    """A row per schedule and bin of positions: sums of `error2` and `norm2` (squared L2 of the last layer's
    difference and of the exact one) and `relative` (relative L2 error)."""
    gradients: pd.DataFrame
    """A row per schedule, loss (`of`) and part (`weights`, `memory`, and each of the memory's own): `cosine`
    with the exact gradient, `norm_ratio` (over the exact one's norm), `loss` and `loss_exact` (nats)."""


def compare_schedules(
    model: StateStreamModel,
    text: Sample,
    weights: Mapping[str, Tensor],
    schedules: Sequence[Schedule] = LRT_SCHEDULES,
) -> Compared:
    """Every schedule against sequential unrolling, at the same weights and on the same text.

    Args:
        model: a Latent Recurrent Transformer; float32 or wider, or rounding is measured.
        text: what is read and minimised.
        weights: of the backbone (or of adapters on it); their gradient is compared.
        schedules: those with more groups than positions are left out.
    """
    kept = model.kind
    memory = {name: w.detach().clone().requires_grad_() for name, w in kept.weights().items()}
    model.kind = kept.with_weights(dict(memory))
    parts = {"weights": list(weights.values()), **{name: [w] for name, w in memory.items()}}
    try:
        exact = newest(run_passes(model, text.tokens, "sequential"))
        loss = text.loss(exact)
        true, loss_exact = _gradient(loss, parts, keep=False), float(loss.detach())
        exact, states, gradients = exact.detach()[0], [], []
        for schedule in [s for s in schedules if _fits(s, text)]:
            passes = run_passes(model, text.tokens, *schedule)
            last = newest(passes)
            about = {"id": text.id, "method": schedule.method, "n": schedule.n}
            error2, norm2 = (x.double().square().sum(-1) for x in (last.detach()[0] - exact, exact))
            sums = {"error2": error2, "norm2": norm2, "relative": (error2 / norm2).sqrt()}
            states.append(by_position(sums).assign(**about))
            for of, loss in ((NEWEST, text.loss(last)), (EVERY_PASS, text.loss_of_passes(passes))):
                losses = {"of": of, "loss": float(loss.detach()), "loss_exact": loss_exact}
                gradient = _gradient(loss, parts, keep=of == NEWEST)
                gradients += [about | losses | row for row in _against(gradient, true, list(memory))]
    finally:
        model.kind = kept
    return Compared(pd.concat(states, ignore_index=True), pd.DataFrame(gradients))


def _fits(schedule: Schedule, text: Sample) -> bool:
    return schedule.method != "interleaved" or schedule.n <= text.tokens.shape[1]


def _gradient(loss: Tensor, parts: Mapping[str, Sequence[Tensor]], keep: bool) -> dict[str, list[Tensor]]:
    """The gradient by part; `keep` leaves the graph for another one."""
    wanted = [w for part in parts.values() for w in part]
    gradients = iter(torch.autograd.grad(loss, wanted, retain_graph=keep, materialize_grads=True))
    return {name: [next(gradients) for _ in part] for name, part in parts.items()}


def _against(
    gradient: dict[str, list[Tensor]], true: dict[str, list[Tensor]], memory: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Cosine and norm ratio by part; the memory's weights also all together."""

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    products = {
        name: np.array([dot(own, own), dot(true[name], true[name]), dot(own, true[name])])
        for name, own in gradient.items()
    }
    products["memory"] = np.sum([products[name] for name in memory], axis=0)
    for name, (own, theirs, both) in products.items():
        cosine = both / np.sqrt(own * theirs) if own > 0 and theirs > 0 else np.nan
        yield {"part": name, "cosine": cosine, "norm_ratio": np.sqrt(own / theirs) if theirs > 0 else np.nan}


def random_memory(model: StateStreamModel, size: float, pathway: Any = "both", seed: int = 0) -> Kind:
    """A memory of a backbone with random weights: at zeros every schedule is the same.

    Every gamma is `size`; projections and gates are normal with standard deviation size / sqrt(d_model), so
    that W m has entries of `size` times those of m.
    """
    fresh = build_memory(MemoryDesign(pathway=pathway), model.backbone)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, w in fresh.weights().items():
        drawn = torch.full(w.shape, size, dtype=w.dtype)
        if name != "gamma":
            drawn = (
                size / model.backbone.d_model**0.5 * torch.randn(w.shape, generator=generator, dtype=w.dtype)
            )
        weights[name] = drawn.to(w.device)
    return fresh.with_weights(weights)


def shortest_texts(model: StateStreamModel, questions: int, data: str = "gsm8k") -> list[Sample]:
    """The shortest conversations of questions with worked answers; the loss is that of the answer.

    Exact back-propagation runs the stack once per token: only short texts are affordable.
    """
    examples = [encode(item, model, "") for item in read_items(data)]
    samples = []
    for example in sorted(examples, key=lambda e: (len(e.tokens), e.id))[:questions]:
        batch = make_batch([example], width=1).to(model.backbone.device)
        losses = partial(answer_loss, model, batch), partial(mean_over_passes, model, batch)
        samples.append(Sample(example.id, batch.tokens, *losses))
    return samples


def sequences(model: StateStreamModel, plan: LrtPlan, questions: int) -> list[Sample]:
    """Held-out sequences of the small model's task, one by one."""
    tokens, labels = plan.small.task.draw(questions, seed=0)
    samples = []
    for k in range(questions):
        row = Labelled(tokens[k : k + 1], labels[k : k + 1])
        losses = partial(label_loss, model, row), partial(label_loss_of_passes, model, row)
        samples.append(Sample(f"sequence {k}", row.tokens, *losses))
    return samples
