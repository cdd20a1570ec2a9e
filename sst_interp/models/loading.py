"""Loading a model with a state stream by name, and sharing its checkpoint on the Hugging Face hub.

    model = sst.load("smollm2-135m", alpha=0.027)
    model.push_to_hub("user/my-sst")
    sst.load("user/my-sst")

Names are looked up in this order: a shipped asset (`smollm2-135m`), a local folder (a Hugging Face model or a
checkpoint), a shipped checkpoint, a hub id (`owner/name`, of a checkpoint or of a model). Weights are read
from safetensors only, and no code from a model's repository runs unless `trust_remote_code=True` is given.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sst_interp import paths
from sst_interp.assets import ASSET_MODELS
from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import replace_bytes
from sst_interp.models.backbone import Backbone, content_hash, first_line
from sst_interp.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTERS,
    CONFIG,
    WEIGHTS,
    checkpoint_folder,
    is_checkpoint,
    merge_adapters,
    read_checkpoint,
    refuse_kind,
    save_checkpoint,
)
from sst_interp.models.choices import TRAINED, Choices, check_choices, shown
from sst_interp.models.families import PlainModel
from sst_interp.models.kinds import kind_named
from sst_interp.models.kinds.looped import loop_of, looping_family, native_kind
from sst_interp.models.model import StateStreamModel
from sst_interp.models.placement import (
    DTYPES,
    Placement,
    hash_of_weights,
    out_of_memory,
    quantisation_of,
    quantised_by,
)
from sst_interp.tables import say

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REQUIRED = (CONFIG, WEIGHTS)
ABOUT = ("README.md", "training.png", "training.json", "training.jsonl")
"""Uploaded if they are there; not needed to load."""

HUB_NAME = r"[\w.-]+/[\w.-]+"


def load(
    name: str | Path,
    alpha: float | Tensor | Sequence[float] | None = None,
    choices: Choices | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    kind: str | None = None,
    loop: Mapping[str, Any] | None = None,
    quantisation: str | None = None,
    attention: str | None = None,
) -> StateStreamModel:
    """Load a model with a state stream.

    Args:
        name: an asset (`smollm2-135m`), a hub id, a local model folder, or a checkpoint (name or folder).
        alpha: blend weights; None takes the checkpoint's, or 0 for a backbone without a checkpoint (the
            paper's mean is 0.027).
        choices: what the paper leaves open; those a checkpoint was trained with are always its own.
        dtype: of the weights: `bfloat16`, `float32` or `float64`.
        device: where to put the model; `auto`: CUDA, then MPS, then the CPU.
        trust_remote_code: run Python code from the model's hub repository.
        kind: `sst`, `lrt`, `looped` or a plugin's: a checkpoint of another kind is refused, and a backbone
            without a checkpoint becomes one. None takes any checkpoint, and makes a backbone an `sst`.
        loop: of kind `looped`, how a backbone without a checkpoint loops: `core`, `inject`, `damping` ... as
            `attach_looped` takes them.
        quantisation: `4bit` or `8bit` linear layers, through bitsandbytes. The backbone keeps its identity: a
            checkpoint trained on such weights loads on unquantised ones, and the other way round.
        attention: `eager` or `sdpa`; None takes the model's own.

    Raises:
        SSTError: unknown name, no access, unsupported family, a checkpoint trained on other weights, or
            choices that a checkpoint was not trained with.
    """
    if not isinstance(name, str | Path):
        raise SSTError(
            f"{shown(name)} is not a model's name", "a model in memory: sst.attach(model, tokenizer)"
        )
    at = Placement(str(device), str(dtype).removeprefix("torch."), quantisation, attention).resolved()
    choices = None if choices is None else check_choices(choices)
    kind_class = kind_named("sst" if kind is None else kind)
    if loop is not None and kind != "looped":
        raise SSTError("a loop is of a looped model", 'kind = "looped"')
    folder = checkpoint_folder(name) or fetch_checkpoint(str(name))
    if folder is None:
        model, tokenizer = _backbone(str(name), at, trust_remote_code)
        backbone = Backbone(_placed(model, at.device))
        if backbone.loops:
            started, own = native_kind(backbone)
            if alpha is not None or loop is not None or kind not in (None, "looped", started.name):
                raise SSTError(
                    f"{name} loops by itself: it is a {started.words}, not a {kind_class.words}",
                    "leave kind, alpha and loop out",
                )
            shared = choices is not None and choices.kv != Choices().kv
            choices = choices if shared else replace(choices or own, kv=own.kv)
        else:
            started = kind_class.start(backbone, alpha)
            started = started if loop is None else loop_of(backbone.n_layers, loop)
        return StateStreamModel(backbone, started, tokenizer, choices, str(name))
    config, stored, theirs = read_checkpoint(folder, kind)
    if loop is not None:
        raise SSTError(f"checkpoint {name} has a loop of its own", "leave loop out")
    if alpha is not None:
        refuse_kind(name, stored.name, "sst")
    trained_on = config["backbone"]
    model, tokenizer = _backbone(trained_on["name"], at, trust_remote_code)
    for field in TRAINED:
        wanted = getattr(choices or theirs, field)
        if wanted not in (getattr(theirs, field), getattr(Choices(), field)):
            raise SSTError(
                f"checkpoint {name} was trained with {field} = {getattr(theirs, field)!r}, not {wanted!r}",
                "leave the choice out, or train another checkpoint",
            )
    digest = content_hash(model)
    if digest != trained_on["content_hash"]:
        raise SSTError(
            f"checkpoint {name} belongs to another backbone: its weights hash to "
            f"{trained_on['content_hash'][:12]}, those of {trained_on['name']!r} to {digest[:12]}",
            "load it with the backbone it was trained on",
        )
    choices = replace(choices or theirs, **{field: getattr(theirs, field) for field in TRAINED})
    if (then := trained_on.get("quantisation")) != quantisation:
        words = [f"{q} weights" if q else "weights that are not quantised" for q in (then, quantisation)]
        say(f"note: {name} was trained on {words[0]} and is loaded on {words[1]}", sys.stderr)
    backbone = Backbone(_placed(merge_adapters(model, folder), at.device))
    stream = stored if alpha is None else stored.start(backbone, alpha)
    return StateStreamModel(backbone, stream, tokenizer, choices, str(name))


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model or checkpoint of that name, without its weights.

    Raises:
        SSTError: unknown name, or a tokenizer that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = checkpoint_folder(name) or fetch_checkpoint(str(name))
    source = _source(str(name) if folder is None else read_checkpoint(folder)[0]["backbone"]["name"])
    with _quiet_transformers(), _readable(str(name)):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def _backbone(name: str, at: Placement, trust_remote_code: bool) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer of that name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    source, dtype, how = _source(name), DTYPES[at.dtype], {}
    if at.attention is not None:
        how["attn_implementation"] = at.attention
    if at.quantisation is not None:
        how |= {"quantization_config": quantised_by(at.quantisation, dtype), "device_map": {"": at.device}}
    with _quiet_transformers(), _readable(name):
        config = PreTrainedConfig.get_config_dict(source)[0]
        known = looping_family(str(config.get("model_type")))
        if known is not None and known.module is not None:
            if how:
                raise SSTError(
                    f"{name} is a {known.words}, read as it is", "leave quantisation and attention out"
                )
            model, landed = _read_plain(known.module, config, source, dtype)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **how,
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
    if at.quantisation is not None:
        plain = replace(at, device="cpu", quantisation=None)
        unquantised = partial(_backbone, name, plain, trust_remote_code)
        object.__setattr__(model, "source_hash", _source_hash(Path(source), model, unquantised))
    return model, tokenizer


def _source_hash(folder: Path, model: Any, unquantised: Callable[[], tuple[Any, Any]]) -> str:
    """`content_hash` of a quantised model's unquantised weights, read one by one from its files.

    Where the files call them otherwise than the model does, or are not here, the whole model is loaded.
    """
    with torch.device("meta"):
        names = type(model)(model.config).state_dict().keys()
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    tied = {ours: theirs for ours, theirs in (model.all_tied_weights_keys or {}).items() if ours not in where}
    if set(where) - set(names) or {tied.get(name, name) for name in names} - set(where):
        return content_hash(unquantised()[0])

    def read(name: str) -> Tensor:
        with safe_open(where[name], "pt") as opened:
            return opened.get_tensor(name)

    return hash_of_weights({name: partial(read, tied.get(name, name)) for name in names})


def _read_plain(
    module: type[PlainModel], config: dict[str, Any], source: str, dtype: torch.dtype
) -> tuple[PlainModel, dict[str, list[str]]]:
    """A model of a family that transformers does not know, from the safetensors of a folder or a hub id."""
    from huggingface_hub import snapshot_download

    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.txt"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SSTError(f"{source} has no weights in safetensors", "fetch the model again")
    weights = {name: value.clone() for file in files for name, value in load_file(file).items()}
    with torch.device("meta"):
        model = module(config)  # pyright: ignore[reportCallIssue]
    missing, surplus = model.read(weights)
    landed = {"missing_keys": missing, "unexpected_keys": surplus}
    return (model if missing else model.to(dtype)), landed


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
    """Any error of Hugging Face about a model, as an SSTError."""
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
    """The model on that device; a quantised one was loaded there."""
    if quantisation_of(model) is not None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        if out_of_memory(error):
            raise SSTError(
                f"the model does not fit on {device}: {first_line(error)}",
                'quantisation = "4bit", or another device',
            ) from error
        raise SSTError(
            f"the model cannot be put on device {shown(device)}: {first_line(error)}",
            'for example device="cpu"',
        ) from error


@contextmanager
def _quiet_transformers():
    """No loading bars and reports: missing or surplus weights are an SSTError here."""
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


def push_to_hub(
    model: StateStreamModel,
    repo_id: str,
    *,
    backbone: str | None = None,
    private: bool = False,
    message: str = "Upload a state stream",
    api: HfApi | None = None,
) -> str:
    """Upload a model's stream and adapters, never the backbone, as a checkpoint in one commit.

    Args:
        repo_id: `owner/name`; made if it is not there.
        backbone: the name others load the backbone by; None takes the one the model was loaded by.
        private: whether a new repository is private.
        message: of the commit.
        api: the hub and the user; None takes the user's own.

    Returns:
        The commit's URL.

    Raises:
        SSTError: others cannot load the backbone by its name; the adapters were trained with other blend
            weights; no access.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not isinstance(repo_id, str) or not re.fullmatch(HUB_NAME, repo_id):
        raise SSTError(f"{shown(repo_id)} is not a repository's name", 'for example "user/my-sst"')
    api = api or HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint_of(model, Path(scratch), backbone, api)
        files = [name for name in (*REQUIRED, *ADAPTERS, *ABOUT) if (folder / name).is_file()]
        with _quiet_hub():
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                added = [CommitOperationAdd(name, folder / name) for name in files]
                commit = api.create_commit(repo_id, added, commit_message=message)
            except Exception as error:  # the hub's own, and those of its HTTP client
                reason = str(error).strip().splitlines()[0]
                hint = "`hf auth login`, with a token that may write there"
                raise SSTError(f"cannot upload to {repo_id}: {reason}", hint) from error
    return str(commit.commit_url)


