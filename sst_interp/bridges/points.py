"""TransformerLens' hook points in time: which fire, and hooks for one iteration or position only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    detect_tokenizer_bos_eos,
)

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import whole
from sst_interp.models.hooks import Hook, alike
from sst_interp.models.model import StateStreamModel
from sst_interp.models.stream import Recurrence, stack_pass


@dataclass(frozen=True)
class Now:
    """Where a bridge is."""

    iteration: int
    """The one that runs."""
    position: int
    """The first of its pass."""


class Runs(Protocol):
    """What says where it is."""

    now: Now


@dataclass
class Placed:
    """`fn(tensor, hook)` at one iteration, or position, or both; None means everywhere.

    With a position it is given that position alone, [row, 1, ...], however many a pass reads.
    """

    bridge: Runs
    fn: Callable[..., Any]
    iteration: int | None = None
    position: int | None = None
    calls: int = 0
    """How often it has been called."""

    def __post_init__(self) -> None:
        if self.iteration is not None:
            self.iteration = whole("iteration", self.iteration, 1)
        if self.position is not None:
            self.position = whole("position", self.position, 0)

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        """What TransformerLens calls."""
        now = self.bridge.now
        if self.iteration is not None and now.iteration != self.iteration:
            return None
        if self.position is None:
            self.calls += 1
            return self.fn(tensor, hook=hook)
        axis = (hook.pos_dim or 1) if isinstance(hook, HookPoint) else 1
        offset = self.position - now.position
        if not 0 <= offset < tensor.shape[axis]:
            return None
        self.calls += 1
        given, changed = tensor.narrow(axis, offset, 1).clone(), tensor.clone()
        changed.narrow(axis, offset, 1).copy_(alike(self.fn(given, hook=hook), given, str(hook.name)))
        return changed

    def refuse_unused(self) -> None:
        """Raise if it was never called."""
        if not self.calls:
            where = {"iteration": self.iteration, "position": self.position}
            named = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
            raise SSTError(f"the hook was never called: nothing ran at {named}", "ask for what there is")


@torch.no_grad()
def firing(
    model: Recurrence,
    points: Mapping[str, HookPoint],
    positions: int,
    hook: Hook,
    unembed: Callable[[Tensor], object],
) -> dict[str, HookPoint]:
    """The hook points that fire, found by one pass.

    TransformerLens says where its own attention has the positions of normed queries and keys. The pass says
    where this backbone has them.

    Args:
        positions: a number that is the size of no other axis before d_head.
        hook: fires the points of the sites.
        unembed: fires those behind the layers.
    """
    fired: set[HookPoint] = set()
    handles = []
    for point in set(points.values()):

        def note(_module: Any, _args: Any, out: Any, point: HookPoint = point) -> None:
            fired.add(point)
            if point.pos_dim is not None:
                point.pos_dim = list(out.shape).index(positions)

        handles.append(point.register_forward_hook(note))
    device = model.backbone.device
    stream = model.new_stream(torch.zeros(1, dtype=torch.long, device=device), positions)
    columns = torch.arange(positions, device=device)
    states = stream.state[:, :, None].expand(-1, -1, positions, -1)
    y, _ = stack_pass(model, stream, columns[None] * 0, columns, states, None, "write", hook(0, 1))
    unembed(y[-1][:, :, None])
    for handle in handles:
        handle.remove()
    return {name: point for name, point in points.items() if point in fired}


OWN = ("resid_mid", "stream_state", "resid_blended")
"""Sites with hook points of their own. TransformerLens' `hook_resid_mid` is the input of `ln2`, which here is
what comes after the blend; and a change there would reach the FFN and not the residual."""


class Twin(NamedTuple):
    """What a `TransformerBridge` is made of."""

    hf: nn.Module
    backbone: Backbone
    """The twin's parts, validated before TransformerLens puts its own in."""
    adapter: Any
    tokenizer: Any


def twin_of(model: StateStreamModel) -> Twin:
    """A model's backbone, ready for TransformerLens.

    Raises:
        SSTError: TransformerLens has no adapter for the family.
    """
    hf: Any = same_weights(model.backbone.model)
    backbone, name = Backbone(hf), type(hf).__name__
    try:
        config = build_bridge_config_from_hf(copy.deepcopy(hf.config), name, model.name, model.backbone.dtype)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise SSTError(
            f"TransformerLens does not know {name}: {reason}", "nnsight needs no adapter"
        ) from error
    adapter.cfg.device = str(model.backbone.device)
    attention = backbone.config._attn_implementation
    adapter.prepare_model(hf)  # may ask for another attention kernel, whose bits are not the model's
    backbone.config._attn_implementation = attention
    tokenizer = copy.deepcopy(model.tokenizer)
    if tokenizer is not None:  # TransformerLens would load another one, with other special tokens
        starts, ends = detect_tokenizer_bos_eos(tokenizer)
        adapter.cfg.default_prepend_bos = adapter.cfg.tokenizer_prepends_bos = starts
        adapter.cfg.tokenizer_appends_eos = ends
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    blocks: Any = (adapter.component_mapping or {})["blocks"]
    blocks.hook_aliases = {k: v for k, v in blocks.hook_aliases.items() if k != "hook_resid_mid"}
    for site in OWN:
        setattr(blocks, f"hook_{site}", HookPoint())
    return Twin(hf, backbone, adapter, tokenizer)


def same_weights(model: nn.Module) -> nn.Module:
    """A copy of a model's modules with the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
