"""Writing a run: one batch at a time, so that a process killed anywhere loses at most the batch in hand.

A batch's files are staged and flushed, renamed into place, and only then listed in the manifest, which is
itself replaced in one step. What the numbers mean is not known here; see docs/run-format.md.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from filelock import FileLock, Timeout

from sst_interp import files as disk
from sst_interp.errors import SSTError
from sst_interp.runs import manifest
from sst_interp.runs.numerics import digest
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.schema import TABLES, to_table, write_parquet
from sst_interp.runs.states import Spooled, Staged, stage_states
from sst_interp.tables import plain

log = logging.getLogger(__name__)

States = Mapping[str, torch.Tensor | Spooled] | Staged

STAGED = re.compile(r"\.\d{4,}(\.\w+)?\.(parquet|safetensors)\.tmp")
SHARD = re.compile(rf"\d{{4,}}\.(parquet|safetensors)|{STAGED.pattern}")
"""The names that a run gives its shards, and their temporary files."""
OWNER = ".writer"
"""Holds the process id of whoever has the lock, for the message to the one who has not."""


class RunWriter:
    """The one writer of a run's folder; use it as a context manager, and `commit` batch by batch.

    with RunWriter.open(folder, recipe, provenance, n_batches=3) as writer:
        for batch in set(range(3)) - writer.committed:
            writer.commit(batch, tables, states)
        writer.finish()
    """

    def __init__(
        self, folder: Path, contents: dict[str, Any], lock: FileLock, numerics: Mapping[str, Any] | None
    ) -> None:
        self.folder = folder
        self.manifest = contents
        self.numerics = numerics
        """Of the batches that are committed without their own."""
        self._lock = lock

    @classmethod
    def open(
        cls,
        folder: str | Path,
        recipe: Recipe,
        provenance: Mapping[str, Any],
        n_batches: int | None = None,
        fresh: bool = False,
        numerics: Mapping[str, Any] | None = None,
        mixed: bool = False,
        verify: bool = False,
    ) -> RunWriter:
        """Start a run in `folder`, or go on with the one that is there; damaged batches are dropped.

        Args:
            folder: the run's folder; made if need be.
            recipe: must agree with the one the run was begun with, but for its name.
            provenance: JSON-ready. Keys that end in `_hash` (`model_hash`) identify what went in and must
                agree with the run's; anything else may differ and is then recorded with the session.
            n_batches: how many batches make the run complete, if known already.
            fresh: erase the run that is there, under the lock.
            numerics: the fingerprint of what captures now; None: not known.
            mixed: go on with a run that was begun on other hardware or versions.
            verify: hash every shard; otherwise only those that are younger than the manifest.

        Raises:
            SSTError: another process writes the run, it was begun differently or elsewhere, or one of its
                folders is a link to somewhere else. Nothing is changed then.
        """
        folder = Path(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_links(folder)
            lock = _lock(folder)
        try:
            with disk_errors(folder):
                if fresh:
                    _erase(folder, recipe)
                there = manifest.read_manifest(folder)
                manifest.refuse_other_origin(folder, there, recipe, manifest.plain(provenance), n_batches)
                if numerics and not mixed and there and there["state"] != "complete":
                    manifest.refuse_other_numerics(folder.name, there, numerics)
                begun = there or manifest.new_manifest(recipe, provenance, n_batches)
                writer = cls(folder, begun, lock, numerics)
                writer._sweep()
                if not (folder / "run.toml").exists():
                    disk.replace_bytes(folder / "run.toml", recipe.to_toml().encode())
            writer.drop_corrupt(verify)
            if writer.manifest["state"] != "complete":
                sessions = [*writer.manifest["sessions"], manifest.session(writer.manifest, provenance)]
                writer._save(sessions=sessions, n_batches=n_batches or writer.manifest["n_batches"])
        except BaseException:
            _unlock(folder, lock)
            raise
        return writer

    @property
    def committed(self) -> set[int]:
        """The batches the run already has."""
        return set(manifest.batches(self.manifest))

    def lacks(self, batch: int, table: str) -> bool:
        """Whether a committed batch has no shard of a table."""
        return manifest.shard(table, batch) not in self.manifest["shards"][str(batch)]

    def captured_on(self, batch: int) -> str | None:
        """The digest of what a committed batch was captured on; None: not known."""
        return self.manifest.get("captured_on", {}).get(str(batch))

    def commit(
        self,
        batch: int,
        tables: Mapping[str, Mapping[str, Any]],
        states: States | None = None,
        numerics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a batch's tables (`schema.to_table`) and kept states, then list them: all or nothing.

        Args:
            states: tensors by name, or a shard that is staged in the run's folder already.
            numerics: the fingerprint of what captured it; None is the writer's own.

        Raises:
            SSTError: the disk is full; earlier batches are safe, and temporary files are gone.
            ValueError: the run has the batch already, or a table does not fit its schema.
        """
        n_batches = self.manifest["n_batches"]
        if batch in self.committed or batch < 0 or (n_batches is not None and batch >= n_batches):
            raise ValueError(f"batch {batch} is already committed, or not one of the run's {n_batches}")
        with self._staged(batch, tables, states) as entries:
            self._list(batch, entries, numerics or self.numerics)

    def add(self, batch: int, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Write further tables of a committed batch, then list them, too: all or nothing."""
        listed = self.manifest["shards"][str(batch)]
        if twice := [name for name in tables if manifest.shard(name, batch) in listed]:
            raise ValueError(f"batch {batch} has its {', '.join(twice)} already")
        with self._staged(batch, tables, None) as entries:
            self._list(batch, listed | entries, None)

    def compare(
        self, batch: int, tables: Mapping[str, Mapping[str, Any]], states: States | None
    ) -> list[str]:
        """The shards of a committed batch whose sha256 is not that of these tables and states."""
        listed = self.manifest["shards"][str(batch)]
        with self._staged(batch, tables, states, in_place=False) as entries:
            return sorted(f for f in listed.keys() | entries.keys() if listed.get(f) != entries.get(f))

    def drop(self, batches: Collection[int]) -> None:
        """Take batches out of the manifest: they will be captured again."""
        gone = set(map(str, batches))
        changes: dict[str, Any] = {"shards": {}, "captured_on": {}}
        for key in changes:
            changes[key] = {b: of for b, of in self.manifest.get(key, {}).items() if b not in gone}
        if "captured_on" not in self.manifest:
            del changes["captured_on"]
        self._save(**changes, state="capturing")

    @contextmanager
    def _staged(
        self,
        batch: int,
        tables: Mapping[str, Mapping[str, Any]],
        states: States | None,
        in_place: bool = True,
    ) -> Iterator[dict[str, dict[str, Any]]]:
        """What the manifest says of a batch's files, which are flushed and, unless told not to, in place."""
        if unknown := set(tables) - set(TABLES):
            raise ValueError(f"no tables {sorted(unknown)}: there are {', '.join(TABLES)}")
        fills: dict[str, Any] = {}
        for name in sorted(tables):
            fills[manifest.shard(name, batch)] = to_table(name, tables[name])
        if states:
            fills[manifest.shard("states", batch)] = states
        entries: dict[str, dict[str, Any]] = {}
        try:
            with disk_errors(self.folder):
                for file, content in fills.items():
                    path = self.folder / file
                    if not path.parent.is_dir():
                        path.parent.mkdir()
                        disk.sync(self.folder)
                    entries[file] = _stage(path, content)
                for file in fills if in_place else ():
                    disk.put_in_place(self.folder / file)
                yield entries
        finally:
            for file in fills:
                disk.temporary(self.folder / file).unlink(missing_ok=True)

    def _list(
        self, batch: int, entries: dict[str, dict[str, Any]], numerics: Mapping[str, Any] | None
    ) -> None:
        changed = manifest.renewed(self.manifest)  # the new shards have today's names
        changed["shards"] = changed["shards"] | {str(batch): entries}
        if numerics:
            made = digest(numerics)
            changed["numerics"] = changed.get("numerics", {}) | {made: dict(numerics)}
            changed["captured_on"] = changed.get("captured_on", {}) | {str(batch): made}
        self._save(**changed)

    def _sweep(self) -> None:
        """Remove what workers staged and nobody committed."""
        for path in (self.folder / "states").glob(".*"):
            if STAGED.fullmatch(path.name):
                path.unlink()

    def finish(self, n_batches: int | None = None) -> None:
        """Mark the run complete. Raises SSTError if batches are missing."""
        count = n_batches or self.manifest["n_batches"]
        if count is None or max(self.committed, default=0) >= count:
            raise ValueError(
                f"n_batches = {count}, but batches up to {max(self.committed, default=0)} are committed"
            )
        if missing := sorted(set(range(count)) - self.committed):
            run = self.folder.name
            said = f"run {run} is not complete: {len(missing)} of {count} batches are missing"
            raise SSTError(said, f"`sst-interp capture --run {run}` goes on with batch {missing[0]}")
        self._sweep()
        self._save(state="complete", n_batches=count)

    def drop_corrupt(self, verify: bool = True) -> list[int]:
        """Drop the batches with a damaged or missing shard from the manifest; returns them, ascending.

        Args:
            verify: hash every shard; otherwise only those that are younger than the manifest.
        """
        dropped, trusted = set(), 0 if verify else manifest.written(self.folder)
        for batch in manifest.batches(self.manifest):
            for file, entry in self.manifest["shards"][str(batch)].items():
                if problem := manifest.damage(self.folder, file, entry, trusted):
                    log.warning("run %s: %s is damaged (%s)", plain(self.folder.name), file, problem)
                    dropped.add(batch)
            if table := manifest.lacking(self.manifest, batch):
                log.warning("run %s: batch %d has no %s", plain(self.folder.name), batch, table)
                dropped.add(batch)
        for batch in dropped:
            log.warning("run %s: batch %d will be captured again", plain(self.folder.name), batch)
        if dropped:
            self.drop(dropped)
        return sorted(dropped)

    def close(self) -> None:
        """Let others write the run."""
        _unlock(self.folder, self._lock)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _save(self, **changes: Any) -> None:
        changed = self.manifest | changes
        with disk_errors(self.folder):
            manifest.write_manifest(self.folder, changed)
        self.manifest = changed


def _stage(path: Path, content: Any) -> dict[str, Any]:
    """Stage a table, states, or what a worker has staged under another name; what the manifest says of it."""
    if isinstance(content, pa.Table):
        staged = disk.stage(path, partial(write_parquet, content))
        return {"rows": len(content), "bytes": staged.stat().st_size, "sha256": disk.sha256(staged)}
    if not isinstance(content, Staged):
        content = stage_states(path, content)
    if content.path != disk.temporary(path):
        os.replace(content.path, disk.temporary(path))
    return {"tensors": content.tensors, "bytes": content.bytes, "sha256": content.sha256}


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            owner = f" (pid {int((folder / OWNER).read_text())})"
        except (OSError, ValueError):
            owner = ""
        raise SSTError(
            f"run {folder.name} is being written by another process{owner}",
            "wait until it has finished, or capture under another --run name",
        ) from None
    try:
        (folder / OWNER).unlink(missing_ok=True)
        disk.create(folder / OWNER, str(os.getpid()).encode())
    except BaseException:
        lock.release()
        raise
    return lock


def _refuse_links(folder: Path) -> None:
    """A link in the place of a run's own folder or lock would have another place written."""
    for name in (*TABLES, "states", ".lock"):
        if (folder / name).is_symlink():
            said = f"{folder / name} is a link to somewhere else: nothing is written there"
            raise SSTError(said, "remove the link")


def _unlock(folder: Path, lock: FileLock) -> None:
    if lock.is_locked:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _erase(folder: Path, recipe: Recipe) -> None:
    """Remove a run's files, the manifest first, and nothing else; a run.toml that says `recipe` stays."""
    (folder / manifest.FILE).unlink(missing_ok=True)
    for table in (*TABLES, "states"):
        for path in (folder / table).glob("*"):
            if SHARD.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        with suppress(OSError):  # not there, or somebody's own files are in it
            (folder / table).rmdir()
    try:
        stays = not recipe.differences(Recipe.load(folder / "run.toml", recipe.name))
    except SSTError:
        stays = False
    if not stays:
        (folder / "run.toml").unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk says into something to act on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise SSTError(
                f"the disk is full: cannot write run {folder.name} in {folder}",
                f"make room; `sst-interp capture --run {folder.name}` then goes on: committed batches stay",
            ) from error
        name = error.filename2 or error.filename
        named = isinstance(name, str | bytes | Path)
        where = f"{os.path.relpath(os.fsdecode(name), folder)}: " if named else ""
        raise SSTError(
            f"cannot write run {folder.name} in {folder}: {where}{error.strerror or error}",
            "put that right, or capture under another --run name",
        ) from error
