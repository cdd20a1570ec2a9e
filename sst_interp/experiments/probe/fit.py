"""Many probes on one set of questions, trained together.

A *problem* is one fit: labels, questions to learn from, layer, number of dimensions, penalty. Problems with
the same layer and number of dimensions are trained together, and such groups are spread over the cores. The
result of a problem does not depend on the others or on the number of cores.

The two-layer probe, Adam with a rate that falls to 0, gradients written out (autograd's bookkeeping would
take longer than such small products):

    h     = relu(W z + b)            # `hidden` units on k standardised dimensions
    logit = u . h + c
    loss  = sum over questions of weight * cross-entropy(logit, y)  +  penalty / 2 * (|W|^2 + |u|^2)

Logistic regression, by accelerated proximal gradient steps (Beck & Teboulle 2009; restarted as O'Donoghue &
Candes 2015):

    logit = w . z + c
    loss  = sum over questions of weight * cross-entropy(logit, y)  +  penalty

`l2`: penalty = p * d / 2 * |w|^2 with d dimensions, so that p means the same for any width. `l1`: penalty =
p * |w|_1 * m with m the smallest for which all weights are 0; a dimension is read if its weight is not 0.

`weight` gives both classes the same total, so a logit above 0 says "more likely than the base rate". Inputs
are standardised, and the dimensions of a two-layer probe are chosen, on the problem's training questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError, unknown_name

Rows = Float[Tensor, "problem question"]
LabelRows = Float[Tensor, "row question"]
Kind = Literal["two_layer", "l2", "l1"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PENALTIES: dict[str, tuple[float, ...]] = {
    "two_layer": (0.003, 0.03, 0.1),
    "l2": (0.001, 0.01, 0.1),
    "l1": (0.1, 0.3, 0.6),
}
"""Candidates by kind."""
STEPS = {"two_layer": 30, "l2": 100, "l1": 100}
TOGETHER = 500_000
"""Numbers that one batched fit works on: as many as stay in a core's cache."""
MORE = 4
"""So many times larger are the batches of many two-layer problems: else two threads wait for each other."""

RATE = 0.1
"""Size of the first step; it falls to 0 linearly."""
BETA_1, BETA_2, EPSILON = 0.9, 0.99, 1e-8
POWER_STEPS = 12
"""Steps of the power iteration for the largest curvature."""
CONSTANT = 1e-6
"""Variances below this are rounding, where the variance over all questions is 1."""


@dataclass(frozen=True)
class Design:
    """A kind of probe and its candidates."""

    kind: Kind = "two_layer"
    """`two_layer`: the paper's, on a few dimensions. `l2`, `l1`: logistic regression on all dimensions."""
    layers: tuple[int, ...] = ()
    """Candidate layers; none: all."""
    dims: tuple[int, ...] = (4, 16, 64)
    """Candidate numbers of dimensions of a `two_layer` probe. The paper's reads 107 of 5,376."""
    penalties: tuple[float, ...] = ()
    """Candidate penalties; none: `PENALTIES` of the kind."""
    hidden: int = 10
    """Hidden units of a `two_layer` probe."""
    steps: int = 0
    """Full-batch steps of every fit; 0: `STEPS` of the kind."""
    blocks: int = 6
    """Parts the questions are divided into for choosing (`validate.choose`)."""
    seed: int = 0
    """Of initial weights, blocks, and the question of the other class that is left out."""
    leak: bool = False
    """Choose with the labels of held-out questions, too. Wrong on purpose: it shows what that would add."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of probe", self.kind, KINDS)
        if self.blocks < 3:
            raise SSTError(f"{self.blocks} blocks are too few to choose with", "at least 3, for example 6")
        if not self.dims or min(self.dims) < 1 or any(p < 0 for p in self.penalties) or self.hidden < 1:
            needs = "a probe needs at least one dimension, one hidden unit and penalties from 0 up"
            raise SSTError(needs, "the defaults of Design are a start")

    @property
    def candidate_penalties(self) -> tuple[float, ...]:
        """The penalties to choose from."""
        return self.penalties or PENALTIES[self.kind]

    @property
    def n_steps(self) -> int:
        """Steps of a fit."""
        return self.steps or STEPS[self.kind]

    def candidate_dims(self, d_model: int) -> tuple[int, ...]:
        """Numbers of dimensions to choose from, of `d_model`. A linear probe reads all."""
        if self.kind != "two_layer":
            return (d_model,)
        return tuple(sorted({min(k, d_model) for k in self.dims}))

    def candidate_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers to choose from, of `n_layers`."""
        return self.layers or tuple(range(n_layers))


