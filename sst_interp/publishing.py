"""Publishing a run: a smaller copy that others can read, check and pass round.

The copy is a run like any other, with three things less: digits of the floats in `pairs` that no analysis
needs, hidden states of iterations that are not asked for, and, if asked for, most of each list of likely
tokens. What was left out is in its manifest under `published`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file

from sst_interp import durable, manifest
from sst_interp.errors import SSTError
from sst_interp.guarded import check_place, read_whole
from sst_interp.rounding import rounded_floats
from sst_interp.run import Run
from sst_interp.runs import open_run
from sst_interp.schema import write_parquet

ROUNDED = ("pairs",)
"""Tables whose floats are rounded; the others are small."""


def publish(
    run: Run,
    folder: str | Path,
    bits: int = 10,
    top: int | None = None,
    iterations: tuple[int, ...] = (1,),
    each: Callable[[int, int], Any] | None = None,
) -> Run:
    """Write a smaller copy of a complete run into `folder`, and open it: the whole copy is there, or nothing.

    Args:
        run: what to publish.
        folder: where to; it must not exist yet.
        bits: significant bits of every float in `pairs` (10: within 1 part in 2,000; a cosine by its
            distance from 1).
        top: how many of the 100 most likely tokens of a step to keep; None keeps them all.
        iterations: which iterations' states at position 0 to keep, 1-based, each named once, kept ascending;
            none drops the states.
        each: told how many batches are done, of how many.

    Raises:
        SSTError: an incomplete run, a folder that exists or cannot be written, a run that keeps other states
            than position 0, iterations it does not have, a full disk.
    """
    folder, kept = Path(folder), tuple(sorted(iterations))
    if not run.complete:
        raise SSTError(
            f"run {run.name} is not complete", f"`sst-interp capture --run {run.name}` finishes it"
        )
    if os.path.lexists(folder):
        raise SSTError(f"{folder} exists already", "name another folder, or remove it")
    if run.recipe.keep not in ("none", "position0"):
        raise SSTError(
            f"run {run.name} keeps the states of {run.recipe.keep}", 'publish runs with keep = "position0"'
        )
    has = run.kept_iterations or range(1, max(run.recipe.depths) + 1)
    if bad := [i for i in kept if i not in has]:
        raise SSTError(f"run {run.name} has no iteration {bad[0]}", f"it has {', '.join(map(str, has))}")
    if twice := [i for i in kept if kept.count(i) > 1]:
        raise SSTError(f"iteration {twice[0]} is named twice", "name each iteration once, for example 1,4")
    check_place(folder)
    part = folder.with_name(f".{folder.name}.part")
    try:
        _clear(part)
        part.mkdir(parents=True)
        _copy(run, part, bits, top, kept, each)
        os.rename(part, folder)
        durable.sync(folder.parent)
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
    bits: int,
    top: int | None,
    iterations: tuple[int, ...],
    each: Callable[[int, int], Any] | None,
) -> None:
    """Fill an empty folder."""
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
                fill = partial(_states, source, [run.kept_iterations.index(i) for i in iterations])
            else:
                fill = partial(_table, table, source, bits, top)
            durable.stage(path, fill)
            durable.publish(path)
            entries[file] = entry | {"bytes": path.stat().st_size, "sha256": durable.sha256(path)}
        listed[str(batch)] = entries
        if each is not None:
            each(done + 1, len(batches))
    own = run.folder / "run.toml"
    recipe = read_whole(own) if own.is_file() else run.recipe.to_toml().encode()
    durable.replace_bytes(folder / "run.toml", recipe)
    about = {"pairs_bits": bits, "top": top, "iterations": list(iterations)}
    manifest.write_manifest(folder, run.manifest | {"shards": listed, "published": about})


def _table(name: str, source: Path, bits: int, top: int | None, path: Path) -> None:
    """Copy a shard, with fewer digits and shorter lists."""
    table = pq.read_table(source)
    for place, field in enumerate(table.schema):
        column: Any = table[field.name]
        if name in ROUNDED and pa.types.is_floating(field.type):
            column = pa.array(rounded_floats(field.name, column.to_numpy(), bits), field.type)
        elif field.name == "top100" and top is not None:
            column = pc.call_function("list_slice", [column], pc.ListSliceOptions(0, top)).cast(field.type)
        else:
            continue
        table = table.set_column(place, field, column)
    write_parquet(table, path)


def _states(source: Path, places: list[int], path: Path) -> None:
    """Copy a shard of states [layer, iteration, d_model], the iterations at `places`."""
    with safe_open(str(source), framework="pt") as tensors:
        kept = {key: tensors.get_tensor(key)[:, places].contiguous() for key in tensors.keys()}  # noqa: SIM118
    save_file(kept, path)
