"""Text from data, made safe and visible: for HTML, for JSON inside HTML, and for scripts under a CSP.

Jinja2's autoescape does the HTML part. What it leaves alone is made visible here: control characters,
bidirectional marks and lone surrogates, which would reorder, hide or break the text around them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pandas as pd

from sst_interp.printing import visible, visible_texts

__all__ = ["script_hash", "script_json", "visible", "visible_table", "visible_texts"]

_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def visible_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every text in it, and its columns' names, `visible`."""
    shown = table.map(lambda cell: visible(cell, lines=True) if isinstance(cell, str) else cell)
    return shown.set_axis([visible(name) for name in shown.columns], axis=1)


def script_json(value: Any) -> str:
    """JSON that can stand inside a `<script type="application/json">` and never close it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, sort_keys=True)
    return text.translate(_IN_SCRIPT)


def script_hash(source: str) -> str:
    """The CSP source `'sha256-...'` that admits exactly this inline script."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"
