"""The tables of docs/approximation.md, written from the measured ones: nothing there is typed in.

A table stands between two comments, `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sst_interp.analyses.approximation import approximation_error
from sst_interp.analyses.approximation_contraction import contraction
from sst_interp.analyses.approximation_gradients import bounds_words, gradient_fidelity
from sst_interp.analyses.approximation_training import EXACT, training_cost
from sst_interp.approximation.study import read_study
from sst_interp.documents import NOT_YET, markdown
from sst_interp.study_tables import read_rows

ERRORS = "errors.parquet"


def all_tables(studies: str | Path) -> dict[str, str]:
    """Every table as Markdown by name; what is not measured yet says so."""
    studies = Path(studies)
    errors = read_rows(studies / ERRORS)
    found, speed, small = approximation_error(errors), contraction(errors), read_study(studies)
    rows = found.schedules
    single = rows[(rows["groups"] == 1)] if len(rows) else rows
    fidelity = gradient_fidelity(small["gradients"])
    cost = training_cost(small["losses"], small["times"])
    return {
        "two-pass": _blends(single[single["sweeps"] == 1] if len(rows) else rows),
        "errors verdict": found.verdict,
        "sweeps": _schedules(single[single["layers"] == "all"] if len(rows) else rows),
        "groups": _schedules(_with_groups(rows) if len(rows) else rows, groups=True),
        "contraction": _contraction(speed.rates),
        "contraction verdict": speed.verdict,
        "gradients": _gradients(fidelity.summary),
        "gradients verdict": fidelity.verdict,
        "training": _training(cost.finals),
        "training verdict": cost.verdict,
    }


def spread(row: Mapping[Any, Any], name: str, form: str = ".2g") -> str:
    """`0.41 [0.36, 0.47]`, or the number alone where there is no interval."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if not math.isfinite(value):
        return ""
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else "")


def _blends(rows: pd.DataFrame) -> str:
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


def _schedules(rows: pd.DataFrame, groups: bool = False) -> str:
    """A row per model, alpha (and number of groups), a column per number of passes."""
    if rows.empty:
        return NOT_YET
    by = ["model", "alpha", *(["groups"] if groups else [])]
    passes = sorted(rows["passes"].unique())
    found = []
    for names, own in rows.groupby(by, sort=False):
        at = {row["passes"]: spread(row, "logit_error") for row in own.to_dict("records")}
        found.append(dict(zip(by, names, strict=True)) | {f"{p} passes": at.get(p, "") for p in passes})
    return markdown(found)


def _with_groups(rows: pd.DataFrame) -> pd.DataFrame:
    """The blends that were measured in several groups."""
    of = rows.groupby(["model", "alpha", "layers"])["groups"].transform("nunique")
    return rows[(of > 1) & (rows["sweeps"] <= rows.loc[rows["groups"] > 1, "sweeps"].max())]


def _contraction(rows: pd.DataFrame) -> str:
    rows = rows[rows["factor"].notna()] if len(rows) else rows
    names = {
        "model": "model",
        "layers": "layers",
        "alpha": "alpha",
        "L_alpha": "L * alpha",
        "groups": "groups",
    }
    return markdown(
        [
            {names[k]: row[k] for k in names} | {"left by a sweep": spread(row, "factor")}
            for row in rows.to_dict("records")
        ]
    )


def _gradients(rows: pd.DataFrame) -> str:
    return markdown(
        [
            {
                "setting": bounds_words(row["alpha_low"], row["alpha_high"]), "gradient": row["arm"],
                "of": row["part"], "cosine with exact": spread(row, "cosine", ".3f"),
                "lowest": f"{row['lowest_cosine']:.3f}",
                "norm / exact norm": spread(row, "norm_ratio", ".2f"),
                "seeds": row["seeds"],
            }
            for row in rows.to_dict("records")
        ]
    )  # fmt: skip


def _training(rows: pd.DataFrame) -> str:
    return markdown(
        [
            {
                "setting": bounds_words(row["alpha_low"], row["alpha_high"]), "trained with": row["arm"],
                "loss, exact evaluation": spread(row, "loss", ".3f"),
                "behind exact training": spread(row, "behind", "+.3f") if row["arm"] != EXACT else "",
                "loss as trained": f"{row['own']:.3f}", "right, exact evaluation": f"{row['accuracy']:.1%}",
                "alpha at the end": f"{row['alpha']:.3f}", "seeds": row["seeds"],
                "step / step without a stream": f"{row['ratio']:.1f}" if math.isfinite(row["ratio"]) else "",
            }
            for row in rows.to_dict("records")
        ]
    )  # fmt: skip
