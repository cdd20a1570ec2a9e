"""manifest.json: the shards a run consists of, what they were captured from, and by which sessions.

A shard exists if and only if the manifest lists it. Timestamps, versions and hosts are in `sessions` and
nowhere else, so that a resumed run's other entries equal those of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sst_interp.errors import SSTError
from sst_interp.files import from_json, read_whole, replace_json, sha256
from sst_interp.runs.numerics import apart, digest
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.schema import TABLES

FORMAT = 2
"""Format 1, of version 0.1, has other names for comparisons and choices (`models.choices.BEFORE`)."""
FILE = "manifest.json"
PER_SESSION = frozenset(
    {"started", "time", "host", "platform", "python", "versions"}
    | {"git_revision", "git_dirty", "threads", "device", "command"}
)
"""Provenance that may differ between the sessions of one run."""
LARGEST = 64 << 20  # bytes
TYPES: dict[str, type | tuple[type, ...]] = {
    "state": str,
    "recipe": dict,
    "recipe_fingerprint": str,
    "n_batches": (int, type(None)),
    "provenance": dict,
    "sessions": list,
    "shards": dict,
}
"""What a manifest holds."""
PROVENANCE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "family", "dtype", "device", "platform", "kind", "stream"), str),
    **dict.fromkeys(("n_layers", "d_model", "threads"), int),
    **dict.fromkeys(("restricted", "off"), bool),
    **dict.fromkeys(("choices", "dataset", "versions"), dict),
    "alpha_mean": (int, float),
    "alpha_range": list,
    "gamma": list,
}
"""What provenance holds where it holds it; keys that end in `_hash` hold text."""
NUMERICS: dict[str, type | tuple[type, ...]] = {"numerics": dict, "captured_on": dict}
"""Fingerprints (`runs.numerics`) by digest, and the digest of every batch; older manifests have neither."""


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


def renewed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest in today's format and names."""
    return {**manifest, "format": FORMAT, "recipe": Recipe.from_dict(manifest["recipe"]).to_dict()}


