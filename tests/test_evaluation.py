"""Losses and accuracies by depth: what a replay gives, kept as they finish, compared by question."""

import json
import shutil
from dataclasses import replace
from string import ascii_uppercase

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tiny_capture import save_model, tiny_llama, word_tokenizer
from tiny_training import EXAMPLES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.training_results import ORACLE, depth_scores, training_curves
from sst_interp.models.checkpoint import fingerprint, save_checkpoint
from sst_interp.models.loading import load
from sst_interp.models.model import attach
from sst_interp.questions.item import Item, Question
from sst_interp.training import evaluation as by_name
from sst_interp.training import evaluation as tasks
from sst_interp.training.card import behind
from sst_interp.training.data import Example
from sst_interp.training.evaluation import (
    BY_DEFAULT,
    TASKS,
    answer_losses,
    answers,
    evaluate,
    evaluate_by_name,
    letters,
    missing,
    read_evaluation,
)


@pytest.fixture
def model():
    return attach(tiny_llama(), word_tokenizer(), alpha=0.05)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_loss_is_that_of_a_sequential_replay(model, depth):
    found = answer_losses(model, EXAMPLES, batch_size=2, iterations=depth)
    assert found["id"].tolist() == ["a", "b", "c"]
    for example, (_, row) in zip(EXAMPLES, found.iterrows(), strict=True):
        logits = model.replay([list(example.tokens)], depth, "sequential").logits[0, :, -1].log_softmax(-1)
        wanted = -sum(logits[t - 1, example.tokens[t]] for t in range(example.prompt, len(example.tokens)))
        assert row["loss"] == pytest.approx(float(wanted), rel=1e-6)
        assert row["tokens"] == len(example.tokens) - example.prompt


def test_enough_sweeps_give_the_exact_loss(model):
    exact = answer_losses(model, EXAMPLES)
    swept = answer_losses(model, EXAMPLES, sweeps=6)
    np.testing.assert_allclose(exact["loss"], swept["loss"], rtol=1e-8)
    assert not np.allclose(exact["loss"], answer_losses(model, EXAMPLES, sweeps=1)["loss"], rtol=1e-4)


def test_the_batch_does_not_matter(model):
    one, all_ = (answer_losses(model, EXAMPLES, batch_size=n)["loss"] for n in (1, 3))
    np.testing.assert_allclose(one, all_, rtol=1e-9)


def test_answers_are_graded_in_the_order_given(model):
    asked = [Question(str(n), "sun " * (4 - n), "A", "choice", 4) for n in range(4)]
    one = pd.concat([answers(model, [q], [2], 5) for q in asked], ignore_index=True)
    pd.testing.assert_frame_equal(answers(model, asked, [2], 5, batch_size=3), one)


def test_depths_side_by_side_are_depths_one_by_one(model):
    prompts, depths = [[5, 6, 7, 8], [9, 8], [4, 5, 6]], [1, 3, 2]
    together = model.generate_at_depths(prompts, depths, 6)
    assert set(together) == set(depths)
    for depth in depths:
        alone = model.generate(prompts, depth, 6)
        assert (together[depth].tokens, together[depth].texts) == (alone.tokens, alone.texts)
        assert together[depth].stopped == alone.stopped


def test_letters_are_the_best_logit_of_a_replay_at_every_depth():
    """One position iterated to the deepest depth shows every depth before it."""
    tokenizer = letter_tokenizer()
    model = attach(tiny_llama(), tokenizer, alpha=0.3)
    asked = [Question(str(n), "sun moon " * (1 + n), "B", "choice", 3) for n in range(3)]
    found = letters(model, asked, [1, 3], batch_size=2)
    assert found["id"].tolist() == ["0", "1", "2"] * 2
    ids = [tokenizer.convert_tokens_to_ids(x) for x in "ABC"]
    for (_, row), (depth, q) in zip(found.iterrows(), [(d, q) for d in (1, 3) for q in asked], strict=True):
        stream_text = [*model.chat(q.prompt), tokenizer.convert_tokens_to_ids("(")]
        logits = (
            model.generate([stream_text], depth, 1, observe=(seen := []).append) and seen[0].logits[-1][0]
        )
        assert row["answer"] == "ABC"[int(logits[ids].argmax())]
        assert row["correct"] == (row["answer"] == "B")


