"""Sharing: what is uploaded is what is on disk, and what comes back is what was uploaded.

The hub is a small server on this machine with a folder behind it: a folder per repository and commit.
"""

import base64
import hashlib
import json
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_run
import torch
from huggingface_hub import HfApi, constants
from tiny_capture import save_model

from sst_interp.errors import SSTError
from sst_interp.models import checkpoint as adapters
from sst_interp.models import loading
from sst_interp.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, WEIGHTS, save_checkpoint
from sst_interp.models.choices import Choices
from sst_interp.models.loading import checkpoint_of, fetch_checkpoint, load, load_tokenizer, push_to_hub
from sst_interp.runs import manifest
from sst_interp.runs.store import fetch_run, open_run

THEIRS = Choices(carry="ffn_output", kv="first")
TOKENS = [[5, 9, 100, 42, 77]]


class Hub:
    """Repositories as folders: `root/owner/name/COMMIT/file`."""

    def __init__(self, root):
        self.root, self.asked, self.forbidden, self.after_file = root, [], False, None
        self.commits: dict[str, list[str]] = {}

    def add(self, repo, files):
        """A commit on top of the last one."""
        commits = self.commits.setdefault(repo, [])
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        folder = self.root / repo / commit
        if commits:
            shutil.copytree(self.root / repo / commits[-1], folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        commits.append(commit)
        return commit

    def folder(self, repo):
        return self.root / repo / self.commits[repo][-1]


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that uploading and downloading small files takes."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(("POST", self.path))
        if self.hub.forbidden:
            return self.answer(403, {"error": "no write access"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.commits.setdefault(repo, [])
            return self.answer(200, {"url": f"{constants.ENDPOINT}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        assert "/commit/main" in self.path
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = self.hub.add(repo, files)
        url = f"{constants.ENDPOINT}/{repo}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def do_GET(self):
        self.hub.asked.append((self.command, self.path))
        owner, name, _, revision, file = self.path.split("?")[0].strip("/").split("/", 4)
        commits = self.hub.commits.get(f"{owner}/{name}")
        if not commits:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commit = commits[-1] if revision == "main" else revision
        path = self.hub.root / owner / name / commit / file
        if not path.is_file():
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = path.read_bytes()
        if self.hub.after_file is not None and self.command == "GET":
            self.hub.after_file(file)
        etag = hashlib.sha1(data).hexdigest()
        return self.answer(200, data, X_Repo_Commit=commit, ETag=f'"{etag}"')

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of its own per test, and an empty cache, for everyone who asks huggingface_hub."""
    served = Hub(tmp_path / "hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), {"hub": served}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    files = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture
def backbone(folder, monkeypatch):
    """A backbone with a name that means the same everywhere."""
    monkeypatch.setitem(loading.ASSET_MODELS, "tiny", lambda: folder)
    return "tiny"


@pytest.fixture
def untrained(backbone):
    alpha = torch.rand(3, 32, generator=torch.Generator().manual_seed(0)) / 10
    return load(backbone, alpha, THEIRS, dtype="float32")


@pytest.fixture
def trained(backbone, folder, tmp_path):
    """A checkpoint with adapters that do something, and what a training leaves beside it."""
    model = load(backbone, 0.05, dtype="float32")
    content = model.backbone.content_hash
    peft_model = adapters.add_adapters(model.backbone.model, 2, 4, (), 0)
    for name, weight in adapters.trainable(peft_model).items():
        generator = torch.Generator().manual_seed(len(name))
        weight.data = torch.randn(weight.shape, generator=generator) / 5
    where = save_checkpoint(model, tmp_path / "trained", backbone, peft_model, content)
    (where / "README.md").write_text("---\nbase_model: tiny\nlicense: apache-2.0\n---\n\n# A card\n")
    (where / "training.jsonl").write_text('{"step": 1}\n')
    (where / "training.safetensors").write_bytes(b"the optimiser's state")
    return where


def test_a_stream_comes_back(hub, untrained, tmp_path):
    url = push_to_hub(untrained, "me/stream")
    assert url.endswith(hub.commits["me/stream"][0])
    assert len(hub.commits["me/stream"]) == 1  # in one commit
    on_disk = save_checkpoint(untrained, tmp_path / "local", "tiny")
    assert {p.name for p in hub.folder("me/stream").iterdir()} == {CONFIG, WEIGHTS}
    for file in on_disk.iterdir():
        assert (hub.folder("me/stream") / file.name).read_bytes() == file.read_bytes()
    fetched = fetch_checkpoint("me/stream")
    places = ("me/stream", fetched, on_disk, hub.folder("me/stream"))
    models = [load(where, dtype="float32") for where in places]
    for model in models:
        assert model.choices == THEIRS
        assert torch.equal(model.replay(TOKENS, 2).logits, untrained.replay(TOKENS, 2).logits)
    assert load_tokenizer("me/stream").get_vocab() == load_tokenizer("tiny").get_vocab()


def test_a_trained_checkpoint_comes_back(hub, trained, tmp_path):
    model = load(trained, dtype="float32")
    push_to_hub(model, "me/trained")
    there = hub.folder("me/trained")
    kept = {CONFIG, WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md", "training.jsonl"}
    assert {p.name for p in there.iterdir()} == kept
    for name in kept:
        assert (there / name).read_bytes() == (trained / name).read_bytes(), name
    again = load(fetch_checkpoint("me/trained"), dtype="float32")
    assert torch.equal(again.replay(TOKENS, 2).logits, model.replay(TOKENS, 2).logits)
    (tmp_path / "named").mkdir()
    named = checkpoint_of(model, tmp_path / "named", "owner/backbone")
    card = (trained / "README.md").read_text()
    assert (named / "README.md").read_text() == card.replace("base_model: tiny", "base_model: owner/backbone")
    plain = load("tiny", 0.05, dtype="float32")
    assert not torch.equal(plain.replay(TOKENS, 2).logits, model.replay(TOKENS, 2).logits)


def test_what_was_fetched_can_be_pushed_on(hub, trained):
    push_to_hub(load(trained, dtype="float32"), "me/first")
    fetched = load("me/first", dtype="float32")
    assert fetched.name == "me/first"
    push_to_hub(fetched, "me/second")
    for file in hub.folder("me/first").iterdir():
        if file.name in (CONFIG, WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            assert (hub.folder("me/second") / file.name).read_bytes() == file.read_bytes()


def test_a_backbone_that_others_cannot_find_is_refused(hub, folder, trained):
    model = load(folder, 0.02, dtype="float32")
    with pytest.raises(SSTError, match="cannot be found by others") as error:
        push_to_hub(model, "me/stream")
    assert "backbone=" in error.value.hint
    assert not hub.commits
    push_to_hub(model, "me/stream", backbone="owner/tiny")
    config = json.loads((hub.folder("me/stream") / CONFIG).read_text())
    assert config["backbone"]["name"] == "owner/tiny"
    assert config["backbone"]["content_hash"] == model.backbone.content_hash
    before = json.loads((trained / CONFIG).read_text())
    push_to_hub(load(trained, dtype="float32"), "me/trained", backbone="owner/tiny")
    there = hub.folder("me/trained")
    assert json.loads((there / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == "owner/tiny"
    assert json.loads((there / CONFIG).read_text())["backbone"]["name"] == "owner/tiny"
    assert json.loads((trained / CONFIG).read_text()) == before  # what is here stays as it is


def test_blend_weights_that_adapters_were_not_trained_with_are_refused(hub, trained, untrained, tmp_path):
    with pytest.raises(SSTError, match="trained with other blend weights"):
        push_to_hub(load(trained, alpha=0.09, dtype="float32"), "me/trained")
    local = save_checkpoint(untrained, tmp_path / "local", "tiny")
    push_to_hub(load(local, alpha=0.09, dtype="float32"), "me/stream")  # nothing was trained with them
    fetched = load(fetch_checkpoint("me/stream"), dtype="float32")
    assert fetched.alpha.unique().tolist() == pytest.approx([0.09])


def test_no_access_is_an_error_to_act_on(hub, untrained):
    hub.forbidden = True
    with pytest.raises(SSTError, match="cannot upload to me/stream") as error:
        push_to_hub(untrained, "me/stream")
    assert "hf auth login" in error.value.hint
    assert "\n" not in error.value.message
    with pytest.raises(SSTError, match="not a repository's name"):
        push_to_hub(untrained, "stream")


def test_what_is_no_checkpoint_is_left_to_others(hub, tmp_path, monkeypatch):
    hub.add("owner/backbone", {"config.json": b"{}"})
    assert fetch_checkpoint("owner/backbone") is None
    assert fetch_checkpoint("owner/nothing") is None
    asked = len(hub.asked)
    assert fetch_checkpoint("smollm2-135m") is None
    assert fetch_checkpoint("../up/and/away") is None
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch_checkpoint("a/b") is None  # a folder of that name
    assert len(hub.asked) == asked


def test_all_files_are_of_one_commit(hub, untrained, trained):
    """Somebody pushes another checkpoint while this one is fetched."""
    push_to_hub(untrained, "me/stream")
    other = {p.name: p.read_bytes() for p in trained.iterdir()}

    def change(file):
        if file == CONFIG:
            hub.after_file = None
            hub.add("me/stream", other)

    hub.after_file = change
    fetched = fetch_checkpoint("me/stream")
    assert {p.name for p in fetched.iterdir()} == {CONFIG, WEIGHTS}
    assert torch.equal(load(fetched, dtype="float32").alpha, untrained.alpha)


def test_without_a_network_what_is_cached_as_a_whole_is_used(hub, untrained, trained, monkeypatch):
    push_to_hub(untrained, "me/stream")
    push_to_hub(load(trained, dtype="float32"), "me/trained")
    HfApi().hf_hub_download("me/trained", CONFIG)
    HfApi().hf_hub_download("me/trained", WEIGHTS)
    whole = fetch_checkpoint("me/stream")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_checkpoint("me/stream") == whole
    assert fetch_checkpoint("me/never-seen") is None
    with pytest.raises(SSTError, match=f"{ADAPTER_CONFIG} of checkpoint me/trained cannot be fetched"):
        fetch_checkpoint("me/trained")  # it may have adapters: without them it would be another model


def test_a_checkpoint_without_its_weights_is_an_error(hub, untrained):
    push_to_hub(untrained, "me/stream")
    (hub.folder("me/stream") / WEIGHTS).unlink()
    with pytest.raises(SSTError, match=f"{WEIGHTS} of checkpoint me/stream cannot be fetched"):
        fetch_checkpoint("me/stream")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SST_INTERP_CACHE", str(tmp_path / "downloads"))
    return tiny_run.capture(tmp_path / "elsewhere" / "theirs")


def as_zip(run, tmp_path):
    archive = tmp_path / "runs.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in run.rglob("*"):
            if path.is_file():
                file.write(path, Path("theirs") / path.relative_to(run))
    return f"zip://theirs::file://{archive}"


def as_memory(run, _tmp_path):
    import fsspec

    fsspec.filesystem("memory").put(str(run), "/shared/theirs", recursive=True)
    return "memory://shared/theirs"


def as_file(run, _tmp_path):
    return f"file://{run}/"


@pytest.mark.parametrize("published", [as_file, as_zip, as_memory])
def test_a_run_is_opened_from_a_url(run, tmp_path, published):
    url = published(run, tmp_path)
    fetched = fetch_run(url)
    assert fetched.name == "theirs"
    assert tiny_run.contents(fetched) == tiny_run.contents(run)
    theirs, ours = open_run(url), open_run(run)
    assert theirs.pairs.equals(ours.pairs)
    assert torch.equal(theirs.states(3), ours.states(3))


def test_only_what_changed_is_fetched_again(run, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    copied, copy = [], LocalFileSystem.get_file

    def get_file(self, there, here, **how):
        copied.append(Path(there).relative_to(run).as_posix())
        return copy(self, there, here, **how)

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    fetched = fetch_run(f"file://{run}")
    assert len(copied) > 10
    copied.clear()
    assert fetch_run(f"file://{run}") == fetched
    assert copied == ["run.toml"]
    (fetched / "pairs" / "0001.parquet").write_bytes(b"not what was published")
    copied.clear()
    fetch_run(f"file://{run}")
    assert copied == ["pairs/0001.parquet", "run.toml"]
    assert open_run(fetched).pairs.equals(open_run(run).pairs)


def change_manifest(run, change):
    found = json.loads((run / manifest.FILE).read_text())
    change(found)
    found.pop("sha256", None)
    (run / manifest.FILE).write_text(json.dumps(found))


def test_a_shard_that_is_not_what_it_should_be_is_an_error(run):
    (run / "pairs" / "0001.parquet").write_bytes(b"cut off")
    with pytest.raises(SSTError, match=r"pairs/0001.parquet of the run at .* is damaged"):
        fetch_run(f"file://{run}")
    with pytest.raises(SSTError):
        open_run("theirs")


@pytest.mark.parametrize("file", ["../../outside.parquet", "/etc/passwd", "pairs/../../x.parquet", "a.py"])
def test_a_manifest_cannot_name_files_outside_its_run(run, tmp_path, file):
    (tmp_path / "outside.parquet").write_bytes(b"x")
    change_manifest(run, lambda m: m["shards"]["0"].update({file: {"bytes": 1, "sha256": "0", "rows": 1}}))
    with pytest.raises(SSTError, match="lists a file"):
        fetch_run(f"file://{run}")
    assert not list((tmp_path / "downloads").rglob("*.parquet"))


@pytest.mark.parametrize(
    "url", ["file:///nowhere/at/all", "memory://nothing", "no-such-protocol://x/y", "zip://a::file:///b.zip"]
)
def test_where_there_is_no_run_is_an_error(run, url):
    with pytest.raises(SSTError, match="there is no run at") as error:
        fetch_run(url)
    assert "\n" not in error.value.message


def test_a_manifest_that_is_none_is_an_error(run):
    for text in ("{", "[]", json.dumps({"format": 99})):
        (run / manifest.FILE).write_text(text)
        with pytest.raises(SSTError, match="no run that this version reads"):
            fetch_run(f"file://{run}")
