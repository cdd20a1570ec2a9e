"""TransformerLens' Jacobian lens on a model that iterates: fitted and read in every iteration.

    lenses = fit_lenses(model, texts, iterations=4)
    readouts = read_lenses(model, lenses, "The sky is", iterations=4)
    readouts[1].top_tokens(model.tokenizer)                # iteration 2

A `JacobianLens` has one matrix per layer: the mean derivative of the last layer's output by this layer's. Its
own `fit` takes one pass, without iterations. Here lens i is of iteration i (as in arXiv 2609.01924): J is the
mean over sources t of the sum over targets t' >= t of
d y(last layer, last iteration, t') / d y(layer, iteration i, t), through the stream, position after position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.tools.analysis import JacobianLens
from transformer_lens.tools.analysis.jacobian_lens import JacobianLensReadout

from sst_interp.bridges import bridge
from sst_interp.errors import SSTError
from sst_interp.models.choices import check_iterations, whole
from sst_interp.models.hooks import Site, Visit
from sst_interp.models.model import Prompt, Prompts, StateStreamModel, listed
from sst_interp.models.solvers.sequential import advance


def fit_lenses(
    model: StateStreamModel,
    prompts: Prompts,
    iterations: int = 1,
    length: int = 64,
    skip: int = 4,
    dim_batch: int = 8,
) -> list[JacobianLens]:
    """A lens per iteration, the first for iteration 1.

    It differentiates through every position, one after the other: for short texts or small models.

    Args:
        prompts: texts or token ids; those without a source position are left out.
        iterations: depth of every position; the target is the last one's output.
        length: tokens of each text that are read.
        skip: positions at the start that are no sources and no targets; the last position is none, either.
        dim_batch: output dimensions that are differentiated at once.

    Raises:
        SSTError: no text is long enough.
    """
    (iterations,), b = check_iterations([iterations]), model.backbone
    length, skip, dim_batch = (
        whole(name, value, low)
        for name, value, low in (("length", length, 2), ("skip", skip, 0), ("dim_batch", dim_batch, 1))
    )
    rows = [model.encode(prompt)[:length] for prompt in listed(prompts)]
    rows = [row for row in rows if len(row) > skip + 1]
    if not rows:
        raise SSTError(f"no text has more than {skip + 1} tokens", "give longer texts, or a smaller skip")
    sums: list[dict[int, Tensor]] = [{} for _ in range(iterations)]
    for row in rows:
        for (iteration, layer), jacobian in _jacobians(model, row, iterations, skip, dim_batch).items():
            if layer < b.n_layers - 1:
                held = sums[iteration - 1]
                held[layer] = held.get(layer, 0) + jacobian / len(rows)
    about = {"model_name": bridge(model).cfg.model_name, "iterations": iterations, "kind": model.kind.name}
    return [
        JacobianLens(of, n_prompts=len(rows), d_model=b.d_model, metadata=about | {"iteration": number})
        for number, of in enumerate(sums, 1)
    ]


def _jacobians(
    model: StateStreamModel, row: list[int], iterations: int, skip: int, dim_batch: int
) -> dict[tuple[int, int], Float[Tensor, "d_model d_model"]]:
    """By (iteration, layer), of one text."""
    width, outputs = model.backbone.d_model, {}

    def hook(position: int, iteration: int) -> Visit:
        def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
            if site == "resid_pre" and not tensor.requires_grad:
                tensor.requires_grad_()  # the embedding: weights may be frozen
            if site == "resid_post":
                outputs[iteration, layer, position] = tensor
            return tensor

        return visit

    found: dict[tuple[int, int], Tensor] = {}
    at = range(skip, len(row) - 1)
    tokens = model.batch([row])[0].expand(min(dim_batch, width), -1)
    with torch.enable_grad():
        stream = model.new_stream(torch.zeros_like(tokens[:, 0]), len(row))
        for position in range(len(row)):
            advance(model, stream, tokens[:, position], iterations, lambda i, t=position: hook(t, i))
        last = model.backbone.n_layers - 1
        target = torch.cat([outputs[iterations, last, t] for t in at], dim=1)
        sources = [key for key in outputs if key[2] in at]
        for begin in range(0, width, len(tokens)):
            wanted = torch.zeros_like(target)
            these = torch.arange(begin, min(begin + len(tokens), width), device=target.device)
            wanted[these - begin, :, these] = 1
            inputs = [outputs[key] for key in sources]
            gradients = torch.autograd.grad(target, inputs, wanted, retain_graph=True, allow_unused=True)
            for (iteration, layer, _), gradient in zip(sources, gradients, strict=True):
                held = found.setdefault((iteration, layer), torch.zeros(width, width))
                if gradient is not None:
                    held[these.cpu()] += gradient[: len(these), 0].detach().float().cpu() / len(at)
    return found


def read_lenses(
    model: StateStreamModel,
    lens: JacobianLens | Sequence[JacobianLens],
    prompt: Prompt,
    iterations: int = 1,
    **how: Any,
) -> list[JacobianLensReadout]:
    """TransformerLens' `lens.readout` of one text in every iteration.

    Args:
        lens: one for all iterations (of the plain backbone, for example), or one per iteration.
        how: `layers`, `positions`, `use_jacobian`, `top_k`, `return_full_logits`, as for `readout`.

    Returns:
        A readout per iteration. Its last layer is what the model would say if it stopped there.

    Raises:
        SSTError: several texts, or a list of another length than the depth.
    """
    shown = bridge(model)
    tokens = model.batch(prompt)[0]
    if len(tokens) != 1:
        raise SSTError("a readout is of one text", "read them one by one")
    (iterations,) = check_iterations([iterations])
    lenses = [lens] * iterations if isinstance(lens, JacobianLens) else list(lens)
    if len(lenses) != iterations:
        raise SSTError(f"{len(lenses)} lenses for {iterations} iterations", "give one, or one per iteration")
    wanted = [f"blocks.{layer}.hook_out" for layer in range(model.backbone.n_layers)]
    logits, caches = shown.run_with_caches(tokens, iterations, lambda name: name in wanted)
    readouts = []
    for i, cache in enumerate(caches):
        if i:  # layers that do not run again have what they had
            cache.cache_dict = {**caches[i - 1].cache_dict, **cache.cache_dict}
        vars(shown)["run_with_cache"] = lambda *_, i=i, **__: (logits[i], caches[i])
        try:
            readouts.append(lenses[i].readout(shown, tokens, **how))
        finally:
            del vars(shown)["run_with_cache"]
    return readouts
