"""manifest.json: the shards a run consists of, what they were captured from, and by which sessions.

A shard exists if and only if the manifest lists it. Timestamps, versions and hosts are in `sessions` and
nowhere else, so that a resumed run's other entries equal those of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sst_interp.durable import replace_json, sha256
from sst_interp.errors import SSTError
from sst_interp.recipe import Recipe

FORMAT = 1
FILE = "manifest.json"
PER_SESSION = frozenset(
    {"started", "time", "host", "platform", "python", "versions"}
    | {"git_revision", "git_dirty", "threads", "device", "command"}
)
"""Provenance that may differ between the sessions of one run; it is recorded with each session."""
_KEYS = {"state", "recipe", "recipe_fingerprint", "n_batches", "provenance", "sessions", "shards"}


def shard(table: str, batch: int) -> str:
    """A shard's path inside the run's folder (`pairs/0000.parquet`, `states/0000.safetensors`)."""
    return f"{table}/{batch:04d}.{'safetensors' if table == 'states' else 'parquet'}"


def new_manifest(recipe: Recipe, provenance: Mapping[str, Any], n_batches: int | None) -> dict[str, Any]:
    """The manifest of a run that has no shards yet."""
    return {
        "format": FORMAT,
        "state": "capturing",
        "recipe": recipe.to_dict(),
        "recipe_fingerprint": recipe.fingerprint(),
        "n_batches": n_batches,
        "provenance": {k: v for k, v in plain(provenance).items() if k not in PER_SESSION},
        "sessions": [],
        "shards": {},
    }


def session(manifest: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A `sessions` entry: when it started, and all provenance that the run does not already state."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stated = manifest["provenance"]
    return {"started": now} | {
        k: v for k, v in plain(provenance).items() if k in PER_SESSION or stated.get(k) != v
    }


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back (tuples as lists), so that they can be compared."""
    return json.loads(json.dumps(dict(values), allow_nan=False))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None if it has none. Raises SSTError for one that cannot be understood."""
    path = folder / FILE
    start_again = f"put a copy back, or `sst-interp capture --run {folder.name} --fresh` starts again"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SSTError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise SSTError(f"{path} is damaged: {error}", start_again) from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise SSTError(
            f"{path} has format {found}; this sst-interp reads format {FORMAT}", "upgrade sst-interp"
        )
    if found != FORMAT or not manifest.keys() >= _KEYS:
        raise SSTError(f"{path} is not a run's manifest", start_again)
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the folder's manifest in one step."""
    replace_json(folder / FILE, manifest)


def batches(manifest: Mapping[str, Any]) -> list[int]:
    """The committed batches, ascending."""
    return sorted(int(batch) for batch in manifest["shards"])


def content_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 over the checksums of a run's shards: tells one capture from another of the same name."""
    files = {
        name: entry["sha256"] for shards in manifest["shards"].values() for name, entry in shards.items()
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, file: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a listed shard ("missing", "truncated" ...); None if it is as it was written."""
    path = folder / file
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{size} bytes, was {entry['bytes']}"
        return None if sha256(path) == entry["sha256"] else "its sha256 differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return str(error.strerror)


def refuse_other_recipe(run: str, was: Recipe, now: Recipe, says: str = "the recipe now says") -> None:
    """Raise SSTError, field by field, if the two recipes would not capture the same thing."""
    if differences := was.differences(now):
        keys, before, after = zip(*differences, strict=True)
        after = _value(after[0]) if len(after) == 1 else _listed(keys, after)
        raise SSTError(f"run {run} was captured with {_listed(keys, before)}; {says} {after}", _other(run))


def refuse_other_origin(
    folder: Path,
    found: Mapping[str, Any] | None,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    n_batches: int | None,
) -> None:
    """Raise SSTError if the run in `folder` (`found`: its manifest, if any) was begun with other inputs."""
    run = folder.name
    if found:
        refuse_other_recipe(run, Recipe.from_dict(found["recipe"]), recipe)
    if (folder / "run.toml").exists():
        written = Recipe.load(folder / "run.toml", recipe.name)
        if differences := recipe.differences(written):
            keys, now, was = zip(*differences, strict=True)
            raise SSTError(
                f"run {run}: its run.toml says {_listed(keys, was)}; this capture {_listed(keys, now)}",
                _other(run),
            )
    for key, was in (found or {}).get("provenance", {}).items():
        if key.endswith("_hash") and provenance.get(key, was) != was:
            raise SSTError(
                f"run {run} was captured with {key} {was}; now it is {provenance[key]}", _other(run)
            )
    before = found and found["n_batches"]
    if before and n_batches and before != n_batches:
        raise SSTError(f"run {run} was captured in {before} batches; now there are {n_batches}", _other(run))


def _other(run: str) -> str:
    return f"capture under another --run name, or `sst-interp capture --run {run} --fresh` starts again"


def _listed(keys: Iterable[str], values: Iterable[Any]) -> str:
    return ", ".join(f"{key} = {_value(value)}" for key, value in zip(keys, values, strict=True))


def _value(value: Any) -> str:
    return "(left out)" if value is None else json.dumps(value, ensure_ascii=False)
