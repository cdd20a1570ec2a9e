"""Findings of the studies as the Markdown tables of the documents: nothing there is typed in.

Each function writes one table from one finding. `documents.fill` puts it between `<!-- NAME -->` and
`<!-- end of NAME -->`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from sst_interp.experiments.studies.errors import ApproximationError, Contraction
from sst_interp.experiments.studies.gradients import (
    EVERY_PASS,
    MODEL,
    NEWEST,
    GradientFidelity,
    LatentEquivalence,
    bounds_words,
    schedule_words,
)
from sst_interp.experiments.studies.scores import ArmScores, of_row, percent
from sst_interp.tables import markdown

SAME = ("interleaved", 1)
"""Left out of the tables: it is multi-refine with K = 1."""
BY_POSITION = (("interleaved", 2), ("interleaved", 8), ("multi_refine", 1), ("multi_refine", 4))


def spread(row: Mapping[Any, Any], name: str, form: str = ".2g") -> str:
    """`0.41 [0.36, 0.47]`, the number alone where there is no interval, nothing where there is no number."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if not math.isfinite(value):
        return ""
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else "")


def known(value: float, form: str) -> str:
    """A number, or nothing where there is none."""
    return f"{value:{form}}" if math.isfinite(value) else ""


def two_pass(result: ApproximationError) -> str:
    """A row per model and blend."""
    rows = result.schedules
    rows = rows[(rows["groups"] == 1) & (rows["sweeps"] == 1)]
    return markdown(
        [
            {
                "model": row["model"], "layers": row["layers"], "alpha": row["alpha"],
                "L * alpha": row["L_alpha"], "questions": row["questions"],
                "logits": spread(row, "logit_error"), "states": spread(row, "state_error"),
                "argmax differs": f"{row['argmax']:.1%}", "KL, nats": row["kl"],
                "loss change, nats": spread(row, "loss_change", "+.2g"), "exact loss": row["loss_exact"],
                "alpha^2": f"{row['alpha'] ** 2:.1e}",
            }
            for row in rows.to_dict("records")
        ]
    )  # fmt: skip


def sweeps(result: ApproximationError) -> str:
    """Error of the logits by number of passes, blend in all layers."""
    rows = result.schedules
    return _by_passes(rows[(rows["groups"] == 1) & (rows["layers"] == "all")], ["model", "alpha"])


def groups(result: ApproximationError) -> str:
    """The same in cyclic groups, of the blends that were measured in several numbers of groups."""
    rows = result.schedules
    of = rows.groupby(["model", "alpha", "layers"])["groups"].transform("nunique")
    most = rows.loc[rows["groups"] > 1, "sweeps"].max()
    return _by_passes(rows[(of > 1) & (rows["sweeps"] <= most)], ["model", "alpha", "groups"])


def _by_passes(rows: pd.DataFrame, by: list[str]) -> str:
    """A row per value of `by`, a column per number of passes."""
    passes, lines = sorted(rows["passes"].unique()), []
    for names, own in rows.groupby(by, sort=False):
        at = {row["passes"]: spread(row, "logit_error") for row in own.to_dict("records")}
        lines.append(dict(zip(by, names, strict=True)) | {f"{p} passes": at.get(p, "") for p in passes})
    return markdown(lines)


def contraction(result: Contraction) -> str:
    """A row per blend and number of groups."""
    names = {
        "model": "model",
        "layers": "layers",
        "alpha": "alpha",
        "L_alpha": "L * alpha",
        "groups": "groups",
    }
    return markdown(
        [
            {words: row[name] for name, words in names.items()} | {"left by a sweep": spread(row, "factor")}
            for row in result.rates[result.rates["factor"].notna()].to_dict("records")
        ]
    )


def gradients(result: GradientFidelity) -> str:
    """A row per setting, arm and part."""
    return markdown(
        [
            {
                "setting": bounds_words(row["alpha_low"], row["alpha_high"]), "gradient": row["arm"],
                "of": row["part"], "cosine with exact": spread(row, "cosine", ".3f"),
                "lowest": f"{row['lowest_cosine']:.3f}",
                "norm / exact norm": spread(row, "norm_ratio", ".2f"),
                "seeds": row["seeds"],
            }
            for row in result.summary.to_dict("records")
        ]
    )  # fmt: skip


