"""Hook points: where a function of your own sees the tensors of a pass, and may change them.

    def edit(tensor, *, layer, position, iteration, site): ...

    model.generate(prompts, iterations=4, edit=at(edit, site="resid_post", layer=12, iteration=2))

The sites of one layer in the order they run, and what a change reaches within the pass:

| site | tensor | reaches |
| --- | --- | --- |
| `resid_pre` | x, what the layer reads | its attention, keys and values included, and its residual |
| `attn_out` | what attention adds | the residual |
| `resid_mid` | m, before the blend | the blend |
| `stream_state` | s_l, the state that is blended in | the blend |
| `resid_blended` | m~, after the blend | FFN and residual |
| `mlp_out` | what the FFN adds | the residual; the state handed on, if `carry` is `ffn_output` |
| `resid_post` | y, the layer's output | the next layer; the state handed on, if `carry` is `layer_output` |

Where a row has no state yet, its `stream_state` means nothing and changing it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError, unknown_name
from sst_interp.models.choices import whole

Site = Literal["resid_pre", "attn_out", "resid_mid", "stream_state", "resid_blended", "mlp_out", "resid_post"]
SITES: tuple[Site, ...] = get_args(Site)
"""Every site, in the order they run, by TransformerLens' names where it has them."""

Visit = Callable[[Site, int, Tensor], Tensor]
"""Called at every site of every layer: (site, layer, tensor) -> the tensor to go on with."""

Hook = Callable[[int, int], Visit]
"""(position, iteration) -> the visit of the pass that is about to run."""


class Edit(Protocol):
    """A researcher's own function, called at every site.

    Args:
        tensor: [row, d_model], a copy. Rows are the prompts that still iterate, in the order they were given.
        layer: 0-based.
        position: 0-based step of generation, or index of the token that is read.
        iteration: 1-based.
        site: one of `SITES`.

    Returns:
        A tensor of the same shape, dtype and device to go on with; None: the given one, as it now is.
    """

    def __call__(  # noqa: D102
        self, tensor: Tensor, *, layer: int, position: int, iteration: int, site: Site
    ) -> Tensor | None: ...


def unhooked(site: Site, layer: int, tensor: Tensor) -> Tensor:
    """The visit of a pass that nobody watches."""
    return tensor


def editing(edit: Edit, order: Int[Tensor, " row"] | None = None) -> Hook:
    """The hook that calls `edit` with copies.

    Args:
        order: which prompt each row is, if the rows are not in the order of the prompts.
    """
    wants = getattr(edit, "wants", None)
    sorted_rows = order is None or bool((order[1:] > order[:-1]).all())

    def hook(position: int, iteration: int) -> Visit:
        def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
            where: dict[str, Any] = {
                "layer": layer, "position": position, "iteration": iteration, "site": site,
            }  # fmt: skip
            if wants is not None and not wants(**where):
                return tensor
            rows = None if sorted_rows or order is None else order[: len(tensor)].argsort()
            given = tensor[:, 0].clone() if rows is None else tensor[rows, 0]
            edited = alike(edit(given, **where), given, f"{site} of layer {layer}")
            return edited[:, None] if rows is None else edited[rows.argsort(), None]

        return visit

    return hook


def alike(returned: object, given: Tensor, where: str) -> Tensor:
    """The tensor that a hook returned, or `given` for None; an error calls the place `where`.

    Raises:
        SSTError: it is no tensor, or one of another shape, dtype or device.
    """
    if returned is None:
        return given
    hint = "return a tensor like the one you are given, or None to leave it as it is"
    if not isinstance(returned, Tensor):
        raise SSTError(f"the edit at {where} returned a {type(returned).__name__}", hint)
    for what in ("shape", "dtype", "device"):
        theirs, ours = getattr(returned, what), getattr(given, what)
        if theirs != ours:
            theirs, ours = (list(x) if what == "shape" else x for x in (theirs, ours))
            raise SSTError(f"the edit at {where} returned {what} {theirs}; it was given {ours}", hint)
    return returned


