"""Exact training in parallel: states layer by layer, and their exact gradient by the same chain backwards.

A state returns to its own layer. So once attention has run, all m_t of a layer are known, and its states are
a chain through the FFN alone,

    y_t = G(m_t, y_(t-1)),   G(m, s) = u + FFN(norm2(u)),   u = (1 - alpha) m + alpha s.

The gradient lambda_t of the loss with respect to y_t is the same chain read backwards, and linear; the layers
above hand down g_t:

    lambda_t = g_t + (dG_(t+1) / ds)^T lambda_(t+1).

Both chains forget by a factor of about alpha (1 + gain) per link. So the chain is cut into segments that run
beside each other, each from a guess of the state before it (backwards: from nothing). Then the state that a
segment hands on replaces the guess, and the first links of the next segment are mended, one link per *sweep*,
until nothing moves. After as many sweeps as links all is exact.

The residual that `Solver` reports is what is still missing at the seams. The definition is `sequential`:
back-propagation through time. A stream whose state goes to another layer (LRT) cannot be solved so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Layer
from sst_interp.models.cache import Access, KeyValues
from sst_interp.models.choices import Choices
from sst_interp.models.kinds.sst import blend
from sst_interp.models.stream import Recurrence, attention_masks

SHORTEST = 8
"""Fewest links of a segment: a shorter one would be mended throughout."""
AT_ONCE = {"cpu": 128}
"""Links that are computed together, which is the number of segments, by device."""
AT_ONCE_ELSEWHERE = 2048  # a guess: no other device was measured


class Solved(NamedTuple):
    """How one layer's chain was solved, in one direction."""

    sweeps: int
    """Links of every segment that were computed again."""
    residual: Tensor | float
    """Error of the equations: relative, root mean square over all links."""


@dataclass
class Solver:
    """How chains are solved, and a record of how well each layer's were, in the order solved."""

    tolerance: float = 1e-3
    """Sweeps end once the residual is below it."""
    sweeps: tuple[int, int] | None = None
    """Exactly so many, forwards and backwards, instead of a tolerance (fewer where that is exact)."""
    remember: bool = True
    """Keep the graphs for the backward pass. False computes each layer again there: slower, less memory."""
    at_once: int | None = None
    """Links that are computed together; None lets the device decide."""
    states: list[Solved] = field(default_factory=list)
    adjoints: list[Solved] = field(default_factory=list)

    def line(self) -> dict[str, float]:
        """The worst layer's sweeps and residuals, forwards and backwards, for a log."""
        return {
            f"{way}_{name}": max(float(getattr(solved, name)) for solved in layers)
            for way, layers in (("state", self.states), ("adjoint", self.adjoints))
            for name in Solved._fields
            if layers
        }

    def settle(
        self, backwards: bool, most: int, gap: Callable[[int], Tensor], mend: Callable[[int], None]
    ) -> None:
        """Mend link after link until the gap that is left is small enough, and record both.

        Args:
            most: sweeps after which everything is exact.
            gap: the residual after so many sweeps.
            mend: the next sweep.
        """
        sweeps, last = 0, most if self.sweeps is None else min(most, self.sweeps[backwards])
        while True:
            residual: Tensor | float = gap(sweeps)
            if self.sweeps is None:  # the one place that waits for the device
                residual = float(residual)
            if sweeps == last or (self.sweeps is None and not self.tolerance <= residual < math.inf):
                break  # what overflows cannot be mended: the loss, or its gradient, is not finite either
            mend(sweeps)
            sweeps += 1
        (self.adjoints if backwards else self.states).append(Solved(sweeps, residual))