def training(result: ArmScores) -> str:
    """A row per setting and arm of the study `small`."""
    lines = []
    for setting, row, own, behind in _arms(result):
        lines.append({
            "setting": bounds_words(**{k.replace("alpha_", ""): v for k, v in setting.items()}),
            "trained with": row["arm"], "loss, exact evaluation": spread(row, "loss", ".3f"),
            "behind exact training": spread(behind, "loss", "+.3f") if behind else "",
            "loss as trained": known(own["loss"], ".3f") if own else "",
            "right, exact evaluation": f"{row['accuracy']:.1%}", "alpha at the end": f"{row['alpha']:.3f}",
            "seeds": row["seeds"], "step / step without a stream": known(row["ratio"], ".1f"),
        })  # fmt: skip
    return markdown(lines)


def latent_training(result: ArmScores) -> str:
    """A row per arm of the study `lrt-schedules`."""
    return markdown(
        [
            {
                "trained with": row["arm"], "loss, sequential": spread(row, "loss", ".3g"),
                "behind exact training": spread(behind, "loss", "+.2g") if behind else "",
                "loss as trained": spread(own, "loss", ".3g") if own else "",
                "right, sequential": f"{row['accuracy']:.1%}", "seeds": row["seeds"],
                f"step / step, {result.design.baseline}": known(row["ratio"], ".1f"),
            }
            for _, row, own, behind in _arms(result)
        ]
    )  # fmt: skip


def _arms(result: ArmScores) -> list[tuple[dict, dict, dict | None, dict | None]]:
    """(setting, its row, the row as trained, the difference from exact training) of every arm."""
    design, arms = result.design, []
    rows = {
        tuple(row[key] for key in (*design.settings, "arm", "evaluated")): row
        for row in result.finals.to_dict("records")
    }
    behind = {
        tuple(row[key] for key in (*design.settings, "arm")): row
        for row in result.differences.to_dict("records")
        if row["minus"] == design.exact
    }
    for (*setting, arm, evaluated), row in rows.items():
        if evaluated == design.definition:
            own = rows.get((*setting, arm, "own"))
            about = dict(zip(design.settings, setting, strict=True))
            arms.append((about, row, own, behind.get((*setting, arm))))
    return arms


def latent_states(result: LatentEquivalence) -> str:
    """A row per model, memory and schedule."""
    return markdown(
        [
            {
                "model": row["model"], "memory": row["memory"],
                "schedule": schedule_words(row["method"], row["n"]), "passes": row["passes"],
                "last layer": spread(row, "state"), "exact loss": row["loss_exact"],
                "loss change, nats": spread(row, "loss_change", "+.2g"), "questions": row["questions"],
            }
            for row in result.schedules.to_dict("records")
            if (row["method"], row["n"]) != SAME
        ]
    )  # fmt: skip


def latent_positions(result: LatentEquivalence) -> str:
    """A row per model and some of its schedules, a column per bin of positions."""
    rows, lines = result.positions, []
    starts = sorted(rows["position"].unique())
    for (model, memory, method, n), own in rows.groupby([*MODEL, "method", "n"], sort=False):
        if (method, n) in BY_POSITION:
            at = dict(zip(own["position"], own["state"], strict=True))
            about = {"model": model, "memory": memory, "schedule": schedule_words(method, n)}
            lines.append(about | {f"from {p}": f"{at[p]:.1g}" if p in at else "" for p in starts})
    return markdown(lines)


def latent_gradients(result: LatentEquivalence) -> str:
    """A row per model and schedule: the gradient that is trained on, and the newest outputs' alone."""
    lines = []
    for (model, memory, method, n), own in result.gradients.groupby([*MODEL, "method", "n"], sort=False):
        if (method, n) == SAME:
            continue
        at = {(row["of"], row["part"]): row for row in own.to_dict("records")}
        line = {"model": model, "memory": memory, "schedule": schedule_words(method, n)}
        for part in ("weights", "memory"):
            line[f"{part}: cosine"] = spread(at[EVERY_PASS, part], "cosine")
            line[f"{part}: norm ratio"] = spread(at[EVERY_PASS, part], "norm_ratio")
            line[f"{part}: cosine, newest outputs"] = spread(at[NEWEST, part], "cosine")
        lines.append(line)
    return markdown(lines)


def text_cost(result: ArmScores) -> str:
    """What every arm is and costs."""
    rows = result.finals
    return markdown(
        [
            {
                "arm": row["arm"], "parameters": f"{row['parameters']:,.0f}", "steps": f"{row['steps']:.0f}",
                "position passes, thousands": f"{row['position_passes'] / 1000:,.0f}",
                "processor seconds": f"{row['seconds']:.0f}",
                "step / baseline's step": known(row["ratio"], ".2f"),
                "gamma at the end": known(row["gamma"], ".3f"), "seeds": row["seeds"],
            }
            for row in rows[rows["evaluated"] == result.design.definition].to_dict("records")
        ]
    )  # fmt: skip


