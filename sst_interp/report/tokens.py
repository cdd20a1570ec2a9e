"""Token ids as text that is safe to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sst_interp.report.escaping import visible
from sst_interp.token_texts import token_texts


def shown_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text per token, in which what is invisible is escaped. Without a tokenizer, the ids."""
    if tokenizer is None or not ids:
        return [f"#{i}" for i in ids]
    return [visible(text) or f"#{i}" for i, text in zip(ids, token_texts(tokenizer, ids), strict=True)]