class Inputs:
    """The states that all problems read: `[question, layer, d_model]`, preconditioned once per layer."""

    def __init__(self, states: Float[Tensor, "question layer d_model"]) -> None:
        self.n_questions, self.n_layers, self.d_model = states.shape
        parts = [precondition(states[:, layer]) for layer in range(self.n_layers)]
        self.x = [x.contiguous() for x, _, _ in parts]
        self.mean, self.scale = (torch.stack([part[i] for part in parts]) for i in (1, 2))


class Problems(NamedTuple):
    """Arrays of equal length, an entry per problem."""

    row: np.ndarray
    """Row of the label table."""
    use: np.ndarray
    """Questions to learn from, bool [problem, question]."""
    layer: np.ndarray
    dims: np.ndarray
    """Number of dimensions."""
    penalty: np.ndarray


class Fits(NamedTuple):
    """Probes in the order of the problems."""

    logits: Rows
    """Of all questions, those learnt from included."""
    read: list[Int[Tensor, " k"]]
    """Dimensions that each probe reads, the most separated first; empty without `keep`."""
    weights: list[tuple[Tensor, ...]]
    """Per problem: means, scales and weights; empty without `keep`."""


class Moments(NamedTuple):
    """Means and scales of every dimension over each problem's training questions."""

    mean: Float[Tensor, "problem d"]
    scale: Float[Tensor, "problem d"]
    """1 / standard deviation; 0 where the dimension is constant."""


class TwoLayer(NamedTuple):
    """Weights of many two-layer probes."""

    w: Float[Tensor, "problem hidden k"]
    b: Float[Tensor, "problem hidden"]
    u: Float[Tensor, "problem hidden"]
    c: Float[Tensor, " problem"]

    def logits(self, z: Float[Tensor, "problem k question"]) -> Rows:
        """Of standardised inputs."""
        h = torch.baddbmm(self.b[..., None], self.w, z).relu_()
        return torch.baddbmm(self.c[:, None, None], self.u[:, None], h)[:, 0]


class Linear(NamedTuple):
    """Weights of many logistic regressions, on standardised inputs."""

    w: Float[Tensor, "problem d"]
    c: Float[Tensor, " problem"]


@torch.no_grad()
def fit(design: Design, inputs: Inputs, labels: LabelRows, problems: Problems, keep: bool = False) -> Fits:
    """Fit every problem; labels are 0 or 1. `keep`: return the dimensions read and the weights, too."""
    n = len(problems.row)
    logits = torch.empty(n, inputs.n_questions)
    read: list[Tensor] = [torch.empty(0)] * n if keep else []
    weights: list[tuple[Tensor, ...]] = [()] * n if keep else []

    def one(where: np.ndarray) -> None:
        first = where[0]
        x, k = inputs.x[problems.layer[first]], int(problems.dims[first])
        y = labels[torch.from_numpy(problems.row[where])]
        use = torch.from_numpy(problems.use[where].astype(np.float32))
        penalty = torch.from_numpy(problems.penalty[where].astype(np.float32))
        own, weight = moments(x, use), balanced_weights(y, use)
        if design.kind == "two_layer":
            seen = torch.ones_like(use) if design.leak else use
            dims = separation(x, y, seen, own).topk(k, dim=1).indices
            z = gather(x, dims, own)
            out, params = train_two_layer(z, y, weight, penalty, design.hidden, design.n_steps, design.seed)
        else:
            l1, dims = design.kind == "l1", None
            out, params = train_logistic(x, *own, y, weight, penalty, l1, design.n_steps)
        logits[torch.from_numpy(where)] = out
        for i, problem in enumerate(where if keep else ()):
            read[problem] = dims[i] if dims is not None else params[0][i].nonzero()[:, 0]
            weights[problem] = (own.mean[i], own.scale[i], *(p[i] for p in params))

    with _spread() as pool:
        list(pool.map(one, _groups(problems, design, inputs)))
    return Fits(logits, read, weights)


def _groups(problems: Problems, design: Design, inputs: Inputs) -> Iterator[np.ndarray]:
    """Problems with the same layer and number of dimensions, as many at a time as go together."""
    key = problems.layer.astype(np.int64) * (1 << 32) + problems.dims
    order = np.argsort(key, kind="stable")
    ends = np.flatnonzero(np.diff(key[order])) + 1
    for group in np.split(order, ends) if len(order) else ():
        if design.kind == "two_layer":
            numbers = 2 * (design.hidden + int(problems.dims[group[0]])) * inputs.n_questions
        else:
            numbers = 4 * (inputs.n_questions + inputs.d_model)
        size = max(8, TOGETHER // numbers)
        if design.kind == "two_layer" and len(group) >= 2 * MORE * size:
            size *= MORE
        for start in range(0, len(group), size):
            yield group[start : start + size]


@contextmanager
def _spread() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, each with a core of its own: products this small do not gain from
    two cores, and a batch computed by one gives the same bits whatever the number.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)


