"""The one error for people: `SSTError` says in one line what is wrong and in one what to type.

The command line prints both without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


class SSTError(Exception):
    """What is wrong, and what to type.

    Args:
        message: one line that names the thing and what is wrong with it.
        hint: one line with the command or the value that puts it right.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class Untestable(SSTError):
    """An analysis cannot be made of these data; the message says why."""


def unknown_name(kind: str, name: str, known: Iterable[str], list_with: str | None = None) -> SSTError:
    """An error for a name that is not known, with the nearest known ones (`unknown run 'dmeo'`)."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    else:
        hint = "known: " + (", ".join(known) if known else "none")
    if list_with:
        hint += f"{'' if near else ';'} `{list_with}` lists them"
    return SSTError(f"unknown {kind} {name!r}", hint)


def check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises `unknown_name` for the first of `names` that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)


def upstairs(name: str) -> Callable[..., Any]:
    """`package.module:function` of a floor above, for methods that open a door upwards (`run.question(3)`).

    Everything else imports downwards (docs/architecture.md).
    """
    module, function = name.split(":")
    return getattr(import_module(f"sst_interp.{module}"), function)
