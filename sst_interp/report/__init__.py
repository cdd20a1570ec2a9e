"""One self-contained HTML file about a run: opens offline, in any browser, and from an archive in ten years.

Nothing is fetched. The page carries plotly.js, its own script and its data, under a Content Security
Policy that admits exactly those two scripts by their sha256. The same run gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sst_interp.analyses import BasinShifts, Result, all_comparisons, table_html
from sst_interp.analyses.statistics import LEVEL, RESAMPLES
from sst_interp.choices import COMPARISONS, Choices
from sst_interp.durable import replace_bytes
from sst_interp.errors import SSTError
from sst_interp.report.escaping import script_hash, script_json, visible
from sst_interp.report.heatmaps import maps_data

__all__ = ["ReportableRun", "render_report", "write_report"]

HERE = Path(__file__).parent

MEANING = {
    "replayed": "The text that depth 1 wrote is replayed token by token at the deeper depth: only the depth "
    "differs.",
    "within": "Iterations of one and the same pass at the deepest depth, on its own text.",
    "free": "Each depth writes its own text and the states are compared by position. Once the texts differ "
    "by a token, the inputs differ too, so a low overlap may say no more than that.",
}
CAPTIONS = {
    "overlap": "How the overlaps are spread. Two separate humps would be two basins; one hump with a tail is "
    "one spread that a threshold cuts through.",
    "by_position": "Which generated positions shift. A high rate at position 0 alone is also what a start-up "
    "transient looks like.",
    "by_layer": "Which layers shift.",
    "rates": "Where in position and depth of the network shifts happen, over all questions. Late positions "
    "rest on fewer questions, because short answers have ended.",
    "norm_ratio": "Whether a shifted state also changes its size: an overlap sees directions only.",
}


_LEFT_OUT = re.compile(r"^recipe\.|(^|\.)host$")
"""Manifest keys that are not shown: the recipe stands above them, and a report is for others to read."""


class ReportableRun(Protocol):
    """What a report needs of a run (docs/run-format.md)."""

    @property
    def name(self) -> str:
        """How the report calls it."""
        ...

    @property
    def recipe(self) -> Any:
        """A `Recipe`."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Provenance, sessions and shards."""
        ...

    @property
    def questions(self) -> pd.DataFrame:
        """The questions table."""
        ...

    @property
    def pairs(self) -> pd.DataFrame:
        """The pairs table."""
        ...


def write_report(run: ReportableRun, path: str | Path, results: Mapping[str, Result] | None = None) -> Path:
    """Write the HTML report of a run; a reader finds the old file or the whole new one.

    Args:
        run: name, recipe, manifest and tables.
        path: the file to write; its folder is made if need be.
        results: from `all_comparisons` (computed here if None). Any other `Result` in it gets a section
            of its own, under its key.

    Returns:
        The path written.

    Raises:
        SSTError: if the file cannot be written.
    """
    path = Path(path)
    page = render_report(run, results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, page.encode(errors="backslashreplace"))  # a lone surrogate
    except OSError as error:
        raise SSTError(f"cannot write the report {path}: {error.strerror}", "choose another path") from None
    return path


def render_report(run: ReportableRun, results: Mapping[str, Result] | None = None) -> str:
    """The report as one HTML text. Pure: no file is written and the clock is not read."""
    choices: Choices = run.recipe.choices
    results = dict(results) if results is not None else dict(all_comparisons(run.pairs, choices))
    shifts = [r for r in results.values() if isinstance(r, BasinShifts)]
    shifts.sort(key=lambda r: (r.comparison != choices.comparison, COMPARISONS.index(r.comparison)))
    others = {key: r for key, r in results.items() if not isinstance(r, BasinShifts)}
    names = _record_ids(run.questions)
    plots: dict[str, Any] = {}
    sections = [_section(f"basin-{r.comparison}", r, plots) for r in shifts]
    other_sections = [_section(f"result-{i}", r, plots) for i, r in enumerate(others.values())]
    maps = maps_data(run.pairs, [r for r in shifts if r.not_testable is None], names)

    plotly_js, page_js = (_script(text) for text in (get_plotlyjs(), (HERE / "report.js").read_text("utf-8")))
    recipe = run.recipe.to_toml()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["visible"] = visible
    return environment.get_template("report.html").render(
        run=run,
        recipe=recipe,
        choices=[(f.name, getattr(choices, f.name)) for f in fields(choices)],
        summary=shifts,
        meaning=MEANING,
        sections=list(zip(shifts, sections, strict=True)),
        others=list(zip(others, others.values(), other_sections, strict=True)),
        maps=maps,
        data=Markup(script_json({"plots": plots, "maps": maps})),
        style=Markup((HERE / "report.css").read_text("utf-8")),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
        script_src=f"{script_hash(plotly_js)} {script_hash(page_js)}",
        facts=_facts(run, len(names)),
        manifest=[row for row in _flat(run.manifest) if not _LEFT_OUT.search(row[0])],
        resamples=RESAMPLES,
        level=LEVEL,
    )


