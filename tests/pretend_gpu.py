"""A GPU to test with where there is none: tensors on a device of its own, which behave as a GPU's do.

They hold real data (on the CPU). They refuse to be mixed with CPU tensors and to become numpy arrays. `GPU`
counts kernels and the moments at which the host waits for the device (a *sync*: reading a number, copying
there or back, a size that depends on values), by line of the package. What is counted is counted exactly; how
long it would take is not known.

    with GPU() as gpu:
        model = attach(tiny("llama").to(DEVICE))
        ...
    gpu.kernels, gpu.syncs            # numbers
    gpu.lines["models/stream.py:52"]  # syncs of that line
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
DEVICE = torch.device("privateuseone:0")
"""Printed as `pretend:0` once a `GPU` was made."""


class _Module(_DummyBackendModule):
    """What `torch.pretend` must be: there is no such device unless a test asks for it."""

    def is_available(self):
        return bool(GPU.active)

    def _lazy_init(self):
        pass


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self):
        return bool(GPU.active)


WAITS = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.is_nonzero, aten.repeat_interleave,
}  # fmt: skip
"""Operators whose result the host needs before it can go on."""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Elsewhere(torch.Tensor):
    """A tensor on the pretend GPU. `held` is the tensor that computes."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if not GPU.active:
            raise RuntimeError("a tensor of the pretend GPU is used outside `with GPU()`")
        return GPU.active[-1].run(func, args, kwargs or {})

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert a GPU tensor to numpy. Use Tensor.cpu() first")
        return self.cpu().numpy()

    __array__ = numpy

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **_):
        return f"Elsewhere({self.held!r})"


LIBRARY = torch.library.Library("aten", "IMPL")


def _empty_strided(size, stride, dtype=None, **_):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    GPU.active[-1].run(aten.copy_.default, (target, source), {"non_blocking": non_blocking})
    return target


class GPU(TorchDispatchMode):
    """While it is entered, `DEVICE` exists. Raises RuntimeError where devices mix."""

    active: ClassVar[list[GPU]] = []
    ready = False

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        if not GPU.ready:
            _setup_privateuseone_for_python_backend("pretend", _Module(), _Hook())
            # `torch.tensor(..., device=DEVICE)` makes and fills its tensor where no mode sees it
            LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
            LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
            GPU.ready = True

    kernels = property(lambda self: sum(self.names.values()))
    syncs = property(lambda self: sum(self.lines.values()))

    def __enter__(self):
        GPU.active.append(self)
        # a module's `.to(dtype)` would set the dtype of the shell alone
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        GPU.active.pop()
        torch.__future__.set_overwrite_module_params_on_conversion(bool(GPU.active))
        return super().__exit__(*error)

    @contextmanager
    def counting(self):
        """Counts from zero; after it, `kernels`, `syncs` and `lines` are of the block alone."""
        self.names.clear()
        self.lines.clear()
        yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, Elsewhere)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        onto = target is not None and target.type == DEVICE.type
        if not there and not onto:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        moves = packet in (aten._to_copy, aten.copy_, aten.copy)
        back = target is not None and not onto
        if not moves:
            self._refuse_mixing(func, packet, args, tensors, there)
        if (moves and len(there) != len(tensors)) or back or (moves and onto and not there):
            if not kwargs.get("non_blocking"):
                self._sync()
        elif packet in WAITS or (packet in INDEXED and self._waits_for_index(args)):
            self._sync()
        if (generator := kwargs.get("generator")) is not None and generator.device != DEVICE:
            raise RuntimeError(f"{func}: a CPU generator cannot draw on the GPU")
        real_args, real_kwargs = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
        if onto:
            real_kwargs["device"] = torch.device("cpu")
            real_kwargs.pop("pin_memory", None)
        out = func(*real_args, **real_kwargs)
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            self.names[str(packet)] += 1
        stays = not back and not (packet in (aten.copy_, aten.copy) and not isinstance(args[0], Elsewhere))
        written = [
            kwargs.get(a.name, args[n] if n < len(args) else None)
            for n, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]

        def outer(x):
            if not isinstance(x, torch.Tensor):
                return x
            for given in written:
                if (isinstance(given, Elsewhere) and given.held is x) or given is x:
                    return given
            return Elsewhere(x) if stays else x

        return tree_map(outer, out)

    @staticmethod
    def _refuse_mixing(func, packet, args, tensors, there):
        if packet in INDEXED and isinstance(args[0], Elsewhere):
            return  # a GPU tensor may be indexed by a CPU one, which is copied there
        foreign = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
        if there and foreign:
            raise RuntimeError(f"{func}: expected all tensors on one device, found {DEVICE} and cpu")

    @staticmethod
    def _waits_for_index(args):
        given = [i for i in args[1] if isinstance(i, torch.Tensor)]
        return any(i.dtype in (torch.bool, torch.uint8) or not isinstance(i, Elsewhere) for i in given)

    def _sync(self):
        frame = sys._getframe(1)
        while (
            frame is not None
            and "sst_interp" not in frame.f_code.co_filename.split("/")
            and "analyses" not in frame.f_code.co_filename.split("/")
        ):
            frame = frame.f_back
        if frame is None:
            self.lines["elsewhere"] += 1
        else:
            where = frame.f_code.co_filename.split("sst_interp/")[-1]
            self.lines[f"{where}:{frame.f_lineno}"] += 1