def session(manifest: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A `sessions` entry: when it started, and the provenance that the run does not state."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stated = manifest["provenance"]
    return {"started": now} | {
        k: v for k, v in plain(provenance).items() if k in PER_SESSION or stated.get(k) != v
    }


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back (tuples as lists), so that they can be compared."""
    return json.loads(json.dumps(dict(values), allow_nan=False))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None if it has none.

    Raises:
        SSTError: it cannot be read or understood.
    """
    path = folder / FILE
    start_again = f"put a copy back, or `sst-interp capture --run {folder.name} --fresh` starts again"
    try:
        data = read_whole(path, LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SSTError(f"cannot read {path}: {error.strerror}", start_again) from None
    return parse_manifest(data, str(path), start_again)


def parse_manifest(data: bytes, path: str, hint: str) -> dict[str, Any]:
    """A manifest without its `sha256`, from its bytes; errors call it `path`.

    Raises:
        SSTError: it is damaged, of a later format, or no manifest.
    """
    try:
        manifest = from_json(data)
    except ValueError as error:
        raise SSTError(f"{path} is damaged: {error}", hint) from None
    kind: Any = manifest.get("format") if isinstance(manifest, dict) else None
    if _is(kind, int) and kind > FORMAT:
        said = f"{path} has format {kind}; this sst-interp reads formats 1 to {FORMAT}"
        raise SSTError(said, "upgrade sst-interp")
    if not (_is(kind, int) and kind >= 1 and manifest.keys() >= TYPES.keys()):
        raise SSTError(f"{path} is not a run's manifest", hint)
    own = manifest.pop("sha256", None)
    try:
        if own is not None and own != _digest(manifest):
            raise ValueError("it is not what was written: its sha256 differs")
        _check(manifest)
    except (ValueError, RecursionError) as error:
        raise SSTError(f"{path} is damaged: {error}", hint) from None
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the folder's manifest in one step."""
    replace_json(folder / FILE, {**manifest, "sha256": _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of everything but `sha256` itself."""
    text = json.dumps(dict(manifest), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError for what is not as a manifest has it."""
    json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()  # no infinity, no lone surrogate
    _check_types("", manifest, TYPES | NUMERICS)
    if not all(isinstance(about, dict) for about in manifest.get("numerics", {}).values()):
        raise ValueError("an entry of numerics is not one")
    if not all(digest in manifest.get("numerics", {}) for digest in manifest.get("captured_on", {}).values()):
        raise ValueError("captured_on names what numerics does not have")
    if manifest["state"] not in ("capturing", "complete"):
        raise ValueError(f"state is {manifest['state'][:40]!r}")
    if (n := manifest["n_batches"]) is not None and n < 1:
        raise ValueError(f"n_batches is {n}")
    about = manifest["provenance"]
    _check_types("provenance.", about, PROVENANCE | {k: str for k in about if k.endswith("_hash")})
    if "alpha_range" in about and not (
        len(about["alpha_range"]) == 2 and all(_is(x, (int, float)) for x in about["alpha_range"])
    ):
        raise ValueError("provenance.alpha_range is not two numbers")
    for session in manifest["sessions"]:
        if not isinstance(session, dict) or not isinstance(session.get("started", ""), str):
            raise ValueError("an entry of sessions is not one")
    for batch, files in manifest["shards"].items():
        if not re.fullmatch(r"0|[1-9]\d{0,8}", batch, re.ASCII) or not isinstance(files, dict):
            raise ValueError(f"shards has an entry {batch[:40]!r}")
        for file, entry in files.items():
            table = file.partition("/")[0]
            if table not in (*TABLES, "states") or file != shard(table, int(batch)):
                raise ValueError(f"batch {batch} lists a file {file[:80]!r}")
            size = "tensors" if table == "states" else "rows"
            if not isinstance(entry, dict):
                raise ValueError(f"the entry of {file} is not one")
            _check_types(f"{file}: ", entry, {"bytes": int, "sha256": str, size: int}, all_of_them=True)
            if entry["bytes"] < 0 or entry[size] < 0:
                raise ValueError(f"{file}: a size is below 0")
    published = manifest.get("published", {})
    kept = published.get("iterations", []) if isinstance(published, dict) else None
    if not isinstance(kept, list) or not all(_is(i, int) and i >= 1 for i in kept):
        raise ValueError("published.iterations is not a list of iterations")


def _check_types(
    where: str,
    values: Mapping[str, Any],
    types: Mapping[str, type | tuple[type, ...]],
    all_of_them: bool = False,
) -> None:
    for key, kind in types.items():
        if (key in values or all_of_them) and not _is(values.get(key), kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise ValueError(f"{where}{key} is not of type {' or '.join(k.__name__ for k in kinds)}")


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """`isinstance`, but true and false are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def batches(manifest: Mapping[str, Any]) -> list[int]:
    """The committed batches, ascending."""
    return sorted(int(batch) for batch in manifest["shards"])


def content_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 over the checksums of a run's shards: tells one capture from another of the same name."""
    files = {
        name: entry["sha256"] for shards in manifest["shards"].values() for name, entry in shards.items()
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def lacking(manifest: Mapping[str, Any], batch: int) -> str | None:
    """The kind of shard that a batch must have and does not list; None if it has them all."""
    recipe, files = manifest["recipe"], manifest["shards"][str(batch)]
    needed = ["questions", "steps", *(("outputs", "pairs") if len(recipe.get("depths", (1, 2))) > 1 else ())]
    if recipe.get("keep", "position0") != "none" and manifest.get("published", {}).get("iterations") != []:
        needed.append("states")
    return next((table for table in needed if shard(table, batch) not in files), None)


def written(folder: Path) -> int:
    """When the folder's manifest was last written, in nanoseconds. What is older is as it was listed."""
    try:
        return (folder / FILE).stat().st_mtime_ns
    except OSError:
        return 0


def damage(folder: Path, file: str, entry: Mapping[str, Any], trusted: int = 0) -> str | None:
    """What is wrong with a listed shard ("missing", "truncated" ...); None if it is as it was written.

    Args:
        trusted: a file of the right size that is older than this (`written`) is not hashed.
    """
    path = folder / file
    try:
        about = path.stat()
        if about.st_size != entry["bytes"]:
            return f"{about.st_size} bytes, was {entry['bytes']}"
        if about.st_mtime_ns < trusted:
            return None
        return None if sha256(path) == entry["sha256"] else "its sha256 differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return str(error.strerror)


def refuse_other_numerics(run: str, contents: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise SSTError if batches were captured on hardware or versions whose last bits differ from `now`'s."""
    known = contents.get("numerics", {})
    for was in {*contents.get("captured_on", {}).values()} - {digest(now)}:
        raise SSTError(
            f"run {run} was captured with {apart(known[was], now)}",
            f"`sst-interp capture --run {run} --mixed` goes on, and each batch says whose it is",
        )


def refuse_other_recipe(run: str, was: Recipe, now: Recipe, says: str = "the recipe now says") -> None:
    """Raise SSTError, field by field, if the two recipes would not capture the same thing."""
    if differences := was.differences(now):
        keys, before, after = zip(*differences, strict=True)
        after = _value(after[0]) if len(after) == 1 else _listed(keys, after)
        raise SSTError(f"run {run} was captured with {_listed(keys, before)}; {says} {after}", _other(run))


def refuse_other_origin(
    folder: Path,
    contents: Mapping[str, Any] | None,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    n_batches: int | None,
) -> None:
    """Raise SSTError if the run in `folder`, of which the manifest has `contents`, was begun differently."""
    run = folder.name
    if contents:
        refuse_other_recipe(run, Recipe.from_dict(contents["recipe"]), recipe)
    if (folder / "run.toml").exists():
        written = Recipe.load(folder / "run.toml", recipe.name)
        if differences := recipe.differences(written):
            keys, now, was = zip(*differences, strict=True)
            raise SSTError(
                f"run {run}: its run.toml says {_listed(keys, was)}; this capture {_listed(keys, now)}",
                _other(run),
            )
    for key, was in (contents or {}).get("provenance", {}).items():
        if key.endswith("_hash") and provenance.get(key, was) != was:
            said = f"run {run} was captured with {key} {was}; now it is {provenance[key]}"
            raise SSTError(said, _other(run))
    before = contents and contents["n_batches"]
    if before and n_batches and before != n_batches:
        raise SSTError(f"run {run} was captured in {before} batches; now there are {n_batches}", _other(run))


def _other(run: str) -> str:
    again = f"`sst-interp capture --run {run} --fresh` starts again"
    return f"capture under another name (--set name={run}-2), or {again}"


def _listed(keys: Iterable[str], values: Iterable[Any]) -> str:
    return ", ".join(f"{key} = {_value(value)}" for key, value in zip(keys, values, strict=True))


def _value(value: Any) -> str:
    return "(left out)" if value is None else json.dumps(value, ensure_ascii=False)
