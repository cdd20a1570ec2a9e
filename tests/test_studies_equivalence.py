"""An LRT's schedules against sequential unrolling: on tiny models, and on planted tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import lrt
from tiny_studies import LRT
from tiny_training import token_batch

from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.studies import lrt_equivalence
from sst_interp.experiments.studies.fit import Schedule
from sst_interp.experiments.studies.lrt_equivalence import (
    LRT_SCHEDULES,
    LrtEquivalence,
    Sample,
    compare_schedules,
    latent_equivalence,
    random_memory,
)
from sst_interp.training.objective import answer_loss, mean_over_passes

T = 8


def interleaved(s: int) -> Schedule:
    return Schedule("interleaved", groups=s)


def text_and_model():
    """A tiny float64 LRT with random weights, a text of 8 tokens, and some of the backbone's weights."""
    model = lrt(size=0.05)
    data = replace(token_batch(), tokens=token_batch().tokens[:1], answer=token_batch().answer[:1])
    layer = model.backbone.layers[0]
    weights = {"down": layer.ffn.down_proj.weight, "k": layer.attention.k_proj.weight}
    text = Sample(
        "one", data.tokens, lambda last: answer_loss(model, data, last),
        lambda passes: mean_over_passes(model, data, passes),
    )  # fmt: skip
    return model, text, weights


def test_as_many_groups_or_sweeps_as_positions_are_sequential_unrolling():
    model, text, weights = text_and_model()
    found = compare_schedules(model, text, weights, [interleaved(T), Schedule("multi_refine", sweeps=T)])
    assert (found.states["relative"] < 1e-9).all()
    newest = found.gradients[found.gradients["of"] == "newest outputs"]
    assert set(newest["part"]) == {"weights", "memory", *model.kind.weights()}
    np.testing.assert_allclose(newest["loss"], newest["loss_exact"], rtol=1e-9)
    np.testing.assert_allclose(newest[["cosine", "norm_ratio"]], 1, atol=1e-5)
    every = found.gradients[found.gradients["of"] == "every pass"]  # has the pass without a memory in it
    assert (every["norm_ratio"] - 1).abs().min() > 1e-3


def test_fewer_are_not_and_one_group_is_one_sweep():
    model, text, weights = text_and_model()
    found = compare_schedules(model, text, weights, LRT_SCHEDULES[:-1])
    by = found.states.groupby(["method", "n"])[["error2", "norm2"]].sum()
    error = np.sqrt(by["error2"] / by["norm2"])
    assert error["interleaved", 1] == pytest.approx(error["multi_refine", 1], rel=1e-9)
    assert error["multi_refine", 1] > error["multi_refine", 2] > error["multi_refine", 3] > 1e-6
    assert error["interleaved", 8] < 1e-9  # T = 8
    first = found.states[found.states["position"] == 0]
    assert (first["relative"] < 1e-12).all()  # a first position has no memory under any schedule
    newest = found.gradients[(found.gradients["of"] == "newest outputs") & (found.gradients["n"] < T)]
    assert newest["cosine"].max() <= 1 + 1e-9
    assert (1 - newest["cosine"]).max() > 1e-3


def test_comparing_changes_nothing_and_leaves_out_what_cannot_be():
    model, text, weights = text_and_model()
    before, kind = {n: w.clone() for n, w in model.kind.weights().items()}, model.kind
    found = compare_schedules(model, text, weights, [interleaved(2), interleaved(9)])
    assert set(found.states["n"]) == {2}
    assert model.kind is kind
    assert all(torch.equal(w, model.kind.weights()[n]) for n, w in before.items())
    assert all(w.grad is None for w in weights.values())


def test_a_random_memory_has_the_size_it_is_said_to_have():
    model = lrt()
    kind = random_memory(model, 0.05)
    weights = kind.weights()
    assert (weights["gamma"] == 0.05).all()
    m = torch.randn(500, model.backbone.d_model, dtype=torch.float64)
    for name in ("key", "value"):
        fed = m @ weights[name].flatten(0, 1).T
        assert 0.03 < float(fed.std() / m.std()) < 0.08
    assert random_memory(model, 0.05).digest() == kind.digest() != random_memory(model, 0.05, seed=1).digest()


