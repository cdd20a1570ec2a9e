"""What was measured on what: the report's head, its choices in words, and its provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sst_interp.run_kind import kind_words, run_kind

_LEFT_OUT = re.compile(r"^recipe\.|(^|\.)(host|command)$")
"""Manifest keys that are not shown: the recipe stands above them, and a report is for others to read."""

CHOICES = {
    "carry": "what a layer hands on to the next pass: its output, or its FFN branch alone",
    "blend": "how the state is mixed in: convex (1 - alpha) m + alpha s, or additive m + alpha s",
    "prompt": "how the prompt is read: recurrence on and certified (exact), off, or in two passes",
    "kv": "which iteration's keys and values later positions attend to",
    "handoff": "how a pass without the blend becomes states: shifted by a position, or a moving average",
    "overlap": "similarity of two hidden states",
    "comparison": "the comparison that the report leads with; all three are measured, never pooled",
    "threshold": "overlap below which a pair has shifted: the antimode of the run's overlaps, or a number",
}


def choices_rows(names: Iterable[str]) -> list[tuple[str, str]]:
    """(choice, what it decides) of every choice."""
    return [(name, CHOICES.get(name, "")) for name in names]


def facts(run: Any) -> list[tuple[str, str]]:
    """(what, value) rows for the first screen."""
    recipe, made = run.recipe, run.manifest.get("provenance", {})
    data = made.get("dataset") if isinstance(made.get("dataset"), Mapping) else {}
    asked = run.questions["question"].nunique() if len(run.questions) else 0
    model = str(recipe.checkpoint)
    if {"family", "n_layers", "d_model"} <= set(made):
        model += f" ({made['family']}, {made['n_layers']} layers of {made['d_model']})"
    dataset = str(recipe.dataset)
    dataset += f", {data['split']} split" if data.get("split") else ""
    questions = f"{asked:,}"
    questions += f" of {data['available']:,}" if isinstance(data.get("available"), int) else ""
    found = [("kind", kind_words(run_kind(recipe, made)))] if made else []
    found += [("model", model), ("dataset", dataset), ("questions", questions)]
    found.append(("depths", ", ".join(map(str, recipe.depths))))
    found.append(("answers", f"up to {recipe.max_new_tokens} tokens"))
    found.append(("stream", _stream(recipe, made)))
    if made.get("dtype"):
        found.append(("arithmetic", str(made["dtype"])))
    started = [s.get("started", "")[:10] for s in run.manifest.get("sessions", []) if isinstance(s, Mapping)]
    if any(started):
        found.append(("captured", max(started)))
    return found


def _stream(recipe: Any, made: Mapping[str, Any]) -> str:
    """What the kind of model does not say: how its state is read, with which weights."""
    choices, kind = recipe.choices, run_kind(recipe, made)
    if kind == "looped":
        how = "in place of" if choices.blend == "convex" else "added to"
        return f"none; from iteration 2 on the last layer's output is read {how} the embedding"
    if kind == "backbone" or "stream" in made:
        return str(made.get("stream", "none"))
    words = f"{choices.blend} blend of the {str(choices.carry).replace('_', ' ')}"
    if "alpha_range" in made:
        low, high = made["alpha_range"]
        words += (
            f", alpha {low:g} fixed"
            if low == high
            else f", alpha {made['alpha_mean']:.3g} ({low:.2g}-{high:.2g})"
        )
    elif recipe.alpha is not None:
        words += f", alpha {recipe.alpha:g}"
    return words


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested dictionary as (dotted key, text) rows."""
    if isinstance(value, Mapping) and value:
        return [row for key in value for row in flat(value[key], f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return [row for i, item in enumerate(value) for row in flat(item, f"{prefix}[{i}]")]
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    return [(prefix, text)]


def shown_manifest(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The rows that a report shows."""
    return [row for row in rows if not _LEFT_OUT.search(row[0])]