@dataclass
class At:
    """An edit in some places only; `at` makes one."""

    edit: Edit
    where: dict[str, frozenset[Any]]
    calls: int = 0
    """How often it has been called."""

    def wants(self, **here: Any) -> bool:
        """Whether it is to be called here."""
        return all(here[name] in allowed for name, allowed in self.where.items())

    def __call__(self, tensor: Tensor, **here: Any) -> Tensor | None:
        """The edit, where it is wanted."""
        if not self.wants(**here):
            return None
        self.calls += 1
        return self.edit(tensor, **here)


def at(
    edit: Edit,
    *,
    site: Site | Collection[Site] | None = None,
    layer: int | Collection[int] | None = None,
    position: int | Collection[int] | None = None,
    iteration: int | Collection[int] | None = None,
) -> At:
    """The edit, called at these sites, layers, positions and iterations only. None means everywhere.

    Raises:
        SSTError: a site that does not exist, or a number that cannot occur.
    """
    where: dict[str, frozenset[Any]] = {}
    given = {"site": site, "layer": layer, "position": position, "iteration": iteration}
    for name, value in given.items():
        if value is None:
            continue
        alone = isinstance(value, str) or not isinstance(value, Collection) or not getattr(value, "ndim", 1)
        named: Collection[Any] = [value] if alone else value  # pyright: ignore
        if name == "site":
            for one in named:
                if one not in SITES:
                    raise unknown_name("site", str(one), SITES)
            where[name] = frozenset(named)
        else:
            where[name] = frozenset(whole(name, one, 1 if name == "iteration" else 0) for one in named)
        if not where[name]:
            raise SSTError(f"no {name} is named", "leave it out to mean all of them")
    return At(edit, where)


def refuse_unused(edit: Edit, ran: str) -> None:
    """Raise if an edit was bound to places that never came; `ran` says what did."""
    if isinstance(edit, At) and not edit.calls:
        asked = "; ".join(f"{name} {', '.join(map(str, sorted(v)))}" for name, v in edit.where.items())
        raise SSTError(f"the edit was never called: nothing ran at {asked}", ran)


@dataclass
class Record:
    """An edit that changes nothing and keeps every tensor: the native recorder.

    record = Record(["resid_mid", "resid_post"])
    model.generate(prompts, iterations=4, edit=record)
    record["resid_mid"]                          # [row, position, layer, iteration, d_model]

    Memory grows with the text; `observe` of `model.generate` reduces while generating.
    """

    sites: Site | Sequence[Site] = SITES
    kept: dict[tuple[Site, int, int, int], Float[Tensor, "row d_model"]] = field(default_factory=dict)
    """By (site, layer, position, iteration)."""

    def __post_init__(self) -> None:
        alone = isinstance(self.sites, str) or not isinstance(self.sites, Collection)
        self.sites = [self.sites] if alone else self.sites  # pyright: ignore
        for site in self.sites:
            if site not in SITES:
                raise unknown_name("site", str(site), SITES)

    def wants(self, *, site: Site, **_where: int) -> bool:
        """Whether it is to be called here."""
        return site in self.sites

    def __call__(self, tensor: Tensor, *, layer: int, position: int, iteration: int, site: Site) -> None:
        """Keep a copy."""
        if site in self.sites:
            self.kept[site, layer, position, iteration] = tensor.clone()

    def __getitem__(self, site: Site) -> Float[Tensor, "row position layer iteration d_model"]:
        keys = sorted(key[1:] for key in self.kept if key[0] == site)
        if not keys:
            raise SSTError(f"nothing was recorded at {site!r}", f"recorded: {', '.join(self.sites)}")
        layers, positions, iterations = (sorted({key[k] for key in keys}) for k in range(3))
        if len({len(self.kept[site, *key]) for key in keys}) > 1:
            raise SSTError("rows iterate to different depths", "record one depth at a time, or read `kept`")
        flat = torch.stack([self._at(site, *key) for key in product(layers, positions, iterations)])
        grid = flat.view(len(layers), len(positions), len(iterations), *flat.shape[1:])
        return grid.permute(3, 1, 0, 2, 4)  # rows first

    def _at(self, site: Site, layer: int, position: int, iteration: int) -> Tensor:
        """What was there; where a layer did not run again, what it had before."""
        while (site, layer, position, iteration) not in self.kept and iteration > 1:
            iteration -= 1
        return self.kept[site, layer, position, iteration]