def exact_states(
    model: Recurrence,
    tokens: Int[Tensor, "row position"],
    solver: Solver,
    *,
    iterations: int = 1,
    pad: Int[Tensor, " row"] | None = None,
    origin: Int[Tensor, " row"] | None = None,
    until: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, "row position d_model"]:
    """The last layer's outputs at every position's last iteration, with their exact gradient.

    Args:
        solver: records this solution, and its backward pass when that has run.
        iterations: depth of every position.
        pad: columns of padding on the left; None: none.
        origin: first column that takes part in the recurrence; None: the first that is no padding.
        until: columns from here on are not computed, and their outputs mean nothing. None: all are.

    Raises:
        SSTError: the state does not return to its own layer.
    """
    if not model.kind.layer_by_layer:
        raise SSTError(
            f"a {model.kind.words} cannot be solved layer by layer: its state goes to another layer",
            'method = "sequential" is exact for every kind; "multi_refine" is its approximation',
        )
    backbone, choices, alpha = model.backbone, model.choices, model.alpha
    (rows, T), D, device = tokens.shape, iterations, tokens.device
    pad = torch.zeros(rows, dtype=torch.long, device=device) if pad is None else pad
    column = torch.arange(T, device=device)
    used = column >= pad[:, None]
    if until is not None:
        used &= column < until[:, None]
    start = (pad if origin is None else origin)[:, None]
    has_state = [model.kind.has_state(column, start, i) & used for i in range(1, D + 1)]
    links = lay_out(
        used.repeat_interleave(D, dim=1),
        torch.stack(has_state, dim=2).flatten(1),
        solver.at_once or AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE),
    )
    solver.states, solver.adjoints = [], []

    position_ids = (column - pad[:, None]).clamp(min=0)
    embedded = backbone.embed(tokens, position_ids)
    rotary = backbone.rotary(embedded, position_ids)
    # As in `layerwise`: what later positions attend to is written first, the rest stands beside it.
    kept = 0 if choices.kv == "first" else D - 1
    order = [kept, *(i for i in range(D) if i != kept)]
    other: Access = "read" if choices.kv == "first" else "beside"
    access: list[Access] = ["write" if i == kept else other for i in range(D)]
    masks = {way: attention_masks(backbone, pad, column, T, way, embedded.dtype) for way in set(access)}

    def after_attention(x: Tensor, layer: Layer) -> Tensor:
        kv, at, out = KeyValues(backbone.n_layers, T), x.unbind(2), [x] * D
        for i in order:
            view = kv.view(slice(0, T), T, access[i])
            branch = layer.attention_branch(at[i], rotary[layer.kind], masks[access[i]][layer.kind], view)
            out[i] = at[i] + branch
        return torch.stack(out, dim=2)

    x = embedded[:, :, None].expand(rows, T, D, -1)
    for index, layer in enumerate(backbone.layers):
        if solver.remember:
            m = after_attention(x, layer)
        else:
            m: Any = checkpoint(after_attention, x, layer, use_reentrant=False)
        chain = Chain(layer, choices, links, solver, torch.is_grad_enabled())
        x = _Solve.apply(m, alpha[index], chain, *chain.parameters)
    return x[:, :, -1]


class Links(NamedTuple):
    """The chains of all rows, one behind the other, cut into segments of equal length.

    Step `j` computes the `j`-th link of every segment.
    """

    at: Int[Tensor, "step segment"]
    """Each link's place in [row * position * iteration]."""
    back: Int[Tensor, " place"]
    """Each place's link in [step * segment]."""
    filler: Bool[Tensor, "step segment"]
    """Links behind the end of the last chain."""
    unused: Bool[Tensor, " place"]
    """Places that are no link."""
    linked: Bool[Tensor, "step segment"]
    """Links that read the state of the link before."""
    whole: list[bool]
    """Steps whose links are all linked."""
    longest: int
    """Links of the longest chain of a row, at most."""


