"""Results as one HTML file that works offline: a verdict, a table and the figures of each."""

from __future__ import annotations

import html
from collections.abc import Sequence

from sst_interp.analyses.result import Result, table_html

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
:root { color-scheme: light dark; }
"""


def result_page(title: str, results: Sequence[Result]) -> str:
    """A page about some results. Nothing is fetched: plotly.js is inside."""
    import plotly.io as pio

    parts, script = [], True
    for result in results:
        parts.append(f"<h2>{html.escape(result.title)}</h2><p>{html.escape(result.verdict)}</p>")
        for figure in result.figures().values():
            parts.append(pio.to_html(figure, include_plotlyjs=script, full_html=False))
            script = False
        parts.append(table_html(result.table))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
