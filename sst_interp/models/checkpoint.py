"""A checkpoint on disk: a stream's weights, its choices, its backbone's name, and trained adapters.

folder/stream.safetensors         SST: alpha [layer, d_model]; LRT: gamma, key, value, gates; looped: none
folder/stream.json                kind, choices, whether there are adapters, and the backbone's name, revision
                                  and content hash
folder/adapter_model.safetensors  trained checkpoints: LoRA adapters, in PEFT's layout
folder/adapter_config.json        and their configuration
"""

from __future__ import annotations

import hashlib
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

from sst_interp import paths
from sst_interp.errors import SSTError
from sst_interp.files import put_in_place, replace_bytes, sha256, stage
from sst_interp.models.backbone import first_line
from sst_interp.models.choices import Choices, shown
from sst_interp.models.kinds import kind_named, kinds
from sst_interp.models.placement import quantisation_of
from sst_interp.models.stream import Kind, Recurrence

FORMAT = 1
CONFIG, WEIGHTS = "stream.json", "stream.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
TRAINED_BY = "training.json"
"""Training leaves it beside its checkpoint."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a state stream."""
    return (folder / CONFIG).is_file()


def checkpoint_folder(name: str | Path) -> Path | None:
    """Where the checkpoint of that name is: a folder, the user's, or a shipped one; None if nowhere."""
    places = (Path(name), paths.checkpoints_dir() / str(name), paths.shipped("checkpoints") / str(name))
    return next(filter(is_checkpoint, places), None)


def save_checkpoint(
    model: Recurrence,
    folder: str | Path,
    backbone_name: str,
    adapters: Any = None,
    content_hash: str | None = None,
) -> Path:
    """Write a model's stream (not its backbone) to `folder`.

    Args:
        backbone_name: for `sst.load`: an asset, a hub id or a folder.
        adapters: the `peft.PeftModel` around the backbone, if adapters were trained with the stream.
        content_hash: of the backbone without the adapters; None takes the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    quantised = quantisation_of(model.backbone.model)
    config = {
        "format": FORMAT,
        "adapters": adapters is not None,
        "kind": model.kind.name,
        "choices": model.choices.to_dict(),
        "backbone": {
            "name": backbone_name,
            "revision": getattr(model.backbone.config, "_commit_hash", None),
            "content_hash": content_hash or model.backbone.content_hash,
            **({"quantisation": quantised} if quantised else {}),
        },
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
    }
    if adapters is not None:
        save_adapters(adapters, folder, backbone_name)
    elif any((folder / name).is_file() for name in ADAPTERS):
        (folder / CONFIG).unlink(missing_ok=True)  # first, so that it never stands beside others' adapters
        for name in ADAPTERS:
            (folder / name).unlink(missing_ok=True)
    config |= model.kind.config()
    weights = {name: w.detach().contiguous().cpu() for name, w in model.kind.weights().items()}
    stage(folder / WEIGHTS, lambda path: save_file(weights, path))
    put_in_place(folder / WEIGHTS)
    replace_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return folder


def read_checkpoint(folder: Path, kind: str | None = None) -> tuple[dict[str, Any], Kind, Choices]:
    """(config, kind with its weights, choices) of a checkpoint folder; `kind` refuses any other kind.

    Raises:
        SSTError: a file is missing or damaged, or holds other tensors than it must; another kind; a newer
            format.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        # cloned, since in the file tensors lie anywhere, and products of unaligned ones round otherwise
        weights = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise SSTError(f"checkpoint {folder} cannot be read: {error}", "fetch or save it again") from None
    if isinstance(config, dict) and config.get("format", FORMAT) != FORMAT:
        written = shown(config["format"])
        raise SSTError(f"checkpoint {folder} has format {written}; this version reads {FORMAT}", "upgrade")
    name = config.get("kind", "sst") if isinstance(config, dict) else "sst"
    if not isinstance(name, str) or name not in kinds():
        raise SSTError(
            f"checkpoint {folder} has an unknown kind {shown(name)}", "a newer version may know it"
        )
    refuse_kind(folder, name, kind)
    kind_class = kind_named(name)
    if set(weights) not in kind_class.holds:
        must = " or ".join(str(sorted(names)) for names in kind_class.holds)
        raise SSTError(
            f"checkpoint {folder} holds {sorted(weights)} where it must hold {must}", "fetch it again"
        )
    backbone = config.get("backbone") if isinstance(config, dict) else None
    if not isinstance(backbone, dict) or not {"name", "content_hash"} <= set(backbone):
        raise SSTError(
            f"checkpoint {folder}: {CONFIG} does not say which backbone it belongs to", "fetch it again"
        )
    refuse_other_adapters(folder, config)
    for name, value in weights.items():
        if not value.is_floating_point():
            raise SSTError(f"checkpoint {folder}: {name} is of {value.dtype}, not real", "fetch it again")
    return config, kind_class.restore(weights, config), Choices.from_dict(config.get("choices", {}))


