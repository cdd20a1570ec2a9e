"""One module per question asked of a run: pure functions of a `Contrast` that return a typed result.

    from sst_interp.analyses import Contrast, basin_shifts, load

    basin_shifts(Contrast.of(run, "within")).verdict
    load()                     # name -> every analysis (`result.Analysis`)

Names are looked up in the modules that define them, which are imported when something of them is wanted.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from sst_interp.analyses.result import ANALYSES, Analysis


class _Front(ModuleType):
    """The package itself: its `dwell` is the analysis, not the module of that name that defines it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Front


def load() -> dict[str, Analysis]:
    """Every analysis by name, after importing every module of this package."""
    list(_modules(__name__))
    return ANALYSES


def _modules(package: str) -> Iterator[ModuleType]:
    """The modules of a package, imported one after the other."""
    for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        yield import_module(module.name)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if find_spec(f"{__name__}.{name}") is not None:
        import_module(f"{__name__}.{name}")
        return globals()[name]
    for package in (__name__, f"{__name__}.statistics"):
        for module in _modules(package):
            value = vars(module).get(name)
            if value is not None and getattr(value, "__module__", module.__name__) == module.__name__:
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
