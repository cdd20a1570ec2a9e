"""A state stream on disk: its weights in safetensors, its choices and its backbone in JSON.

folder/stream.safetensors         SST: alpha [layer, d_model]; LRT: gamma, key, value, gates; looped: none
folder/stream.json                kind, choices, whether there are adapters, and the backbone's name, revision
                                  and content hash
folder/adapter_model.safetensors  trained checkpoints: LoRA adapters, in PEFT's layout
folder/adapter_config.json        and their configuration
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sst_interp.choices import Choices, shown
from sst_interp.durable import publish, replace_bytes, sha256, stage
from sst_interp.errors import SSTError
from sst_interp.kind import NAMES, Kind, KindName
from sst_interp.looped import Looped
from sst_interp.lrt import Memory
from sst_interp.stream import LayerBlend
from sst_interp.training import adapters as lora
from sst_interp.training.adapters import save_adapters

if TYPE_CHECKING:
    from sst_interp.model import StateStreamModel

FORMAT = 1
CONFIG, WEIGHTS = "stream.json", "stream.safetensors"
ADAPTERS = (lora.CONFIG, lora.WEIGHTS)
TRAINED_BY = "training.json"
"""What a training leaves beside its checkpoint (`training.log`)."""
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
        "format": FORMAT,
        "adapters": adapters is not None,
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
    elif any((folder / name).is_file() for name in ADAPTERS):
        (folder / CONFIG).unlink(missing_ok=True)  # first, so that it never stands beside others' adapters
        for name in ADAPTERS:
            (folder / name).unlink(missing_ok=True)
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
    found = config.get("kind", "sst") if isinstance(config, dict) else "sst"
    if not isinstance(found, str) or found not in NAMES:
        raise SSTError(
            f"checkpoint {folder} has an unknown kind {shown(found)}", "a newer version may know it"
        )
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
    refuse_other_adapters(folder, config)
    for name, value in weights.items():
        if not value.is_floating_point():
            raise SSTError(f"checkpoint {folder}: {name} is of {value.dtype}, not real", "fetch it again")
    return config, _stream(found, config, weights), Choices.from_dict(config.get("choices", {}))


def fingerprint(folder: Path) -> str:
    """sha256 over everything that decides what a checkpoint computes: its stream, adapters and backbone.

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
    """Raise if the adapters of a checkpoint are not there as a whole, or are not its own.

    `stream.json` says whether there are any. Older ones do not: a trained checkpoint (`training.json`) always
    has them, and of the two files there is none or both.

    Raises:
        SSTError: with the file that is missing, or that should not be there.
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