def letter_tokenizer():
    """One token per character of "(A)" and per word."""
    words = ["<unk>", "</s>", "(", ")", *ascii_uppercase, "sun", "moon"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Punctuation()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), inner.pre_tokenizer])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def small_tasks(monkeypatch):
    """The real tasks' shape, with questions that a tiny model can read."""
    items = [Item(str(n), "sun moon", (), str(n), f"moon #### {n}") for n in range(6)]
    monkeypatch.setattr(tasks, "load_items", lambda *_: (items, {}))
    asked = tuple(Question(str(n), "sun " * (1 + n), "A", "choice", 4) for n in range(6))
    monkeypatch.setattr(
        tasks, "load_questions", lambda _d, n, split: type("Set", (), {"questions": asked[:n]})
    )
    return ["gsm8k-loss", "arc-easy"]


def test_what_is_measured_is_not_measured_again(model, small_tasks, tmp_path, monkeypatch):
    done = []
    found = evaluate(model, tmp_path, [1, 2], small_tasks, EXAMPLES, 3, lambda *seen: done.append(seen))
    assert set(found["task"]) == {"gsm8k-loss", "arc-easy", "held-out-loss"}
    assert found.groupby(["task", "depth"]).size().eq(3).all()
    assert {label for label, *_ in done} >= {"arc-easy at depth 1, 2", "gsm8k-loss at depth 2"}
    assert all(count <= total for _, count, total in done)
    monkeypatch.setattr(tasks, "_measure", lambda *_: pytest.fail("measured again"))
    again = evaluate(model, tmp_path, [1, 2], small_tasks, EXAMPLES, 3)
    pd.testing.assert_frame_equal(found, again)


def test_more_questions_are_measured_and_fewer_are_not(model, small_tasks, tmp_path):
    evaluate(model, tmp_path, [1], small_tasks, questions=3)
    assert missing(tmp_path, small_tasks, [1], 2) == []
    assert [task for task, *_ in missing(tmp_path, small_tasks, [1], 4)] == small_tasks


@pytest.mark.parametrize("contents", [b"", b"PAR1 nothing more PAR1", None])
def test_a_damaged_measurement_is_named_and_measured_again_alone(model, small_tasks, tmp_path, contents):
    found = evaluate(model, tmp_path, [1, 2], small_tasks, questions=3)
    file = tmp_path / "arc-easy-d2.parquet"
    if contents is None:
        pd.DataFrame({"other": [1]}).to_parquet(file)
    else:
        file.write_bytes(contents)
    for read in (lambda: missing(tmp_path, small_tasks, [1, 2], 3), lambda: read_evaluation(tmp_path)):
        with pytest.raises(SSTError, match=f"{file} (is damaged|holds another table): ") as told:
            read()
        assert "delete it" in str(told.value.hint)
    file.unlink()
    assert missing(tmp_path, small_tasks, [1, 2], 3) == [("arc-easy", [2], 3)]
    pd.testing.assert_frame_equal(evaluate(model, tmp_path, [1, 2], small_tasks, questions=3), found)


def test_a_model_without_a_stream_is_measured_once(small_tasks, tmp_path):
    plain = attach(tiny_llama(), word_tokenizer(), alpha=0.0)
    assert set(evaluate(plain, tmp_path, [1, 2, 4], small_tasks, questions=2)["depth"]) == {1}


@pytest.mark.parametrize(
    ("depths", "names", "message"),
    [
        ([], ["gsm8k"], "depths names no depth"),
        ([0], ["gsm8k"], "depths = 0 is not a whole number from 1 to 127"),
        ([1], ["gsm9k"], "unknown task"),
    ],
)
def test_bad_requests(model, tmp_path, depths, names, message):
    with pytest.raises(SSTError, match=message):
        evaluate(model, tmp_path, depths, names)
    with pytest.raises(SSTError, match="holds no evaluation"):
        read_evaluation(tmp_path)


def test_the_tasks_are_never_a_training_split():
    assert all(task.split in ("test", "validation") for task in TASKS.values())


def made_up(rng, n, depths, rate):
    """Answers that are right at random, at a rate by depth."""
    question = [f"q{i}" for i in range(n)]
    return pd.concat(
        pd.DataFrame(
            {
                "task": "gsm8k",
                "depth": depth,
                "question": question,
                "value": (rng.random(n) < rate[depth]).astype(float),
                "weight": 1.0,
            }
        )
        for depth in depths
    )


