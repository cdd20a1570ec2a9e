"""The model in TransformerLens and nnsight, with the iteration axis that they lack.

Both record one value per hook point. Of a model that iterates they keep the last; here every iteration has
its own. Each tool is imported when it is first asked for, because nnsight patches torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sst_interp.bridges.parallel_hooks import Method, NamesFilter, refuse_options
from sst_interp.errors import SSTError, check_known, unknown_name
from sst_interp.experiments.origin import origin_of, written_tokens
from sst_interp.experiments.probe.saved import load_probe
from sst_interp.models.choices import MAX_DEPTH, whole
from sst_interp.models.halting import Convergence, Entropy, HaltingPolicy, OutputChange, Threshold
from sst_interp.models.hooks import Record
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.runs.provenance import prompt_tokens
from sst_interp.runs.run import Run

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from sst_interp.bridges.nnsight import StateStreamNNsight
    from sst_interp.bridges.transformer_lens import StateStreamBridge

BEFORE_NNSIGHT = ("anyio.abc._sockets", "anyio.streams.file", "anyio.streams.tls")
"""Modules of Jupyter and web clients. They cannot be imported after nnsight, which patches every object."""
POLICIES: dict[str, type[Threshold]] = {
    "convergence": Convergence,
    "output_change": OutputChange,
    "entropy": Entropy,
}
"""Halting policies by the name that a command line gives."""


def bridge(model: StateStreamModel) -> StateStreamBridge:
    """The model as a TransformerLens `TransformerBridge`. It shares the weights, and is made once."""
    if "_bridge" not in vars(model):
        vars(model)["_bridge"] = _tool("transformer_lens").StateStreamBridge(model)
    return vars(model)["_bridge"]


def run_with_cache(
    model: StateStreamModel,
    prompts: str | Sequence[Any] | Tensor,
    iterations: int = 1,
    names_filter: NamesFilter = None,
    method: Method = "parallel",
    **others: Any,
) -> tuple[list[Tensor], list[ActivationCache]]:
    """Read given tokens and keep the values at every hook point, iteration by iteration.

    Args:
        prompts: token ids [row, position], a text, or several of one length.
        names_filter: TransformerLens names, as `blocks.3.hook_resid_mid`.
        method: `sequential` is the definition; `parallel` solves as `replay` does.
        others: TransformerLens' options. A recurrence supports none of them (`incl_bwd`: no gradients are
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
    return _tool("nnsight").StateStreamNNsight(model, iterations)


def hook_points(model: StateStreamModel) -> list[dict[str, Any]]:
    """Every point at which a value can be read or changed, in the order of the layers.

    Returns:
        A row per point: `name` in TransformerLens (None if it does not know the family), `site` of
        `sst_interp.models.hooks` (None for points inside attention and FFN), `layer`, `nnsight` (the path in
        a trace), `first_iteration` (from 1) and `shape`, as ["row", "position", 576]. An edit and nnsight see
        one position at a time.
    """
    record, lens = Record(), None
    model.generate([[0]], 2, 1, stop_tokens=[], edit=record)
    with suppress(SSTError):  # a family without an adapter, or no transformer-lens
        lens = bridge(model)
    first: dict[tuple[str, int], int] = {}
    for site, layer, _, iteration in record.kept:
        first.setdefault((site, layer), iteration)
    rows = []
    for (site, layer), iteration in first.items():
        name = f"blocks.{layer}.hook_{site}"
        path = f"iteration[i].layers[{layer}].{site}"
        shape = ["row", "position", model.backbone.d_model]
        rows.append({"name": name if lens is not None else None, "site": site, "layer": layer})
        rows[-1] |= {"nnsight": path, "first_iteration": iteration, "shape": shape}
    known = {row["name"] for row in rows}
    for name, shape in {} if lens is None else lens.shapes.items():
        if name not in known:
            parts = name.split(".")
            layer = int(parts[1]) if parts[0] == "blocks" else None
            rows.append({"name": name, "site": None, "layer": layer})
            rows[-1] |= {"nnsight": None, "first_iteration": 1, "shape": list(shape)}
    last = model.backbone.n_layers
    return sorted(rows, key=lambda row: last if row["layer"] is None else row["layer"])


