"""Examples, their split, and the order they are trained in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_capture import tiny_llama, word_tokenizer
from tiny_training import write_gsm8k

from sst_interp.errors import SSTError
from sst_interp.models.model import attach
from sst_interp.training.data import (
    WIDTH,
    Example,
    encode,
    load_split,
    make_batch,
    padded,
    read_items,
    schedule,
)
from sst_interp.training.recipe import TrainingRecipe


@pytest.fixture
def model():
    return attach(tiny_llama(), word_tokenizer())


@pytest.fixture
def recipe(tmp_path):
    data = write_gsm8k(tmp_path / "train.jsonl")
    return TrainingRecipe(name="t", backbone="b", data=str(data), holdout=5)


def test_parts_are_disjoint_and_complete(recipe, model):
    split = load_split(recipe, model)
    held_out, train = ({e.id for e in part} for part in (split.held_out, split.train))
    assert len(held_out) == 5
    assert held_out | train == {str(n) for n in range(1, 21)}
    assert not held_out & train


def test_the_held_out_part_depends_on_the_seed_alone(recipe, model):
    from dataclasses import replace

    ids = lambda **changes: {e.id for e in load_split(replace(recipe, **changes), model).held_out}  # noqa: E731
    assert ids() == ids(batch_size=3, examples=7, method="none")
    assert ids() != ids(seed=1)
    assert ids(max_tokens=24) <= ids()


def test_long_examples_are_counted_not_cut(recipe, model):
    from dataclasses import replace

    whole = load_split(recipe, model)
    lengths = sorted(len(e.tokens) for e in (*whole.train, *whole.held_out))
    limit = lengths[len(lengths) // 2]
    split = load_split(replace(recipe, max_tokens=limit), model)
    assert split.too_long == sum(n > limit for n in lengths) > 0
    assert {e.id: e for e in split.train}.items() <= {e.id: e for e in whole.train}.items()
    with pytest.raises(SSTError, match="longer than max_tokens"):
        load_split(replace(recipe, max_tokens=2), model)


def test_an_answer_ends_its_turn_and_has_no_calculator_marks(model):
    item = read_items_of('{"question": "sun", "answer": "moon <<1+1=2>>2\\n#### 2"}')[0]
    example = encode(item, model, instruction="")
    text = model.tokenizer.decode(example.tokens[example.prompt :])
    assert example.tokens[-1] == model.tokenizer.eos_token_id
    assert "<<" not in text
    assert list(example.tokens[: example.prompt]) == model.chat("sun")


def read_items_of(line, tmp=None):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text(line)
        return read_items(str(path))


def test_a_choice_is_learnt_as_letter_and_text(model):
    line = '{"question": "sun", "choices": ["moon", "rain"], "answer": "rain"}'
    example = encode(read_items_of(line)[0], model, instruction="")
    words = model.tokenizer.decode(example.tokens[example.prompt :])
    assert words.startswith(("(A)", "(B)"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gsm8k:nowhere.jsonl", "cannot read"),
        ("gsm8k:", "names no file"),
        ("gsm9k", "unknown training data 'gsm9k'"),
        ("nowhere.csv", "cannot read"),
    ],
)
def test_missing_data_is_one_line(data, message, monkeypatch):
    monkeypatch.delenv("SST_INTERP_GSM8K", raising=False)
    with pytest.raises(SSTError, match=message):
        read_items(data)


def test_no_network_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.delenv("SST_INTERP_GSM8K", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(SSTError, match="cannot be fetched") as caught:
        read_items("gsm8k")
    assert "gsm8k:train.jsonl" in caught.value.hint


def test_the_hub_and_a_file_give_the_same_records(tmp_path, monkeypatch):
    import huggingface_hub
    import pandas as pd

    file = write_gsm8k(tmp_path / "train.jsonl")
    monkeypatch.delenv("SST_INTERP_GSM8K", raising=False)
    pd.read_json(file, lines=True).to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: tmp_path / "train.parquet")
    assert read_items("gsm8k") == read_items(f"gsm8k:{file}")


def test_an_empty_split_is_an_error(recipe, model):
    from dataclasses import replace

    with pytest.raises(SSTError, match="leaves nothing to train on"):
        load_split(replace(recipe, holdout=20), model)


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(0, 5),
    st.none() | st.integers(1, 200),
)
def test_an_epoch_shows_everything_once(lengths, batch_size, seed, examples):
    steps = schedule(lengths, batch_size, examples, seed)
    shown = [i for step in steps for i in step]
    assert len(shown) == (len(lengths) if examples is None else examples)
    assert steps == schedule(lengths, batch_size, examples, seed)
    assert all(1 <= len(step) <= batch_size for step in steps)
    counts = [shown.count(i) for i in range(len(lengths))]
    assert max(counts) - min(counts) <= 1


def test_neighbours_in_length_go_together():
    lengths = list(range(10, 330))
    steps = schedule(lengths, 8, None, 0)
    spread = [max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps]
    assert sum(spread) / len(spread) < 20  # of 320 at random order: about 250
    assert [s[0] for s in steps] != sorted(s[0] for s in steps)


def test_a_batch_marks_the_positions_before_answer_tokens():
    examples = [Example("a", (5, 6, 7, 8), 2), Example("b", (5, 6, 7), 1)]
    batch = make_batch(examples)
    assert batch.tokens.shape == (2, WIDTH)
    assert batch.tokens[:, :4].tolist() == [[5, 6, 7, 8], [5, 6, 7, 0]]
    assert not batch.tokens[:, 4:].any()
    assert batch.answer.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]


@given(st.lists(st.integers(2, 300), min_size=1, max_size=80), st.integers(64, 900), st.integers(0, 3))
def test_a_step_takes_as_many_examples_as_fit(lengths, positions, seed):
    steps = schedule(lengths, 8, None, seed, positions)
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    for step in steps:
        assert len(step) == 1 or len(step) * padded(max(lengths[i] for i in step)) <= positions


def test_several_datasets_train_together(recipe, model):
    from dataclasses import replace

    sums = "reasoning-gym:chain_sum?size=9"
    split = load_split(replace(recipe, data=[recipe.data, sums]), model)
    held_out, train = ({e.id for e in part} for part in (split.held_out, split.train))
    assert held_out | train == {str(n) for n in range(1, 21)} | {f"chain_sum-0-{n}" for n in range(9)}
    assert split.data_hash != load_split(recipe, model).data_hash


def test_few_steps_go_deeper_if_the_recipe_says_so(recipe):
    from dataclasses import replace

    exact = replace(recipe, method="exact", depths=(1, 4))
    drawn = [exact.depth(step) for step in range(400)]
    few = [replace(exact, deeper=0.2).depth(step) for step in range(400)]
    assert {*drawn} == {*few} == {1, 2, 3, 4}
    assert sum(d > 1 for d in few) < 90 < 250 < sum(d > 1 for d in drawn)
    late = [replace(exact, deeper_from=300).depth(step) for step in range(400)]
    assert late == [1] * 300 + drawn[300:]
    assert TrainingRecipe.from_dict(exact.to_dict()) == exact
    with pytest.raises(SSTError, match="deeper"):
        replace(exact, deeper=1.5)
