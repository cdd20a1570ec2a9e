"""States on their way to the disk, the memory that a capture takes, and what is trusted on resuming."""

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_capture import (
    ALPHA,
    capture,
    capture_module,
    recipe_for,
    tiny_llama,
    word_tokenizer,
    write_questions,
)
from tiny_run import contents

from sst_interp.errors import SSTError
from sst_interp.experiments.probe import position0
from sst_interp.models.model import attach
from sst_interp.runs import manifest, memory
from sst_interp.runs.memory import estimate, preflight
from sst_interp.runs.perturbations import in_float32, read_alone
from sst_interp.runs.states import DTYPES, Spool, Spooled, stage_states
from sst_interp.runs.store import open_run
from sst_interp.tables import markdown


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "words.csv")


@pytest.fixture(scope="module")
def model():
    made = attach(tiny_llama(torch.bfloat16), word_tokenizer(), ALPHA, name="tiny")
    made.backbone.model.generation_config.eos_token_id = [2, *range(40, 60)]
    return made


@pytest.fixture(scope="module")
def whole(csv, model, tmp_path_factory):
    recipe = recipe_for(csv, keep="all", dtype="bfloat16")
    return capture(recipe, model, tmp_path_factory.mktemp("runs") / "own", progress=False)


SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(st.dictionaries(st.text("abq0.1", min_size=1), st.tuples(SHAPES, st.sampled_from(list(DTYPES)))))
def test_a_shard_of_states_has_the_bytes_of_safetensors(tmp_path_factory, about):
    folder = tmp_path_factory.mktemp("shard")
    tensors = {name: torch.rand(shape).mul(9).to(dtype) for name, (shape, dtype) in about.items()}
    spool, given = Spool(), dict(tensors)
    for name in list(tensors)[::2]:  # every other one by way of the spool
        starts = tuple(spool.add(piece) for piece in tensors[name])
        given[name] = Spooled(spool, tensors[name].dtype, tuple(tensors[name].shape), starts)
    staged = stage_states(folder / "ours", given)
    save_file(tensors, folder / "theirs")
    assert staged.path.read_bytes() == (folder / "theirs").read_bytes()
    assert (staged.bytes, staged.tensors) == (staged.path.stat().st_size, len(tensors))
    assert staged.sha256 == manifest.sha256(staged.path)


@pytest.mark.parametrize("keep", ["all", "position0", "shifts"])
def test_kept_layers_and_positions_are_a_part_of_all(csv, model, whole, tmp_path, keep):
    some = {"keep_layers": (0, 2)} | ({} if keep == "position0" else {"keep_positions": (0, 3, 5)})
    recipe = recipe_for(csv, keep=keep, dtype="bfloat16", **some)
    run = capture(recipe, model, tmp_path / "own", progress=False)
    assert run.kept_layers == (0, 2)
    for q in range(5):
        if keep == "shifts":
            files = [load_file(file) for file in sorted((tmp_path / "own" / "states").glob("*.safetensors"))]
            index = next(f[f"q{q}.shifts.index"] for f in files if f"q{q}.shifts.index" in f)
            below = whole.pairs[(whole.pairs["cosine"] < 0.99) & (whole.pairs["question"] == q)]
            below = below[below["layer"].isin((0, 2)) & below["position"].isin((0, 3, 5))]
            assert sorted(map(tuple, index[:, 1:].tolist())) == sorted(
                below[["position", "layer", "a", "b"]].itertuples(index=False, name=None)
            )
            continue
        assert torch.equal(run.states(q), whole.states(q)[[0, 2]])
        assert torch.equal(run.state(q, 2), whole.state(q, 2)[[0, 2]])
        if keep == "all":
            every = whole.states(q, None)
            there = [p for p in (0, 3, 5) if p < len(every)]
            assert torch.equal(run.states(q, None), every[there][:, [0, 2]])
            assert all(torch.equal(run.states(q, p), every[p][[0, 2]]) for p in there)
            with pytest.raises(SSTError, match="has no position 1 at depth 3"):
                run.states(q, 1)
    with pytest.raises(SSTError, match="keeps the states of layers 0, 2 only"):
        position0(run, [0])
    if keep == "all":
        run.export(tmp_path / "ours", layers=[2], positions=[3])
        whole.export(tmp_path / "theirs", layers=[2], positions=[3])
        files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("ours", "theirs")]
        assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_keys_that_cannot_be_kept_are_one_line(csv, model, tmp_path):
    for changes, said in [
        ({"keep_positions": (1,)}, "keep_positions is not read with keep = 'position0'"),
        ({"keep": "all", "keep_positions": (7,)}, "keep_positions names position 7 of 7"),
        ({"keep_layers": ()}, r"keep_layers = \(\) is not a list of distinct whole numbers from 0"),
    ]:
        with pytest.raises(SSTError, match=said):
            recipe_for(csv, **changes)
    with pytest.raises(SSTError, match="keep_layers names layer 3 of 3"):
        capture(recipe_for(csv, dtype="bfloat16", keep_layers=(3,)), model, tmp_path / "own", progress=False)
    plain = recipe_for(csv)
    assert recipe_for(csv, keep_layers=(0,)).fingerprint() != plain.fingerprint()
    assert plain.with_settings(["keep_layers=2,1"]).keep_layers == (1, 2)
    assert "keep_layers" not in plain.to_dict()


