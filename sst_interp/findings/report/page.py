"""A run's report as one HTML file that works offline.

Nothing is fetched: the page carries plotly.js (compressed), its own script and its data. A Content Security
Policy admits exactly those two scripts by their sha256. The same run gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sst_interp.analyses.contrast import PAPER_THRESHOLD
from sst_interp.analyses.result import Result, comparison_words, table_html
from sst_interp.analyses.statistics.bootstrap import LEVEL, RESAMPLES
from sst_interp.errors import SSTError
from sst_interp.files import check_output, put_bytes
from sst_interp.findings.ledger import Ledger, claims
from sst_interp.findings.report.beside import Beside
from sst_interp.findings.report.explorer import LARGEST, Threshold, explorer_data
from sst_interp.findings.report.packing import packed
from sst_interp.findings.report.sections import (
    CHIPS,
    MEANING,
    STORY,
    Panel,
    Section,
    choices_rows,
    comparisons,
    facts,
    manifest_rows,
    sections,
    summary,
)
from sst_interp.models.choices import COMPARISONS, Choices
from sst_interp.runs.manifest import content_hash
from sst_interp.runs.provenance import shows_text, tokenizer_of
from sst_interp.tables import visible, visible_texts

HERE = Path(__file__).parent
EXPLORER_SCRIPTS = ("unpack.js", "explorer_data.js", "explorer_map.js", "explorer_plots.js", "explorer.js")
REPORT_SCRIPTS = ("links.js", "list.js", "changed.js", "compare.js", "notes.js", "report.js")


def write_report(
    run: Any, path: str | Path, ledger: Ledger | None = None, tokenizer: Any = None, **more: Any
) -> Path:
    """Write the HTML report of a run, atomically; returns its path.

    Args:
        run: a `Run`, or anything with its name, recipe, manifest and tables.
        path: the file to write; its folder is made if needed.
        ledger: of `ledger_of` or `claims` (None: computed). Other results in it get a section.
        tokenizer: for token texts, if the run's data may be shown (None: looked up).
        more: `beside`, `notes` and `scores` of `render_report`.

    Raises:
        SSTError: if the file cannot be written.
    """
    path = Path(path)
    check_output(path, "choose another path")
    page = render_report(run, ledger, tokenizer, **more)
    try:
        put_bytes(path, page.encode(errors="backslashreplace"))  # a lone surrogate
    except OSError as error:
        raise SSTError(f"cannot write the report {path}: {error.strerror}", "choose another path") from None
    return path


def render_report(
    run: Any,
    ledger: Ledger | None = None,
    tokenizer: Any = None,
    *,
    beside: Beside | None = None,
    notes: Mapping[str, str] | None = None,
    scores: Mapping[int, float] | None = None,
    live: str | None = None,
) -> str:
    """The report as one HTML text. No file is written and the clock is not read.

    Args:
        run: a `Run`, or anything with its name, recipe, manifest and tables.
        ledger: of `ledger_of` or `claims` (None: computed).
        tokenizer: for token texts, if the run's data may be shown (None: looked up).
        beside: another run on the same questions.
        notes: of `read_notes`.
        scores: of a probe, by question (None: those kept with the run).
        live: a server's name of this version of the page, which asks for it and reloads when it changes.
    """
    ledger = ledger if ledger is not None else _ledger(run)
    choices: Choices = run.recipe.choices
    figures: dict[str, Any] = {}
    tables: dict[str, dict[str, str]] = {"ledger": _csv("claims", ledger.table)}
    shown = sections(ledger, choices.comparison)
    for section in shown:
        for panel in section.panels:
            _draw(section, panel, figures)
            tables[panel.id] = _csv(
                f"{section.about.name}-{panel.comparison}".rstrip("-"), panel.result.table
            )
    second = beside.data(run, thresholds(beside.ledger, beside.run)) if beside is not None else None
    if scores is None:
        scores = _scores(run)
    room = LARGEST - len(json.dumps(second)) if second else LARGEST
    data = {
        "name": visible(run.name),
        "of": capture(run),
        "notes": dict(notes or {}),
        "beside": second,
        "live": live,
        "figures": packed(json.dumps(figures, separators=(",", ":"), sort_keys=True).encode()),
        "tables": packed(json.dumps(tables, separators=(",", ":"), sort_keys=True).encode()),
        "plotly": _packed_plotly(),
        "explorer": explorer_data(
            run, thresholds(ledger, run), tokenizer or tokenizer_of(run), largest=room, scores=scores
        )
        | {"lead": choices.comparison},
    }
    return page(
        "report.html",
        (*EXPLORER_SCRIPTS, *REPORT_SCRIPTS),
        data,
        more=(plotly_script(),),
        connect="'self'" if live is not None else "'none'",
        title=f"{run.name} · sst-interp",
        run=run,
        summary=summary(run, ledger),
        beside=beside,
        both=beside.claims(ledger) if beside is not None else [],
        notes=notes or {},
        recipe=run.recipe.to_toml(),
        ledger=ledger,
        columns=comparisons(ledger, choices.comparison),
        story=_story(shown),
        sections=shown,
        meaning=MEANING,
        chips=CHIPS,
        lead=choices.comparison,
        choices=choices_rows(choices),
        facts=facts(run),
        shows_text=shows_text(run),
        manifest=manifest_rows(run.manifest),
        resamples=RESAMPLES,
        level=LEVEL,
        table_html=lambda table: Markup(table_html(visible_table(table))),
    )


def page(
    template: str,
    scripts: tuple[str, ...],
    data: Any,
    more: tuple[str, ...] = (),
    connect: str = "'none'",
    **values: Any,
) -> str:
    """A page from a template, with style, scripts, data and the policy that admits them.

    Args:
        template: file in this folder.
        scripts: files in this folder, joined in this order.
        data: JSON-ready, for the script.
        more: other scripts that the policy admits.
        connect: where its script may ask for more.
        values: for the template.
    """
    script = script_source("\n".join((HERE / name).read_text("utf-8") for name in scripts))
    style = (HERE / "report.css").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"visible": visible, "spoken": comparison_words}
    return environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        data=Markup(script_json(data)),
        script_src=Markup(" ".join(map(script_hash, (script, *more)))),
        # plotly writes style elements and attributes; without it the page's own style is all there is.
        style_src=Markup("'unsafe-inline'" if more else script_hash(style)),
        connect=Markup(connect),
        **values,
    )


def thresholds(ledger: Ledger, run: Any) -> dict[str, Threshold]:
    """Per testable comparison, the threshold of its basin shifts; before there are claims, the paper's."""
    shifts: list[Any] = [r for key, r in ledger.results.items() if key.split(".")[0] == "basin_shifts"]
    if shifts or ledger.rows:
        return {r.comparison: Threshold(r.threshold, r.provenance, r.a, r.b) for r in shifts}
    fixed = run.recipe.choices.threshold
    value = PAPER_THRESHOLD if fixed == "antimode" else float(fixed)
    words = f"the paper's {value}" if fixed == "antimode" else "fixed by the recipe"
    return {name: Threshold(value, words, 1, max(run.recipe.depths)) for name in COMPARISONS}