def test_scores_and_the_oracle():
    rng = np.random.default_rng(0)
    sst = made_up(rng, 400, [1, 2], {1: 0.5, 2: 0.3})
    baseline = made_up(rng, 400, [1], {1: 0.5})
    found = depth_scores({"sst": sst, "baseline": baseline}, "baseline")
    by_depth = sst.groupby("depth")["value"].mean()
    assert found.scores["gsm8k", "1", "sst"].estimate == pytest.approx(by_depth[1])
    either = sst.groupby("question")["value"].max().mean()
    assert found.scores["gsm8k", ORACLE, "sst"].estimate == pytest.approx(either)
    drop = found.differences["gsm8k", "2", "sst"]
    assert drop.estimate == pytest.approx(by_depth[2] - baseline["value"].mean())
    assert drop.high < 0
    assert found.verdict.startswith("1 of 2 scores differ from baseline's at depth 1. At most 400 questions")
    assert "gsm8k, sst at depth 2: -" in found.verdict
    assert "oracle" not in found.verdict
    beside = found.table.set_index("depth")["sst minus baseline"]
    assert beside["2"] == drop.text(percent=True)
    assert "sst at depth 1:" not in found.verdict
    assert len(found.figure().data) == 2


def test_a_loss_is_weighted_by_tokens():
    rows = pd.DataFrame(
        {"task": "x-loss", "depth": 1, "question": ["a", "b"], "value": [10.0, 2.0], "weight": [10.0, 1.0]}
    )
    found = depth_scores({"m": rows})
    assert found.scores["x-loss", "1", "m"].estimate == pytest.approx(12 / 11)
    assert "no baseline to compare with" in found.verdict
    json.dumps(found.to_dict())
    with pytest.raises(Untestable, match="nothing was evaluated"):
        depth_scores({"m": rows[:0]})


def test_pairing_is_by_question_not_by_row():
    rng = np.random.default_rng(1)
    ours = made_up(rng, 50, [1, 2], {1: 0.5, 2: 0.5})
    same = ours[ours["depth"] == 1].sample(frac=1, random_state=0)
    found = depth_scores({"a": ours, "b-baseline": same}, "b-baseline")
    difference = found.differences["gsm8k", "1", "a"]
    assert difference.estimate == difference.low == difference.high == 0


def test_curves():
    log = [{"step": 0, "held_out_exact": 2.0}]
    alphas = {"alpha_mean": 0.03, "alpha_min": 0.02, "alpha_max": 0.04}
    log += [{"step": n, "loss": 2 - n / 50, "tokens": 100, "seconds": 0.5, **alphas} for n in range(1, 41)]
    log[-1]["held_out_exact"] = 1.5
    curves = training_curves(log, "x")
    assert "2.000 -> 1.500" in curves.verdict
    assert "200/s" in curves.verdict
    assert len(curves.table) == 2
    assert len(curves.figure().data) == 6
    with pytest.raises(Untestable, match="no step was taken"):
        training_curves([{"step": 0, "held_out_exact": 2.0}])


def test_gradients_are_not_kept(model):
    model.alpha = model.alpha.requires_grad_()
    assert not answer_losses(model, EXAMPLES)["loss"].isna().any()
    assert torch.is_grad_enabled()


@pytest.fixture
def named(small_tasks, tmp_path, monkeypatch):
    """Two checkpoints on one tiny backbone, and a count of the models that were loaded."""
    backbone, loaded = save_model(tmp_path / "tiny", dtype=torch.bfloat16), []
    monkeypatch.setattr(by_name, "load", lambda name, alpha=None: loaded.append(name) or load(name, alpha))
    for name, alpha in (("a", 0.05), ("b", 0.4)):
        save_checkpoint(load(backbone, alpha), tmp_path / name, str(backbone))
    return tmp_path, loaded


def scores(found):
    return found["value"].tolist()


def test_kept_measurements_are_those_of_the_checkpoint_that_is_there_now(named):
    folder, loaded = named
    ask = lambda name: evaluate_by_name(str(folder / name), [1], ["gsm8k-loss"], 2)  # noqa: E731
    first, other = ask("a"), ask("b")
    assert scores(first) != scores(other)
    assert scores(ask("a")) == scores(first)
    assert len(loaded) == 2  # what is kept needs no model
    for name in ("stream.json", "stream.safetensors"):
        shutil.copy(folder / "b" / name, folder / "a" / name)
    with pytest.raises(SSTError, match="another model's measurements"):
        ask("a")
    shutil.rmtree(folder / "a" / "evaluation")
    assert scores(ask("a")) == scores(other)


@pytest.mark.parametrize("change", ["choices", "alpha", "backbone"])
def test_any_change_of_a_checkpoint_is_another_one(named, change):
    folder, _ = named
    before = fingerprint(folder / "a")
    config = json.loads((folder / "a" / "stream.json").read_text())
    if change == "choices":
        config["choices"]["kv"] = "first"
    elif change == "backbone":
        config["backbone"]["content_hash"] = "0" * 64
    else:
        save_file({"alpha": torch.full((3, 32), 0.06)}, folder / "a" / "stream.safetensors")
    (folder / "a" / "stream.json").write_text(json.dumps(config))
    assert fingerprint(folder / "a") != before
    assert fingerprint(shutil.copytree(folder / "b", folder / "c")) == fingerprint(folder / "b")


