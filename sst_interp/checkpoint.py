"""A state stream on disk: its weights in safetensors, its choices and its backbone in JSON.

folder/stream.safetensors         SST: alpha [layer, d_model]; LRT: gamma, key, value, gates; looped: none
folder/stream.json                kind, choices, and the backbone's name, revision and content hash
folder/adapter_model.safetensors  trained checkpoints: LoRA adapters, in PEFT's layout
folder/adapter_config.json        and their configuration
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sst_interp.choices import Choices
from sst_interp.durable import publish, replace_bytes, stage
from sst_interp.errors import SSTError
from sst_interp.kind import NAMES, Kind, KindName
from sst_interp.looped import Looped
from sst_interp.lrt import Memory
from sst_interp.stream import LayerBlend
from sst_interp.training.adapters import save_adapters

if TYPE_CHECKING:
    from sst_interp.model import StateStreamModel

CONFIG, WEIGHTS = "stream.json", "stream.safetensors"
HELD: dict[KindName, list[set[str]]] = {
    "sst": [{"alpha"}],
    "lrt": [{"gamma"}, {"key", "value", "gates"}, {"gamma", "key", "value", "gates"}],  # by pathway
    "looped": [set()],
}
"""The tensors that a checkpoint of each kind can hold."""
OWN: dict[KindName, str] = {"sst": "blend weights (alpha)", "lrt": "memory", "looped": "loop of its own"}


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
        "kind": model.kind.name,
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
    if isinstance(model.kind, Memory):
        config["source"] = model.kind.source
    weights = {name: w.detach().contiguous().cpu() for name, w in model.kind.weights().items()}
    stage(folder / WEIGHTS, lambda path: save_file(weights, path))
    publish(folder / WEIGHTS)
    replace_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return folder


def read_checkpoint(folder: Path, kind: KindName | None = None) -> tuple[dict[str, Any], Kind, Choices]:
    """(config, the stream with its weights, choices) of a checkpoint folder.

    Args:
        kind: the only kind that will do; None for any.

    Raises:
        SSTError: a file is missing or damaged, or holds other tensors than it must; another kind.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        # cloned, since in the file tensors lie anywhere, and products of unaligned ones round otherwise
        weights = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise SSTError(f"checkpoint {folder} cannot be read: {error}", "fetch or save it again") from None
    found = config.get("kind", "sst") if isinstance(config, dict) else "sst"
    if found not in NAMES:
        raise SSTError(f"checkpoint {folder} is of an unknown kind {found!r}", "a newer version may know it")
    refuse_kind(folder, found, kind)
    if set(weights) not in HELD[found]:
        must = " or ".join(str(sorted(names)) for names in HELD[found])
        raise SSTError(
            f"checkpoint {folder} holds {sorted(weights)} where it must hold {must}", "fetch it again"
        )
    backbone = config.get("backbone") if isinstance(config, dict) else None
    if not isinstance(backbone, dict) or not {"name", "content_hash"} <= set(backbone):
        raise SSTError(
            f"checkpoint {folder}: {CONFIG} does not say which backbone it belongs to", "fetch it again"
        )
    return config, _stream(found, config, weights), Choices.from_dict(config.get("choices", {}))


def _stream(kind: KindName, config: dict[str, Any], weights: dict[str, Tensor]) -> Kind:
    if kind == "lrt":
        return Memory(config.get("source"), **weights)
    return Looped() if kind == "looped" else LayerBlend(weights["alpha"])


def refuse_kind(name: str | Path, found: KindName, wanted: KindName | None) -> None:
    """Raise if a checkpoint is of another kind than the one that is wanted."""
    if wanted is not None and found != wanted:
        raise SSTError(
            f"checkpoint {name} is a {NAMES[found]}, not a {NAMES[wanted]}",
            f"it has no {OWN[wanted]}: name another checkpoint",
        )
