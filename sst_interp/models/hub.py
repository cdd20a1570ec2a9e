"""Sharing: checkpoints to and from the Hugging Face hub, and runs from any URL.

    model.push_to_hub("user/my-sst")
    sst.load("user/my-sst")
    sst.open_run("hf://datasets/user/runs/gpqa")      # or https://, s3://, zip://... (`PROTOCOLS`)

A checkpoint on the hub is the same folder as on disk: the stream and, if it was trained, its adapters, never
the backbone's weights. What comes from elsewhere is data: safetensors, JSON and Parquet, nothing that runs.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sst_interp.assets.wheels import ASSET_MODELS
from sst_interp.errors import SSTError
from sst_interp.files import replace_bytes
from sst_interp.models import checkpoint
from sst_interp.models.checkpoint import checkpoint_folder
from sst_interp.models.choices import TRAINED, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from sst_interp.models.model import StateStreamModel

REQUIRED = (checkpoint.CONFIG, checkpoint.WEIGHTS)
ADAPTERS = checkpoint.ADAPTERS
ABOUT = ("README.md", "training.png", "training.json", "training.jsonl")
"""Uploaded if they are there; not needed to load."""

HUB_NAME = r"[\w.-]+/[\w.-]+"


def push_to_hub(
    model: StateStreamModel,
    repo_id: str,
    *,
    backbone: str | None = None,
    private: bool = False,
    message: str = "Upload a state stream",
    api: HfApi | None = None,
) -> str:
    """Upload a model's stream as a checkpoint, in one commit; the repository is made if it is not there.

    Args:
        repo_id: `owner/name`.
        backbone: the name others load the backbone by; None takes the one the model was loaded by.
        private: of a repository that is made.
        message: the commit's.
        api: where the hub is and who asks; None is the user's own.

    Returns:
        The commit's URL.

    Raises:
        SSTError: the backbone's name means nothing elsewhere; adapters with other blend weights than they
            were trained with; no access.
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
    """The model's checkpoint as a folder that means the same elsewhere: copied or written into `scratch`."""
    source, trained = checkpoint_folder(model.name) or fetch_checkpoint(model.name, api=api), False
    if source is not None:
        config, kind, theirs = checkpoint.read_checkpoint(source)
        same = kind.like(model.kind) and all(
            getattr(theirs, field) == getattr(model.choices, field) for field in TRAINED
        )
        trained = (source / checkpoint.ADAPTER_CONFIG).is_file()
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
        return checkpoint.save_checkpoint(model, scratch, backbone)
    _name_backbone(scratch / checkpoint.CONFIG, ("backbone", "name"), backbone)
    _name_backbone(scratch / checkpoint.ADAPTER_CONFIG, ("base_model_name_or_path",), backbone)
    return scratch


def fetch_checkpoint(repo_id: str, revision: str | None = None, api: HfApi | None = None) -> Path | None:
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
            found = Path(api.hf_hub_download(repo_id, checkpoint.CONFIG, revision=revision))
        except Exception:
            return None  # a backbone, or nothing: whoever loads it finds out
        commit = found.parent.name
        for name in (checkpoint.WEIGHTS, *ADAPTERS):
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
    return found.parent


def _name_backbone(file: Path, keys: tuple[str, ...], name: str) -> None:
    """Write a backbone's name into a JSON file, if it has another."""
    config = json.loads(file.read_text())
    *outer, last = keys
    place = config
    for key in outer:
        place = place[key]
    if place[last] != name:
        place[last] = name
        replace_bytes(file, json.dumps(config, indent=2, sort_keys=True).encode())


def _known_to_be_missing(repo_id: str, name: str, commit: str) -> bool:
    """Whether the hub's cache has noted that a commit has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(repo_id, name, revision=commit) is _CACHED_NO_EXIST


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No bars from inside a library."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
