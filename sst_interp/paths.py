"""Where things are: the download cache, shipped recipes and runs, and the user's runs."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import platformdirs

from sst_interp.errors import SSTError


def user_path(text: str) -> Path:
    """A path as a person types it, with `~` for their folder.

    Raises:
        SSTError: no file can have that name.
    """
    try:
        path = Path(text).expanduser()
        if "\0" in text:
            raise ValueError("it holds a NUL")
        if len(text) > 4000 or any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise ValueError("it is too long")
    except (RuntimeError, ValueError) as error:
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise SSTError(f"{shown!r} is no file's name: {error}", "give the path of a file") from None
    return path


def cache_dir() -> Path:
    """Downloads and converted weights: `$SST_INTERP_CACHE`, else the platform's cache folder."""
    path = Path(os.environ.get("SST_INTERP_CACHE") or platformdirs.user_cache_dir("sst-interp"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def shipped(kind: str) -> Path:
    """The installed package's `data/KIND` folder (`recipes`, `runs`, `checkpoints`); may not exist."""
    return Path(str(resources.files("sst_interp.data"))) / kind


def runs_dir() -> Path:
    """The user's runs: `$SST_INTERP_RUNS`, else `runs` in the working folder. Not created here."""
    return Path(os.environ.get("SST_INTERP_RUNS") or "runs")


def checkpoints_dir() -> Path:
    """The user's checkpoints: `$SST_INTERP_CHECKPOINTS`, else `checkpoints` in the working folder."""
    return Path(os.environ.get("SST_INTERP_CHECKPOINTS") or "checkpoints")


def studies_dir() -> Path:
    """The user's measurements of the approximation: `studies` in the working folder. Not created here."""
    return Path("studies")
