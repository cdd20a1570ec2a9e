"""Runs by name: listing, opening, publishing and fetching them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file

from sst_interp import paths
from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import check_place, put_in_place, read_whole, replace_bytes, sha256, stage, sync
from sst_interp.models.choices import BEFORE, COMPARISONS
from sst_interp.runs import manifest
from sst_interp.runs.recipe import Recipe, known_recipes
from sst_interp.runs.recorder import rounded_floats
from sst_interp.runs.run import Run
from sst_interp.runs.schema import write_parquet

__all__ = ["Run", "list_runs", "open_run"]


def open_run(name_or_path: str | Path, verify: bool = True) -> Run:
    """The run in a folder, of a name (the user's own, else a shipped one), or at a URL (`fetch_run`).

    Raises:
        SSTError: there is none, with the nearest names, or it has no data yet.
    """
    name = str(name_or_path)
    if "://" in name:
        return open_run(fetch_run(name), verify)
    for folder in (Path(name), paths.runs_dir() / name, paths.shipped("runs") / name):
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
    """`Run.summary` of every run that has a name and of every recipe without data, by name.

    What cannot be read says why in `state`, and has None for what is not known.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, path in known_recipes().items():
        try:
            recipe = Recipe.load(path, name)
            rows[name] = Run(name, path, recipe, manifest.new_manifest(recipe, {}, None)).summary()
        except SSTError as error:
            rows[name] = _unreadable(name, path, error)
    for where in (paths.shipped("runs"), paths.runs_dir()):  # the user's own go before shipped ones
        for path in where.glob(f"*/{manifest.FILE}"):
            try:
                if run := _load(path.parent, verify=False):
                    rows[path.parent.name] = run.summary()
            except SSTError as error:
                rows[path.parent.name] = _unreadable(path.parent.name, path.parent, error)
    return [rows[name] for name in sorted(rows)]


def _load(folder: Path, verify: bool) -> Run | None:
    """The run in `folder`, whether or not it has data; None if there is no manifest."""
    contents = manifest.read_manifest(folder)
    if contents is None:
        return None
    if str(folder) != str(folder).encode(errors="replace").decode():
        raise SSTError(f"{folder}: the folder's name is not UTF-8: no table is read there", "rename it")
    name, recipe = _name(folder), Recipe.from_dict(contents["recipe"])
    if (folder / "run.toml").exists():
        now = Recipe.load(folder / "run.toml", recipe.name)
        manifest.refuse_other_recipe(name, recipe, now, "its run.toml now says")
        recipe = now  # the choices of analysis may have changed
    return Run(name, folder, recipe, contents, verify)


def _name(folder: str | Path) -> str:
    return os.path.basename(os.path.abspath(folder))


def _unreadable(name: str, where: Path, error: SSTError) -> dict[str, Any]:
    blank = dict.fromkeys(("kind", "checkpoint", "dataset", "questions", "depths"))
    state = f"unreadable: {error.message}" + (f"; {error.hint}" if error.hint else "")
    return {"name": name, "state": state, **blank, "bytes": 0, "where": str(where)}


ROUNDED = ("pairs",)
"""Tables whose floats are rounded in a published copy; the others are small."""


def publish(
    run: Run,
    folder: str | Path,
    bits: int = 10,
    top: int | None = None,
    iterations: tuple[int, ...] = (1,),
    each: Callable[[int, int], Any] | None = None,
    comparisons: tuple[str, ...] | None = None,
    right_only: bool = False,
) -> Run:
    """Write a smaller copy of a complete run into `folder`, and open it: the whole copy is there, or nothing.

    Args:
        run: what to publish.
        folder: where to; it must not exist yet.
        bits: significant bits of every float in `pairs` (10: within 1 in 2,000; of a cosine, 1 - cosine).
        top: how many of the 100 most likely tokens of a step to keep; None keeps them all.
        iterations: whose states at position 0 are kept, 1-based, each named once; none drops the states.
        each: told how many batches are done, of how many.
        comparisons: whose rows of `pairs` are kept; None keeps them all.
        right_only: keep the states only of questions that are right at depth 1: must-halt is told of those.

    Raises:
        SSTError: the run is incomplete, keeps other states than position 0 or lacks an iteration; the folder
            exists or cannot be written; the disk is full.
    """
    folder, kept = Path(folder), tuple(sorted(iterations))
    if not run.complete:
        hint = f"`sst-interp capture --run {run.name}` finishes it"
        raise SSTError(f"run {run.name} is not complete", hint)
    if os.path.lexists(folder):
        raise SSTError(f"{folder} exists already", "name another folder, or remove it")
    if run.recipe.keep not in ("none", "position0"):
        said = f"run {run.name} keeps the states of {run.recipe.keep}"
        raise SSTError(said, 'publish runs with keep = "position0"')
    has = run.kept_iterations or range(1, max(run.recipe.depths) + 1)
    if bad := [i for i in kept if i not in has]:
        raise SSTError(f"run {run.name} has no iteration {bad[0]}", f"it has {', '.join(map(str, has))}")
    if twice := [i for i in kept if kept.count(i) > 1]:
        raise SSTError(f"iteration {twice[0]} is named twice", "name each iteration once, for example 1,4")
    for comparison in comparisons or ():
        if comparison not in COMPARISONS:
            raise unknown_name("comparison", comparison, COMPARISONS)
    check_place(folder)
    part = folder.with_name(f".{folder.name}.part")
    try:
        _clear(part)
        part.mkdir(parents=True)
        about = {"pairs_bits": bits, "top": top, "iterations": list(kept)}
        about |= {"pairs": list(comparisons)} if comparisons is not None else {}
        about |= {"states": "right at depth 1"} if right_only else {}
        _copy(run, part, about, each)
        os.rename(part, folder)
        sync(folder.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        hint = "make room" if full else "put that right, or name another folder"
        said = f"{folder} cannot be written: {error.strerror or error}"
        raise SSTError(said, f"{hint}; the same command starts again") from error
    finally:
        _clear(part)
    return open_run(folder)


def _clear(part: Path) -> None:
    """Remove what an earlier publication left, or this one. Of a link, the link alone."""
    if part.is_symlink() or part.is_file():
        part.unlink()
    elif part.exists():
        shutil.rmtree(part)


def _copy(
    run: Run,
    folder: Path,
    about: dict[str, Any],
    each: Callable[[int, int], Any] | None,
) -> None:
    """Fill an empty folder; `about` is what the manifest says of the copy."""
    iterations, right = about["iterations"], None
    if "states" in about:
        answers = run.table("questions", ["question", "depth", "correct"])
        right = set(answers.loc[(answers["depth"] == 1) & answers["correct"], "question"])
    listed: dict[str, Any] = {}
    batches = manifest.batches(run.manifest)
    for done, batch in enumerate(batches):
        entries = {}
        for file, entry in run.manifest["shards"][str(batch)].items():
            if problem := manifest.damage(run.folder, file, entry):
                raise SSTError(f"run {run.name}: {file} is damaged ({problem})", "capture it again first")
            table, source, path = Path(file).parent.name, run.folder / file, folder / file
            if table == "states" and not iterations:
                continue
            path.parent.mkdir(exist_ok=True)
            if table == "states":
                fill = partial(_states, source, [run.kept_iterations.index(i) for i in iterations], right)
            else:
                fill = partial(_table, table, source, about)
            stage(path, fill)
            put_in_place(path)
            if table == "pairs":
                entry = entry | {"rows": pq.read_metadata(path).num_rows}
            elif table == "states":
                with safe_open(str(path), framework="pt") as tensors:
                    entry = entry | {"tensors": len(tensors.keys())}
            entries[file] = entry | {"bytes": path.stat().st_size, "sha256": sha256(path)}
        listed[str(batch)] = entries
        if each is not None:
            each(done + 1, len(batches))
    own = run.folder / "run.toml"
    recipe = read_whole(own) if own.is_file() else run.recipe.to_toml().encode()
    replace_bytes(folder / "run.toml", recipe)
    manifest.write_manifest(folder, run.manifest | {"shards": listed, "published": about})


def _table(name: str, source: Path, about: dict[str, Any], path: Path) -> None:
    """Copy a shard, with fewer digits, shorter lists and fewer comparisons."""
    table, bits, top = pq.read_table(source), about["pairs_bits"], about["top"]
    if name == "pairs" and "pairs" in about:
        names = [*about["pairs"], *(old for old, new in BEFORE.items() if new in about["pairs"])]
        kept = pc.call_function(
            "is_in", [table["comparison"].cast(pa.string())], pc.SetLookupOptions(pa.array(names))
        )
        table = table.filter(kept)
    for place, field in enumerate(table.schema):
        column: Any = table[field.name]
        if name in ROUNDED and pa.types.is_floating(field.type):
            column = pa.array(rounded_floats(field.name, column.to_numpy(), bits), field.type)
        elif field.name == "top100" and top is not None:
            column = pc.call_function("list_slice", [column], pc.ListSliceOptions(0, top)).cast(field.type)
        else:
            continue
        table = table.set_column(place, field, column)
    write_parquet(table, path, small=True)


def _states(source: Path, places: list[int], right: set[int] | None, path: Path) -> None:
    """Copy a shard of states [layer, iteration, d_model], the iterations at `places`, of the questions in
    `right` (None: of all).
    """
    with safe_open(str(source), framework="pt") as tensors:
        keys = [k for k in tensors.keys() if right is None or int(k[1:].partition(".")[0]) in right]  # noqa: SIM118
        kept = {key: tensors.get_tensor(key)[:, places].contiguous() for key in keys}
    save_file(kept, path)


PROTOCOLS = ("file", "hf", "http", "https", "s3", "gs", "zip", "memory")
"""Where a run is fetched from: fsspec knows many more, and some of them run or ask for something else."""


def fetch_run(url: str) -> Path:
    """The folder of a run that is somewhere else: a copy in the cache, every shard checked, fetched once.

    Args:
        url: a run's folder as fsspec reads it (`hf://datasets/user/runs/gpqa`).

    Raises:
        SSTError: there is no run, or a shard is not what the manifest says.
    """
    from fsspec.core import url_to_fs

    for link in url.split("::"):
        if (protocol := link.partition("://")[0]) not in PROTOCOLS:
            said = f"there is no run at {url}: {protocol!r} is not read"
            raise SSTError(said, f"there are {', '.join(PROTOCOLS)}")
    try:
        files, root = url_to_fs(url)
        with files.open(f"{root.rstrip('/')}/{manifest.FILE}", "rb") as file:
            listed = file.read(manifest.LARGEST + 1)
    except (OSError, ValueError, ImportError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "give the folder that has its manifest.json"
        raise SSTError(f"there is no run at {url}: {reason}", hint) from error
    name = root.rstrip("/").rpartition("/")[2]
    folder = paths.cache_dir() / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16] / (name or "run")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        contents = manifest.parse_manifest(listed, manifest.FILE, "check the URL, or upgrade")
    except SSTError as error:
        said = f"what is at {url} is no run that this version reads: {error.message}"
        raise SSTError(said, error.hint) from None
    for shards in contents["shards"].values():
        for file, entry in shards.items():
            if manifest.damage(folder, file, entry) is not None:
                there = f"{root.rstrip('/')}/{file}"
                if (size := files.size(there)) not in (None, entry["bytes"]):
                    said = f"{size} bytes, was {entry['bytes']}"
                    raise SSTError(f"{file} of the run at {url} is damaged: {said}", "fetch it again later")
                _fetch(files, there, folder / file)
            if problem := manifest.damage(folder, file, entry):
                raise SSTError(f"{file} of the run at {url} is damaged: {problem}", "fetch it again later")
    if files.exists(recipe := f"{root.rstrip('/')}/run.toml"):
        _fetch(files, recipe, folder / "run.toml")
    else:
        (folder / "run.toml").unlink(missing_ok=True)
    replace_bytes(folder / manifest.FILE, listed)  # last: what it lists is there
    return folder


def _fetch(files: Any, there: str, here: Path) -> None:
    here.parent.mkdir(parents=True, exist_ok=True)
    stage(here, lambda path: files.get_file(there, str(path)))
    put_in_place(here)