def run_caches(
    run: Run,
    question: int,
    depth: int | None = None,
    text: str = "own",
    model: StateStreamModel | None = None,
    names_filter: NamesFilter = None,
) -> list[ActivationCache]:
    """Caches of a captured run's text, one per iteration: [1, generated position, ...].

    A run does not keep most of these values. So the question is taken from the run's dataset, and the tokens
    that the run wrote are read again at their depth, one after the other, as they were generated.

    Args:
        question: its index in the run.
        depth: iteration depth; None is the deepest.
        text: whose tokens are read: the depth's `own`, or `depth1`.
        model: the run's model, if it is loaded already; None loads what the recipe names.
        names_filter: which hook points, as for `run_with_cache`.

    Raises:
        SSTError: no such question, depth or text; the run keeps no tokens (its dataset is restricted); a
            model or dataset that is not the run's by its hash; a filter that matches nothing.
    """
    recipe = run.recipe
    question = whole("question", question, 0)
    depth = max(recipe.depths) if depth is None else whole("depth", depth, 1)
    tokens = written_tokens(run, question, 1 if text == "depth1" else depth, text)
    model, asked = origin_of(run, model)
    prompt = prompt_tokens(model, asked[question], recipe.reply_prefix)
    return bridge(model).read_with_caches(prompt, tokens, depth, names_filter)[1]


def run_cache(run: Run, question: int, iteration: int = 1, **how: Any) -> ActivationCache:
    """The cache of one iteration; `how` are the other arguments of `run_caches`."""
    iteration = whole("iteration", iteration, 1)
    caches = run_caches(run, question, **how)
    if iteration > len(caches):
        raise SSTError(f"there is no iteration {iteration}", f"this depth has 1 to {len(caches)}")
    return caches[iteration - 1]


def _tool(name: str) -> Any:
    """The module of a bridge, imported now."""
    try:
        return importlib.import_module(f"sst_interp.bridges.{name}")
    except ImportError as error:
        hint = "install sst-interp again: it brings a version that fits"
        raise SSTError(f"{name.replace('_', '-')} cannot be imported: {error}", hint) from error


def for_harness(
    checkpoint: str | StateStreamModel,
    iterations: int = 1,
    halting: str | None = None,
    threshold: float | None = None,
    deepest: int = 4,
    **how: Any,
) -> tuple[StateStreamModel, int | HaltingPolicy]:
    """The model that an evaluation harness asks for, and its depth, from options of a command line.

    Args:
        checkpoint: what `sst.load` takes, or a model in memory.
        iterations: depth of every position from the prompt's last token on.
        halting: instead of `iterations`: `convergence`, `output_change` or `entropy`, with a `threshold` and
            the `deepest` depth, or the folder of a trained probe, which brings its own.
        how: of `sst.load`. The device is a GPU if there is one.

    Raises:
        SSTError: an unknown model, policy or option; numbers that do not fit the policy.
    """
    check_known("option", how, [name for name in signature(load).parameters if name != "name"])
    if not isinstance(checkpoint, StateStreamModel):
        how.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        checkpoint = load(str(checkpoint), **how)
    elif how:
        raise SSTError(f"{', '.join(how)}: the model is loaded already", "give these to sst.load")
    if halting is None:
        if threshold is not None:
            raise SSTError("a threshold without a halting policy", "for example halting=convergence")
        return checkpoint, whole("iterations", iterations, 1, MAX_DEPTH)
    if iterations != 1:
        raise SSTError("both iterations and halting were given", "leave one of them out")
    if Path(halting).is_dir():
        if threshold is not None:
            raise SSTError("a probe has its own threshold", "leave the threshold out")
        policy: HaltingPolicy = load_probe(halting, checkpoint)
    elif halting == "exit_gate":
        policy = checkpoint.exit_gate(0.5 if threshold is None else threshold, deepest)
    elif halting not in POLICIES:
        known = [*POLICIES, "exit_gate", "the folder of a probe"]
        raise unknown_name("halting policy", halting, known)
    elif threshold is None:
        raise SSTError(f"halting = {halting} needs a threshold", "for example threshold=0.05")
    else:
        policy = POLICIES[halting](threshold, deepest)
    policy.check(checkpoint)
    return checkpoint, policy
