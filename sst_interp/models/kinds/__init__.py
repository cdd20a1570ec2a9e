"""The kinds of stream by name: each is one file, here or a plugin's, that defines a `Kind` under `@kind`.

    @kind("looped", "depth-looped model")
    class Looped(Kind): ...

Recipes, checkpoints, `sst.load` and every listing take it from there.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from sst_interp.errors import SSTError, unknown_name
from sst_interp.models.stream import Kind

K = TypeVar("K", bound=type[Kind])
_KINDS: dict[str, type[Kind]] = {}


def kind(name: str, words: str) -> Callable[[K], K]:
    """Register a class as the kind of that name; sentences call it `words`.

    Raises:
        SSTError: if another class has the name.
    """

    def register(cls: K) -> K:
        known = _KINDS.get(name)
        if known is not None and known.__module__ != cls.__module__:
            raise SSTError(
                f"two kinds are called {name!r}: of {known.__module__} and {cls.__module__}",
                "give one of them another name",
            )
        cls.name, cls.words = name, words
        _KINDS[name] = cls
        return cls

    return register


def kinds() -> dict[str, type[Kind]]:
    """Every kind by name, after importing every module of this package."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        import_module(module.name)
    return dict(sorted(_KINDS.items()))


def kind_named(name: str) -> type[Kind]:
    """The kind of that name.

    Raises:
        SSTError: with the nearest names, if there is none.
    """
    if not isinstance(name, str) or name not in kinds():
        raise unknown_name("kind", str(name), kinds())
    return _KINDS[name]