def checkpoint_of(
    model: StateStreamModel, scratch: Path, backbone: str | None = None, api: HfApi | None = None
) -> Path:
    """The model's checkpoint in the folder `scratch`, with a backbone name that others can load."""
    source, trained = checkpoint_folder(model.name) or fetch_checkpoint(model.name, api=api), False
    if source is not None:
        config, kind, theirs = read_checkpoint(source)
        same = kind.like(model.kind) and all(
            getattr(theirs, field) == getattr(model.choices, field) for field in TRAINED
        )
        trained = (source / ADAPTER_CONFIG).is_file()
        if trained and not same:
            raise SSTError(
                f"the adapters of {model.name} were trained with other blend weights",
                "push the checkpoint as it was loaded",
            )
        backbone = backbone or config["backbone"]["name"]
    backbone = backbone or model.name
    if backbone not in ASSET_MODELS and (not re.fullmatch(HUB_NAME, backbone) or Path(backbone).exists()):
        raise SSTError(
            f"backbone {backbone!r} cannot be found by others",
            'push_to_hub(repo_id, backbone="owner/name") names it as the hub does',
        )
    for name in (*REQUIRED, *ADAPTERS, *ABOUT):
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, scratch / name)
    if not trained:
        return save_checkpoint(model, scratch, backbone)
    _name_backbone(scratch / CONFIG, backbone, "name", table="backbone")
    _name_backbone(scratch / ADAPTER_CONFIG, backbone, "base_model_name_or_path")
    if (scratch / "README.md").is_file():
        _name_in_card(scratch / "README.md", backbone)
    return scratch