def text_losses(result: ArmScores) -> str:
    """A row per arm and evaluation."""
    return markdown(
        [
            {
                "arm": row["arm"], "evaluated": row["evaluated"],
                "nats per token": spread(row, "loss", ".3f"), "bits per byte": spread(row, "bits", ".3f"),
                "seeds": row["seeds"],
            }
            for row in result.finals.to_dict("records")
        ]
    )  # fmt: skip


def text_seeds(result: ArmScores) -> str:
    """Sequential losses, a row per seed and a column per arm."""
    wide = result.seeds.pivot(index="seed", columns="arm", values="loss")
    arms = [arm for arm in dict.fromkeys(result.seeds["arm"]) if arm in wide]
    return markdown(
        [
            {"seed": seed} | {str(arm): known(float(row[arm]), ".4f") for arm in arms}
            for seed, row in wide.iterrows()
        ]
    )


def text_differences(result: ArmScores) -> str:
    """A row per arm with a memory and what it is compared with."""
    return markdown(
        [
            {
                "arm, sequential": row["arm"], "minus": _minus(row),
                "nats per token": spread(row, "loss", "+.3f"),
                "bits per byte": spread(row, "bits", "+.3f"),
                "position passes": f"{row['passes']:.2f}x", "": _said(row), "seeds": row["seeds"],
            }
            for row in result.differences.to_dict("records")
            if row["arm"] not in result.design.against
        ]
    )  # fmt: skip


def text_positions(result: ArmScores) -> str:
    """Loss by bin of positions, a column per arm, sequential evaluation."""
    wide = result.curves["position"].pivot(index="position", columns="arm", values="loss")
    return markdown(
        [
            {"from position": first} | {str(arm): f"{value:.3f}" for arm, value in row.items()}
            for first, row in wide.iterrows()
        ]
    )


def recall(result: ArmScores) -> str:
    """A row per layers, arm and evaluation, and per way to guess; a column per number of pairs."""
    lines = []
    for names, own in result.finals.groupby(["layers", "arm", "evaluated"], sort=False):
        first = own.iloc[0]
        at = {f"{row['pairs']} pairs": _accuracy(row) for row in own.to_dict("records")}
        cost = {
            "steps": f"{first['steps']:.0f}",
            "position passes, thousands": f"{first['position_passes'] / 1000:,.0f}",
            "seconds": f"{first['seconds']:.0f}", "seeds": first["seeds"],
        }  # fmt: skip
        lines.append(dict(zip(("layers", "arm", "evaluated"), names, strict=True)) | at | cost)
    blank = dict.fromkeys(("steps", "position passes, thousands", "seconds", "seeds"), "")
    for words, share in result.design.guesses.items():
        at = {f"{n} pairs": f"{share(int(n)):.0%}" for n in result.finals["pairs"].unique()}
        lines.append({"layers": "", "arm": words, "evaluated": ""} | at | blank)
    return markdown(lines)


def recall_differences(result: ArmScores) -> str:
    """A row per layers, arm and what it is compared with, a column per number of pairs."""
    rows, lines = result.differences, []
    rows = rows[~rows["arm"].isin(result.design.against)] if len(rows) else rows
    for (layers, arm, _), own in rows.groupby(["layers", "arm", "minus"], sort=False) if len(rows) else ():
        records = own.to_dict("records")
        at = {f"{row['pairs']} pairs": percent(of_row(row, "accuracy")) for row in records}
        about = {"layers": layers, "arm, sequential": arm, "minus": _minus(records[0])}
        lines.append(about | at | {"seeds": records[0]["seeds"]})
    return markdown(lines)


def _minus(row: Mapping[Any, Any]) -> str:
    if row["same"]:
        return f"itself, evaluated: {row['minus']}"
    return f"baseline at equal {'compute' if 'compute' in row['minus'] else 'steps'}"


def _said(row: Mapping[Any, Any]) -> str:
    """What the interval of a difference of losses says."""
    low, high = row["loss_low"], row["loss_high"]
    if not math.isfinite(low):
        return "one seed"
    if low <= 0 <= high:
        return "no difference is shown"
    return "better" if high < 0 else "worse"


def _accuracy(row: Mapping[Any, Any]) -> str:
    ends = f" [{row['lowest']:.0%} to {row['highest']:.0%}]" if row["seeds"] > 1 else ""
    return f"{row['accuracy']:.0%}{ends}"