def fingerprint(folder: Path) -> str:
    """sha256 of a checkpoint's stream, adapters and backbone.

    Raises:
        SSTError: the checkpoint cannot be read.
    """
    config, _, _ = read_checkpoint(folder)
    said = {key: value for key, value in config.items() if key != "adapters"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in (WEIGHTS, *ADAPTERS):
        if (folder / name).is_file():
            digest.update(f"{name} {sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def refuse_other_adapters(folder: Path, config: dict[str, Any]) -> None:
    """Raise SSTError if an adapter file is missing, or lies in the folder of a checkpoint without adapters.

    `stream.json` says whether there are any. Where an older one does not, a trained checkpoint
    (`training.json`) has them, and of the two files there is none or both.
    """
    there = {name: (folder / name).is_file() for name in ADAPTERS}
    own = config.get("adapters")
    if own is None:
        own = any(there.values()) or (folder / TRAINED_BY).is_file()
    if own and not all(there.values()):
        missing = next(name for name in ADAPTERS if not there[name])
        raise SSTError(
            f"checkpoint {folder} lacks {missing}: without it, it would be another model",
            "copy or fetch the whole folder again",
        )
    if not own and any(there.values()):
        extra = next(name for name in ADAPTERS if there[name])
        raise SSTError(
            f"checkpoint {folder} has no adapters of its own, but {extra} lies in its folder",
            "fetch it again, or take the file away",
        )


def refuse_kind(name: str | Path, found: str, wanted: str | None) -> None:
    """Raise if a checkpoint is of another kind than the one that is wanted."""
    if wanted is not None and found != wanted:
        raise SSTError(
            f"checkpoint {name} is a {kind_named(found).words}, not a {kind_named(wanted).words}",
            f"it has no {kind_named(wanted).own}: name another checkpoint",
        )


def add_adapters(model: nn.Module, rank: int, lora_alpha: int, targets: tuple[str, ...], seed: int) -> Any:
    """Put fresh adapters, in the model's dtype, on its linear layers in place; the rest is frozen.

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
    dtype: Any = model.dtype
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
    """Write the adapters as `peft` does, with the backbone's name in place of its folder."""
    from peft import get_peft_model_state_dict

    weights: dict[str, Tensor] = {
        name: value.detach().contiguous().cpu()
        for name, value in get_peft_model_state_dict(peft_model).items()
    }
    stage(folder / ADAPTER_WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
    put_in_place(folder / ADAPTER_WEIGHTS)
    config = peft_model.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": backbone_name,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    replace_bytes(
        folder / ADAPTER_CONFIG, json.dumps(plain, indent=2, sort_keys=True, default=str).encode() + b"\n"
    )


NAME = r"[A-Za-z_][A-Za-z0-9_.]{0,199}"
"""Names of modules that adapters may name: nothing that is also a regular expression."""


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(NAME, v) for v in value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000


PEFT_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "r": _count,
    "lora_alpha": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v),
    "target_modules": lambda v: _names(v) and len(v) > 0,
    "exclude_modules": lambda v: v is None or _names(v),
    "fan_in_fan_out": lambda v: isinstance(v, bool),
    "use_rslora": lambda v: isinstance(v, bool),
}
"""Settings that PEFT is given, and what each may be."""
IGNORED = (
    "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version", "revision",
    "task_type",
)  # fmt: skip
"""Settings that do not matter once adapters are merged."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of plain LoRA adapters in `adapter_config.json`, for `peft.LoraConfig`.

    The file may come from anywhere, and PEFT would load tokenizers, import modules and read names as regular
    expressions that it names. So PEFT is given numbers and plain names only.

    Raises:
        SSTError: another type than LORA, or a setting that is neither a known number nor PEFT's default.
        OSError, ValueError: the file cannot be read.
    """
    from peft import LoraConfig

    hint = "sst-interp reads plain LoRA adapters, as `sst-interp train` writes them"
    try:
        given = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except RecursionError:
        raise SSTError(
            f"{folder / ADAPTER_CONFIG} is nested too deeply", "fetch or train the adapters again"
        ) from None
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        written = given.get("peft_type") if isinstance(given, dict) else None
        raise SSTError(
            f"{folder / ADAPTER_CONFIG}: the adapters are of type {shown(written)}, not 'LORA'", hint
        )
    usual = LoraConfig().to_dict()
    for key, value in given.items():
        if key in PEFT_SETTINGS:
            fits = PEFT_SETTINGS[key](value)
        else:
            fits = key in IGNORED or value in (None, False, {}, usual.get(key))
        if not fits:
            raise SSTError(f"{folder / ADAPTER_CONFIG}: {shown(key)} = {shown(value)} is not read", hint)
    return {key: given[key] for key in PEFT_SETTINGS if key in given} | {"task_type": "CAUSAL_LM"}


def merge_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapters of `folder` added to its weights. Without adapters, the model itself.

    Raises:
        SSTError: the adapters are damaged, are not plain LoRA, or do not fit the model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return model
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        config: Any = LoraConfig(**read_config(folder))
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SSTError(f"adapters of {folder} cannot be read: {error}", "fetch or train them again") from None
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            quantised = quantisation_of(model) is not None
            peft_model: Any = get_peft_model(model, config, autocast_adapter_dtype=not quantised)  # pyright: ignore[reportArgumentType]
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
    if quantised:  # merged, they would be rounded to four or eight bits
        for name, value in peft_model.named_parameters():
            if "lora_" in name:
                value.data = value.data.to(peft_model.base_model.model.dtype)
        return peft_model.base_model.model.eval()
    return peft_model.merge_and_unload()
