"""Results as one HTML file that works offline: a verdict, a table and the figures of each."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence

from sst_interp.analyses.result import Result, table_html
from sst_interp.report.escaping import script_hash, visible, visible_table, visible_texts

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, p { overflow-wrap: anywhere; }
figure { margin: 0; overflow-x: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
:root { color-scheme: light dark; }
"""
_SCRIPT = re.compile(r"<script\b[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)


def result_page(title: str, results: Sequence[Result]) -> str:
    """A page about some results. Nothing is fetched: plotly.js is inside, and the page's policy admits its
    own scripts by their sha256 and no other.
    """
    import plotly.io as pio

    parts, scripts, whole = [], [], True
    for result in results:
        parts.append(f"<h2>{_text(result.title)}</h2><p>{_text(result.verdict)}</p>")
        for figure in result.figures().values():
            inert = visible_texts(json.loads(str(figure.to_json())))
            drawn = pio.to_html(inert, include_plotlyjs=whole, full_html=False, validate=False)
            scripts += _SCRIPT.findall(drawn)
            parts.append(f"<figure>{drawn}</figure>")
            whole = False
        parts.append(table_html(visible_table(result.table)))
    admitted = " ".join(map(script_hash, scripts)) or "'none'"
    policy = (  # plotly writes style elements and attributes
        f"default-src 'none'; script-src {admitted}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{_text(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(visible(text))