def test_a_folder_of_two_models_is_refused_whoever_asks(model, small_tasks, tmp_path):
    evaluate(model, tmp_path, [1], ["gsm8k-loss"], questions=2)
    other = attach(tiny_llama(), word_tokenizer(), alpha=0.3)
    with pytest.raises(SSTError, match="another model's measurements"):
        evaluate(other, tmp_path, [1, 2], ["gsm8k-loss"], questions=2)
    (tmp_path / "model.json").unlink()
    with pytest.raises(SSTError, match="does not say whose"):
        evaluate(model, tmp_path, [1], ["gsm8k-loss"], questions=2)


def test_other_held_out_examples_are_measured_anew(model, small_tasks, tmp_path):
    ours = evaluate(model, tmp_path, [1], [], EXAMPLES)
    assert scores(evaluate(model, tmp_path, [1], [], EXAMPLES)) == scores(ours)
    others = [Example(e.id, e.tokens[::-1], 1) for e in EXAMPLES]  # the same ids
    assert scores(evaluate(model, tmp_path, [1], [], others)) != scores(ours)


def test_a_task_that_asks_something_else_is_measured_anew(model, small_tasks, tmp_path, monkeypatch):
    evaluate(model, tmp_path, [1], ["arc-easy"], questions=2)
    monkeypatch.setitem(TASKS, "arc-easy", replace(TASKS["arc-easy"], split="test"))
    assert missing(tmp_path, ["arc-easy"], [1], 2) == [("arc-easy", [1], 2)]


@pytest.mark.parametrize("questions", [0, -1, 2.5, True, "3"])
def test_a_number_of_questions_is_whole_and_not_none(model, small_tasks, tmp_path, questions):
    with pytest.raises(SSTError, match=r"questions = .* is not a whole number from 1"):
        evaluate(model, tmp_path, [1], small_tasks, questions=questions)
    with pytest.raises(SSTError, match=r"questions = .* is not a whole number from 1"):
        evaluate_by_name("smollm2-135m", [1], ["gsm8k"], questions)
    assert not any(tmp_path.iterdir())


def test_the_shipped_measurements_are_found_without_a_model(monkeypatch):
    """They are those of the shipped checkpoints by their fingerprints, and of the same held-out examples."""
    monkeypatch.setattr(by_name, "load", lambda *_a, **_k: pytest.fail("loaded"))
    sst = "smollm2-135m-sst"
    for name, held_out in ((sst, sst), ("smollm2-135m-baseline", sst), ("smollm2-135m", sst)):
        found = evaluate_by_name(name, [1, 2, 3, 4], list(BY_DEFAULT), held_out_of=held_out)
        assert set(found["task"]) == {*BY_DEFAULT, "held-out-loss"}
    evaluate_by_name("smollm2-135m-lrt", [1, 2, 3, 4], ["gsm8k-loss", "arc-challenge"], 32)


def test_a_training_is_set_against_its_baseline_by_the_tokens_seen():
    steps = [{"step": n, "loss": 1.0, "tokens": 100.0, "seconds": 1.0} for n in range(1, 5)]
    looks = {0: (2.0, 2.0, 2.0), 2: (1.5, 1.6, 1.4), 4: (1.2, 1.25, 1.19)}

    def log(which):
        rows = [{"step": 0}, *map(dict, steps)]
        for n, values in looks.items():
            rows[n] |= {"held_out_exact": values[which], "held_out_depth_4": values[1]}
        return pd.DataFrame(rows).drop(columns=["held_out_depth_4"] if which else [])

    found = behind(log(0), log(2))
    assert found["tokens"].tolist() == [0, 200, 400]
    assert found["exact"].tolist() == pytest.approx([0, 0.1, 0.01])
    assert found["depth_4"].tolist() == pytest.approx([0, 0.2, 0.06])
    curves = training_curves(log(0), "sst", log(2))
    assert set(curves.figures()) == {"curves", "behind"}
    assert [list(trace.x) for trace in curves.figures()["behind"].data] == [[0, 200, 400]] * 2
    other = log(2).assign(tokens=90.0)
    assert behind(log(0), other).empty
    assert set(training_curves(log(0), "sst", other).figures()) == {"curves"}
    assert "depth_4" not in behind(log(0).drop(columns="held_out_depth_4"), log(2))
