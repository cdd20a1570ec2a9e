"""LoRA adapters (peft): put on a backbone to be trained, written in PEFT's layout, merged when loaded."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sst_interp.backbone import first_line
from sst_interp.choices import shown
from sst_interp.durable import publish, replace_bytes, stage
from sst_interp.errors import SSTError

NAME = r"[A-Za-z_][A-Za-z0-9_.]{0,199}"
"""Names of modules that adapters may name: nothing that is also a regular expression."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_adapters(model: nn.Module, rank: int, lora_alpha: int, targets: tuple[str, ...], seed: int) -> Any:
    """Put fresh adapters on a model's linear layers, in place; everything else is frozen.

    The adapters take the model's own dtype: an optimiser keeps what it trains in fp32 (`optimiser.Masters`).

    Args:
        targets: ends of the names of the linear layers; empty for all but the unembedding.

    Returns:
        The `peft.PeftModel` around the model.

    Raises:
        SSTError: no linear layer has such a name, or there is no memory for adapters of that rank.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        target_modules=list(targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dtype = next(model.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise SSTError(
                f"no linear layer is called {', '.join(targets)}",
                'name the ends of module names, for example ["q_proj", "v_proj"], or leave targets out',
            ) from error
        except (RuntimeError, MemoryError) as error:
            raise SSTError(
                f"adapters of rank {rank} cannot be made: {first_line(error)}", "for example rank = 16"
            ) from error
    for parameter in trainable(peft_model).values():
        parameter.data = parameter.data.to(dtype)
    return peft_model


def trainable(peft_model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights by name, in a fixed order."""
    return {name: p for name, p in sorted(peft_model.named_parameters()) if p.requires_grad}


def save_adapters(peft_model: Any, folder: Path, backbone_name: str) -> None:
    """Write the adapters as `peft` does, with the backbone's name instead of where it happened to lie."""
    from peft import get_peft_model_state_dict

    weights: dict[str, Tensor] = {
        name: value.detach().contiguous().cpu()
        for name, value in get_peft_model_state_dict(peft_model).items()
    }
    stage(folder / WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
    publish(folder / WEIGHTS)
    config = peft_model.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": backbone_name,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    replace_bytes(folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True, default=str).encode() + b"\n")


def read_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says of plain LoRA adapters, for `peft.LoraConfig`.

    The file may come from anywhere, and PEFT acts on more of it than numbers: it loads tokenizers, imports
    modules, and reads names as regular expressions. So it sees the numbers and plain names only.

    Raises:
        SSTError: another type than LORA, or a setting that is neither a known number nor PEFT's default.
        OSError, ValueError: the file cannot be read.
    """
    from peft import LoraConfig

    hint = "sst-interp reads plain LoRA adapters, as `sst-interp train` writes them"
    try:
        given = json.loads((folder / CONFIG).read_bytes())
    except RecursionError:
        raise SSTError(
            f"{folder / CONFIG} is nested too deeply", "fetch or train the adapters again"
        ) from None
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        found = given.get("peft_type") if isinstance(given, dict) else None
        raise SSTError(f"{folder / CONFIG}: the adapters are of type {shown(found)}, not 'LORA'", hint)
    usual = LoraConfig().to_dict()
    for key, value in given.items():
        fits = READ[key](value) if key in READ else key in ABOUT or value in (None, False, {}, usual.get(key))
        if not fits:
            raise SSTError(f"{folder / CONFIG}: {shown(key)} = {shown(value)} is not read", hint)
    return {key: given[key] for key in READ if key in given} | {"task_type": "CAUSAL_LM"}


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(NAME, v) for v in value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000


READ: dict[str, Callable[[Any], bool]] = {
    "r": _count,
    "lora_alpha": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v),
    "target_modules": lambda v: _names(v) and len(v) > 0,
    "exclude_modules": lambda v: v is None or _names(v),
    "fan_in_fan_out": lambda v: isinstance(v, bool),
    "use_rslora": lambda v: isinstance(v, bool),
}
"""Settings that PEFT is given, and what each may be."""
ABOUT = (
    "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version", "revision",
    "task_type",
)  # fmt: skip
"""Settings that change nothing about adapters that are merged."""


def merge_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapters of `folder` added to its weights. Without any, the model itself.

    Raises:
        SSTError: the adapters are damaged, no plain LoRA, or not exactly those that the model has places for.
    """
    if not (folder / CONFIG).is_file():
        return model
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        config: Any = LoraConfig(**read_config(folder))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SSTError(f"adapters of {folder} cannot be read: {error}", "fetch or train them again") from None
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            peft_model: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise SSTError(
            f"adapters of {folder} do not fit: {error}", "load them on their own backbone"
        ) from None
    places = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(peft_model).items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if wrong := sorted(name for name in places | given if places.get(name) != given.get(name)):
        raise SSTError(
            f"adapters of {folder} do not fit: {len(wrong)} tensors are missing, surplus or of another "
            f"shape, {wrong[0]} first",
            "load them on the backbone they were trained on",
        )
    for name, value in weights.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            what = "non-finite values" if value.is_floating_point() else f"dtype {value.dtype}"
            raise SSTError(f"adapters of {folder}: {name} has {what}", "fetch or train them again")
    set_peft_model_state_dict(peft_model, weights)
    return peft_model.merge_and_unload()
