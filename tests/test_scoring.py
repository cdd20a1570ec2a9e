"""How answers are graded: by likelihood wherever a run is made or read, by text, by a scorer with a name."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_capture import capture_module, recipe_for, tiny_llama, word_tokenizer, write_questions

from sst_interp.errors import SSTError
from sst_interp.experiments.patching.effects import Patches, choice_sums, read_text
from sst_interp.experiments.patching.run import Plan, patch_run
from sst_interp.experiments.probe import halting_labels
from sst_interp.models.model import attach
from sst_interp.questions import Graded, Item, Question, grade, graded, load_questions, scorer
from sst_interp.questions import datasets as datasets_module
from sst_interp.questions.item import ask, canonical_text, final_lines
from sst_interp.questions.scoring import _SCORERS, grade_by_likelihood
from sst_interp.runs.provenance import prompt_tokens
from sst_interp.runs.recipe import Recipe
from sst_interp.training import evaluation
from sst_interp.training.evaluation import TASKS, choices, evaluate

METALS = Item("m", "Which is a metal?", ("tin", "wood", "a very long stone"), 0)


@pytest.fixture(scope="module")
def model():
    return attach(tiny_llama(), word_tokenizer(), torch.linspace(0.1, 0.4, 3), name="tiny")


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("q") / "words.csv", 6)


@pytest.fixture(scope="module")
def run(csv, model, tmp_path_factory):
    recipe = recipe_for(csv, scoring="likelihood", depths=(1, 3))
    return capture_module.capture(recipe, model, tmp_path_factory.mktemp("r") / "own", progress=False)


def test_the_question_is_the_harness_cloze_and_shows_no_choice():
    for seed in range(6):
        question = ask(METALS, seed, scoring="likelihood")
        assert question.prompt == "Question: Which is a metal?\nAnswer:"
        assert question.choices["ABC".index(question.gold)] == "tin"


def test_no_chat_template_is_put_around_it():
    templated = word_tokenizer()
    templated.chat_template = "{{ 'quorvex9 quorvex8 ' + messages[0]['content'] }}"
    model = attach(tiny_llama(), templated)
    cloze, lettered = ask(METALS, scoring="likelihood"), ask(METALS)
    assert prompt_tokens(model, cloze) == model.encode(cloze.prompt)
    assert prompt_tokens(model, lettered) == model.chat(lettered.prompt)
    assert len(model.chat(cloze.prompt)) == len(model.encode(cloze.prompt)) + 2


def test_the_likeliest_choice_is_the_answer_and_the_margin_says_by_how_much():
    raw, per = (ask(METALS, 0, scoring=s) for s in ("likelihood", "likelihood_per_character"))
    sums = {"tin": -3.0, "wood": -3.5, "a very long stone": -5.1}
    values = [sums[choice] for choice in raw.choices]
    assert grade_by_likelihood(raw, values) == (Graded(raw.gold, True), pytest.approx(0.5))
    answer, margin = grade_by_likelihood(per, values)
    assert per.choices["ABC".index(answer.answer)] == "a very long stone"
    assert (answer.correct, margin) == (False, pytest.approx(-3.0 / 3 + 5.1 / 17))


@pytest.mark.parametrize("scoring", ["likelihood", "likelihood_per_character"])
def test_a_run_by_likelihood_is_what_the_model_says_at_each_depth(csv, model, tmp_path, scoring):
    recipe = recipe_for(csv, scoring=scoring, depths=(1, 3))
    run = capture_module.capture(recipe, model, tmp_path / "own", progress=False)
    asked = load_questions(str(csv), scoring=scoring).questions
    rows = run.questions.set_index(["question", "depth"])
    assert rows.groupby("question")["answer"].nunique().max() > 1  # the depth matters somewhere
    for (q, depth), row in rows.iterrows():
        question = asked[q]
        sums = model.loglikelihood(question.prompt, [f" {c}" for c in question.choices], depth).sums
        answer, margin = grade_by_likelihood(question, sums.tolist())
        assert (row["answer"], bool(row["correct"]), row["gold"]) == (*answer, question.gold)
        assert row["likelihood_margin"] == pytest.approx(margin, rel=1e-5)
        assert row["correct"] == (row["likelihood_margin"] > 0)
        assert row["prompt_tokens"] == len(model.encode(question.prompt))
    # what is generated is what the model writes after "Answer:"
    first = run.steps.query("question == 0 and depth == 3 and text == 'own' and iteration == 3")["token"]
    written = model.generate([model.encode(asked[0].prompt)], 3, recipe.max_new_tokens).tokens[0]
    assert first.tolist() == written


def test_an_interrupted_run_by_likelihood_goes_on_to_the_same(csv, model, run, tmp_path, monkeypatch):
    from tiny_capture import interrupt
    from tiny_run import contents

    with monkeypatch.context() as patch:
        interrupt(patch, capture_module, "capture_batch", 2)
        with pytest.raises(KeyboardInterrupt):
            capture_module.capture(run.recipe, model, tmp_path / "own", progress=False)
    capture_module.capture(run.recipe, model, tmp_path / "own", progress=False)
    assert contents(tmp_path / "own") == contents(run.folder)


def test_the_probe_reads_the_likeliest_answers(run):
    from sst_interp.analyses.answers import answers_of

    answers = answers_of(run.questions)
    changed = run.questions.pivot(index="question", columns="depth", values="answer")
    labels = halting_labels(answers, "answer-changed")
    assert labels.positive.tolist() == (changed[1] != changed[3]).tolist()


def test_patches_at_position_0_are_graded_by_likelihood(run, model, tmp_path):
    rows = patch_run(run, tmp_path / "rows", 3, Plan(layers=3, windows=2, new_tokens=3), model)
    answered = rows["answer_changed"].notna()
    assert (answered == (rows["continued"] & (rows["position"] == 0))).all()
    first = rows[answered]
    assert not first[first["what"] == "own"]["answer_changed"].any()
    whole = run.questions.pivot(index="question", columns="depth", values="answer")
    differ = first.groupby("question")["answers_differ"].first()
    assert differ.tolist() == [float(whole.loc[q, 1] != whole.loc[q, 3]) for q in differ.index]


def test_unpatched_rows_have_the_likelihoods_of_their_depths(model):
    prompt, after = [9, 10, 11, 12], [[20, 21, 22], [30]]
    reading = read_text(model, prompt, [40, 41], 3)
    patches = Patches()
    patches.put(0, 3, "resid_post", 1, 1, torch.ones(32, dtype=torch.float64))
    sums = choice_sums(model, reading, patches, 2, after)
    for row, depth in ((0, 3), (2, 1)):
        assert torch.allclose(sums[row], model.loglikelihood(prompt, after, depth).sums, atol=1e-9)
    assert not torch.allclose(sums[1], sums[0])


def test_an_evaluation_by_likelihood(csv, model, tmp_path, monkeypatch):
    asked = load_questions(str(csv), scoring="likelihood").questions
    rows = choices(model, asked, [1, 3], batch_size=4)
    for _, row in rows.iterrows():
        question = next(q for q in asked if q.id == row["id"])
        sums = model.loglikelihood(question.prompt, [f" {c}" for c in question.choices], row["depth"]).sums
        graded_, margin = grade_by_likelihood(question, sums.tolist())
        assert (row["answer"], row["correct"], row["margin"]) == (*graded_, pytest.approx(margin))
    monkeypatch.setattr(
        evaluation,
        "load_questions",
        lambda _d, n, split, scoring: load_questions(str(csv), n, scoring=scoring),
    )
    kept = evaluate(model, tmp_path, [1, 3], ["arc-easy-likelihood"], questions=6)
    np.testing.assert_array_equal(kept["value"], rows["correct"])


def test_tasks_by_likelihood_are_not_asked_for_by_default():
    assert TASKS["sciq-likelihood-per-character"].kind == "likelihood_per_character"
    assert not any("likelihood" in name for name in evaluation.BY_DEFAULT)


@pytest.mark.parametrize(
    ("item", "scoring", "says"),
    [
        (METALS, "text", "has choices, and scoring is 'text'"),
        (METALS, "number", "has choices"),
        (Item("n", "How many?", (), "7"), "letter", "has no choices"),
        (Item("n", "How many?", (), "7"), "likelihood", "has no choices"),
        (Item("n", "Who?", (), "Ada"), None, "the answer is not a number"),
    ],
)
def test_a_scoring_that_does_not_fit_its_question(item, scoring, says):
    with pytest.raises(SSTError, match=says):
        ask(item, scoring=scoring)


def test_what_a_recipe_by_likelihood_refuses(csv):
    for key in ("instruction", "reply_prefix"):
        with pytest.raises(SSTError, match=f"{key} is not read with scoring"):
            recipe_for(csv, scoring="likelihood", **{key: "("})
    with pytest.raises(SSTError, match="unknown scoring 'likelyhood'"):
        load_questions(str(csv), scoring="likelyhood")


def test_a_recipe_without_the_new_keys_is_what_it_was():
    plain = Recipe("a", "c", "d")
    assert {"scoring", "columns"}.isdisjoint(plain.to_dict())
    other = Recipe("a", "c", "d", scoring="text", columns={"question": "Q", "choices": ["a", "b"]})
    assert Recipe.loads(other.to_toml(), "a") == other
    assert plain.with_settings(["columns.question=Q", "scoring=text"]).columns == {"question": "Q"}
    assert len({r.fingerprint() for r in (plain, other, Recipe("a", "c", "d", scoring="text"))}) == 3
    for wrong in ({"questions": "Q"}, {"question": 3}, {"choices": []} | {"id": ""}, []):
        with pytest.raises(SSTError, match=r"columns = .* is not a table of column names"):
            Recipe("a", "c", "d", columns=wrong)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("  a cat\n", "Cat"),
        ("“Paris”!", "paris"),
        ("an", "AN"),
        ("[1, 2]", "1, 2"),
        ("++", "++"),
    ],
)
def test_texts_that_are_the_same_answer(one, other):
    assert canonical_text(one) == canonical_text(other)
    assert canonical_text(canonical_text(one)) == canonical_text(one)


@pytest.mark.parametrize(
    ("one", "other"), [("cat", "cats"), ("+", "-"), ("the cat sat", "cat the sat"), ("1.5", "15")]
)
def test_texts_that_are_not(one, other):
    assert canonical_text(one) != canonical_text(other)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Paris.\nIt is in France.", "Paris."),
        ("Let me think.\nThe answer is: Paris.\nBye", "Paris."),
        ("Answer: Rome. No, the answer is Paris", "Paris"),
        ("So #### Paris", "Paris"),
        ("\n\n", ""),
        ("Paris. Answer:", "Paris. Answer:"),
    ],
)
def test_where_a_reply_gives_its_answer(reply, answer):
    assert final_lines(reply) == answer
    assert grade("text", reply) == (canonical_text(answer) or None)


def test_a_file_of_texts(tmp_path):
    path = tmp_path / "capitals.jsonl"
    path.write_text(json.dumps({"question": "Capital of France?", "answer": "The Paris"}) + "\n")
    (question,) = load_questions(str(path), scoring="text").questions
    assert (question.kind, question.gold) == ("text", "paris")
    assert question.prompt.endswith("Reply with the answer alone.")
    assert graded(question, "PARIS!") == ("paris", True)
    assert not graded(question, "Paris is it").correct


@pytest.fixture
def scorers():
    before = dict(_SCORERS)
    yield
    _SCORERS.clear()
    _SCORERS.update(before)


def test_a_scorer_of_ones_own_grades_a_run(csv, model, tmp_path, scorers):
    @scorer("long")
    def long(question: Question, reply: str) -> Graded:
        return Graded(str(len(reply.split())), len(reply.split()) > 5)

    recipe = recipe_for(csv, scoring="long", depths=(1, 2))
    run = capture_module.capture(recipe, model, tmp_path / "own", progress=False)
    words = run.questions["answer"].astype(int)
    assert (run.questions["correct"] == (words > 5)).all()
    assert "likelihood_margin" not in run.columns("questions")
    with pytest.raises(SSTError, match="two scorers are called 'letter'"):
        scorer("letter")(long)


def test_a_scorer_that_fails_is_named_and_the_question_not_quoted(scorers):
    @scorer("broken")
    def broken(question, reply):
        raise ValueError(question.prompt)

    question = Question("q7", "quorvex", "x", "text", 0, scoring="broken")
    with pytest.raises(SSTError, match="scorer 'broken', question q7: ValueError") as told:
        graded(question, "x")
    assert "quorvex" not in str(told.value)


def test_reasoning_gym_grades_what_is_not_a_number():
    asked = load_questions("reasoning-gym:spell_backward?size=5").questions
    for question in asked:
        assert question.kind == "text"
        assert question.scoring == "reasoning-gym"
        assert graded(question, f"The answer is {question.gold}").correct
        assert not graded(question, "The answer is nothing").correct
        assert graded(question, "") == (None, False)
    sums = load_questions("reasoning-gym:chain_sum?size=5").questions
    assert {(q.kind, q.scoring) for q in sums} == {("number", None)}
    own = load_questions("reasoning-gym:chain_sum?size=5", scoring="reasoning-gym").questions
    assert all(graded(q, f"#### {q.gold}").correct and not graded(q, "#### 7.5").correct for q in own)
    with pytest.raises(SSTError, match="is not of reasoning-gym"):
        graded(Question("q", "x", "1", "number", 0, scoring="reasoning-gym"), "1")


# The hub


ARC = [
    {"id": "a", "question": "One?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    {"id": "b", "question": "Two?", "choices": {"text": ["u", "v"], "label": ["1", "2"]}, "answerKey": "1"},
]
PIQA = [{"goal": "Cut it.", "sol1": "knife", "sol2": "spoon", "label": 0}]
TRIVIA = [{"question": "Capital of France?", "a": {"value": "Paris"}}]


def on_disk(folder, rows, place):
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


def golds(found):
    return {q.id: q.choices["AB".index(q.gold)] if q.choices else q.gold for q in found.questions}


@pytest.mark.parametrize("place", ["ARC-Easy/test/0000.parquet", "ARC-Easy/test-00000-of-00001.parquet"])
def test_a_hub_dataset_from_a_local_copy(tmp_path, monkeypatch, place):
    monkeypatch.chdir(on_disk(tmp_path / "arc", ARC, place).parent)
    found = load_questions("hf:./arc:ARC-Easy", columns={"answer": "answerKey"})
    assert golds(found) == {"a": "y", "b": "u"}
    assert found.provenance["source"] == "folder arc ARC-Easy"
    assert found.provenance["split"] == "test"
    same = {"answer": "answerKey", "choices": "choices"}
    assert load_questions("hf:./arc:ARC-Easy", split="test", columns=same).questions == found.questions


def test_labels_that_count_and_texts_inside_a_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_disk(tmp_path / "piqa", PIQA, "data/train-0.parquet")
    columns = {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"}
    assert golds(load_questions("hf:./piqa", split="train", columns=columns)) == {"1": "knife"}
    on_disk(tmp_path / "trivia", TRIVIA, "rc/test/0000.parquet")
    columns = {"answer": "a.value"}
    assert golds(load_questions("hf:./trivia:rc", columns=columns, scoring="text")) == {"1": "paris"}


def test_the_hub_is_asked_for_the_files_of_one_split(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, **how):
        asked.append((name, how["revision"], how["allow_patterns"]))
        return str(on_disk(tmp_path / "cache", ARC, "ARC-Easy/test/0000.parquet"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = load_questions("hf:allenai/ai2_arc:ARC-Easy", split="test", columns={"answer": "answerKey"})
    patterns = ["ARC-Easy/test/*.parquet", "ARC-Easy/test-*.parquet"]
    assert asked == [("allenai/ai2_arc", datasets_module.CONVERTED, patterns)]
    assert found.provenance["source"] == "hub allenai/ai2_arc ARC-Easy"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: 1 / 0)
    with pytest.raises(SSTError, match="could not get allenai/ai2_arc from the hub") as told:
        load_questions("hf:allenai/ai2_arc:ARC-Easy", columns={"answer": "answerKey"})
    assert "hf:./FOLDER" in told.value.hint


@pytest.mark.parametrize(
    ("dataset", "how", "says"),
    [
        ("hf:./arc:ARC-Hard", {}, "no Parquet files of configuration 'ARC-Hard', split 'test'"),
        ("hf:./arc:ARC-Easy", {"split": "train"}, "split 'train'"),
        ("hf:./arc:ARC-Easy", {}, "ARC-Easy test row 1 has no 'answer'"),
        ("hf:./damaged:x", {}, "cannot read 0.parquet"),
        ("hf:./nowhere:x", {}, "no Parquet files"),
    ],
)
def test_a_hub_dataset_that_cannot_be_read(tmp_path, monkeypatch, dataset, how, says):
    monkeypatch.chdir(on_disk(tmp_path / "arc", ARC, "ARC-Easy/test/0000.parquet").parent)
    (tmp_path / "damaged" / "x" / "test").mkdir(parents=True)
    (tmp_path / "damaged" / "x" / "test" / "0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SSTError, match=says):
        load_questions(dataset, **how)


# The harness, on real weights


@pytest.mark.real
@torch.no_grad()
def test_answers_are_those_of_lm_evaluation_harness():
    """The same requests through `HFLM.loglikelihood` of the same Hugging Face model, in float32."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    import sst_interp as sst

    model, n = sst.load("smollm2-135m", dtype="float32"), 20
    asked = load_questions("arc-easy", n, scoring="likelihood").questions
    harness: Any = huggingface.HFLM  # its own decorators hide the signature from type checkers
    harness = harness(
        pretrained=model.backbone.model, tokenizer=model.tokenizer, batch_size=8, backend="causal"
    )
    pairs = [(q.prompt, f" {choice}") for q in asked for choice in q.choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = iter(harness.loglikelihood(requests, disable_tqdm=True))
    ours, raw = [], []
    for question in asked:
        raw.append([next(theirs)[0] for _ in question.choices])
        ours.append(model.loglikelihood(question.prompt, [f" {c}" for c in question.choices]).sums.tolist())
        np.testing.assert_allclose(ours[-1], raw[-1], atol=2e-3)
    for scoring in ("likelihood", "likelihood_per_character"):
        read = choices(model, load_questions("arc-easy", n, scoring=scoring).questions)
        for question, sums, (_, row) in zip(asked, raw, read.iterrows(), strict=True):
            by = len if scoring != "likelihood" else lambda _: 1
            best = max(range(len(sums)), key=lambda i: sums[i] / by(question.choices[i]))
            assert row["answer"] == "ABCDE"[best], (scoring, question.id)
    assert pd.Series([s for sums in ours for s in sums]).nunique() > n