def lay_out(used: Bool[Tensor, "row link"], has_state: Bool[Tensor, "row link"], at_once: int) -> Links:
    """Segments of the rows' chains; the used links of a row are neighbours."""
    places = used.flatten().nonzero()[:, 0]
    n = len(places)
    segments = max(1, min(at_once, n // SHORTEST))
    steps = -(-n // segments)
    numbers = torch.arange(steps * segments, device=used.device).view(segments, steps).T
    at, filler = places[numbers.clamp(max=n - 1)], numbers >= n
    linked = has_state.flatten()[at] & ~filler
    back = torch.zeros(used.numel(), dtype=torch.long, device=used.device)
    here = ~filler.flatten()
    back[at.flatten()[here]] = here.nonzero()[:, 0]
    return Links(at, back, filler, ~used.flatten(), linked, linked.all(1).tolist(), min(n, used.shape[1]))


class Chain:
    """One layer's chain: its states forwards (`solve`), their gradient backwards (`pull`)."""

    def __init__(self, layer: Layer, choices: Choices, links: Links, solver: Solver, learns: bool) -> None:
        self.layer, self.choices, self.links, self.solver = layer, choices, links, solver
        self.learns = learns and solver.remember
        modules = (layer.norm2, layer.ffn, layer.post_ffn_norm)
        self.parameters = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
        self.graphs: dict[int, tuple[list[Tensor], Tensor, Tensor]] = {}

    def link(self, step: int, m: Tensor, s: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """G: the outputs of a step's links, and what they hand on [segment, d_model]."""
        if not self.links.whole[step]:
            alpha = alpha * self.links.linked[step, :, None]
        u = blend(m, s, alpha, self.choices)
        ffn = self.layer.ffn_branch(u)
        y = u + ffn
        return y, ffn if self.choices.carry == "ffn_output" else y

    def graph(self, step: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """The inputs m, s, alpha of a step's links, y, and what they hand on, differentiable."""
        if step in self.graphs:
            return self.graphs[step]
        inputs = [t.detach().requires_grad_() for t in (self.m[step], self.s[step], self.alpha)]
        with torch.enable_grad():
            return inputs, *self.link(step, *inputs)

    def solve(
        self, m: Float[Tensor, "step segment d_model"], alpha: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "step segment d_model"]:
        """The layer's outputs y."""
        self.m, self.alpha, steps = m, alpha, len(m)
        self.s: list[Tensor] = [m[0]] * steps
        y: list[Tensor] = [m[0]] * steps
        linked, n = self.links.linked, self.links.linked.sum().clamp(min=1)

        def compute(step: int, s: Tensor) -> Tensor:
            self.s[step] = s
            self.graphs.pop(step, None)
            if self.learns:
                self.graphs[step] = self.graph(step)
                y[step], handed = (t.detach() for t in self.graphs[step][1:])
            else:
                y[step], handed = self.link(step, m[step], s, alpha)
            return handed

        # The first guess: what the link before hands on if it has no state itself.
        handed = self.link(steps - 1, m[-1], m[-1], torch.zeros_like(alpha))[1].roll(1, 0)
        for step in range(steps):
            handed = compute(step, handed)

        def gap(sweeps: int) -> Tensor:
            nonlocal handed
            step = sweeps % steps
            handed = handed.roll(1, 0) if step == 0 else handed
            new, old = _wide(handed), _wide(self.s[step])
            change = (new - old).square().sum(-1) / new.square().sum(-1).clamp(min=1e-30)
            return (torch.where(linked[step], change, 0).sum() / n).sqrt()

        def mend(sweeps: int) -> None:
            nonlocal handed
            handed = compute(sweeps % steps, handed)

        self.solver.settle(False, self.links.longest, gap, mend)
        return torch.stack(y)

    def pull(self, g: Float[Tensor, "step segment d_model"]) -> tuple[Tensor, ...]:
        """Gradients of m, alpha and the parameters, from that of y as the layers above hand it down."""
        steps, size = len(g), _wide(g).norm().clamp(min=1e-30)
        of_m: list[Tensor] = [g[0]] * steps
        rest = [torch.zeros_like(_wide(p)) for p in (self.alpha, *self.parameters)]

        def through(step: int, *gradients: Tensor | None) -> Tensor:
            """From the gradients of y and of what is handed on to that of the states that were read."""
            (m, s, alpha), *outputs = self.graph(step)
            given = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
            pulled = torch.autograd.grad(
                [o for o, _ in given], [m, s, alpha, *self.parameters], [g for _, g in given],
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            of_m[step] = pulled[0] if gradients[0] is not None else of_m[step] + pulled[0]
            for total, part in zip(rest, pulled[2:], strict=True):
                total += part
            return pulled[1]

        carried = torch.zeros_like(g[0])
        for step in reversed(range(steps)):
            carried = through(step, g[step], carried)

        def gap(sweeps: int) -> Tensor:
            nonlocal carried
            carried = carried.roll(-1, 0) if sweeps % steps == 0 else carried
            return _wide(carried).norm() / size

        def mend(sweeps: int) -> None:
            nonlocal carried
            carried = through(steps - 1 - sweeps % steps, None, carried)

        self.solver.settle(True, self.links.longest, gap, mend)
        self.graphs.clear()
        learned = (self.alpha, *self.parameters)
        return torch.stack(of_m), *(t.to(p.dtype) for t, p in zip(rest, learned, strict=True))


class _Solve(torch.autograd.Function):
    """A chain between tensors of [row, position, iteration, d_model]."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, alpha: Tensor, chain: Chain, *_parameters: Tensor) -> Tensor:
        ctx.chain, (at, back) = chain, chain.links[:2]
        flat = m.reshape(-1, m.shape[-1])
        y = chain.solve(flat[at], alpha)
        return y.flatten(0, 1)[back].view_as(m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        links = ctx.chain.links
        of_y = g.reshape(-1, g.shape[-1])[links.at].masked_fill_(links.filler[..., None], 0)
        of_m, of_alpha, *rest = ctx.chain.pull(of_y)
        of_m = of_m.flatten(0, 1)[links.back].masked_fill_(links.unused[:, None], 0)
        return of_m.view_as(g), of_alpha, None, *rest


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
