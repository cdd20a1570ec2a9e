"""Which runs there are, and opening one by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sst_interp import manifest, places
from sst_interp.errors import SSTError, unknown_name
from sst_interp.recipe import Recipe, known_recipes
from sst_interp.run import Run

__all__ = ["Run", "list_runs", "open_run"]


def open_run(name_or_path: str | Path, verify: bool = True) -> Run:
    """The run in a folder, or the run of that name: the user's own, else a shipped one. A URL of a run's
    folder, in any form that fsspec reads (`hf://datasets/user/runs/gpqa`), is fetched first.

    Raises SSTError with the nearest names if there is none, and if it has no data yet.
    """
    name = str(name_or_path)
    if "://" in name:
        from sst_interp.sharing import fetch_run

        return open_run(fetch_run(name), verify)
    for folder in (Path(name), places.runs_dir() / name, places.shipped("runs") / name):
        if (run := _load(folder, verify)) is not None:
            if run.manifest["shards"]:
                return run
            break
    else:
        known = {row["name"] for row in list_runs()}
        if name not in known and not (Path(name) / "run.toml").is_file():
            raise unknown_name("run", name, known, "sst-interp runs")
    name = _name(name)
    raise SSTError(f"run {name} has no data yet", f"`sst-interp capture --run {name}` captures it")


def list_runs() -> list[dict[str, Any]]:
    """Every run `open_run` finds by name and every recipe without data, by name; JSON-ready.

    Keys: name, state (`complete`, `partial 2 of 3`, `not captured`, or what is wrong with it), kind (`sst`,
    `lrt`, `looped`, `backbone`), checkpoint, dataset, questions (None: all of them), depths, bytes, where.
    None: not known.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, path in known_recipes().items():
        try:
            recipe = Recipe.load(path, name)
            rows[name] = Run(name, path, recipe, manifest.new_manifest(recipe, {}, None)).summary()
        except SSTError as error:
            rows[name] = _unreadable(name, path, error)
    for where in (places.shipped("runs"), places.runs_dir()):  # the user's own go before shipped ones
        for path in where.glob(f"*/{manifest.FILE}"):
            try:
                if run := _load(path.parent, verify=False):
                    rows[path.parent.name] = run.summary()
            except SSTError as error:
                rows[path.parent.name] = _unreadable(path.parent.name, path.parent, error)
    return [rows[name] for name in sorted(rows)]


def _load(folder: Path, verify: bool) -> Run | None:
    """The run in `folder`, whether or not it has data; None if there is no manifest."""
    found = manifest.read_manifest(folder)
    if found is None:
        return None
    if str(folder) != str(folder).encode(errors="replace").decode():
        raise SSTError(f"{folder}: the folder's name is not UTF-8: no table is read there", "rename it")
    name, recipe = _name(folder), Recipe.from_dict(found["recipe"])
    if (folder / "run.toml").exists():
        now = Recipe.load(folder / "run.toml", recipe.name)
        manifest.refuse_other_recipe(name, recipe, now, "its run.toml now says")
        recipe = now  # the choices of analysis may have changed
    return Run(name, folder, recipe, found, verify)


def _name(folder: str | Path) -> str:
    return os.path.basename(os.path.abspath(folder))


def _unreadable(name: str, where: Path, error: SSTError) -> dict[str, Any]:
    blank = dict.fromkeys(("kind", "checkpoint", "dataset", "questions", "depths"))
    state = f"unreadable: {error.message}" + (f"; {error.hint}" if error.hint else "")
    return {"name": name, "state": state, **blank, "bytes": 0, "where": str(where)}
