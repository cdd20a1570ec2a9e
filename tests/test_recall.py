"""In-context recall: the task, its study, and what the analysis says of planted accuracies."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from sst_interp.analyses.recall import recall_accuracy
from sst_interp.errors import SSTError
from sst_interp.pretraining import recall_study
from sst_interp.pretraining.arms import BASELINE, BOTH, LONGER, Decoder
from sst_interp.pretraining.recall import Recall
from sst_interp.pretraining.recall_study import RecallPlan, passes_left, run_recall
from sst_interp.pretraining.training import Training

PLAN = RecallPlan(
    task=Recall(pairs=(1, 3), symbols=4), layers=(1, 2), decoder=Decoder(d_model=8, heads=2, warmup=1),
    steps=2, batch=4, held_out=8,
)  # fmt: skip


@pytest.mark.parametrize("filler", [False, True])
def test_every_key_is_asked_once_and_the_next_token_is_its_value(filler):
    task, n = Recall(), 8
    batch = task.draw(50, 3, n, filler)
    body = batch.tokens[:, int(filler) :]
    assert (batch.tokens[:, 0] == task.vocabulary - 1).all() == filler
    for row, answer in zip(body.tolist(), batch.answer[:, int(filler) :].tolist(), strict=True):
        shown = dict(zip(row[: 2 * n : 2], row[1 : 2 * n : 2], strict=True))
        asked = [t for t, a in enumerate(answer) if a]
        assert len(shown) == len(asked) == n
        assert {row[t] for t in asked} == set(shown)
        assert all(row[t + 1] == shown[row[t]] for t in asked)
        assert max(shown) < task.symbols <= min(shown.values())
    assert batch.answer.sum() == 50 * n


def test_sequences_are_drawn_anew_and_all_sizes_come_up():
    task = Recall(pairs=(2, 4))
    assert torch.equal(task.draw(4, 1).tokens, task.draw(4, 1).tokens)
    assert not torch.equal(task.draw(4, 1, 2, False).tokens, task.draw(4, 2, 2, False).tokens)
    lengths = {task.draw(1, k).tokens.shape[1] for k in range(60)}
    assert lengths == {8, 9, 16, 17}
    assert max(lengths) == task.positions
    pairs = task.draw(4000, 5, 2, False).tokens[:, :2]
    table = torch.zeros(16, 16).index_put_(tuple(pairs.T - torch.tensor([[0], [16]])), torch.ones(4000), True)
    assert table.min() > 0  # no key has a value of its own


def test_impossible_numbers_of_pairs_are_refused():
    for pairs in ((), (0,), (5,)):
        with pytest.raises(SSTError, match="cannot be drawn"):
            Recall(pairs=pairs, symbols=4)


def test_an_interrupted_study_goes_on_and_another_plan_is_refused(tmp_path):
    arms = (BASELINE, BOTH)
    total = passes_left(tmp_path, PLAN, [0], arms)
    run_recall(tmp_path, replace(PLAN, layers=(1, 2)), [0], (BASELINE,))
    assert passes_left(tmp_path, PLAN, [0], arms) == total - 2 * PLAN.steps
    taken = []
    table = run_recall(tmp_path, PLAN, [0], arms, lambda words, passes: taken.append(passes))
    assert sum(taken) == total - 2 * PLAN.steps
    assert passes_left(tmp_path, PLAN, [0], arms) == 0
    assert len(table) == 2 * (1 + 3) * 2  # layers, evaluations of both arms, numbers of pairs
    assert (table["answers"] == 8 * table["pairs"]).all()
    with pytest.raises(SSTError, match="steps = 2, not 3"):
        run_recall(tmp_path, replace(PLAN, steps=3))


def test_answers_are_counted_where_a_key_is_asked(monkeypatch):
    def all_right(_model, batch, _method, _groups):
        asked = batch.answer[:, :-1]
        return torch.where(asked, 0.5, torch.nan), torch.where(asked, 1.0, torch.nan)

    monkeypatch.setattr(recall_study, "score", all_right)
    weights = PLAN.decoder.weights(PLAN.task.vocabulary, PLAN.task.positions, 0)
    training = Training(PLAN.decoder, weights, BOTH, lambda k: PLAN.task.draw(4, k), 1)
    table = recall_study.accuracy(PLAN, training)
    assert (table["right"] == table["answers"]).all()
    assert (table["loss"] == table["answers"] / 2).all()
    assert set(table["evaluated"]) == {"sequential", "zero memory", "own"}


def accuracies(gain: float = 0.0, seeds: int = 4, seed: int = 0) -> pd.DataFrame:
    """Planted: the baselines near 0.4, an LRT `gain` above them, 0.3 without its memory."""
    rng = np.random.default_rng(seed)
    rows = []
    for layers in (1, 2):
        for s in range(seeds):
            base = 0.4 + 0.05 * rng.normal()
            for arm, evaluated, mean in (
                (BASELINE.name, "sequential", base),
                (LONGER.name, "sequential", base),
                (BOTH.name, "sequential", base + gain),
                (BOTH.name, "zero memory", 0.3),
            ):
                for n in (2, 8):
                    right = 1000 * (mean + 0.01 * rng.normal())
                    about = {"layers": layers, "seed": s, "arm": arm, "evaluated": evaluated, "pairs": n}
                    cost = {"steps": 1, "position_passes": 1, "seconds": 1.0, "parameters": 1}
                    rows.append(about | {"answers": 1000, "right": right, "loss": 700.0} | cost)
    return pd.DataFrame(rows)


def test_a_planted_gain_is_found_and_no_gain_is_not():
    found = recall_accuracy(accuracies(0.3))
    rows = found.differences[found.differences["minus"] == BASELINE.name]
    assert len(rows) == 4
    assert (rows["difference_low"] > 0).all()
    assert rows["difference"].to_numpy() == pytest.approx(0.3, abs=0.03)
    assert found.verdict.count("at equal compute") == 2
    assert found.verdict.count("(better)") == 6
    called = sum(recall_accuracy(accuracies(0.0, seed=s)).verdict.count("compute +") for s in range(3))
    assert called < 6
    none = [recall_accuracy(accuracies(0.0, seed=s)).differences for s in range(20)]
    rows = pd.concat(d[d["minus"] == LONGER.name] for d in none)
    assert ((rows["difference_low"] > 0) | (rows["difference_high"] < 0)).mean() < 0.15
    assert set(found.table["guess"]) == {0.5, 0.125}
    assert found.table.set_index("pairs").loc[2, "excluding"].iloc[0] == pytest.approx(0.75)  # 1/2, then 1


def test_pairing_within_seeds_is_what_finds_a_small_gain():
    found = recall_accuracy(accuracies(0.06, seeds=5))
    rows = found.differences[found.differences["minus"] == BASELINE.name]
    assert (rows["difference_low"] > 0).all()
    scores = (
        found.scores[found.scores["evaluated"] == "sequential"]
        .set_index(["arm", "layers", "pairs"])
        .sort_index()
    )
    assert (scores.loc["baseline", "accuracy_high"] > scores.loc["LRT, both", "accuracy_low"]).any()


def test_one_seed_empty_tables_and_diverged_trainings_are_said():
    one = recall_accuracy(accuracies(0.3, seeds=1))
    assert "(one seed)" in one.verdict
    assert "better" not in one.verdict
    table = accuracies()
    for empty in (table.iloc[:0], pd.DataFrame(), table.assign(loss=np.nan)):
        found = recall_accuracy(empty)
        assert found.verdict.startswith("not testable:")
        assert found.figure().layout.annotations
    alone = recall_accuracy(table[table["arm"] == BASELINE.name])
    assert "nothing to compare with" in alone.verdict
    bad = (table["seed"] == 1) & (table["arm"] == BOTH.name)
    broken = recall_accuracy(table.assign(loss=table["loss"].mask(bad)))
    assert broken.scores.set_index("arm")["seeds"].groupby("arm").max().to_dict() == {
        BASELINE.name: 4, LONGER.name: 4, BOTH.name: 3,
    }  # fmt: skip
    assert list(found.figures()) == ["figure"]
    drawn = recall_accuracy(table).figures()
    assert list(drawn) == ["1 layer", "2 layers"]
    assert all("4 seeds" in figure.layout.title.subtitle.text for figure in drawn.values())