def fetch_checkpoint(repo_id: str, api: HfApi | None = None) -> Path | None:
    """The folder of a checkpoint on the hub, in the hub's own cache; None if `repo_id` names none.

    Every file is of one commit. Offline, only what is cached as a whole is used.

    Raises:
        SSTError: a part of the checkpoint cannot be had.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not re.fullmatch(HUB_NAME, repo_id) or Path(repo_id).exists():
        return None
    api = api or HfApi()
    with _quiet_hub():
        try:
            config = Path(api.hf_hub_download(repo_id, CONFIG))
        except Exception:
            return None  # a backbone, or nothing: whoever loads it finds out
        commit = config.parent.name
        for name in (WEIGHTS, *ADAPTERS):
            try:
                api.hf_hub_download(repo_id, name, revision=commit)
            except Exception as error:
                unreachable = isinstance(error, LocalEntryNotFoundError)
                missing = isinstance(error, EntryNotFoundError) and not unreachable
                if name in ADAPTERS and (missing or _known_to_be_missing(repo_id, name, commit)):
                    continue  # not trained
                raise SSTError(
                    f"{name} of checkpoint {repo_id} cannot be fetched", "check the network and try again"
                ) from error
    return config.parent


def _name_in_card(card: Path, backbone: str) -> None:
    """Name the backbone in a card's metadata, where the hub looks for it; the rest stays byte for byte."""
    head, mark, rest = card.read_text("utf-8").partition("\n---")
    if mark and head.startswith("---"):
        head = re.sub(r"(?m)^base_model:.*$", lambda _: f"base_model: {backbone}", head, count=1)
        card.write_text(head + mark + rest, "utf-8")


def _name_backbone(file: Path, name: str, key: str, table: str | None = None) -> None:
    """Write a backbone's name into a JSON file, if it has another."""
    config = json.loads(file.read_text())
    place = config if table is None else config[table]
    if place[key] != name:
        place[key] = name
        replace_bytes(file, json.dumps(config, indent=2, sort_keys=True).encode())


def _known_to_be_missing(repo_id: str, name: str, commit: str) -> bool:
    """Whether the hub's cache has noted that a commit has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(repo_id, name, revision=commit) is _CACHED_NO_EXIST


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No progress bars of the hub's client."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
