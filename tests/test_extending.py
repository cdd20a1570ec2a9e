"""The examples of docs/extending.md run from a temporary folder: the command line and the report see them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_capture import tiny_llama, word_tokenizer

import sst_interp as sst
from sst_interp import cli
from sst_interp.models import kinds as kinds_module
from sst_interp.models.kinds import kinds
from sst_interp.questions import datasets as datasets_module
from sst_interp.questions import scoring
from sst_interp.questions.datasets import known_datasets

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
EXAMPLES = {
    re.search(r"\((\w+\.py)\)", code)[1]: code  # type: ignore[index]
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}
"""File -> the example of the documentation."""


@pytest.fixture
def here(tmp_path, monkeypatch, registries):
    """A working folder with the examples as plugins, a tiny backbone and a recipe."""
    for module, loaded in ((kinds_module, kinds()), (datasets_module, known_datasets())):
        name = "_KINDS" if module is kinds_module else "_DATASETS"
        monkeypatch.setattr(module, name, dict(loaded))
    monkeypatch.setattr(scoring, "_SCORERS", dict(scoring._SCORERS))
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SST_INTERP_PLUGINS", ":".join(str(tmp_path / name) for name in EXAMPLES))
    tiny_llama(torch.float32, max_position_embeddings=256).save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "r.toml").write_text(
        'checkpoint = "tiny"\ndataset = "riddles"\nkind = "damped"\nscoring = "rhyme"\ndepths = [1, 2]\n'
        'max_new_tokens = 4\nbatch_size = 2\ndtype = "float32"\n'
    )
    return tmp_path


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sst-interp", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_page_has_an_example_of_everything_that_is_registered():
    assert set(EXAMPLES) == {"halves.py", "damped.py", "riddles.py", "rhyme.py"}


def test_the_examples_are_captured_listed_and_reported(here, monkeypatch, capsys):
    assert command(monkeypatch, "datasets") in (0, None)
    assert "riddles" in capsys.readouterr().out
    assert command(monkeypatch, "capture", "r.toml") in (0, None)
    capsys.readouterr()
    assert command(monkeypatch, "runs", "--json") in (0, None)
    row = next(row for row in json.loads(capsys.readouterr().out) if row["name"] == "r")
    assert (row["kind"], row["dataset"], row["state"]) == ("damped", "riddles", "complete")
    run = sst.open_run("r")
    assert run.manifest["provenance"]["dataset"]["scoring"] == "rhyme"
    assert [
        a.endswith(g) for a, g in zip(run.questions["answer"], run.questions["gold"].str.lower(), strict=True)
    ] == (run.questions["correct"].tolist())
    assert command(monkeypatch, "report", "r", "--html", "r.html") in (0, None)
    page = Path("r.html").read_text()
    for words in ("Damped loop", "Two halves", "riddles"):
        assert words in page, words


def test_the_kind_is_the_backbone_at_depth_1_and_solves_in_parallel(here):
    from sst_interp.plugins import load_plugins

    load_plugins()
    plain, damped = (sst.load("tiny", dtype="float64", kind=kind) for kind in ("sst", "damped"))
    ids = [5, 6, 7, 8, 9]
    assert torch.equal(plain.replay([ids]).resid_post, damped.replay([ids]).resid_post)
    parallel, sequential = (damped.replay([ids], 3, method=m).resid_post for m in ("parallel", "sequential"))
    assert torch.allclose(parallel, sequential, atol=1e-9)
    assert not torch.allclose(parallel[:, :, :, 0], parallel[:, :, :, 2])