def capture(run: Any) -> str:
    """Which capture notes are about: `content_hash`, or the name of what is no `Run`."""
    return content_hash(run.manifest) if "shards" in run.manifest else f"name {run.name}"


def _scores(run: Any) -> Mapping[int, float]:
    from sst_interp.findings.of_run import kept_findings
    from sst_interp.runs.run import Run

    return kept_findings(run).scores if isinstance(run, Run) else {}


def _ledger(run: Any) -> Ledger:
    from sst_interp.findings.of_run import ledger_of
    from sst_interp.runs.run import Run

    return ledger_of(run) if isinstance(run, Run) else claims(run)


def _draw(section: Section, panel: Panel, figures: dict[str, Any]) -> None:
    """Fill a panel's figures, the leading one first; their data go to `figures` by id."""
    for i, (kind, figure) in enumerate(panel.result.figures().items()):
        key = f"{panel.id}-f{i}"
        title, subtitle = _pop_title(figure)
        figures[key] = visible_texts(json.loads(figure.to_json()))  # type: ignore[arg-type]
        height = figure.layout.height or figure.layout.template.layout.height or 380
        panel.figures.append(
            {
                "id": key, "kind": kind, "key": f"{panel.key}.{kind}", "title": title, "subtitle": subtitle,
                "height": int(height), "caption": section.about.captions.get(kind, ""),
            }
        )  # fmt: skip


