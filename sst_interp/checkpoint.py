"""A state stream on disk: its blend weights in safetensors, its choices and its backbone in JSON.

folder/stream.safetensors         alpha [layer, d_model]
folder/stream.json                choices, and the backbone's name, revision and content hash
folder/adapter_model.safetensors  trained checkpoints: LoRA adapters, in PEFT's layout
folder/adapter_config.json        and their configuration
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sst_interp.choices import Choices
from sst_interp.durable import publish, replace_bytes, stage
from sst_interp.errors import SSTError
from sst_interp.training.adapters import save_adapters

if TYPE_CHECKING:
    from sst_interp.model import StateStreamModel

CONFIG, WEIGHTS = "stream.json", "stream.safetensors"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a state stream."""
    return (folder / CONFIG).is_file()


def save_checkpoint(
    model: StateStreamModel,
    folder: str | Path,
    backbone_name: str,
    adapters: Any = None,
    content_hash: str | None = None,
) -> Path:
    """Write a model's stream (not its backbone) to `folder`.

    Args:
        backbone_name: what `sst.load` loads the backbone by: an asset, a hub id or a folder.
        adapters: the `peft.PeftModel` around the backbone, if adapters were trained with the stream.
        content_hash: the backbone's, without the adapters; None takes the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": 1,
        "choices": model.choices.to_dict(),
        "backbone": {
            "name": backbone_name,
            "revision": getattr(model.backbone.config, "_commit_hash", None),
            "content_hash": content_hash or model.backbone.content_hash,
        },
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
    }
    if adapters is not None:
        save_adapters(adapters, folder, backbone_name)
    stage(folder / WEIGHTS, lambda path: save_file({"alpha": model.alpha.contiguous().cpu()}, path))
    publish(folder / WEIGHTS)
    replace_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], torch.Tensor, Choices]:
    """(config, alpha [layer, d_model], choices) of a checkpoint folder.

    Raises:
        SSTError: a file is missing or damaged, or holds other tensors than it must.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SSTError(f"checkpoint {folder} cannot be read: {error}", "fetch or save it again") from None
    if set(weights) != {"alpha"}:
        raise SSTError(
            f"checkpoint {folder} holds {sorted(weights)} where it must hold ['alpha']", "fetch it again"
        )
    backbone = config.get("backbone") if isinstance(config, dict) else None
    if not isinstance(backbone, dict) or not {"name", "content_hash"} <= set(backbone):
        raise SSTError(
            f"checkpoint {folder}: {CONFIG} does not say which backbone it belongs to", "fetch it again"
        )
    return config, weights["alpha"], Choices.from_dict(config.get("choices", {}))
