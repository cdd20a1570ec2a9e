"""States for other tools: an export has the run's bits, a harvest the replay's; both resume."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import lrt
from tiny_capture import WORDS, interrupt, recipe_for, save_model, tiny_llama, word_tokenizer, write_questions

from sst_interp.cli import experiments
from sst_interp.errors import SSTError
from sst_interp.models.loading import load
from sst_interp.models.model import attach
from sst_interp.runs import export
from sst_interp.runs.export import harvest

DEPTH = 2


def captured(folder, **changes):
    capture = importlib.import_module("sst_interp.runs.capture").capture
    model = attach(tiny_llama(), word_tokenizer(), 0.3, name="tiny")
    recipe = recipe_for(write_questions(folder / "words.csv", 5), depths=(1, DEPTH), **changes)
    return capture(recipe, model, folder / "own", progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return captured(tmp_path_factory.mktemp("all"), keep="all", max_new_tokens=4)


@pytest.fixture
def model():
    return attach(tiny_llama(), word_tokenizer(), 0.3, name="tiny")


def read(folder):
    """The three lines of the documentation, and the index."""
    index, tensors = json.loads((folder / "index.json").read_text()), []
    for shard in index["shards"]:
        tensors.append(load_file(folder / shard["file"]))
    return index, tensors


def samples(folder):
    return torch.cat([t["states"][t["mask"]] for t in read(folder)[1]])


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rows": [3, 0], "layers": 1, "iterations": [2]},
        {"positions": slice(1, 3), "layers": torch.tensor([0, 2]), "depth": 1},
        {"rows": slice(2), "text": "depth1", "rows_per_shard": 1},
    ],
    ids=str,
)
def test_an_export_has_the_runs_states(run, tmp_path, how):
    folder = run.export(tmp_path / "states", **({"rows_per_shard": 2} | how))
    index, tensors = read(folder)
    assert index["axes"] == ["row", "position", "layer", "iteration", "d_model"]
    assert index["complete"]
    depth, text = how.get("depth", DEPTH), how.get("text", "own")
    by_row = {}
    for shard in tensors:
        for row, states, mask in zip(shard["rows"].tolist(), shard["states"], shard["mask"], strict=True):
            assert not states[~mask].any()
            by_row[row] = states[mask]
    assert list(by_row) == [entry["row"] for entry in index["rows"]]
    ids = run.questions.drop_duplicates("question").set_index("question")["id"]
    for entry in index["rows"]:
        kept = run.states(entry["question"], None, depth, text)
        there = [p for p in index["positions"] if p < len(kept)]
        kept = kept[there][:, index["layers"]][:, :, [i - 1 for i in index["iterations"]]]
        assert torch.equal(by_row[entry["row"]], kept)
        assert entry["id"] == ids[entry["question"]]
        assert entry["positions"] == len(kept)
    if how.get("rows") == [3, 0]:
        assert [entry["question"] for entry in index["rows"]] == [0, 3]
    assert sum(shard["samples"] for shard in index["shards"]) == len(samples(folder))


def test_a_run_that_keeps_position_0_exports_that(tmp_path):
    run = captured(tmp_path, max_new_tokens=2)
    folder = run.export(tmp_path / "states")
    assert read(folder)[0]["positions"] == [0]
    states = samples(folder)
    for question in range(5):
        assert torch.equal(states[question], run.states(question))
    for how in ({"positions": 1}, {"depth": 1}, {"text": "depth1"}):
        with pytest.raises(SSTError):
            run.export(tmp_path / "more", **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"layers": 3}, "there is no layer 3"),
        ({"layers": []}, "no layer is named"),
        ({"iterations": 0}, "there is no iteration 0"),
        ({"iterations": [3]}, "there is no iteration 3"),
        ({"rows": 5}, "there is no row 5"),
        ({"positions": -1}, "is not a whole number"),
        ({"positions": True}, "is not a whole number"),
        ({"rows": "1"}, "is not a whole number"),
        ({"rows_per_shard": 0}, "is not a whole number"),
        ({"depth": 5}, "unknown states"),
    ],
    ids=str,
)
def test_what_is_not_there_is_an_error(run, tmp_path, how, message):
    with pytest.raises(SSTError, match=message):
        run.export(tmp_path / "states", **how)
    assert not (tmp_path / "states" / "index.json").exists()


TEXTS = [" ".join(WORDS[7 * i : 7 * i + n]) for i, n in enumerate((5, 3, 9, 1, 6))]


def test_a_harvest_has_the_replays_states(model, tmp_path):
    """Of texts of different length, side by side: as each alone, to rounding."""
    file = tmp_path / "documents.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": text}) for text in TEXTS[:3]) + "\n\n" + json.dumps(TEXTS[3])
    )
    folder = harvest(model, file, tmp_path / "states", DEPTH, length=6, layers=[0, 2], rows_per_shard=3)
    index, tensors = read(folder)
    assert [entry["positions"] for entry in index["rows"]] == [5, 3, 6, 1]
    assert [shard["rows"] for shard in index["shards"]] == [3, 1]
    for shard in tensors:
        for row, states, mask, tokens in zip(
            *(shard[k] for k in ("rows", "states", "mask", "tokens")), strict=True
        ):
            ids = model.encode(TEXTS[row])[:6]
            assert tokens[mask].tolist() == ids
            assert (tokens[~mask] == -1).all()
            alone = model.replay(ids, DEPTH).resid_post[0][:, [0, 2]]
            assert (states[mask] - alone).abs().max() < 1e-9


@pytest.mark.parametrize(("budget", "lengths"), [(8, [5, 3]), (9, [5, 3, 1]), (10**6, [5, 3, 9, 1, 6])])
def test_a_budget_is_of_tokens(model, tmp_path, budget, lengths):
    index, _ = read(harvest(model, TEXTS, tmp_path / "states", tokens=budget))
    assert [entry["positions"] for entry in index["rows"]] == lengths


def test_a_harvest_keeps_the_positions_and_iterations_that_it_is_asked_for(tmp_path):
    model = lrt("both", hf=tiny_llama())
    ids = [[7, 9, 11, 13], [8, 10]]
    folder = harvest(model, ids, tmp_path / "states", 3, positions=[1, 3], keep=3)
    index, (shard,) = read(folder)
    assert (index["positions"], index["iterations"]) == ([1, 3], [3])
    assert shard["tokens"].tolist() == [[9, 13], [10, -1]]
    states = model.replay(ids, 3).resid_post
    assert torch.equal(shard["states"][0], states[0, [1, 3]][:, :, 2:])
    assert torch.equal(shard["states"][1, 0], states[1, 1, :, 2:])


def test_an_interrupted_harvest_goes_on(model, tmp_path, monkeypatch):
    how = {"iterations": DEPTH, "rows_per_shard": 2}
    whole = harvest(model, TEXTS, tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        interrupt(patch, export, "save_file", 1)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, TEXTS, tmp_path / "states", **how)
    assert not read(tmp_path / "states")[0]["complete"]
    made, replay = [], model.replay
    model.replay = lambda *a, **k: made.append(a) or replay(*a, **k)
    harvest(model, TEXTS, tmp_path / "states", **how)
    assert len(made) == 2
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "states").iterdir())
    for name in files:
        assert (whole / name).read_bytes() == (tmp_path / "states" / name).read_bytes()
    harvest(model, TEXTS, tmp_path / "states", **how)
    assert len(made) == 2
    for other in ({"iterations": 1}, how | {"layers": 1}, how | {"length": 3}, how | {"rows_per_shard": 3}):
        with pytest.raises(SSTError, match="holds other states"):
            harvest(model, TEXTS, tmp_path / "states", **other)
    model.alpha = model.alpha / 2
    with pytest.raises(SSTError, match="holds other states"):
        harvest(model, TEXTS, tmp_path / "states", **how)


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', "[1]", '{"text": 3}'])
def test_a_line_without_a_text_is_named_and_not_shown(model, tmp_path, line):
    file = tmp_path / "documents.jsonl"
    file.write_text(f'{{"text": "quorvex1"}}\n{line}\n')
    with pytest.raises(SSTError, match="line 2 has no text") as error:
        harvest(model, file, tmp_path / "states")
    assert line not in error.value.message
    file.write_text("\n")
    with pytest.raises(SSTError, match="no texts"):
        harvest(model, file, tmp_path / "states")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(SSTError, match="is not empty"):
        harvest(model, TEXTS, tmp_path / "mine")


def test_the_command_harvests(tmp_path, capsys):
    save_model(tmp_path / "tiny")
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    how = {"iterations": 2, "tokens": 12, "length": 4, "layers": "0,2", "keep": "2"}
    experiments.harvest(str(tmp_path / "tiny"), file, tmp_path / "states", **how)
    assert "12 positions of 4 texts" in capsys.readouterr().out
    index, _ = read(tmp_path / "states")
    assert (index["layers"], index["iterations"]) == ([0, 2], [2])
    assert [entry["positions"] for entry in index["rows"]] == [4, 3, 4, 1]
    loaded = load(str(tmp_path / "tiny"))
    states = loaded.replay([loaded.encode(text)[:4] for text in TEXTS[:3]], 2).resid_post
    assert torch.allclose(
        samples(tmp_path / "states")[:4].float(), states[0][:, [0, 2]][:, :, 1:].float(), 1e-2
    )
    for wrong, message in (({"layers": "x"}, "--layers"), ({"layers": "3"}, "there is no layer 3")):
        with pytest.raises(SSTError, match=message):
            experiments.harvest(str(tmp_path / "tiny"), file, tmp_path / "more", **(how | wrong))
    with pytest.raises(SSTError, match="is not a file"):
        experiments.harvest(str(tmp_path / "tiny"), tmp_path / "none.jsonl", tmp_path / "more", **how)


def test_a_sparse_autoencoder_trains_on_it(model, tmp_path):
    """The consumer of docs/bridges.md, word for word, on a harvest."""
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "bridges.md").read_text("utf-8")
    code = page.partition("<!-- consumer -->\n```python\n")[2].partition("```")[0]
    assert "load_file" in code
    folder = harvest(model, [" ".join(WORDS[i : i + 12]) for i in range(100)], tmp_path / "states", DEPTH)
    names = {"folder": str(folder), "layer": 1, "iteration": 2, "width": 128, "steps": 200}
    exec(code, names)
    assert names["samples"].shape == (1200, 32)
    assert names["explained"] > 0.6
    assert ((names["features"] > 0).sum(-1) <= 16).all()


def test_a_runs_tables_are_datasets(run):
    datasets = pytest.importorskip("datasets")
    steps = datasets.Dataset.from_parquet(
        sorted(map(str, run.folder.glob("steps/*.parquet"))), keep_in_memory=True
    )
    assert len(steps) == len(run.steps)