def _story(shown: list[Section]) -> list[dict[str, Any]]:
    """The figures of the first screen, per comparison."""
    story = []
    for analysis, kind, asks in STORY:
        figures: dict[str, Any] = {}
        of = [section for section in shown if section.about.name == analysis]
        for section in of:
            figures |= {
                p.comparison: next((f for f in p.figures if f["kind"] == kind), None) for p in section.panels
            }
            figures |= dict.fromkeys(section.missing)
        story.append({"asks": asks, "figures": figures, "section": of[0].id if of else ""})
    return story


def _csv(name: str, table: pd.DataFrame) -> dict[str, str]:
    """A table as a CSV download. Texts that a spreadsheet would take for a formula get a `'` in front."""
    inert = visible_table(table).map(_no_formula)
    inert.columns = [_no_formula(name) for name in inert.columns]
    return {"name": re.sub(r"[^a-z0-9_-]+", "-", name.lower()), "text": inert.to_csv(index=False)}


def _no_formula(cell: Any) -> Any:
    formula = isinstance(cell, str) and cell != "-" and cell.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{cell}" if formula else cell


def _pop_title(figure: go.Figure) -> tuple[str, str]:
    """Take the title off a figure: the page shows it as text, which wraps on a phone and is read aloud."""
    title = figure.layout.title.text or ""
    subtitle = figure.layout.title.subtitle.text or ""
    figure.update_layout(title={"text": None, "subtitle": {"text": None}}, margin={"t": 40, "l": 50, "r": 10})
    return title, subtitle


@cache
def plotly_script() -> str:
    """plotly.js of the installed plotly."""
    return script_source(get_plotlyjs())


@cache
def _packed_plotly() -> str:
    return packed(plotly_script().encode())


def script_source(source: str) -> str:
    """A script as the browser hashes it; ValueError if it would end its own element."""
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    if any(stop in source.lower() for stop in ("</script", "<!--", "\0")):
        raise ValueError("a script that would close its own element")
    return source


_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def visible_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its texts and column names made `visible`."""
    shown = table.map(lambda cell: visible(cell, lines=True) if isinstance(cell, str) else cell)
    return shown.set_axis([visible(name) for name in shown.columns], axis=1)


def script_json(value: Any) -> str:
    """JSON that cannot close the `<script type="application/json">` around it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, sort_keys=True)
    return text.translate(_IN_SCRIPT)


def script_hash(source: str) -> str:
    """The source `'sha256-...'` that admits exactly this inline script."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"


def result_page(title: str, results: Sequence[Result]) -> str:
    """A page about some results: verdicts, figures, tables. The same results give the same bytes."""
    figures: list[Any] = []
    shown = []
    for result in results:
        drawn = [visible_texts(json.loads(str(figure.to_json()))) for figure in result.figures().values()]
        ids = range(len(figures), len(figures) + len(drawn))
        table = Markup(table_html(visible_table(result.table)))
        shown.append({"title": result.title, "verdict": result.verdict, "figures": ids, "table": table})
        figures += drawn
    plotly = plotly_script()
    return page(
        "results.html", ("results.js",), figures, more=(plotly,),
        title=title, results=shown, plotly=Markup(plotly),
    )  # fmt: skip
