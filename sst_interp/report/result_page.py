"""Results as one HTML file that works offline: a verdict, the figures and a table of each.

Nothing is fetched. As in the report, the page's Content Security Policy admits its own two scripts alone.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence

from sst_interp.analyses.result import Result, table_html
from sst_interp.report import plotly_script, script_source
from sst_interp.report.escaping import script_hash, script_json, visible, visible_table, visible_texts

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, p { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.plot { min-width: 36rem; }
table { border-collapse: collapse; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
"""
DRAW = """
for (const [at, figure] of JSON.parse(document.getElementById("data").textContent).entries())
  Plotly.newPlot(`plot-${at}`, figure.data, figure.layout, { responsive: true, displaylogo: false });
document.documentElement.dataset.ready = "yes";
"""
_SCRIPT = re.compile(r"<script\b[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)


def result_page(title: str, results: Sequence[Result]) -> str:
    """A page about some results. The same results give the same bytes."""
    parts, figures = [], []
    for result in results:
        parts.append(f"<h2>{_text(result.title)}</h2><p>{_text(result.verdict)}</p>")
        for figure in result.figures().values():
            plot = f'<div class="plot" id="plot-{len(figures)}"></div>'
            parts.append(f'<div class="scroll" tabindex="0">{plot}</div>')
            figures.append(visible_texts(json.loads(str(figure.to_json()))))
        parts.append(f'<div class="scroll" tabindex="0">{table_html(visible_table(result.table))}</div>')
    scripts = plotly_script(), script_source(DRAW)
    policy = (
        f"default-src 'none'; script-src {' '.join(map(script_hash, scripts))}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{STYLE}</style></head>'
        f"<body><h1>{_text(title)}</h1>{''.join(parts)}"
        f'<script type="application/json" id="data">{script_json(figures)}</script>'
        f"{''.join(f'<script>{script}</script>' for script in scripts)}</body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(visible(text))
