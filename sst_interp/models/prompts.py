"""Prompts as people give them: texts and token ids of any kind, as lists of ids, or one clear line."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.backbone import first_line
from sst_interp.models.choices import shown, whole

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt] | Tensor | np.ndarray
"""One prompt or several: texts, or token ids as a list, tuple, tensor or array; also ids [row, position]."""

TEMPLATE_SECONDS = 10.0
"""A chat template that takes longer is stopped."""


def listed(prompts: Any) -> list[Prompt]:
    """Prompts as a list; one prompt alone becomes a list of one.

    Raises:
        SSTError: they are neither texts nor ids [position] or [row, position].
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Tensor | np.ndarray):
        if prompts.ndim not in (1, 2):
            raise SSTError(
                f"token ids have shape {list(prompts.shape)}", "give [position] or [row, position]"
            )
        return [ids_of(row) for row in (prompts if prompts.ndim == 2 else prompts[None])]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise SSTError(
            f"prompts are a {type(prompts).__name__}, not texts or token ids",
            'for example ["Why is the sky blue?"] or [[12, 7, 9]]',
        )
    flat = bool(prompts) and all(isinstance(p, Number) or getattr(p, "ndim", None) == 0 for p in prompts)
    return [ids_of(prompts)] if flat else [p if isinstance(p, str) else ids_of(p) for p in prompts]


def only(prompt: Any) -> Prompt:
    """One prompt, given alone or as a batch of one; none is an empty one. Raises SSTError for several."""
    prompts = listed(prompt)
    if len(prompts) > 1:
        raise SSTError(f"there are {len(prompts)} prompts where one is taken", "give them one by one")
    return prompts[0] if prompts else []


def ids_of(row: Any) -> list[int]:
    """One prompt's token ids as ints, or SSTError. (No error shows a prompt's text: it may be restricted.)"""
    hint = "token ids are whole numbers from 0, as a tokenizer gives them"
    if isinstance(row, Tensor | np.ndarray):
        dtype = str(row.dtype).removeprefix("torch.")
        if row.ndim != 1 or "int" not in dtype or getattr(row, "is_meta", False):
            raise SSTError(f"a prompt is of {dtype} and shape {list(row.shape)}, not ids [position]", hint)
        return row.tolist()
    if not isinstance(row, Sequence) or isinstance(row, str | bytes):
        raise SSTError(f"a prompt is a {type(row).__name__}, neither text nor token ids", hint)
    for token in row:
        if not isinstance(token, Number | Tensor | np.ndarray):
            raise SSTError(f"a prompt has a {type(token).__name__} among its token ids", hint)
    return [token if type(token) is int else whole("a token id", token, 0) for token in row]


def check_stop(stop_tokens: Any) -> list[int]:
    """The ids that end a text as ints, or SSTError."""
    if isinstance(stop_tokens, str) or not isinstance(stop_tokens, Iterable):
        raise SSTError(f"stop_tokens = {shown(stop_tokens)} is no list of token ids", "for example [2]")
    return [whole("a stop token", token, 0) for token in stop_tokens]


class _TooLong(BaseException):
    """Raised inside a thread that has taken too long."""


def in_time(work: Callable[[], Any], what: str) -> Any:
    """What `work`, the code of a stranger, returns.

    Raises:
        SSTError: it raises anything, or takes longer than `TEMPLATE_SECONDS`.
    """
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:  # handed to the caller
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    hint = "mend `chat_template` of the tokenizer, or set it to None to send messages as plain text"
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TooLong)
        )
        raise SSTError(f"{what} has not ended after {TEMPLATE_SECONDS:g} s", hint)
    value, error = done[0]
    if error is not None:
        raise SSTError(f"{what} fails: {type(error).__name__}: {first_line(error)}", hint) from error
    return value
