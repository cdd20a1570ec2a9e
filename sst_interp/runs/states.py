"""Kept states on their way to a shard.

A batch's states are copied off the device position by position and spooled by a thread, so that neither the
device nor the memory ever holds all of them. When the batch ends, its shard is put together from the spool
and hashed while it is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sst_interp import files as disk

AT_ONCE = 4
"""Pieces that wait for the disk at most."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16",
}  # fmt: skip
"""What safetensors calls them, in the order in which it writes them."""


class Staged(NamedTuple):
    """A shard that is written and flushed, and not yet in its place."""

    path: Path
    tensors: int
    bytes: int
    sha256: str


class Spool:
    """A nameless file on the run's disk: a killed process leaves nothing.

    Args:
        folder: on the disk that has room for a batch's states; None is the system's temporary folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it ends with the spool)
        self._thread = ThreadPoolExecutor(1, "states")
        self._writing: deque[Future[object]] = deque()
        self._end = 0

    def add(self, piece: Tensor) -> int:
        """Let the thread write a tensor; returns where it will begin. Raises OSError of an earlier one."""
        host, ready = to_host(piece)
        start, self._end = self._end, self._end + host.nbytes
        while len(self._writing) >= AT_ONCE:
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(self._write, host, ready))
        return start

    def read(self, start: int, size: int) -> bytes:
        """Bytes of what was added."""
        while self._writing:
            self._writing.popleft().result()
        self._file.seek(start)
        return self._file.read(size)

    def _write(self, host: Tensor, ready: Callable[[], object]) -> None:
        ready()
        self._file.write(_bytes(host))


@dataclass(frozen=True)
class Spooled:
    """A tensor in a spool, in pieces of equal size along its first axis."""

    spool: Spool
    dtype: torch.dtype
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    """Where the piece at each place of the first axis begins."""

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes, in order."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        for start in self.starts:
            yield self.spool.read(start, size)


def stage_states(path: Path, tensors: Mapping[str, Tensor | Spooled]) -> Staged:
    """Stage a shard, hashed while it is written: the bytes of `safetensors.torch.save_file`.

    Raises:
        OSError: the disk is full or fails.
    """
    dtypes = list(DTYPES)
    order = sorted(tensors, key=lambda name: (dtypes.index(tensors[name].dtype), name))
    about, end = {}, 0
    for name in order:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        about[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()

    def fill(staged: Path) -> None:
        with open(staged, "wb") as file:
            for piece in (len(header).to_bytes(8, "little"), header):
                digest.update(piece)
                file.write(piece)
            for name in order:
                tensor = tensors[name]
                for piece in tensor.pieces() if isinstance(tensor, Spooled) else [_bytes(tensor)]:
                    digest.update(piece)
                    file.write(piece)

    staged = disk.stage(path, fill)
    return Staged(staged, len(order), 8 + len(header) + end, digest.hexdigest())


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """The tensor in memory, and what to call before it is read: nothing waits for a GPU's copy here."""
    if tensor.device.type != "cuda":
        return tensor.detach().to("cpu"), lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return host, done.synchronize


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
