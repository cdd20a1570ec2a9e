"""Published copies: a run like any other, within the stated rounding of the original."""

import shutil

import numpy as np
import pytest
import tiny_run
import torch

from sst_interp.errors import SSTError
from sst_interp.runs.recorder import significant
from sst_interp.runs.store import open_run, publish


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(tiny_run.capture(tmp_path_factory.mktemp("runs") / "tiny"))


def test_a_copy_says_the_same_within_its_rounding(run, tmp_path):
    copy = publish(run, tmp_path / "copy", bits=10, top=1, iterations=(1,))
    assert copy.complete
    assert copy.recipe == run.recipe
    assert copy.manifest["published"] == {"pairs_bits": 10, "top": 1, "iterations": [1]}
    for name in ("questions", "outputs", "lens"):
        assert getattr(copy, name).equals(getattr(run, name))
    for column in run.pairs.columns:
        was, now = run.pairs[column].to_numpy(), copy.pairs[column].to_numpy()
        if was.dtype.kind != "f":
            assert (was == now).all()
            continue
        was, now = (1 - v.astype(float) if column == "cosine" else v for v in (was, now))
        slack = 2**-24 if column == "cosine" else 0
        assert np.abs(now - was).max() > 0
        assert (np.abs(now - was) <= 2**-10 * np.abs(was) + slack).all()
        assert ((was == 0) == (now == 0)).all()
    assert copy.steps.drop(columns="top100").equals(run.steps.drop(columns="top100"))
    for was, now in zip(run.steps["top100"], copy.steps["top100"], strict=True):
        assert now is was is None or list(now) == list(was[:1])
    for question in copy.questions["question"].unique():
        assert torch.equal(copy.states(question), run.states(question)[:, :1])


def test_a_copy_keeps_some_comparisons_and_the_states_of_right_answers(run, tmp_path):
    copy = publish(run, tmp_path / "copy", comparisons=("teacher_forced",), right_only=True)
    was = publish(run, tmp_path / "all").table("pairs", comparison="teacher_forced")
    assert 0 < len(was) < len(run.pairs)
    assert copy.pairs.equals(was)
    assert copy.outputs.equals(run.outputs)
    first = run.questions[run.questions["depth"] == 1]
    assert 0 < first["correct"].sum() < len(first)
    for question, right in zip(first["question"], first["correct"], strict=True):
        if right:
            assert torch.equal(copy.states(question), run.states(question)[:, :1])
        else:
            with pytest.raises(SSTError, match="states in run"):
                copy.states(question)
    with pytest.raises(SSTError, match="comparison"):
        publish(run, tmp_path / "other", comparisons=("replayed twice",))


def test_states_can_be_left_out(run, tmp_path):
    copy = publish(run, tmp_path / "copy", iterations=())
    assert not (tmp_path / "copy" / "states").exists()
    with pytest.raises(SSTError, match="has no states"):
        copy.states(0)


def test_a_copy_of_a_copy_is_that_copy(run, tmp_path):
    once = publish(run, tmp_path / "once")
    assert publish(once, tmp_path / "twice").pairs.equals(once.pairs)


def test_rounding_keeps_what_has_no_digits():
    odd = np.array([0.0, np.inf, -np.inf, np.nan, 1.0, -1024.0])
    assert np.array_equal(significant(odd, 4), odd, equal_nan=True)
    assert significant(np.array([1.0 + 2**-9]), 10)[0] == 1.0 + 2**-9
    assert significant(np.array([1.0 + 2**-10 + 2**-12]), 10)[0] == 1.0 + 2**-9


@pytest.mark.parametrize(
    ("change", "says"),
    [({"iterations": (9,)}, "has no iteration 9"), ({"iterations": (0,)}, "has no iteration 0")],
)
def test_what_cannot_be_published_is_refused_and_nothing_is_written(run, tmp_path, change, says):
    with pytest.raises(SSTError, match=says):
        publish(run, tmp_path / "copy", **change)
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_exists_is_left_alone(run, tmp_path):
    with pytest.raises(SSTError, match="exists already"):
        publish(run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SSTError, match="cannot be written"):
        publish(run, tmp_path / "file" / "copy")


def test_a_damaged_run_is_not_published(run, tmp_path):
    broken = tmp_path / "own"
    shutil.copytree(run.folder, broken)
    shard = next(broken.glob("pairs/*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SSTError, match="is damaged"):
        publish(open_run(broken), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
