"""Token ids as text, where a run may show them: the tokenizer comes from the caller or from this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sst_interp.report.escaping import visible

TokenText = Callable[[list[int]], list[str]]
"""Token ids -> their texts, one each."""


def shows_text(run: Any) -> bool:
    """Whether the run's data may be shown: its provenance says that it is not restricted."""
    return run.manifest.get("provenance", {}).get("restricted") is False


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """A token each, as it would be read in the middle of a text: a space shows as a space, the rest escaped
    where it is invisible. Without a tokenizer, the ids.
    """
    ids = list(ids)
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    return [visible(tokenizer.decode([i], skip_special_tokens=False)) or f"#{i}" for i in ids]


def offline_tokenizer(checkpoint: str) -> Any:
    """The tokenizer of a checkpoint or backbone, if it is on this machine; nothing is fetched. Else None."""
    from transformers import AutoTokenizer

    from sst_interp import places
    from sst_interp.checkpoint import read_checkpoint
    from sst_interp.errors import SSTError
    from sst_interp.loading import ASSET_MODELS, checkpoint_folder

    try:
        folder = checkpoint_folder(checkpoint)
        name = str(read_checkpoint(folder)[0]["backbone"]["name"]) if folder is not None else checkpoint
    except (SSTError, KeyError, TypeError):
        return None
    source = str(places.cache_dir() / "models" / name) if name in ASSET_MODELS else name
    if name in ASSET_MODELS and not Path(source).is_dir():
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None
