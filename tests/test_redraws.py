"""Re-draws of depth 1: sampled answers, a row per draw, and the control of claim C11 that they give."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_capture import ALPHA, capture, recipe_for, tiny_llama, word_tokenizer, write_questions

from sst_interp.analyses.answers import margin_changes
from sst_interp.errors import SSTError
from sst_interp.findings.of_run import ledger_of
from sst_interp.models.model import attach
from sst_interp.questions import load_questions
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.redraws import drawn_choices

DRAWS = 3


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "words.csv")


@pytest.fixture(scope="module")
def model():
    return attach(tiny_llama(), word_tokenizer(), ALPHA, name="tiny")


def redraws(csv, model, folder, **changes):
    recipe = recipe_for(csv, depths=(1,), draws=DRAWS, name="own-redraws", **changes)
    return capture(recipe, model, folder / "own-redraws", progress=False)


def test_every_draw_is_the_sampled_text_of_its_own_seed_in_any_batch(csv, model, tmp_path):
    run = redraws(csv, model, tmp_path, temperature=2)
    table = run.questions
    assert list(zip(table["question"], table["draw"], strict=True)) == [
        (q, d) for q in range(5) for d in (1, 2, 3)
    ]
    assert set(table["depth"]) == {1}
    questions = load_questions(str(csv), instruction="").questions
    for row in table.itertuples():
        prompt = model.chat(questions[row.question].prompt)
        out = model.generate(prompt, 1, 7, temperature=2, seed=row.draw)
        assert row.tokens == len(out.tokens[0])
    again = redraws(csv, model, tmp_path / "again", temperature=2, batch_size=5)
    assert again.questions["answer"].astype(str).tolist() == table["answer"].astype(str).tolist()


def test_choices_are_drawn_as_often_as_they_are_likely(csv):
    asked = load_questions(str(csv), scoring="likelihood").questions[:1]
    sums = torch.tensor([-1.0, -2.0])
    fields = {"name": "r", "checkpoint": "c", "dataset": "d", "depths": (1,), "draws": 8}
    for temperature in (0.5, 2.0):
        drawn = [
            drawn_choices(Recipe(**fields, seed=seed, temperature=temperature), asked, sums)
            for seed in range(250)
        ]
        share = np.mean([answer == "A" for read in drawn for answer, *_ in read])
        assert abs(share - 1 / (1 + np.exp(-1 / temperature))) < 0.03


@pytest.mark.parametrize("scoring", [None, "likelihood", "likelihood_per_character"])
def test_the_ledger_takes_them_as_the_control_of_the_oracle(csv, model, tmp_path, scoring):
    changes = {"scoring": scoring, "instruction": None} if scoring else {}
    run = capture(recipe_for(csv, **changes), model, tmp_path / "own", progress=False)
    row = next(r for r in ledger_of(run, resamples=20).rows if r.claim.id == "C11")
    assert "no re-draws" in row.finding.here
    control = redraws(csv, model, tmp_path, **changes)
    row = next(r for r in ledger_of(run, resamples=20).rows if r.claim.id == "C11")
    assert "no re-draws" not in row.finding.here
    some = run.questions.groupby("question")["correct"].any()
    drawn = control.questions.groupby("question")["correct"].any()  # as many draws as depths
    assert row.finding.figure.estimate == pytest.approx((some * 1.0 - drawn).mean())


def test_margins_change_by_hand_and_stand_beside_the_cut(csv, model, tmp_path):
    scores = [[0.0, -1.0, -3.0], [-2.0, 0.0, -3.0], [-1.0, -1.5, -4.0], [-1.0, 0.5, -4.0]]
    table = pd.DataFrame({"question": [0, 0, 1, 1], "depth": [1, 4, 1, 4], "gold": list("AABB")})
    right, wrong = margin_changes(table.assign(choice_scores=scores))
    # question 0: A 1 to -2, B -1 to 2, C stays; question 1: A .5 to -1.5, B -.5 to 1.5, C -3 to -4.5
    assert right == pytest.approx([-3.0, 2.0])
    assert wrong == pytest.approx([1.5, -1.75])
    run = capture(
        recipe_for(csv, scoring="likelihood", instruction=None), model, tmp_path / "own", progress=False
    )
    for row in run.questions.itertuples():
        own = dict(zip("AB", row.choice_scores, strict=True))
        assert own.pop(row.gold) - max(own.values()) == pytest.approx(row.likelihood_margin, abs=1e-5)
    row = next(r for r in ledger_of(run, resamples=20).rows if r.claim.id == "C10")
    assert "the right choice's margin changes by" in row.finding.control


@pytest.mark.parametrize(
    "wrong", [{"draws": 2}, {"draws": 2, "depths": (1,), "controls": 1}, {"temperature": 0.5}, {"draws": -1}]
)
def test_a_recipe_that_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(SSTError):
        Recipe("r", "c", "d", **wrong)
