"""At home in the field: the model in TransformerLens and nnsight, with the iteration axis they do not have.

Both record one value per hook point, so of a model that iterates they keep the last. Here every iteration
has its own. Each tool is imported when it is first asked for; `pip install "sst-interp[lens]"` brings both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from sst_interp.errors import SSTError

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from sst_interp.bridges.nnsight import StateStreamNNsight
    from sst_interp.bridges.transformer_lens import StateStreamBridge
    from sst_interp.models.model import StateStreamModel

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
"""Which hook points: a name, names, or a function of the name; None is every one that runs."""

Method = Literal["parallel", "sequential"]

BEFORE_NNSIGHT = ("anyio.abc._sockets", "anyio.streams.file", "anyio.streams.tls")
"""Modules that cannot be imported any more once nnsight has given every object a `save` (Jupyter and web
clients ask for them late)."""


class Bridges:
    """What `sst_interp.models.model.StateStreamModel` inherits to be used from other tools."""

    _bridge: StateStreamBridge | None = None

    def bridge(self) -> StateStreamBridge:
        """The model as a TransformerLens `TransformerBridge`. It shares the weights, and is made once."""
        if self._bridge is None:
            try:
                from sst_interp.bridges.transformer_lens import StateStreamBridge
            except ImportError as error:
                raise _not_installed("transformer-lens", error) from error
            self._bridge = StateStreamBridge(cast("StateStreamModel", self))
        return self._bridge

    def run_with_cache(
        self,
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
            SSTError: a filter that matches nothing; an option in `others`; transformer-lens is not installed.
        """
        refuse_options(others)
        return self.bridge().run_with_caches(prompts, iterations, names_filter, method=method)

    def nnsight(self, iterations: int = 1) -> StateStreamNNsight:
        """The model for nnsight: `trace` and `generate` at this depth, every iteration addressable.

        Raises:
            SSTError: nnsight is not installed.
        """
        for module in BEFORE_NNSIGHT:
            with suppress(ImportError, TypeError):  # not there, or nnsight was here before
                importlib.import_module(module)
        try:
            from sst_interp.bridges.nnsight import StateStreamNNsight
        except ImportError as error:
            raise _not_installed("nnsight", error) from error
        return StateStreamNNsight(cast("StateStreamModel", self), iterations)

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """Upload the stream as a checkpoint that `sst.load(repo_id)` loads; see `sst_interp.models.hub`."""
        from sst_interp.models.hub import push_to_hub

        return push_to_hub(cast("StateStreamModel", self), repo_id, **how)


def refuse_options(others: dict[str, Any]) -> None:
    """Raise for an option of TransformerLens that would be ignored."""
    given = sorted(name for name, value in others.items() if value is not None)
    if others.get("incl_bwd") is False:
        given.remove("incl_bwd")
    if "incl_bwd" in given:
        raise SSTError(
            "incl_bwd=True does not work with a state stream: the pass records no gradients",
            "leave incl_bwd out, or boot a TransformerBridge on a copy of `model.backbone.model`",
        )
    if given:
        raise SSTError(f"{', '.join(given)}: not with a state stream", "leave it out")


def _not_installed(package: str, error: ImportError) -> SSTError:
    return SSTError(
        f"{package} cannot be imported: {error}", 'pip install "sst-interp[lens]" brings a version that fits'
    )
