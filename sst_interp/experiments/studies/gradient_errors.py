"""How far is the gradient of a training schedule from the exact one, and what does it cost?

Two tables: on one model with random adapters, under conditions that vary one at a time (`GRADIENT_ERRORS`);
and along the training of the small SST of `exact-training`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from sst_interp.analyses.plots import GREY, TEMPLATE, canvas
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import over_seeds, seeds_words
from sst_interp.errors import Untestable
from sst_interp.experiments.studies.fit import EXACT, NONE, TWO_PASS, Schedule
from sst_interp.experiments.studies.show import COLOURS, finite, groups_of, interval, number, table
from sst_interp.experiments.studies.study import Progress
from sst_interp.experiments.table import Table
from sst_interp.models.checkpoint import add_adapters, trainable
from sst_interp.models.kinds.sst import PAPER_ALPHA
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel, attach
from sst_interp.models.solvers.implicit import Solver
from sst_interp.questions.datasets import load_items
from sst_interp.tables import markdown
from sst_interp.training.data import Batch
from sst_interp.training.objective import answer_loss, newest, run_passes

SETTING = ("alpha_low", "alpha_high", "start")
PARTS = {"weights": "weights", "alpha": "alpha (its logit)"}
ROWS = 2
"""Rows of text."""
RANK = 16
"""Of the adapters; their second factors are random, so that they do something."""
REFERENCE = 1e-7
"""Tolerance of the solution whose gradient counts as exact."""
SCHEDULES: dict[str, Schedule] = {
    "no stream": NONE,
    TWO_PASS.name: TWO_PASS.schedule,
    "2 sweeps": Schedule(sweeps=2),
    "4 sweeps": Schedule(sweeps=4),
    **{f"solved, {n} and {n}": Schedule("exact", exact_sweeps=(n, n)) for n in (0, 1, 2, 4, 8)},
    "solved, 8 and 0": Schedule("exact", exact_sweeps=(8, 0)),
    "solved to 1e-3": Schedule("exact"),
}
"""`solved, a and b`: the method `exact` with `a` sweeps for the states and `b` for their gradient."""


@dataclass(frozen=True)
class Condition:
    """What gradients are compared under."""

    alpha: float = PAPER_ALPHA
    share: float = 1.0
    """Of the backbone's layers, from the first on; the others are cut off."""
    length: int = 128
    """Tokens of a row."""


BASE = Condition()
CONDITIONS = (
    BASE,
    *(Condition(alpha=alpha) for alpha in (0.01, 0.05, 0.1)),
    *(Condition(share=share) for share in (0.2, 0.5)),
    *(Condition(length=length) for length in (32, 64, 256)),
)
GRADIENT_ERRORS = Table("exact-training-schedules.parquet", ("model", *asdict(BASE)))
"""A row per condition and schedule: `layers`, `loss_change` (from the exact loss, nats per token), `cosine`
and `error` (relative, L2) of the gradient of all adapters and of alpha, `seconds` of a forward and backward
pass (processor time, one thread, float32). The schedule `token by token` checks the reference."""


