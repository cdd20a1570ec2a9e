"""The tables of docs/lrt.md about schedules, written from the measured ones: nothing there is typed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from sst_interp.analyses.latent_equivalence import EVERY_PASS, MODEL, latent_equivalence, schedule_words
from sst_interp.analyses.latent_training import BASELINE, EXACT, latent_training
from sst_interp.approximation.tables import spread
from sst_interp.documents import NOT_YET, markdown
from sst_interp.latent.named import read_equivalence
from sst_interp.latent.schedules import read_schedules


def all_tables(studies: str | Path) -> dict[str, str]:
    """Every table as Markdown by name; what is not measured yet says so."""
    return {name: text for tables in TABLES for name, text in tables(Path(studies)).items()}


def equivalence_tables(studies: Path) -> dict[str, str]:
    """`latent states`, `latent positions`, `latent gradients`, `latent equivalence verdict`."""
    measured = read_equivalence(studies)
    found = latent_equivalence(measured["states"], measured["gradients"])
    return {
        "latent states": _states(found.schedules),
        "latent positions": _positions(found.positions),
        "latent gradients": _gradients(found.gradients),
        "latent equivalence verdict": found.verdict,
    }


def training_tables(studies: Path) -> dict[str, str]:
    """`latent training`, `latent training verdict`."""
    found = latent_training(**read_schedules(studies))
    return {"latent training": _training(found.finals), "latent training verdict": found.verdict}


TABLES: tuple[Callable[[Path], dict[str, str]], ...] = (equivalence_tables, training_tables)
"""Each gives tables by name from the folder of measured ones; another study is another entry."""


SAME = ("interleaved", 1)
"""Left out of the tables: it is multi-refine with K = 1."""
BY_POSITION = (("interleaved", 2), ("interleaved", 8), ("multi_refine", 1), ("multi_refine", 4))


def _listed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["method"] != SAME[0]) | (rows["n"] != SAME[1])] if len(rows) else rows


def _states(rows: pd.DataFrame) -> str:
    return markdown(
        [
            {
                "model": row["model"],
                "memory": row["memory"],
                "schedule": schedule_words(row["method"], row["n"]),
                "passes": row["passes"],
                "last layer": spread(row, "state"),
                "exact loss": row["loss_exact"],
                "loss change, nats": spread(row, "loss_change", "+.2g"),
                "questions": row["questions"],
            }
            for row in _listed(rows).to_dict("records")
        ]
    )


def _positions(rows: pd.DataFrame) -> str:
    """A row per model and some of its schedules, a column per bin of positions."""
    if rows.empty:
        return NOT_YET
    starts = sorted(rows["position"].unique())
    found = []
    for (model, memory, method, n), own in rows.groupby([*MODEL, "method", "n"], sort=False):
        if (method, n) not in BY_POSITION:
            continue
        at = dict(zip(own["position"], own["state"], strict=True))
        about = {"model": model, "memory": memory, "schedule": schedule_words(method, n)}
        found.append(about | {f"from {p}": f"{at[p]:.1g}" if p in at else "" for p in starts})
    return markdown(found)


def _gradients(rows: pd.DataFrame) -> str:
    """A row per model and schedule: the gradient that is trained on, and the newest outputs' alone."""
    if rows.empty:
        return NOT_YET
    found = []
    for (model, memory, method, n), own in _listed(rows).groupby([*MODEL, "method", "n"], sort=False):
        at = {(row["of"], row["part"]): row for row in own.to_dict("records")}
        line = {"model": model, "memory": memory, "schedule": schedule_words(method, n)}
        for part, words in (("weights", "weights"), ("memory", "memory")):
            trained, newest = at[EVERY_PASS, part], at["newest outputs", part]
            line[f"{words}: cosine"] = spread(trained, "cosine")
            line[f"{words}: norm ratio"] = spread(trained, "norm_ratio")
            line[f"{words}: cosine, newest outputs"] = spread(newest, "cosine")
        found.append(line)
    return markdown(found)


def _training(rows: pd.DataFrame) -> str:
    return markdown(
        [
            {
                "trained with": row["arm"],
                "loss, sequential": spread(row, "loss", ".3g"),
                "behind exact training": "" if row["arm"] == EXACT else spread(row, "behind", "+.2g"),
                "loss as trained": spread(row, "own", ".3g"),
                "right, sequential": f"{row['accuracy']:.1%}",
                "seeds": row["seeds"],
                f"step / step, {BASELINE}": f"{row['ratio']:.1f}" if math.isfinite(row["ratio"]) else "",
            }
            for row in rows.to_dict("records")
        ]
    )
