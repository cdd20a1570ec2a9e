"""Publishing a run: a smaller copy that others can read, check and pass round.

The copy is a run like any other, with three things less: digits of the floats in `pairs` that no analysis
needs, hidden states of iterations that are not asked for, and, if asked for, most of each list of likely
tokens. What was left out is in its manifest under `published`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file

from sst_interp import durable, manifest
from sst_interp.errors import SSTError
from sst_interp.guarded import check_place
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
    """Write a smaller copy of a complete run into `folder`, and open it.

    Args:
        run: what to publish.
        folder: where to; it must not exist yet.
        bits: significant bits of every float in `pairs` (10: within 1 part in 2,000; a cosine by its
            distance from 1).
        top: how many of the 100 most likely tokens of a step to keep; None keeps them all.
        iterations: which iterations' states at position 0 to keep, 1-based; none drops the states.
        each: told how many batches are done, of how many.

    Raises:
        SSTError: an incomplete run, a folder that exists or cannot be written, a run that keeps other states
            than position 0, or iterations it does not have.
    """
    folder = Path(folder)
    if not run.complete:
        raise SSTError(
            f"run {run.name} is not complete", f"`sst-interp capture --run {run.name}` finishes it"
        )
    if folder.exists():
        raise SSTError(f"{folder} exists already", "name another folder, or remove it")
    if run.recipe.keep not in ("none", "position0"):
        raise SSTError(
            f"run {run.name} keeps the states of {run.recipe.keep}", 'publish runs with keep = "position0"'
        )
    deepest = max(run.recipe.depths)
    if bad := [i for i in iterations if not 1 <= i <= deepest]:
        raise SSTError(f"run {run.name} has no iteration {bad[0]}", f"it has 1 to {deepest}")
    check_place(folder)
    folder.mkdir(parents=True)
    listed: dict[str, Any] = {}
    batches = manifest.batches(run.manifest)
    for done, batch in enumerate(batches):
        entries = {}
        for file, entry in run.manifest["shards"][str(batch)].items():
            if problem := manifest.damage(run.folder, file, entry):
                shutil.rmtree(folder)
                raise SSTError(f"run {run.name}: {file} is damaged ({problem})", "capture it again first")
            table = Path(file).parent.name
            if table == "states" and not iterations:
                continue
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            if table == "states":
                size = {"tensors": _states(run.folder / file, path, iterations)}
            else:
                size = {"rows": _table(table, run.folder / file, path, bits, top)}
            entries[file] = size | {"bytes": path.stat().st_size, "sha256": durable.sha256(path)}
        listed[str(batch)] = entries
        if each is not None:
            each(done + 1, len(batches))
    shutil.copyfile(run.folder / "run.toml", folder / "run.toml")
    about = {"pairs_bits": bits, "top": top, "iterations": list(iterations)}
    manifest.write_manifest(folder, run.manifest | {"shards": listed, "published": about})
    return open_run(folder)


def _table(name: str, source: Path, path: Path, bits: int, top: int | None) -> int:
    """Copy a shard, with fewer digits and shorter lists; its number of rows."""
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
    return len(table)


def _states(source: Path, path: Path, iterations: tuple[int, ...]) -> int:
    """Copy a shard of states [layer, iteration, d_model], a few iterations of each; how many tensors."""
    places = [i - 1 for i in iterations]
    with safe_open(str(source), framework="pt") as tensors:
        kept = {key: tensors.get_tensor(key)[:, places].contiguous() for key in tensors.keys()}  # noqa: SIM118
    save_file(kept, path)
    return len(kept)
