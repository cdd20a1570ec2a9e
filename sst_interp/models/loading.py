"""`sst.load`: a model with a state stream by name, wherever it is.

Names are looked up in this order: a shipped asset (`smollm2-135m`), a local folder (a Hugging Face model or
a checkpoint), a shipped checkpoint, a hub id (`owner/name`, of a checkpoint or of a model). Weights are read
from safetensors only, and no code from a model's repository runs unless `trust_remote_code=True` is asked for
by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sst_interp import paths
from sst_interp.assets.wheels import ASSET_MODELS
from sst_interp.errors import SSTError, unknown_name
from sst_interp.models.backbone import Backbone, content_hash, first_line
from sst_interp.models.checkpoint import (
    checkpoint_folder,
    is_checkpoint,
    merge_adapters,
    read_checkpoint,
    refuse_kind,
)
from sst_interp.models.choices import TRAINED, Choices, check_choices, shown
from sst_interp.models.hub import fetch_checkpoint
from sst_interp.models.kinds import kind_named
from sst_interp.models.model import StateStreamModel

PAPER_ALPHA = 0.027
"""Mean of the learned blend weights in arXiv 2605.00206."""


def load(
    name: str | Path,
    alpha: float | Tensor | Sequence[float] | None = None,
    choices: Choices | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    kind: str | None = None,
) -> StateStreamModel:
    """Load a model with a state stream.

    Args:
        name: an asset (`smollm2-135m`), a hub id, a local model folder, or a checkpoint (name or folder).
        alpha: blend weights; None takes the checkpoint's. A backbone without a checkpoint has none and is
            loaded as it is, without a blend: name one to try it (the paper's mean is 0.027).
        choices: what the paper leaves open; those a checkpoint was trained with are always its own.
        dtype: of the weights: `bfloat16`, `float32` or `float64`.
        device: where to put the model.
        trust_remote_code: run Python code from the model's hub repository.
        kind: `sst`, `lrt`, `looped` or a plugin's refuses a checkpoint of another kind; None takes any. A backbone
            without a checkpoint is an SST whose blend is off; with `looped` it is iterated with no stream
            (`sst.attach_lrt` attaches the other to a model in memory).

    Raises:
        SSTError: unknown name, no access, unsupported family, a checkpoint trained on other weights, or
            choices that a checkpoint was not trained with.
    """
    if not isinstance(name, str | Path):
        raise SSTError(
            f"{shown(name)} is not a model's name", "a model in memory: sst.attach(model, tokenizer)"
        )
    dtype, choices = _dtype(dtype), None if choices is None else check_choices(choices)
    wanted = kind_named("sst" if kind is None else kind)
    folder = checkpoint_folder(name) or fetch_from_hub(name)
    if folder is None:
        model, tokenizer = _backbone(str(name), dtype, trust_remote_code)
        backbone = Backbone(_placed(model, device))
        stream = wanted.start(backbone, alpha)
        return StateStreamModel(backbone, tokenizer, choices=choices, name=str(name), kind=stream)
    config, trained, theirs = read_checkpoint(folder, kind)
    if alpha is not None:
        refuse_kind(name, trained.name, "sst")
    backbone = config["backbone"]
    model, tokenizer = _backbone(backbone["name"], dtype, trust_remote_code)
    for field in TRAINED:
        wanted = getattr(choices or theirs, field)
        if wanted not in (getattr(theirs, field), getattr(Choices(), field)):
            raise SSTError(
                f"checkpoint {name} was trained with {field} = {getattr(theirs, field)!r}, not {wanted!r}",
                "leave the choice out, or train another checkpoint",
            )
    found = content_hash(model)
    if found != backbone["content_hash"]:
        raise SSTError(
            f"checkpoint {name} belongs to another backbone: its weights hash to "
            f"{backbone['content_hash'][:12]}, those of {backbone['name']!r} to {found[:12]}",
            "load it with the backbone it was trained on",
        )
    choices = replace(choices or theirs, **{field: getattr(theirs, field) for field in TRAINED})
    model = merge_adapters(model, folder)
    if alpha is not None:
        trained = trained.with_weights({"alpha": alpha})
    fitted = Backbone(_placed(model, device))
    return StateStreamModel(fitted, tokenizer, choices=choices, name=str(name), kind=trained.fit(fitted))


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model or checkpoint of that name, without its weights.

    Raises SSTError for unknown names and for one that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = checkpoint_folder(name)
    source = _source(str(name) if folder is None else read_checkpoint(folder)[0]["backbone"]["name"])
    with _readable(str(name)):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def fetch_from_hub(name: str | Path) -> Path | None:
    """Where the hub's cache has the checkpoint of that name; None if the hub has none."""
    return None if (Path(name) / "config.json").is_file() else fetch_checkpoint(str(name))


def _backbone(name: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer of that name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _source(name)
    with _quiet_transformers(), _readable(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, landed = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if landed["missing_keys"]:  # transformers would have made them up
        missing = sorted(landed["missing_keys"])
        raise SSTError(
            f"model {name!r} lacks {len(missing)} of its weights, {missing[0]} first",
            "fetch it again: a part of it is missing",
        )
    if landed["unexpected_keys"]:  # transformers would have dropped them
        surplus = sorted(landed["unexpected_keys"])
        raise SSTError(
            f"model {name!r} holds {len(surplus)} weights that its config.json has no place for: "
            f"{', '.join(surplus[:3])}{' ...' if len(surplus) > 3 else ''}",
            "fetch its config.json again: the model was cut short or is of another kind",
        )
    return model, tokenizer


def _source(name: str) -> str:
    """Where Hugging Face finds that backbone: a folder or a hub id."""
    local = name in ASSET_MODELS or (Path(name) / "config.json").is_file()
    if not local and ("/" not in name or name.startswith((".", "/", "~")) or Path(name).exists()):
        if Path(name).exists():
            raise SSTError(f"{name} is neither a model nor a checkpoint folder", "it has no config.json")
        shipped = paths.shipped("checkpoints")
        known = [*ASSET_MODELS, *(p.name for p in shipped.glob("*") if is_checkpoint(p))]
        raise unknown_name("model", name, known)
    return str(ASSET_MODELS[name]()) if name in ASSET_MODELS else name


@contextmanager
def _readable(name: str):
    """What Hugging Face says about a model that it cannot read, as something to act on."""
    try:
        yield
    except SSTError:
        raise
    except Exception as error:  # transformers raises whatever a config makes it stumble over
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise SSTError(
            f"model {name!r} cannot be loaded: {kind}{first_line(error)}",
            "check the name and the network; `hf auth login` if the model is gated; "
            "models that need their own code: trust_remote_code=True",
        ) from error


def _placed(model: Any, device: str | torch.device) -> Any:
    """The model on that device."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SSTError(
            f"the model cannot be put on device {shown(device)}: {first_line(error)}",
            'for example device="cpu"',
        ) from error


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise unknown_name("dtype", str(name), known)
    return known[name]


@contextmanager
def _quiet_transformers():
    """No loading bars and reports from inside a library: what they say of weights is an error of ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if enabled:
            logging.enable_progress_bar()
