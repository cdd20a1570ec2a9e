"""What the documentation site needs besides mkdocs.yml: one folder in which `sst_interp.analyses` is found.

The package is put together from two folders (`package-dir` in pyproject.toml). Docstrings are read from
source, so the reader is given a temporary copy in which the two are one.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_FOLDER = tempfile.TemporaryDirectory(prefix="sst-interp-docs-")
TOP = Path(__file__).resolve().parent.parent


@event_priority(100)  # before mkdocstrings reads its own configuration
def on_config(config: Any) -> Any:
    """Point mkdocstrings at the joined package."""
    package = Path(_FOLDER.name) / "sst_interp"
    for source, target in ((TOP / "sst_interp", package), (TOP / "analyses", package / "analyses")):
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    handlers = config.plugins["mkdocstrings"].config["handlers"]
    handlers.setdefault("python", {})["paths"] = [_FOLDER.name]
    return config
