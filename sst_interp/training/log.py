"""What a training leaves in its folder besides the checkpoint, and how it is read back.

NAME/training.json     the recipe, and what the training was done with
NAME/training.jsonl    a line per step; lines with `held_out_...` hold the loss on held-out examples
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from sst_interp.errors import SSTError

LOG, ABOUT = "training.jsonl", "training.json"
FORMAT = 2
"""Of `training.json`. 1: the method that is now called `sequential` was called `exact`."""


def read_about(folder: Path) -> dict[str, Any]:
    """`training.json` of a checkpoint.

    Raises:
        SSTError: it cannot be read.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["format"] == 1 and about["recipe"].get("method") == "exact":
            about["recipe"]["method"] = "sequential"
        return about
    except (OSError, ValueError, KeyError) as error:
        raise SSTError(f"{folder / ABOUT} cannot be read: {error}", "--fresh trains anew") from None


def read_log(folder: Path) -> pd.DataFrame:
    """`training.jsonl` of a checkpoint: a row per step.

    Raises:
        SSTError: it cannot be read.
    """
    try:
        return pd.DataFrame(json.loads(line) for line in (folder / LOG).read_text().splitlines())
    except (OSError, ValueError) as error:
        raise SSTError(f"{folder / LOG} cannot be read: {error}", "--fresh trains anew") from None
