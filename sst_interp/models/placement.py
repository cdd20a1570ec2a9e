"""Where a model is put and in which numbers it computes: device, dtype, quantisation, attention.

    Placement("auto", "bfloat16", quantisation="4bit").resolved()    # on cuda, bfloat16, 4bit

The device decides no number that a recipe promises; dtype, quantisation and attention do, and belong to a
run's fingerprint. The identity of a quantised backbone is that of its unquantised weights (`source_hash`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sst_interp.errors import SSTError, unknown_name

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
QUANTISATIONS = ("4bit", "8bit")
ATTENTIONS = ("eager", "sdpa")
"""Implementations that take the masks of a stream."""


@dataclass(frozen=True)
class Placement:
    """Device and numbers of a model. Raises SSTError for a value that cannot be."""

    device: str = "auto"
    """`auto`: CUDA, then MPS, then the CPU."""
    dtype: str = "bfloat16"
    """Of weights that are not quantised, and of states."""
    quantisation: str | None = None
    """`4bit` or `8bit`: of the linear layers, through bitsandbytes."""
    attention: str | None = None
    """`eager` or `sdpa`; None: the model's own."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", str(self.dtype), DTYPES)
        for key, known in (("quantisation", QUANTISATIONS), ("attention", ATTENTIONS)):
            if (value := getattr(self, key)) is not None and value not in known:
                raise unknown_name(key, str(value), known)

    def __str__(self) -> str:
        attention = f"{self.attention} attention" if self.attention else None
        return "on " + ", ".join(filter(None, (self.device, self.dtype, self.quantisation, attention)))

    def resolved(self) -> Placement:
        """The same with a device that is there.

        Raises:
            SSTError: there is no such device here, or no bitsandbytes for a quantised model.
        """
        if self.quantisation is not None and find_spec("bitsandbytes") is None:
            raise SSTError(
                f"quantisation = {self.quantisation!r} needs bitsandbytes",
                'pip install "sst-interp[quantised]"',
            )
        return replace(self, device=best_device() if self.device == "auto" else check_device(self.device))

    def how(self) -> dict[str, Any]:
        """Arguments of `sst.load`."""
        return dict(vars(self))


def best_device() -> str:
    """CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str | torch.device) -> str:
    """The device's name. Raises SSTError unless a tensor can be put there."""
    try:
        device = torch.device(name)
        if device.type != "meta":
            torch.empty(1, device=device)
            return str(name)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError):
        pass
    here = ", ".join(dict.fromkeys((best_device(), "cpu")))
    raise SSTError(
        f"there is no device {str(name)!r} here: this machine has {here}", 'device = "auto" takes the best'
    )


def quantised_by(quantisation: str, dtype: torch.dtype) -> Any:
    """The configuration that transformers takes: NF4 with absolute maxima quantised again, or LLM.int8."""
    from transformers import BitsAndBytesConfig

    if quantisation == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantisation_of(model: nn.Module) -> str | None:
    """How the linear layers of a model in memory are quantised."""
    kinds = {type(weight).__name__ for weight in model.parameters()}
    return "4bit" if "Params4bit" in kinds else "8bit" if "Int8Params" in kinds else None


def hash_of_weights(weights: Mapping[str, Tensor] | Mapping[str, Callable[[], Tensor]]) -> str:
    """sha256 of every weight's name, shape and values, rounded to bfloat16: it is the same in every dtype."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        given: Any = weights[name]
        value: Any = given if isinstance(given, Tensor) else given()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised it."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "out of memory" in words)
    )
