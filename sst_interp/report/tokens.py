"""Token ids as text, where a run may show them: the tokenizer comes from the caller or from this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sst_interp.errors import SSTError
from sst_interp.report.escaping import visible
from sst_interp.token_texts import token_texts


def shows_text(run: Any) -> bool:
    """Whether the run's data may be shown: its provenance says that it is not restricted."""
    return run.manifest.get("provenance", {}).get("restricted") is False


def tokenizer_of(run: Any) -> Any:
    """The tokenizer of a run whose text may be shown; None if it may not, or is not at hand."""
    if not shows_text(run):
        return None
    from sst_interp.loading import load_tokenizer

    try:
        return load_tokenizer(run.recipe.checkpoint)
    except SSTError:
        return None


def shown_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text per token, in which what is invisible is escaped. Without a tokenizer, the ids."""
    if tokenizer is None or not ids:
        return [f"#{i}" for i in ids]
    return [visible(text) or f"#{i}" for i, text in zip(ids, token_texts(tokenizer, ids), strict=True)]
