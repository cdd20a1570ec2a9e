"""The model as a TransformerLens `TransformerBridge`, with hooks and caches for every iteration.

    bridge = model.bridge()
    bridge.run_with_hooks(tokens, iterations=4, fwd_hooks=[
        ("blocks.12.hook_resid_post", bridge.at(fn, iteration=2, position=5)),
    ])
    logits, caches = bridge.run_with_caches(tokens, iterations=4)

In TransformerLens' own adapters for models that loop, a cache holds the final step. This bridge runs the pass
of `sst_interp.models.stream` on a twin of the backbone and fires the hook points in it, so it knows the
iteration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    detect_tokenizer_bos_eos,
)

from sst_interp.bridges.parallel_hooks import (
    Method,
    NamesFilter,
    read_in_parallel,
    read_sequentially,
    refuse_options,
)
from sst_interp.errors import SSTError, unknown_name
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import check_iterations, whole
from sst_interp.models.generation import Generation, generate
from sst_interp.models.hooks import SITES, Hook, Site, Visit, alike
from sst_interp.models.model import Prompts, StateStreamModel
from sst_interp.models.stream import Recurrence, stack_pass

OWN = ("resid_mid", "stream_state", "resid_blended")
"""Sites with hook points of their own. TransformerLens' `hook_resid_mid` is the input of `ln2`: here that
comes after the blend, and a change there would reach the FFN and not the residual."""

Input = Prompts
"""Token ids [row, position] or [position], a text, or several of either."""


@dataclass(frozen=True)
class Now:
    """The iteration that runs, and the first position of its pass."""

    iteration: int
    position: int


@dataclass
class Placed:
    """`fn(tensor, hook)` at one iteration, or position, or both; None means everywhere.

    With a position, `fn` gets that position alone, [row, 1, ...], however many a pass reads.
    """

    bridge: StateStreamBridge
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
        """The hook that TransformerLens calls."""
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
        """Raise SSTError if it was never called."""
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
) -> tuple[dict[str, HookPoint], dict[str, tuple[str | int, ...]]]:
    """The hook points that fire in two iterations, and their shapes, as ("row", "position", 576).

    The passes also note which axis has the positions: this backbone's attention may differ from
    TransformerLens' own.

    Args:
        positions: a number that is the size of no other axis before d_head.
        hook: fires the points of the sites.
        unembed: fires the points behind the layers.
    """
    fired: dict[HookPoint, tuple[str | int, ...]] = {}
    handles = []
    for point in set(points.values()):

        def note(_module: Any, _args: Any, out: Any, point: HookPoint = point) -> None:
            if point.pos_dim is not None:
                point.pos_dim = list(out.shape).index(positions)
            seen = out if point.hook_conversion is None else point.hook_conversion.convert(out)
            names: dict[int, str] = {0: "row", point.pos_dim or 1: "position"}
            fired[point] = tuple(names.get(at) or size for at, size in enumerate(seen.shape))

        handles.append(point.register_forward_hook(note))
    device = model.backbone.device
    stream = model.new_stream(torch.zeros(1, dtype=torch.long, device=device), positions)
    columns = torch.arange(positions, device=device)
    states = stream.state[:, :, None].expand(-1, -1, positions, -1)
    for number in (1, 2):
        there = model.kind.has_state(columns, stream.origin[:, None], number)
        tokens = columns[None] * 0
        visit = hook(0, number)
        y, states = stack_pass(model, stream, tokens, columns, states, there, "write", visit, number)
    unembed(y[-1][:, :, None])
    for handle in handles:
        handle.remove()
    here = {name: point for name, point in points.items() if point in fired}
    return here, {name: fired[point] for name, point in here.items()}


def twin_of(model: StateStreamModel) -> tuple[nn.Module, Backbone, Any, Any]:
    """A twin with the same weights for TransformerLens: its module, backbone, adapter and tokenizer.

    The backbone is validated before TransformerLens replaces some layers. Raises SSTError if TransformerLens
    has no adapter for the family.
    """
    weights = {id(p): p for p in model.backbone.model.parameters()}
    hf: Any = copy.deepcopy(model.backbone.model, weights)  # new modules with the very same parameters
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
    return hf, backbone, adapter, tokenizer


class StateStreamBridge(TransformerBridge):
    """A `TransformerBridge` whose forward is the state stream's.

    Beside the standard names there are `blocks.{l}.hook_stream_state` and `blocks.{l}.hook_resid_blended`.
    Attention runs as the backbone runs it, so points inside it (`hook_pattern`, `hook_attn_scores`) do not
    fire, and asking for them is an error.
    """

    def __init__(self, model: StateStreamModel) -> None:
        hf, backbone, adapter, tokenizer = twin_of(model)
        super().__init__(hf, adapter, tokenizer)
        self.state_stream, self._twin = model, backbone
        self.now = Now(1, 0)
        """Where the values come from that hooks are called with."""
        norms: list[Any] = [self.ln_final]
        for index, block in enumerate(self.blocks):
            layer = backbone.layers[index]
            before = {"norm1": "ln1", "norm2": "ln2"}  # OLMo 2 norms after its branches alone
            own = [ours for ours in before if not isinstance(getattr(layer, ours), nn.Identity)]
            theirs = {ours: getattr(block, before[ours]) for ours in own}
            norms += theirs.values()
            backbone.layers[index] = replace(layer, **theirs)
        for norm in norms:
            norm.use_native_layernorm_autograd = True  # the backbone's own numbers, unless a hook edits them
        self._passes = copy.copy(backbone)
        """For passes: a memory that is taken after the final norm is not a logit, and fires no hook there."""
        backbone.final_norm = self.ln_final
        named = self.hook_dict
        self._points: list[dict[Site, HookPoint]] = [
            {site: named[f"blocks.{layer}.hook_{site}"] for site in SITES}
            for layer in range(backbone.n_layers)
        ]
        self.firing, self.shapes = firing(
            self._hooked(), self.hook_dict, self.cfg.n_heads + 1, self._hook, self._logits
        )
        """Name -> hook point that fires (`hook_dict` also has those that do not), and name -> its shape."""

    def forward(
        self,
        input: Input,
        iterations: int = 1,
        method: Method = "parallel",
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        **others: Any,
    ) -> Any:
        """Read tokens at a depth; the logits [row, position, vocab] or loss are the last iteration's.

        Raises:
            SSTError: TransformerLens' options for parts of a forward pass, which a recurrence lacks.
        """
        refuse_options(others)
        tokens = self._tokens(input)
        logits = self._read(tokens, iterations, method)[-1]
        return self._finalize_return(return_type, logits, tokens, loss_per_token=loss_per_token)

    def run_with_caches(
        self,
        input: Input,
        iterations: int = 1,
        names_filter: NamesFilter = None,
        method: Method = "parallel",
    ) -> tuple[list[Float[Tensor, "row position vocab"]], list[ActivationCache]]:
        """(logits, caches), one of each per iteration; see `sst_interp.bridges.run_with_cache`."""
        with Collector(self, names_filter) as collected:
            logits = self._read(self._tokens(input), iterations, method)
        return logits, collected.caches(len(logits))

    def run_with_cache(
        self,
        input: Input,
        names_filter: NamesFilter = None,
        remove_batch_dim: bool = False,
        iterations: int = 1,
        method: Method = "parallel",
        **others: Any,
    ) -> tuple[Any, ActivationCache]:
        """TransformerLens' method: logits and cache of the last iteration. `run_with_caches` has all."""
        refuse_options(others)
        logits, caches = self.run_with_caches(input, iterations, names_filter, method)
        return logits[-1], caches[-1].remove_batch_dim() if remove_batch_dim else caches[-1]

    def run_with_hooks(self, input: Input, fwd_hooks: Sequence[Any] = (), **how: Any) -> Any:
        """TransformerLens' method, with `iterations` and `method` of `forward`.

        Raises:
            SSTError: a hook of `at` that was never called.
        """
        if how.get("bwd_hooks"):
            raise SSTError("backward hooks do not run: the pass records no gradients", "leave bwd_hooks out")
        placed = [hook for _, hook in fwd_hooks if isinstance(hook, Placed)]
        for hook in placed:
            hook.calls = 0
        out = super().run_with_hooks(input, fwd_hooks=list(fwd_hooks), **how)
        for hook in placed:
            hook.refuse_unused()
        return out

    def at(
        self, fn: Callable[..., Any], *, iteration: int | None = None, position: int | None = None
    ) -> Placed:
        """`fn(tensor, hook)` at one iteration, or position, or both."""
        return Placed(self, fn, iteration, position)

    def generate(
        self,
        input: Input,
        iterations: int = 1,
        max_new_tokens: int = 64,
        stop_tokens: Sequence[int] | None = None,
        **others: Any,
    ) -> Generation:
        """Greedy generation at a depth; hooks fire at every generated position, [row, 1, d_model].

        The prompt is read without hooks. Hooks at `ln_final` and `unembed` see all positions at the end and
        change nothing.
        """
        refuse_options(others)
        (iterations,) = check_iterations([iterations])
        model, last, hooked = self.state_stream, [], self._hooked()
        tokens, pad = model.batch(input)
        hooked.backbone.unembed = model.backbone.unembed
        out = generate(
            hooked, tokens, pad, [iterations] * len(pad), max_new_tokens,
            model.endings(stop_tokens),
            observe=lambda step: last.append(torch.stack([it.resid_post[-1] for it in step.iterations], 1)),
            hook=self._hook,
        )  # fmt: skip
        self._logits(torch.stack(last, 1))
        if model.tokenizer is not None:
            out.texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.tokens]
        return out

    def generate_with_caches(
        self, input: Input, names_filter: NamesFilter = None, **how: Any
    ) -> tuple[Generation, list[ActivationCache]]:
        """The result of `generate`, and a cache per iteration whose positions are the generated ones."""
        with Collector(self, names_filter) as collected:
            out = self.generate(input, **how)
        return out, collected.caches(max(out.iterations))

    def read_with_caches(
        self,
        prompt: str | Sequence[int],
        tokens: Sequence[int],
        iterations: int = 1,
        names_filter: NamesFilter = None,
    ) -> tuple[list[Float[Tensor, "row position vocab"]], list[ActivationCache]]:
        """Read the tokens after a prompt, position by position: (logits, caches) per iteration. Position 0
        reads the prompt's last token. The last of `tokens` was emitted and is not read.
        """
        (iterations,) = check_iterations([iterations])
        model = self.state_stream
        ids, pad = model.batch([prompt])
        stream = model.new_stream(pad, ids.shape[1] + len(tokens) - 1)
        model.prefill(stream, ids[:, :-1])
        read = torch.cat([ids[:, -1:], ids.new_tensor(list(tokens[:-1])).view(1, -1)], dim=1)
        with Collector(self, names_filter) as collected:
            logits = self._logits(read_sequentially(self._hooked(), read, iterations, self._hook, stream))
        return logits, collected.caches(iterations)

    def _tokens(self, input: Input) -> Tensor:
        tokens, pad = self.state_stream.batch(input)
        if bool(pad.any()):
            raise SSTError("prompts of different length have no common positions", "run them one by one")
        return tokens

    def _read(self, tokens: Tensor, iterations: int, method: Method) -> list[Tensor]:
        (iterations,) = check_iterations([iterations])
        if method == "parallel":
            last = read_in_parallel(self.state_stream, self._hooked(), tokens, iterations, self._hook)
        elif method == "sequential":
            last = read_sequentially(self._hooked(), tokens, iterations, self._hook)
        else:
            raise SSTError(f"unknown method {method!r}", "use 'parallel' or 'sequential'")
        return self._logits(last)

    @torch.no_grad()
    def _logits(self, last: Float[Tensor, "row position iteration d_model"]) -> list[Tensor]:
        logits = []
        for i in range(last.shape[2]):
            self.now = Now(i + 1, 0)
            logits.append(self._twin.unembed(last[:, :, i].contiguous()))
        return logits

    def _hooked(self) -> Recurrence:
        return Recurrence(copy.copy(self._passes), self.state_stream.kind, self.state_stream.choices)

    def _hook(self, position: int, iteration: int) -> Visit:
        self.now = Now(iteration, position)
        return self._visit

    def _visit(self, site: Site, layer: int, tensor: Tensor) -> Tensor:
        point = self._points[layer][site]
        return alike(point(tensor.clone()), tensor, str(point.name)) if point._forward_hooks else tensor

    def _check_hook_fireable(self, *names: str) -> None:
        """Raise SSTError for a hook that would never be called."""
        if names[-1] in self.hook_dict and names[-1] not in self.firing:
            raise SSTError(
                f"{names[0]} does not fire: attention and FFN run as the backbone runs them",
                "`bridge.firing` has the names of those that do",
            )


