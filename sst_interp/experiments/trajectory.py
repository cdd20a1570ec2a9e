"""One position's pass through all layers and iterations as a graph; earlier positions are held.

    t = trajectory(model, texts, iterations=4, gradients=True)
    t.states[:, 12, 1]               # the output of layer 12 in iteration 2, of every text
    t.pull(t.output, directions)     # directions times the Jacobian from every cell to the output

A *cell* is a (layer, iteration) of the position. Everything here is about the last token of each text, which
is generated position 0; the texts before it are read at depth 1, as `model.generate` reads a prompt.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sst_interp.models.choices import check_iterations
from sst_interp.models.hooks import Site, Visit
from sst_interp.models.model import StateStreamModel
from sst_interp.models.prompts import Prompts
from sst_interp.models.solvers.sequential import advance


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Every cell of the last position of a batch of texts."""

    cells: list[list[Tensor]]
    """By layer, then iteration: the layer's output [row, 1, d_model], a node of the graph. A layer that does
    not run again keeps the node that it had."""
    output: Float[Tensor, "row d_model"]
    """What the last layer hands to the final norm in the last iteration."""

    @property
    def states(self) -> Float[Tensor, "row layer iteration d_model"]:
        """The cells as numbers."""
        return torch.stack([torch.stack([c[:, 0].detach() for c in row], 1) for row in self.cells], 1)

    def pull(
        self,
        of: Float[Tensor, "row d_model"],
        directions: Float[Tensor, "*many row d_model"],
        batched: bool = False,
    ) -> Float[Tensor, "*many row layer iteration d_model"]:
        """The vector-Jacobian product of `of` from every cell; zero where a cell does not reach it."""
        flat = list({id(cell): cell for row in self.cells for cell in row}.values())
        pulled = torch.autograd.grad(
            of, flat, directions, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        by_cell = {
            id(cell): cell.new_zeros(*directions.shape[:-1], 1, cell.shape[-1]) if g is None else g
            for cell, g in zip(flat, pulled, strict=True)
        }
        return torch.stack(
            [torch.stack([by_cell[id(c)][..., 0, :] for c in row], -2) for row in self.cells], -3
        )


def trajectory(
    model: StateStreamModel,
    texts: Prompts,
    iterations: int,
    gradients: bool = False,
    add: dict[tuple[int, int], Tensor] | None = None,
) -> Trajectory:
    """Read the texts up to their last tokens, and run these through all iterations.

    Args:
        texts: one or several, as for `model.replay`.
        iterations: depth of the last position.
        gradients: whether the cells and the output are one graph.
        add: (layer from 0, iteration from 1) -> what is added to that cell, [row, d_model].

    Raises:
        SSTError: an empty text, or iterations below 1.
    """
    (iterations,) = check_iterations([iterations])
    tokens, pad = model.batch(texts)
    stream = model.new_stream(pad, tokens.shape[1])
    model.prefill(stream, tokens[:, :-1])
    seen: dict[tuple[int, int], Tensor] = {}

    def hook(iteration: int) -> Visit:
        def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
            if site != "resid_post":
                return tensor
            if add is not None and (layer, iteration) in add:
                tensor = tensor + add[layer, iteration][:, None]
            if gradients and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            seen[layer, iteration] = tensor
            return tensor

        return visit

    exact = sdpa_kernel(SDPBackend.MATH) if gradients else nullcontext()  # the one with second derivatives
    with torch.set_grad_enabled(gradients), exact:
        done = advance(model, stream, tokens[:, -1], iterations, hook)
    for layer in range(model.backbone.n_layers):
        for iteration in range(2, iterations + 1):
            seen.setdefault((layer, iteration), seen[layer, iteration - 1])
    cells = [[seen[la, it] for it in range(1, iterations + 1)] for la in range(model.backbone.n_layers)]
    undamped = torch.equal(done[-1].resid_post[-1], cells[-1][-1][:, 0])
    return Trajectory(cells, cells[-1][-1][:, 0] if undamped else done[-1].resid_post[-1])


def identity(model: StateStreamModel) -> str:
    """sha256 of the backbone's weights, the stream and the choices: whose lens it is."""
    words = f"{model.backbone.content_hash}{model.kind.digest()}{model.choices}"
    return hashlib.sha256(words.encode()).hexdigest()