def test_equivalence_goes_on_by_question_and_refuses_another_model(tmp_path, monkeypatch):
    study = LrtEquivalence(LRT, LRT_SCHEDULES[:2])
    before = study.run(tmp_path, model="small", questions=1)
    calls, compare = [], lrt_equivalence.compare_schedules
    monkeypatch.setattr(lrt_equivalence, "compare_schedules", lambda *a: calls.append(a[1].id) or compare(*a))
    again = study.run(tmp_path, model="small", questions=2)
    assert calls == ["sequence 1"] * 2  # the exactly and the interleaved trained model
    pd.testing.assert_frame_equal(again["states"].iloc[: len(before["states"])], before["states"])
    assert again["gradients"].groupby(["memory", "id"]).ngroups == 4
    longer = replace(LRT, small=replace(LRT.small, steps=5))
    with pytest.raises(SSTError, match="another 'small'"):
        LrtEquivalence(longer, LRT_SCHEDULES[:2]).run(tmp_path, model="small", questions=1)


def test_what_cannot_be_measured_is_one_line_before_the_work(tmp_path):
    study = LrtEquivalence()
    with pytest.raises(SSTError, match="is a State Stream Transformer, not a Latent Recurrent Transformer"):
        study.run(tmp_path, model="smollm2-135m-sst")
    with pytest.raises(SSTError, match="has no memory"):
        study.run(tmp_path, model="smollm2-135m", sizes=())
    for size in (0, float("nan"), float("inf")):
        with pytest.raises(SSTError, match="of a random memory is not above 0"):
            study.run(tmp_path, model="small", sizes=(size,))
    with pytest.raises(SSTError, match="measured on a model"):
        study.run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SSTError, match="cannot be written"):
        study.run(tmp_path / "file", model="small")


def planted_equivalence(error: float, cosine: float, questions: int = 6, seed: int = 0):
    """Tables in which every question has about this error and cosine, with some spread."""
    rng = np.random.default_rng(seed)
    states, gradients = [], []
    for q in range(questions):
        for schedule in LRT_SCHEDULES[:4]:
            about = {
                "model": "m",
                "memory": "trained",
                "id": str(q),
                "method": schedule.method,
                "n": schedule.n,
            }
            for position, n in ((0, 1), (1, 1), (2, 2)):
                norm2 = rng.uniform(50, 100)
                e2 = norm2 * (error * rng.uniform(0.9, 1.1)) ** 2
                states.append(about | {"position": position, "positions": n, "error2": e2, "norm2": norm2})
            for of in ("newest outputs", "every pass"):
                for part in ("weights", "memory"):
                    value = {"cosine": cosine + rng.normal(0, 0.001), "norm_ratio": 0.5}
                    losses = {"loss": 1 + error, "loss_exact": 1.0}
                    gradients.append(about | {"of": of, "part": part} | value | losses)
    return pd.DataFrame(states), pd.DataFrame(gradients)


def test_a_planted_error_is_found_within_its_interval():
    found = latent_equivalence(*planted_equivalence(0.2, 0.8))
    row = found.table.iloc[1]
    assert row["state_low"] < 0.2 < row["state_high"]
    assert row["weights_cosine_low"] < 0.8 < row["memory_cosine_high"]
    assert row["loss_change"] == pytest.approx(0.2)
    assert "No schedule is within 1%" in found.verdict
    assert "6 questions" in found.verdict
    same = latent_equivalence(*planted_equivalence(0.001, 0.9999)).verdict
    assert "In the direction of gradients too: interleaved S = 1" in same
    assert "gradients too: none." in latent_equivalence(*planted_equivalence(0.001, 0.7)).verdict


def test_order_changes_nothing_one_question_has_no_interval_and_nothing_is_said():
    states, gradients = planted_equivalence(0.2, 0.8)
    mixed = [t.sample(frac=1, random_state=1) for t in (states, gradients)]
    a, b = (latent_equivalence(*t).table.sort_values("n") for t in ((states, gradients), mixed))
    np.testing.assert_allclose(a["state"], b["state"])
    np.testing.assert_allclose(a["state_low"], b["state_low"], rtol=0.05)
    one = latent_equivalence(states[states["id"] == "0"], gradients[gradients["id"] == "0"])
    assert one.table["state"].notna().all()
    assert one.table["state_low"].isna().all()
    for empty in ((pd.DataFrame(), pd.DataFrame()), (states.assign(error2=np.nan), gradients)):
        with pytest.raises(Untestable):
            latent_equivalence(*empty)
    broken = gradients.assign(loss=gradients["loss"].where(gradients["id"] != "0", np.nan))
    assert latent_equivalence(states, broken).table["questions"].eq(5).all()
    figures = latent_equivalence(states, gradients).figures()
    assert len(figures) == 4
    assert all("6 questions" in figure.layout.title.subtitle.text for figure in figures.values())
