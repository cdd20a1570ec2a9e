"""A training's lines in TensorBoard, Weights & Biases or trackio, beside its JSONL: `train --log NAME`.

Each is its own library, imported when it is asked for. Weights & Biases stays offline unless `WANDB_MODE`
says otherwise (`wandb sync` uploads it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from sst_interp.errors import SSTError, unknown_name

Watch = Callable[[Mapping[str, float]], object]
"""Is given each step's line of the log; `step` among its numbers."""

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Name -> the module that writes it."""


def find_log(name: str) -> Any:
    """The library that writes a log.

    Raises:
        SSTError: no such log, or its library cannot be imported.
    """
    if name not in MODULES:
        raise unknown_name("log", name, MODULES)
    try:
        return import_module(MODULES[name])
    except ImportError as error:
        raise SSTError(
            f"--log {name} needs {name}, which cannot be imported: {error}", f"pip install {name}"
        ) from None


@contextmanager
def watching(
    name: str, folder: Path, run: str, config: Mapping[str, Any], done: int = 0, project: str = "sst-interp"
) -> Iterator[Watch]:
    """A log, open for a training.

    Args:
        name: of `MODULES`.
        folder: the training's; TensorBoard and Weights & Biases write into `tensorboard` and `wandb` there.
        run: how the log calls the training.
        config: its recipe.
        done: steps that an earlier call has made. TensorBoard drops what it has of later ones.
        project: of Weights & Biases and trackio.
    """
    library = find_log(name)
    if name == "tensorboard":
        with library.SummaryWriter(folder / name, purge_step=done + 1 if done else None) as writer:

            def scalars(line: Mapping[str, float]) -> None:
                for key, value in line.items():
                    if key != "step":
                        writer.add_scalar(key, value, int(line["step"]))

            writer.add_text("recipe", "\n".join(f"    {key} = {value!r}" for key, value in config.items()), 0)
            yield scalars
        return
    how: dict[str, Any] = {"project": project, "name": run, "config": dict(config)}
    if name == "wandb":
        folder.mkdir(parents=True, exist_ok=True)
        how |= {"dir": str(folder), "mode": os.environ.get("WANDB_MODE", "offline")}
    library.init(**how)

    def metrics(line: Mapping[str, float]) -> None:
        numbers = {key: value for key, value in line.items() if key != "step"}
        library.log(numbers, step=int(line["step"]))

    try:
        yield metrics
    finally:
        library.finish()