def _section(prefix: str, result: Result, plots: dict[str, Any]) -> dict[str, Any]:
    """Figures and table of one result; the figures' data go to `plots` under the ids of their elements."""
    testable = not (isinstance(result, BasinShifts) and result.not_testable)
    figures = result.figures() if testable else {}
    shown = []
    for name, figure in figures.items():
        key = f"{prefix}-{name.replace('_', '-')}"
        title, subtitle = _pop_title(figure)
        plots[key] = json.loads(figure.to_json())  # type: ignore[arg-type]
        height = figure.layout.height or figure.layout.template.layout.height or 400
        shown.append(
            {
                "id": key,
                "title": title,
                "subtitle": subtitle,
                "caption": CAPTIONS.get(name, ""),
                "height": height,
            }
        )
    return {
        "id": prefix,
        "figures": shown,
        "table": Markup(table_html(result.table)),
        "modes": Markup(table_html(result.distribution.sensitivity))
        if isinstance(result, BasinShifts) and result.distribution
        else None,
    }


def _pop_title(figure: go.Figure) -> tuple[str, str]:
    """Take a figure's title: the page shows it as text, which wraps on a phone and is read aloud."""
    title = figure.layout.title.text or ""
    subtitle = figure.layout.title.subtitle.text or ""
    figure.update_layout(title={"text": None, "subtitle": {"text": None}}, margin={"t": 40, "l": 50, "r": 10})
    return title, subtitle


def _record_ids(questions: pd.DataFrame) -> dict[int, str]:
    if questions.empty:
        return {}
    first = questions.drop_duplicates("question")
    return {int(q): str(i) for q, i in zip(first["question"], first["id"], strict=True)}


def _facts(run: ReportableRun, n_questions: int) -> list[tuple[str, str]]:
    """What was measured on what: the header's short list."""
    recipe = run.recipe
    depths = ", ".join(map(str, recipe.depths))
    made = run.manifest.get("provenance", {})
    alpha = "not recorded"
    if "alpha_range" in made:
        low, high = made["alpha_range"]
        alpha = f"{low:g}, fixed" if low == high else f"{low:g} to {high:g}, mean {made['alpha_mean']:.3g}"
    found = [
        ("checkpoint", str(recipe.checkpoint)),
        ("questions", f"{n_questions:,} of {recipe.dataset}"),
        ("iteration depths", depths),
        ("tokens per answer", f"at most {recipe.max_new_tokens}"),
        ("alpha", alpha),
        ("pairs measured", f"{len(run.pairs):,}"),
    ]
    return found


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested dictionary as (dotted key, text) rows."""
    if isinstance(value, Mapping) and value:
        return [row for key in value for row in _flat(value[key], f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return [row for i, item in enumerate(value) for row in _flat(item, f"{prefix}[{i}]")]
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    return [(prefix, text)]


def _script(source: str) -> str:
    """A script as the browser will see it and hash it.

    Raises:
        ValueError: if it would end its own element (plotly.js and the page's script do not).
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    if any(stop in source.lower() for stop in ("</script", "<!--", "\0")):
        raise ValueError("a script that would close its own element")
    return source