def precondition(x: Float[Tensor, "question d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs centred and scaled by all questions: (x, mean [d], scale [d]). Constant dimensions become 0.

    It uses no label, and standardising in each fold undoes it. A few dimensions of a language model are
    thousands of times larger than the rest, too large for sums of squares in fp32.
    """
    wide = x.double()
    mean, sd = wide.mean(0), wide.std(0, correction=0)
    constant = sd <= 1e-6 * wide.abs().amax(0)
    scale = torch.where(constant, 0.0, 1 / sd.clamp_min(torch.finfo(torch.float64).tiny))
    return ((wide - mean) * scale).float(), mean.float(), scale.float()


def moments(x: Float[Tensor, "question d"], use: Rows) -> Moments:
    """Over the questions in `use` (1 or 0)."""
    n = use.sum(-1, keepdim=True).clamp_min(1)
    mean = use @ x / n
    variance = use @ x.square() / n - mean.square()
    return Moments(mean, torch.where(variance > CONSTANT, variance.clamp_min(CONSTANT).rsqrt(), 0.0))


def separation(
    x: Float[Tensor, "question d"], y: Rows, use: Rows, own: Moments
) -> Float[Tensor, "problem d"]:
    """Distance of the classes' means in standard deviations: it ranks dimensions as a two-sample t test does.
    0 where the dimension is constant.
    """
    n1 = (use * y).sum(-1, keepdim=True)
    n0 = use.sum(-1, keepdim=True) - n1
    ones = (use * y) @ x / n1.clamp_min(1)
    gap = (ones - own.mean).abs() * (n1 + n0) / n0.clamp_min(1)
    return gap * own.scale * ((n1 > 0) & (n0 > 0))


def gather(
    x: Float[Tensor, "question d"], dims: Int[Tensor, "problem k"], own: Moments
) -> Float[Tensor, "problem k question"]:
    """The chosen dimensions of all questions, standardised."""
    mean, scale = own.mean.gather(1, dims), own.scale.gather(1, dims)
    return (x.T[dims] - mean[..., None]) * scale[..., None]


def balanced_weights(y: Rows, use: Rows) -> Rows:
    """Each class weighs one half (a class alone: 1), questions not in `use` nothing."""
    ones, zeros = use * y, use * (1 - y)
    n1, n0 = ones.sum(-1, keepdim=True), zeros.sum(-1, keepdim=True)
    share = torch.where((n1 > 0) & (n0 > 0), 0.5, 1.0)
    return share * (ones / n1.clamp_min(1) + zeros / n0.clamp_min(1))


def train_two_layer(
    z: Float[Tensor, "problem k question"],
    y: Rows,
    weight: Rows,
    penalty: Float[Tensor, " problem"],
    hidden: int = 10,
    steps: int = 30,
    seed: int = 0,
) -> tuple[Rows, TwoLayer]:
    """One two-layer probe per problem, from the same initial weights: logits of all questions, and weights.

    z is standardised, y is 0 or 1; questions of weight 0 (`balanced_weights`) are not learnt from.
    """
    problems, k, questions = z.shape
    z = torch.cat([z, z.new_ones(problems, 1, questions)], 1)  # a constant input carries the bias
    zt, wide = z.transpose(1, 2), k + 1
    n_w, n_u = problems * hidden * wide, problems * hidden

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W, u and c in a row of all weights, so that a step of Adam is a few operations."""
        w, u, c = x[:n_w], x[n_w : n_w + n_u], x[n_w + n_u :]
        return w.view(problems, hidden, wide), u.view(problems, 1, hidden), c.view(problems, 1, 1)

    theta, gradient, first, second, size, decay = (z.new_zeros(n_w + n_u + problems) for _ in range(6))
    (w, u, c), (to_w, to_u, to_c), (decay_w, decay_u, _) = map(parts, (theta, gradient, decay))
    start = _start(k, hidden, seed).to(z)
    w.copy_(start[: hidden * wide].view(hidden, wide))
    u.copy_(start[hidden * wide : -1])
    decay_w[..., :k], decay_u[:] = penalty.to(z)[:, None, None], penalty.to(z)[:, None, None]
    h, error = z.new_empty(problems, hidden, questions), z.new_empty(problems, 1, questions)
    back = torch.empty_like(h)
    ht, u_column, y, weight = h.transpose(1, 2), u.transpose(1, 2), y[:, None], weight[:, None]
    mask = torch.ops.aten.threshold_backward.grad_input
    for step in range(steps):
        torch.bmm(w, z, out=h).relu_()
        torch.baddbmm(c, u, h, out=error).sigmoid_().sub_(y).mul_(weight)
        torch.bmm(error, ht, out=to_u)
        torch.sum(error, -1, keepdim=True, out=to_c)
        torch.mul(u_column, error, out=back)
        mask(back, h, 0, grad_input=back)  # back where h > 0; multiplying by a mask takes ten times as long
        torch.bmm(back, zt, out=to_w)
        gradient.addcmul_(decay, theta)
        first.lerp_(gradient, 1 - BETA_1)
        second.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        torch.sqrt(second, out=size).mul_((1 - BETA_2 ** (step + 1)) ** -0.5).add_(EPSILON)
        rate = RATE * (1 - step / steps) / (1 - BETA_1 ** (step + 1))
        theta.addcdiv_(first, size, value=-rate)
    trained = TwoLayer(w[..., :k].clone(), w[..., k].clone(), u[:, 0].clone(), c[:, 0, 0].clone())
    return torch.baddbmm(c, u, torch.bmm(w, z, out=h).relu_())[:, 0], trained


def _start(k: int, hidden: int, seed: int) -> Tensor:
    """Initial weights of one problem as a row: half He's size, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.5 * (2 / (k + 1)) ** 0.5 * torch.randn(hidden, k + 1, generator=generator)
    w[:, k] = 0
    u = 0.5 * hidden**-0.5 * torch.randn(hidden, generator=generator)
    return torch.cat([w.flatten(), u, torch.zeros(1)])


def train_logistic(
    x: Float[Tensor, "question d"],
    mean: Float[Tensor, "problem d"],
    scale: Float[Tensor, "problem d"],
    y: Rows,
    weight: Rows,
    penalty: Float[Tensor, " problem"],
    l1: bool = False,
    steps: int = 100,
) -> tuple[Rows, Linear]:
    """One logistic regression per problem: logits of all questions, and weights.

    mean and scale are the `Moments` of the training questions; y is 0 or 1; penalties are relative.
    """

    def forward(w: Tensor, c: Tensor) -> Tensor:
        scaled = w * scale
        return torch.addmm((c - (scaled * mean).sum(-1))[:, None], scaled, x.T)

    def gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
        error = (logits.sigmoid() - y) * weight
        total = error.sum(-1)
        return scale * (error @ x - total[:, None] * mean), total

    w, c = torch.zeros_like(mean), torch.zeros_like(penalty)
    ridge, threshold = torch.zeros_like(penalty), torch.zeros_like(penalty)
    if l1:
        threshold = penalty * gradient(forward(w, c))[0].abs().amax(-1)
    else:
        ridge = penalty * x.shape[1]
    step = 1 / (_curvature(x, mean, scale, weight) + ridge)
    ahead_w, ahead_c, momentum = w, c, torch.ones_like(penalty)
    for _ in range(steps):
        to_w, to_c = gradient(forward(ahead_w, ahead_c))
        new_w = ahead_w - step[:, None] * (to_w + ridge[:, None] * ahead_w)
        new_c = ahead_c - step * to_c
        if l1:
            new_w = torch.sign(new_w) * (new_w.abs() - (step * threshold)[:, None]).clamp_min(0)
        overshot = ((ahead_w - new_w) * (new_w - w)).sum(-1) + (ahead_c - new_c) * (new_c - c) > 0
        momentum = torch.where(overshot, 1.0, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        keep = torch.where(overshot, 0.0, (momentum - 1) / following)
        ahead_w, ahead_c = new_w + keep[:, None] * (new_w - w), new_c + keep * (new_c - c)
        w, c, momentum = new_w, new_c, following
    return forward(w, c), Linear(w, c)


def _curvature(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Nearly always an upper bound of the loss's curvature: the largest eigenvalue of Z' diag(weight) Z / 4,
    with a column of ones in Z for the constant. Power iteration comes from below, hence the tenth on top.
    """
    v = torch.ones_like(mean) * torch.where(torch.arange(mean.shape[1]) % 2 == 0, 1.0, -0.5)
    v, constant = v * (scale > 0), torch.ones_like(mean[:, 0])
    size = constant
    for _ in range(POWER_STEPS):
        size = (v.square().sum(-1) + constant**2).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        v, constant = v / size[:, None], constant / size
        scaled = v * scale
        z = torch.addmm((constant - (scaled * mean).sum(-1))[:, None], scaled, x.T) * weight
        total = z.sum(-1)
        v, constant = scale * (z @ x - total[:, None] * mean), total
    size = (v.square().sum(-1) + constant**2).sqrt()
    return 1.1 * size / 4 + 1e-6
