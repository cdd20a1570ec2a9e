"""What token ids stand for: their text, and a coarse class for questions about content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sst_interp.errors import SSTError

CLASSES = ("special", "space", "digit", "punctuation", "word", "piece")
"""A control token; white space only; with a digit; without letter or digit; the start of a word (a space or
line before it); the inside of one."""


def shows_text(run: Any) -> bool:
    """Whether the run's data may be shown: its provenance says that it is not restricted."""
    return run.manifest.get("provenance", {}).get("restricted") is False


def tokenizer_of(run: Any) -> Any:
    """The tokenizer of a run whose text may be shown; None if it may not, or is not at hand."""
    if not shows_text(run):
        return None
    from sst_interp.models.loading import load_tokenizer

    try:
        return load_tokenizer(run.recipe.checkpoint)
    except SSTError:
        return None


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token by itself, spaces included. Bytes that are no character become U+FFFD."""
    return tokenizer.batch_decode([[int(i)] for i in ids], skip_special_tokens=False)


def token_classes(tokenizer: Any) -> Callable[[np.ndarray], list[str]]:
    """A function from an array of token ids to the class (`CLASSES`) of each."""
    special = set(tokenizer.all_special_ids)

    def classes(ids: np.ndarray) -> list[str]:
        texts = token_texts(tokenizer, ids.tolist())
        return [
            "special" if i in special else _class(text) for i, text in zip(ids.tolist(), texts, strict=True)
        ]

    return classes


def _class(text: str) -> str:
    if not text.strip():
        return "space"
    if any(c.isdigit() for c in text):
        return "digit"
    if not any(c.isalpha() for c in text):
        return "punctuation"
    return "word" if text[0].isspace() else "piece"
