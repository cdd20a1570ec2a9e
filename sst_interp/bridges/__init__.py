"""At home in the field: the model in TransformerLens and nnsight, with the iteration axis they do not have.

Both record one value per hook point, so of a model that iterates they keep the last. Here every iteration
has its own. Each tool is imported when it is first asked for: nnsight patches torch when it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sst_interp.bridges.asked import Method, NamesFilter, refuse_options
from sst_interp.errors import SSTError

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from sst_interp.bridges.nnsight import StateStreamNNsight
    from sst_interp.bridges.transformer_lens import StateStreamBridge
    from sst_interp.models.model import StateStreamModel

BEFORE_NNSIGHT = ("anyio.abc._sockets", "anyio.streams.file", "anyio.streams.tls")
"""Modules that cannot be imported any more once nnsight has given every object a `save` (Jupyter and web
clients ask for them late)."""


def bridge(model: StateStreamModel) -> StateStreamBridge:
    """The model as a TransformerLens `TransformerBridge`. It shares the weights, and is made once."""
    if "_bridge" not in vars(model):
        try:
            from sst_interp.bridges.transformer_lens import StateStreamBridge
        except ImportError as error:
            raise _not_installed("transformer-lens", error) from error
        vars(model)["_bridge"] = StateStreamBridge(model)
    return vars(model)["_bridge"]


def run_with_cache(
    model: StateStreamModel,
    prompts: str | Sequence[Any] | Tensor,
    iterations: int = 1,
    names_filter: NamesFilter = None,
    method: Method = "parallel",
    **others: Any,
) -> tuple[list[Tensor], list[ActivationCache]]:
    """Read given tokens and keep what every hook point sees, iteration by iteration.

    Args:
        prompts: token ids [row, position], a text, or several of one length.
        iterations: depth of every position.
        names_filter: TransformerLens names, as `blocks.3.hook_resid_mid`.
        method: `sequential` is the definition; `parallel` is as `replay` solves it.
        others: TransformerLens' options, none of which a recurrence has (`incl_bwd`: no gradients are
            recorded).

    Returns:
        (logits, caches), one of each per iteration: [row, position, vocab] and an `ActivationCache`.

    Raises:
        SSTError: a filter that matches nothing; an option in `others`; transformer-lens cannot be imported.
    """
    refuse_options(others)
    return bridge(model).run_with_caches(prompts, iterations, names_filter, method=method)


def open_nnsight(model: StateStreamModel, iterations: int = 1) -> StateStreamNNsight:
    """The model for nnsight: `trace` and `generate` at this depth, every iteration addressable.

    Raises:
        SSTError: nnsight cannot be imported.
    """
    for module in BEFORE_NNSIGHT:
        with suppress(ImportError, TypeError):  # not there, or nnsight was here before
            importlib.import_module(module)
    try:
        from sst_interp.bridges.nnsight import StateStreamNNsight
    except ImportError as error:
        raise _not_installed("nnsight", error) from error
    return StateStreamNNsight(model, iterations)


def _not_installed(package: str, error: ImportError) -> SSTError:
    return SSTError(
        f"{package} cannot be imported: {error}", "install sst-interp again: it brings a version that fits"
    )