def test_states_do_not_stay_on_the_device(csv, model, tmp_path, monkeypatch):
    """Of `keep = "all"`, no more than one position is held by what measures it."""
    held = []
    real = capture_module.Recorder.see

    def see(self, *given):
        written = real(self, *given)
        tensors = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
        tensors += [kept for kept, _ in self._spooled.values()]
        held.append(sum(t.numel() for t in tensors if t is not self._position0))
        return written

    monkeypatch.setattr(capture_module.Recorder, "see", see)
    capture(recipe_for(csv, keep="all", dtype="bfloat16"), model, tmp_path / "own", progress=False)
    assert set(held) == {0}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_weight_upcast_when_it_is_read_gives_the_same_bits(family):
    model = attach(tiny.tiny(family, torch.bfloat16), None, ALPHA)
    twins = [in_float32(model, whole) for whole in (True, False)]
    both = [read_alone(twin, [5, 6, 7, 8, 9, 10, 11, 12], [9, 10, 11], (1, 3)).resid_post for twin in twins]
    assert all(torch.equal(both[0][depth], both[1][depth]) for depth in (1, 3))
    assert both[1][3].dtype == torch.float32
    stored = {weight.data_ptr() for weight in model.backbone.model.parameters()}
    assert {weight.data_ptr() for weight in twins[1].backbone.model.parameters()} <= stored


def test_controls_with_little_memory_are_the_same(csv, model, tmp_path, monkeypatch):
    recipe = recipe_for(csv, controls=2, dtype="bfloat16")
    capture(recipe, model, tmp_path / "much", progress=False)
    controls = capture_module.Controls.watch.__globals__
    monkeypatch.setitem(controls, "free_memory", lambda _: 0)
    capture(recipe, model, tmp_path / "little", progress=False)
    assert contents(tmp_path / "much") == contents(tmp_path / "little")


def test_a_quantised_model_has_no_controls(csv, model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.backbone.model, "is_quantized", True, raising=False)
    with pytest.raises(SSTError, match="a quantised model has other weights"):
        capture(recipe_for(csv, controls=2, dtype="bfloat16"), model, tmp_path / "own", progress=False)


def test_controls_that_were_not_made_are_made_up_for(csv, model, tmp_path, monkeypatch):
    """Killed between the commit of a batch and that of its controls."""
    recipe = recipe_for(csv, controls=3, dtype="bfloat16")
    capture(recipe, model, tmp_path / "whole", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module.RunWriter, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            capture(recipe, model, tmp_path / "own", progress=False)
    partial = open_run(tmp_path / "own")
    assert len(partial.manifest["shards"]) == 1
    assert partial.noise.empty
    capture(recipe, model, tmp_path / "own", progress=False)
    assert contents(tmp_path / "own") == contents(tmp_path / "whole")


def test_resuming_hashes_nothing_that_is_as_old_and_as_long_as_it_was(whole, csv, model, monkeypatch):
    hashed = []
    real = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: hashed.append(path) or real(path))
    manifest.write_manifest(whole.folder, whole.manifest)  # after the last shard's tick of the clock
    capture(whole.recipe, model, whole.folder, progress=False)
    assert hashed == []
    open_run(whole.folder).states(0)
    assert [path.suffix for path in hashed] == [".parquet"] * 3  # to find the question
    shard = whole.folder / "states" / "0000.safetensors"
    later = manifest.written(whole.folder) + 10**12
    os.utime(shard, ns=(later, later))
    capture(whole.recipe, model, whole.folder, progress=False)
    assert hashed[3:] == [shard]
    capture(whole.recipe, model, whole.folder, progress=False, verify=0)
    assert len(hashed) == 4 + sum(len(f) for f in whole.manifest["shards"].values())


# Memory


def test_too_little_memory_is_told_before_the_first_batch_with_the_key(csv, model, tmp_path, monkeypatch):
    recipe = recipe_for(csv, dtype="bfloat16", batch_size=4)
    shape = memory.Shape.of(model)
    need = estimate(shape, recipe, 20, 5)
    sizes = [estimate(shape, recipe_for(csv, batch_size=n), 20, 5).at_once for n in (1, 2, 3, 4)]
    assert sizes == sorted(sizes)
    assert need.states == 4 * 3 * 3 * 32 * 2  # question, layer, iteration, d_model, bytes
    monkeypatch.setattr(memory, "free_memory", lambda _: sizes[1] + 1)
    with pytest.raises(SSTError, match=r"run own needs about .* GB beside the weights") as error:
        preflight(model, recipe, [20] * 5, tmp_path)
    assert "batch_size = 2 fits" in error.value.hint
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    with pytest.raises(SSTError, match=r"0\.0 are free") as error:
        capture(recipe, model, tmp_path / "own", progress=False)
    assert error.value.hint.startswith("lower batch_size")
    assert not (tmp_path / "own").exists()
    monkeypatch.setattr(memory, "free_memory", lambda _: None)
    monkeypatch.setattr(memory, "_free_on_host", lambda: 0)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    notes = preflight(model, recipe, [20] * 5, tmp_path)
    assert ["batch_size" in notes[0], "keep_layers" in notes[1]] == [True, True]


def test_the_estimate_of_kept_states_is_what_is_written(whole, csv):
    shape = memory.Shape(3, 32, 48, 4, 2, 8, 160, 1)
    longest = estimate(shape, whole.recipe, 20, 5).states
    written = [json.loads((whole.folder / "manifest.json").read_text())["shards"][b] for b in "012"]
    sizes = [entry["bytes"] for files in written for name, entry in files.items() if "states" in name]
    assert 0.3 * longest < max(sizes) < 1.1 * longest


def test_the_table_in_the_docs_is_the_estimate():
    page = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()
    assert markdown(memory.table()) in page
