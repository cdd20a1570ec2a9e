"""What the report shows beside the figures: claims, a section per analysis, choices, provenance."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

from sst_interp.analyses.result import ANALYSES, Analysis, Result
from sst_interp.findings.answers import KEPT
from sst_interp.findings.claims import EVERYWHERE, GRADES, INCOMPARABLE, Row
from sst_interp.findings.ledger import Ledger
from sst_interp.models.choices import COMPARISONS, Choices
from sst_interp.runs.provenance import kind_words, run_kind

MEANING = {
    "teacher_forced": "Both depths read the text that depth 1 wrote: only the depth differs.",
    "within": "Iterations of one pass at the deepest depth, on its own text.",
    "free_running": "Each depth writes its own text; states are compared by position. Once a token differs, "
    "the inputs differ, and a low overlap may mean no more than that.",
}
"""Comparison -> what differs in it."""

STORY = (
    ("basin_shifts", "overlap", "Is there a second mode?"),
    ("basin_shifts", "rates", "Where do states shift?"),
    ("token_replacement", "replaced", "What does it do to the output?"),
)
"""Figures of the first screen: analysis, figure, the question it answers."""


@dataclass(frozen=True)
class Panel:
    """One result in the report, with its claims and figures."""

    id: str
    comparison: str
    result: Result
    rows: list[Row]
    figures: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""
    """Its name in `Ledger.results`."""

    @property
    def first(self) -> str:
        """The first sentence of the verdict."""
        return split_verdict(self.result.verdict)[0]

    @property
    def rest(self) -> str:
        """The other sentences of the verdict."""
        return split_verdict(self.result.verdict)[1]


@dataclass(frozen=True)
class Section:
    """One analysis in all its comparisons."""

    id: str
    about: Analysis
    """Its entry in the registry."""
    panels: list[Panel]
    missing: dict[str, str]

    @property
    def answer(self) -> str:
        """One line for the index: the leading comparison's first sentence."""
        return self.panels[0].first if self.panels else "not testable"


def split_verdict(verdict: str) -> tuple[str, str]:
    """(first sentence, rest): a full stop before a capital letter ends a sentence."""
    stop = re.search(r"(?<=[a-z0-9)\]%])\.(?=\s+[A-Z])", verdict)
    if stop is None:
        return verdict, ""
    return verdict[: stop.end()], verdict[stop.end() :].strip()


def sections(ledger: Ledger, lead: str) -> list[Section]:
    """The report's sections; figures are filled in by `render_report`."""
    names = dict.fromkeys(key.split(".")[0] for key in [*ledger.results, *ledger.missing])
    order = sorted((_about(name, ledger) for name in names), key=lambda about: about.order)
    return [_section(ledger, about, i, lead) for i, about in enumerate(order)]


def by_lead(names: Iterable[str], lead: str) -> list[str]:
    """Comparisons in their order: the leading one first, unknown names last."""
    known = {name: i for i, name in enumerate(COMPARISONS)}
    return sorted(names, key=lambda name: (name != lead, known.get(name, len(known))))


def _about(name: str, ledger: Ledger) -> Analysis:
    """The registry's entry of an analysis; for an unregistered result, an entry with its title."""
    if name in ANALYSES:
        return ANALYSES[name]
    if name in KEPT:
        return KEPT[name]
    titles = (
        result.title.split(":")[0] for key, result in ledger.results.items() if key.split(".")[0] == name
    )
    return Analysis(name, _not_registered, next(titles, name), "", order=math.inf)


def _not_registered(_: Any) -> NoReturn:
    raise NotImplementedError


def _section(ledger: Ledger, about: Analysis, index: int, lead: str) -> Section:
    def of(keys: Iterable[str]) -> dict[str, str]:
        """Comparison -> key, for the keys of this analysis."""
        return {k.partition(".")[2] or EVERYWHERE: k for k in keys if k.split(".")[0] == about.name}

    results = of(ledger.results)
    panels = [
        Panel(
            f"a{index}-{i}",
            place,
            ledger.results[results[place]],
            _rows(ledger, about, place),
            [],
            results[place],
        )
        for i, place in enumerate(by_lead(results, lead))
    ]
    missing = {place: ledger.missing[key] for place, key in of(ledger.missing).items()}
    return Section(f"a{index}", about, panels, missing)


