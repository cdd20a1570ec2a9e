"""Dory (NVIDIA, `dory`): input layers, a recurrent section, output layers, on the unit sphere.

With `e` the input layers' output, N the norm to length 1, and s(t, 0) = e:

    x(t, i) = N(s(t, i-1)) + N(e(t)),      s(t, i) = core(x(t, i)),      y(t) = output layers(s(t, D))

Its config.json says which keys and values are kept. `per_loop` is `kv = "each"`. `last_loop` is `kv =
"last"`: a position attends to the last loop's entries of earlier positions, as when a text is read token by
token. A forward pass over a whole text without a cache attends to those of the same loop, which is `each`. So
under `last_loop` transformers gives other logits for the same text by how it is cut (docs/looped.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices
from sst_interp.models.kinds import kind
from sst_interp.models.kinds.looped import Looped


@kind("dory", "Dory")
@dataclass(frozen=True, eq=False)
class Dory(Looped):
    """A loop in the middle of the stack, which reads its own output and the input layers', both normed."""

    native = "dory"

    @classmethod
    def of(cls, backbone: Backbone) -> tuple[Dory, Choices]:
        """Ranges, loops and cache mode of its config.json."""
        config = backbone.config
        first, end = config.n_input_layers, config.n_input_layers + config.n_recurrent_layers
        loop = cls(
            (first, end), inject="add", initial="prelude", norm="final", prelude_norm="final",
            depth=config.n_recurrent_loops,
        )  # fmt: skip
        return loop, Choices(kv="last" if config.recurrent_kv_cache_mode == "last_loop" else "each")