def _backbone_only(name: str) -> Callable[..., Any]:
    def method(self: StateStreamBridge, *_args: Any, **_kwargs: Any) -> Any:
        raise SSTError(
            f"{name} works on the backbone alone, without its stream",
            "boot a TransformerBridge on a copy of `model.backbone.model` for that",
        )

    method.__doc__ = "Not with a state stream: it would run or change the backbone alone."
    return method


for _name in ("enable_compatibility_mode", "process_weights", "generate_stream", "hf_generate"):
    setattr(StateStreamBridge, _name, _backbone_only(_name))


class Collector:
    """Records hook points while a bridge runs.

    Args:
        names_filter: which hook points; every name must exist and fire.

    Raises:
        SSTError: a filter that matches nothing.
    """

    def __init__(self, bridge: StateStreamBridge, names_filter: NamesFilter = None) -> None:
        self.bridge, points = bridge, bridge.firing
        if names_filter is None or callable(names_filter):
            names = [name for name in points if names_filter is None or names_filter(name)]
        else:
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            for name in names:
                if name not in bridge.hook_dict:
                    raise unknown_name("hook point", name, points)
                bridge._check_hook_fireable(name)
        if not names:
            raise SSTError("the names filter matches no hook point", "`bridge.firing` has their names")
        self._names: dict[int, list[str]] = {}
        self._points: dict[int, HookPoint] = {}
        for name in names:  # aliases are several names of one point
            self._names.setdefault(id(points[name]), []).append(name)
            self._points[id(points[name])] = points[name]
        self._seen: dict[int, dict[int, dict[int, Tensor]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        for key, point in self._points.items():
            self._handles.append(point.register_forward_hook(self._keeper(key, point)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def caches(self, iterations: int) -> list[ActivationCache]:
        """One cache per iteration, positions in order.

        Raises:
            SSTError: nothing that the filter names has run (at depth 1, a state read from iteration 2 on).
        """
        if not self._seen:
            named = ", ".join(names[0] for names in self._names.values())
            raise SSTError(f"nothing ran at {named} in {iterations} iteration(s)", "read it deeper")
        caches = []
        for iteration in range(1, iterations + 1):
            tensors: dict[str, Tensor] = {}
            for key, pieces in self._seen.get(iteration, {}).items():
                parts, axis = [pieces[first] for first in sorted(pieces)], self._points[key].pos_dim or 1
                joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
                tensors |= dict.fromkeys(self._names[key], joined)
            caches.append(ActivationCache(tensors, self.bridge))
        return caches

    def _keeper(self, key: int, point: HookPoint) -> Any:
        def keep(_module: Any, _args: Any, tensor: Any) -> None:
            if not isinstance(tensor, Tensor):
                return
            if point.hook_conversion is not None:
                tensor = point.hook_conversion.convert(tensor)
            now = self.bridge.now
            # A repeated pass overwrites the earlier values.
            self._seen.setdefault(now.iteration, {}).setdefault(key, {})[now.position] = tensor.detach()

        return keep
