"""The tables of docs/pretraining.md, written from the measured ones: nothing there is typed in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sst_interp.analyses.pretraining import Pretraining, pretraining, said
from sst_interp.analyses.recall import RecallAccuracy, percent, recall_accuracy
from sst_interp.analyses.statistics.seeds import OverSeeds
from sst_interp.documents import NOT_YET, markdown
from sst_interp.pretraining.recall_study import read_recall
from sst_interp.pretraining.text_study import read_text_study


def all_tables(studies: str | Path) -> dict[str, str]:
    """Every table as Markdown by name; what is not measured yet says so."""
    study = read_text_study(studies)
    text, recall = pretraining(study["losses"], study["times"]), recall_accuracy(read_recall(studies))
    return {
        "text cost": _cost(text),
        "text losses": _losses(text),
        "text seeds": _by_seed(study["losses"]),
        "text differences": _differences(text),
        "text positions": _positions(text),
        "text verdict": text.verdict,
        "recall": _recall(recall),
        "recall differences": _recall_differences(recall),
        "recall verdict": recall.verdict,
    }


def spread(row: Mapping[Any, Any], name: str, form: str) -> str:
    """`0.41 [0.36, 0.47]`, or the number alone where there is no interval."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else "")


def _cost(found: Pretraining) -> str:
    rows = found.finals
    return markdown(
        [
            {
                "arm": row["arm"], "parameters": f"{row['parameters']:,.0f}", "steps": f"{row['steps']:.0f}",
                "position passes, thousands": f"{row['position_passes'] / 1000:,.0f}",
                "processor seconds": f"{row['seconds']:.0f}",
                "step / baseline's step": f"{row['ratio']:.2f}" if math.isfinite(row["ratio"]) else "",
                "gamma at the end": f"{row['gamma']:.3f}" if math.isfinite(row["gamma"]) else "",
                "seeds": row["seeds"],
            }
            for row in (rows[rows["evaluated"] == "sequential"].to_dict("records") if len(rows) else [])
        ]
    )  # fmt: skip


def _losses(found: Pretraining) -> str:
    return markdown(
        [
            {
                "arm": row["arm"], "evaluated": row["evaluated"],
                "nats per token": spread(row, "loss", ".3f"), "bits per byte": spread(row, "bits", ".3f"),
                "seeds": row["seeds"],
            }
            for row in found.finals.to_dict("records")
        ]
    )  # fmt: skip


def _by_seed(losses: Any) -> str:
    """Sequential losses, a row per seed and a column per arm."""
    if losses.empty:
        return NOT_YET
    rows = losses[losses["evaluated"] == "sequential"]
    sums = rows.groupby(["seed", "arm"], sort=False)[["loss", "tokens"]].sum()
    table = (sums["loss"] / sums["tokens"]).unstack("arm")
    return markdown(
        [
            {"seed": seed} | {arm: f"{v:.4f}" if math.isfinite(v) else "" for arm, v in row.items()}
            for seed, row in table.iterrows()
        ]
    )


def _differences(found: Pretraining) -> str:
    return markdown(
        [
            {
                "arm, sequential": row["arm"], "minus": _minus(row),
                "nats per token": spread(row, "difference", "+.3f"),
                "bits per byte": spread(row, "difference_bits", "+.3f"),
                "position passes": f"{row['passes']:.2f}x",
                "": said(_over(row)), "seeds": row["seeds"],
            }
            for row in found.differences.to_dict("records")
        ]
    )  # fmt: skip


def _positions(found: Pretraining) -> str:
    """Loss by bin of positions, a column per arm, sequential evaluation."""
    if found.positions.empty:
        return NOT_YET
    chosen = found.positions[found.positions["evaluated"] == "sequential"]
    table = chosen.pivot(index="position", columns="arm", values="loss")
    rows = [
        {"from position": first} | {str(arm): f"{value:.3f}" for arm, value in row.items()}
        for first, row in table.iterrows()
    ]
    return markdown(rows)


def _recall(found: RecallAccuracy) -> str:
    """A row per layers, arm and evaluation, a column per number of pairs."""
    if found.scores.empty:
        return NOT_YET
    rows = []
    for names, own in found.scores.groupby(["layers", "arm", "evaluated"], sort=False):
        first = own.iloc[0]
        at = {f"{row['pairs']} pairs": _accuracy(row) for row in own.to_dict("records")}
        cost = {
            "steps": f"{first['steps']:.0f}",
            "position passes, thousands": f"{first['position_passes'] / 1000:,.0f}",
            "seconds": f"{first['seconds']:.0f}", "seeds": first["seeds"],
        }  # fmt: skip
        rows.append(dict(zip(("layers", "arm", "evaluated"), names, strict=True)) | at | cost)
    first = found.scores.drop_duplicates("pairs")
    blank = dict.fromkeys(("steps", "position passes, thousands", "seconds", "seeds"), "")
    for name, words in (("guess", "a guess"), ("excluding", "a guess among values not yet an answer")):
        at = {f"{n} pairs": f"{share:.0%}" for n, share in zip(first["pairs"], first[name], strict=True)}
        rows.append({"layers": "", "arm": words, "evaluated": ""} | at | blank)
    return markdown(rows)


def _recall_differences(found: RecallAccuracy) -> str:
    """A row per layers, arm and what it is compared with, a column per number of pairs."""
    if found.differences.empty:
        return NOT_YET
    rows = []
    for (layers, arm, _), own in found.differences.groupby(["layers", "arm", "minus"], sort=False):
        records = own.to_dict("records")
        at = {f"{row['pairs']} pairs": percent(_over(row)) for row in records}
        about = {"layers": layers, "arm, sequential": arm, "minus": _minus(records[0])}
        rows.append(about | at | {"seeds": records[0]["seeds"]})
    return markdown(rows)


def _minus(row: Mapping[Any, Any]) -> str:
    if row["equal"] == "weights":
        return f"itself, evaluated: {row['minus']}"
    return f"baseline at {row['equal']}"


def _accuracy(row: Mapping[Any, Any]) -> str:
    ends = f" [{row['lowest']:.0%} to {row['highest']:.0%}]" if row["seeds"] > 1 else ""
    return f"{row['accuracy']:.0%}{ends}"


def _over(row: Mapping[Any, Any]) -> OverSeeds:
    mean, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
    return OverSeeds(mean, low, high, math.nan, math.nan, int(row["seeds"]))