def measure_gradient_errors(
    folder: str | Path,
    name: str,
    conditions: tuple[Condition, ...] = CONDITIONS,
    progress: Progress | None = None,
    rows: int = ROWS,
) -> pd.DataFrame:
    """Gradients of every schedule on GSM8K text under each condition, where the table lacks them.

    Args:
        name: a backbone.
        rows: of text, in a batch.
    """
    jobs = [{"model": Path(name).name, **asdict(condition)} for condition in conditions]
    lacks = GRADIENT_ERRORS.missing(folder, jobs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for done, (condition, job, lack) in enumerate(zip(conditions, jobs, lacks, strict=True), 1):
            if lack:
                found = pd.DataFrame(compared(name, condition, rows))
                GRADIENT_ERRORS.put(folder, found.assign(**job))
            if progress is not None:
                words = ", ".join(f"{key} {value:g}" for key, value in asdict(condition).items())
                progress(f"gradients, {words}", done, len(conditions))
    finally:
        torch.set_num_threads(threads)
    return GRADIENT_ERRORS.read(folder)


def compared(name: str, condition: Condition, rows: int) -> Iterator[dict[str, Any]]:
    """The rows of one condition."""
    model, weights = with_adapters(name, condition)
    batch = text_rows(model, rows, condition.length)

    def gradient(schedule: Schedule, solver: Solver | None = None) -> tuple[Tensor, float, float]:
        began = time.process_time()
        last = newest(run_passes(model, batch.tokens, *schedule, solver=solver))
        loss = answer_loss(model, batch, last)
        parts = torch.autograd.grad(loss, weights, materialize_grads=True)
        spent = time.process_time() - began
        return torch.cat([part.flatten() for part in parts]).double(), float(loss.detach()), spent

    exact, exact_loss, _ = gradient(Schedule("exact"), Solver(REFERENCE))
    shown = SCHEDULES | ({"token by token": EXACT.schedule} if condition.length <= 32 else {})
    for schedule, how in shown.items():
        found, loss, seconds = gradient(how)
        yield {
            "layers": model.backbone.n_layers, "schedule": schedule, "loss_change": loss - exact_loss,
            "cosine": float(torch.nn.functional.cosine_similarity(found, exact, dim=0)),
            "error": float((found - exact).norm() / exact.norm()), "seconds": seconds,
        }  # fmt: skip


def with_adapters(
    name: str, condition: Condition, dtype: str = "float32"
) -> tuple[StateStreamModel, list[Tensor]]:
    """The first layers of a backbone, and what is differentiated: alpha and all adapters."""
    whole = load(name, dtype=dtype)
    inner, backbone = whole.backbone.model, whole.backbone
    kept = max(1, round(condition.share * backbone.n_layers))
    blocks = "layers" if hasattr(backbone.decoder, "layers") else "h"
    setattr(backbone.decoder, blocks, getattr(backbone.decoder, blocks)[:kept])
    backbone.config.num_hidden_layers = kept
    if getattr(backbone.config, "layer_types", None) is not None:
        backbone.config.layer_types = backbone.config.layer_types[:kept]
    backbone.config._attn_implementation = "eager"  # as a training on CPUs does
    model = attach(inner, whole.tokenizer, alpha=condition.alpha)
    adapters = trainable(add_adapters(inner, RANK, 2 * RANK, (), 0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in adapters.items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    model.alpha = model.alpha.detach().requires_grad_()
    return model, [model.alpha, *adapters.values()]


def text_rows(model: StateStreamModel, rows: int, tokens: int) -> Batch:
    """Rows of GSM8K questions and worked answers, one behind the other; the loss is on the second halves."""
    items, _ = load_items("gsm8k")
    text = "\n".join(f"{item.text}\n{item.worked}" for item in items[:100])
    cut = torch.tensor(model.encode_plain(text)[: rows * tokens]).view(rows, tokens)
    answer = torch.zeros_like(cut, dtype=torch.bool)
    answer[:, tokens // 2 : -1] = True
    return Batch(cut, answer)


@dataclass(frozen=True, eq=False)
class GradientErrors(Result):
    """Errors and costs of every schedule's gradient. Conditions are never pooled."""

    rows: pd.DataFrame
    """`GRADIENT_ERRORS` with `time`, over the time of two passes in the same condition."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Error and cost of the gradient"

    @property
    def table(self) -> pd.DataFrame:
        """A row per condition and schedule."""
        return self.rows

    @property
    def base(self) -> pd.DataFrame:
        """The rows under the paper's mean alpha, all layers and `BASE.length` tokens."""
        return at(self.rows, BASE)

    @property
    def verdict(self) -> str:
        """Two passes against a solution with two and two sweeps, and the check of the reference."""
        own = self.base.set_index("schedule")
        two, solved = own.loc[TWO_PASS.name], own.loc["solved, 2 and 2"]
        check = self.rows.loc[self.rows["schedule"] == "token by token", "error"]
        words = (
            f"The two-pass gradient is {two['error']:.0%} off, the solved one {solved['error']:.2g} at "
            f"{solved['time']:.2f} of its time ({two['model']}, alpha {BASE.alpha:g}, "
            f"{two['layers']} layers, {BASE.length} tokens)."
        )
        told = f" The reference is {check.max():.1g} from back-propagation through time."
        return words + (told if len(check) else "")

    def figure(self) -> go.Figure:
        """Error by alpha, a line per schedule, on log axes."""
        return self.figures()["by alpha"]

    def figures(self) -> dict[str, go.Figure]:
        """Error by alpha, by layers and by tokens."""
        drawn, y = {}, "relative error of the gradient (log scale)"
        for name, column in (("alpha", "alpha"), ("layers", "share"), ("tokens", "length")):
            shown = self.rows
            for key, value in asdict(BASE).items():
                shown = shown if key == column else shown[shown[key] == value]
            x = "layers" if column == "share" else column
            words = f"{shown['model'].iloc[0]}; everything but {name} as in training; float32"
            figure = canvas(f"Error of the gradient by {name}", words, f"{name} (log scale)", y)
            names = [n for n in SCHEDULES if n != "no stream"]
            for n, schedule in enumerate(names):
                own = shown[(shown["schedule"] == schedule) & (shown["error"] > 0)].sort_values(x)
                figure.add_scatter(
                    x=own[x], y=own["error"], name=schedule, mode="lines+markers",
                    line={"color": COLOURS[n % len(COLOURS)], "dash": "solid" if n < len(COLOURS) else "dot"},
                    hovertemplate=f"{schedule}<br>{name} %{{x}}: %{{y:.2g}}<extra></extra>",
                )  # fmt: skip
            figure.update_xaxes(type="log").update_yaxes(type="log", exponentformat="power")
            drawn[f"by {name}"] = figure
        return drawn


def at(rows: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """The rows of a condition."""
    for key, value in asdict(condition).items():
        rows = rows[rows[key] == value]
    return rows


def gradient_errors(rows: pd.DataFrame) -> GradientErrors:
    """The errors of every schedule, from the table `schedules` of `exact-training`.

    Raises Untestable if the base condition was not measured.
    """
    if rows.empty or at(rows, BASE).empty:
        raise Untestable("no gradient was measured; `sst-interp study run exact-training smollm2-135m` does")
    by = ["model", *asdict(BASE)]
    two = rows[rows["schedule"] == TWO_PASS.name].set_index(by)["seconds"]
    times = [row["seconds"] / two[tuple(row[key] for key in by)] for row in rows.to_dict("records")]
    return GradientErrors(rows.assign(time=times))


def schedules_table(result: GradientErrors) -> str:
    """A row per schedule under the base condition."""
    columns = {
        "schedule": "schedule", "loss less exact": number("loss_change", "+.4f"),
        "cosine with exact": number("cosine", ".4f"), "relative error": number("error", ".2g"),
        "time / two passes": number("time", ".2f"),
    }  # fmt: skip
    return table(result.base, columns)


def conditions_table(result: GradientErrors) -> str:
    """A row per condition: the errors of a few schedules."""
    shown = [TWO_PASS.name, "4 sweeps", "solved, 2 and 2", "solved, 4 and 4", "solved to 1e-3"]
    lines = []
    for _, own in groups_of(result.rows, [*asdict(BASE)]):
        first, cells = own.iloc[0], own.set_index("schedule")
        about = {"alpha": first["alpha"], "layers": first["layers"], "tokens": first["length"]}
        errors = {name: f"{cells['error'][name]:.2g}" for name in shown}
        lines.append(about | errors | {"time, solved to 1e-3": f"{cells['time']['solved to 1e-3']:.2f}"})
    return markdown(lines)


@dataclass(frozen=True, eq=False)
class GradientFidelity(Result):
    """Gradients of few sweeps against exact ones. Intervals are over seeds; settings are not pooled."""

    summary: pd.DataFrame
    """A row per setting, arm and part: seeds, steps, and over them `cosine` and `norm_ratio` (mean of each
    seed's mean over the training) with `_low` and `_high`, and `lowest_cosine` of any step and seed."""
    curves: pd.DataFrame
    """A row per setting, arm, part and step: means over seeds of `cosine` and `norm_ratio`, and their lowest
    and highest seed."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Gradients against exact back-propagation"

    @property
    def table(self) -> pd.DataFrame:
        """A row per setting, arm and part."""
        return self.summary

    @property
    def verdict(self) -> str:
        """The two-pass gradient, setting by setting, and the arm that comes nearest to exact."""
        told = [self._told(ends, rows) for ends, rows in groups_of(self.summary, SETTING)]
        return " ".join(filter(None, told)) or "Not testable: no two-pass gradient was measured."

    def _told(self, ends: tuple, rows: pd.DataFrame) -> str:
        sentences = []
        for part, words in PARTS.items():
            own = rows[rows["part"] == part].set_index("arm")
            if TWO_PASS.name not in own.index:
                continue
            two, best = own.loc[TWO_PASS.name], str(own["cosine"].idxmax())
            sentences.append(
                f"The two-pass gradient of {words} has a cosine of {two['cosine']:.3f} with the exact one "
                f"(lowest {two['lowest_cosine']:.3f}) and {two['norm_ratio']:.2f} times its norm."
            )
            if best != TWO_PASS.name:
                sentences.append(f"Nearest is {best}, cosine {own.loc[best, 'cosine']:.3f}.")
        head = f"{bounds_words(*ends)}, {seeds_words(int(rows['seeds'].max()))}."
        return " ".join([head, *sentences]) if sentences else ""

    def figure(self) -> go.Figure:
        """Cosine (above) and norm ratio (below) over the training, in the widest setting."""
        return self._setting(*max(groups_of(self.curves, SETTING), key=lambda one: one[0][1]))

    def figures(self) -> dict[str, go.Figure]:
        """A figure per setting."""
        by = groups_of(self.curves, SETTING)
        return {bounds_words(*ends): self._setting(ends, rows) for ends, rows in by}

    def _setting(self, ends: tuple, rows: pd.DataFrame) -> go.Figure:
        parts = [part for part in PARTS if part in set(rows["part"])]
        figure = make_subplots(
            rows=2, cols=len(parts), shared_xaxes=True, vertical_spacing=0.08, horizontal_spacing=0.12,
            column_titles=[PARTS[part] for part in parts],
        )  # fmt: skip
        for column, part in enumerate(parts, 1):
            arms = rows[rows["part"] == part].groupby("arm", sort=False)
            for (arm, own), colour in zip(arms, COLOURS, strict=False):
                for row, name in enumerate(("cosine", "norm_ratio"), 1):
                    figure.add_scatter(
                        x=own["step"], y=own[name], name=arm, legendgroup=arm, line={"color": colour},
                        mode="lines+markers", marker={"size": 4}, showlegend=row == 1 and column == 1,
                        customdata=own[[f"{name}_lowest", f"{name}_highest"]].to_numpy(), row=row, col=column,
                        hovertemplate=f"{arm}, step %{{x}}: %{{y:.3f}} [%{{customdata[0]:.3f}} to "
                        "%{customdata[1]:.3f} over seeds]<extra></extra>",
                    )  # fmt: skip
            figure.update_yaxes(title_text="cosine with exact", row=1, col=column)
            figure.update_yaxes(title_text="norm / exact norm", row=2, col=column)
            figure.add_hline(y=1, line={"color": GREY, "dash": "dot"}, row=2, col=column)  # pyright: ignore
            figure.update_xaxes(title_text="step of the two-pass training", row=2, col=column)
        n = int(self.summary["seeds"].max())
        subtitle = f"{bounds_words(*ends)}; mean of {seeds_words(n)}"
        figure.update_layout(
            template=TEMPLATE, height=560, margin={"t": 130},
            title={"text": self.title, "subtitle": {"text": subtitle}}, legend={"y": 1.06},
        )  # fmt: skip
        return figure


def bounds_words(low: float, high: float, start: float) -> str:
    """How a setting is called."""
    return f"alpha in [{low:g}, {high:g}] from {start:g}"


def setting_words(row: Mapping[Any, Any]) -> str:
    """How the setting of a table's row is called."""
    return bounds_words(*(row[name] for name in SETTING))


def gradient_fidelity(gradients: pd.DataFrame) -> GradientFidelity:
    """Cosines and norm ratios of approximate gradients, from the table `gradients` of `exact-training`.

    Rows that are not finite are left out. Raises Untestable if there is no other.
    """
    values = ["cosine", "norm_ratio"]
    if gradients.empty:
        raise Untestable("the table of gradients is empty")
    rows = finite(gradients, values)
    if rows.empty:
        raise Untestable("no gradient is finite")
    by, records = [*SETTING, "arm", "part"], []
    for names, own in groups_of(rows, by, sort=False):
        per_seed = own.groupby("seed")[values].mean()
        record = dict(zip(by, names, strict=True)) | {"seeds": len(per_seed), "steps": own["step"].nunique()}
        for value in values:
            record |= over_seeds(per_seed[value].to_numpy()).columns(value)
        records.append(record | {"lowest_cosine": own["cosine"].min()})
    grouped = rows.groupby([*by, "step"], sort=False)[values]
    curves = grouped.mean()
    for value in values:
        curves[f"{value}_lowest"], curves[f"{value}_highest"] = grouped.min()[value], grouped.max()[value]
    return GradientFidelity(pd.DataFrame(records), curves.reset_index())


def gradients_table(result: GradientFidelity) -> str:
    """A row per setting, arm and part."""
    columns = {
        "setting": setting_words, "gradient": "arm", "of": "part",
        "cosine with exact": interval("cosine", ".3f"), "lowest": number("lowest_cosine", ".3f"),
        "norm / exact norm": interval("norm_ratio", ".2f"), "seeds": "seeds",
    }  # fmt: skip
    return table(result.summary, columns)