def _rows(ledger: Ledger, about: Analysis, comparison: str) -> list[Row]:
    """The ledger's rows that stand beside a result."""
    rows = []
    for row in ledger.rows:
        if row.claim.id in about.claims and row.comparison in (comparison, EVERYWHERE):
            rows.append(row)
        elif row.claim.id in about.claims and comparison in row.checks:
            rows.append(replace(row, finding=row.checks[comparison], comparison=comparison))
    return rows


CHIPS = dict(zip(GRADES, (("holds", "\u2713"), ("fails", "\u2717"), ("untested", "?"), ("untested", "\u25a0"),
                          ("untested", "\u25cb")), strict=True))  # fmt: skip
"""Grade -> CSS class and mark: it differs in words, shape and colour."""


def comparisons(ledger: Ledger, lead: str) -> list[str]:
    """The comparisons that the report shows, the leading one first."""
    return by_lead(
        {name for row in ledger.rows for name in (row.comparison, *row.checks)} - {EVERYWHERE}, lead
    )


_LEFT_OUT = re.compile(r"^recipe\.|(^|\.)(host|command)$")
"""Manifest keys that a report leaves out: the recipe, which it shows apart, and names of the machine."""

CHOICES = {
    "carry": "what becomes the next state: the output of the layer, or of its FFN branch",
    "blend": "how the state is mixed in: convex (1 - alpha) m + alpha s, or additive m + alpha s",
    "prompt": "how the prompt is read: recurrence on and certified (exact), off, or in two passes",
    "kv": "which iteration's keys and values later positions attend to",
    "initial_guess": "how a pass without the blend becomes states: shift by a position, or a moving average",
    "overlap": "similarity of two hidden states",
    "comparison": "the comparison that the report leads with; all three are measured, never pooled",
    "threshold": "overlap below which a pair has shifted: the antimode of the run's overlaps, or a number",
}


def choices_rows(choices: Choices) -> list[tuple[str, str, Any]]:
    """(choice, what it decides, this run's value) for every choice."""
    return [(f.name, CHOICES.get(f.name, ""), getattr(choices, f.name)) for f in fields(choices)]


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
    rows = [("kind", kind_words(run_kind(recipe, made)))] if made else []
    rows += [("model", model), ("dataset", dataset), ("questions", questions)]
    rows.append(("depths", ", ".join(map(str, recipe.depths))))
    rows.append(("scoring", str(getattr(recipe, "scoring", None) or "what the model writes")))
    rows.append(("answers", f"up to {recipe.max_new_tokens} tokens"))
    rows.append(("stream", _stream(recipe, made)))
    if made.get("dtype"):
        rows.append(("arithmetic", str(made["dtype"])))
    started = [s.get("started", "")[:10] for s in run.manifest.get("sessions", []) if isinstance(s, Mapping)]
    if any(started):
        rows.append(("captured", max(started)))
    return rows


def summary(run: Any, ledger: Ledger) -> list[str]:
    """What was asked, of which model, what came out, and what is not comparable: four sentences."""
    about = dict(facts(run))
    asked = f"{about['questions']} questions of {about['dataset']} were asked at depths {about['depths']}"
    kind = f"a {about['kind']}" if "kind" in about else "a model"
    stream = "" if about["stream"] in ("none", "") else f", with a stream: {about['stream']}"
    counts = [f"{n} {grade}" for grade, n in ledger.counts.items() if n and grade != INCOMPARABLE]
    left = [row.claim.id for row in ledger.rows if row.grade == INCOMPARABLE]
    found = f"Of {len(ledger.rows)} claims, {', '.join(counts) or 'none could be graded'}."
    found += f" {ledger.verdict.split('; teacher-forced text decides.')[1].strip()}" if ledger.failed else ""
    return [
        f"{asked}, answers of {about['answers']}, scored by {about['scoring']}.",
        f"The model is {about['model']}, {kind}{stream}.",
        found.strip() if ledger.rows else "The claims of this run are not computed yet.",
        f"Not comparable with this run: {', '.join(left)}." if left else "Every claim could be compared.",
    ]


def _stream(recipe: Any, made: Mapping[str, Any]) -> str:
    """How the state is read, and with which weights."""
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


def manifest_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The manifest rows that a report shows."""
    return [row for row in flat(manifest) if not _LEFT_OUT.search(row[0])]
