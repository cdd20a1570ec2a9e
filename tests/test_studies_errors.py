"""Errors of sweeps: measured on tiny models, and analysed on tables with known answers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny

from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.studies import two_pass
from sst_interp.experiments.studies.errors import FLOOR, SUMS, approximation_error, contraction
from sst_interp.experiments.studies.fit import Schedule
from sst_interp.experiments.studies.two_pass import (
    BLEND,
    KEYS,
    Condition,
    Outputs,
    TwoPass,
    blend_of,
    by_position,
    compare,
    grid,
    measure_errors,
    switched_on,
)
from sst_interp.models.model import attach
from sst_interp.questions.item import Item
from sst_interp.training.data import Example

T = 12


def example(seed: int = 0, length: int = T, prompt: int = 5) -> Example:
    g = torch.Generator().manual_seed(seed)
    return Example(f"r{seed}", tuple(torch.randint(3, 97, (length,), generator=g).tolist()), prompt)


def total(rows: pd.DataFrame) -> pd.Series:
    return rows[list(SUMS)].sum()


@pytest.fixture(scope="module")
def model():
    return attach(tiny("llama"), alpha=0.05)


@pytest.fixture(scope="module")
def measured(model):
    schedules = [Schedule(sweeps=k) for k in (1, 3, T)] + [Schedule(sweeps=k, groups=2) for k in (1, T)]
    return measure_errors(model, [example(0), example(1, 9)], schedules)


def test_enough_sweeps_are_exact_whatever_the_groups(measured):
    for groups in (1, 2):
        rows = measured[(measured["sweeps"] == T) & (measured["groups"] == groups)]
        sums = total(rows)
        assert np.sqrt(sums["error2"] / sums["norm2"]) < 1e-5
        assert sums["argmax"] == 0
        assert sums["loss"] == pytest.approx(sums["loss_exact"], rel=1e-5)


def test_after_k_sweeps_the_first_k_positions_are_exact_and_the_others_are_not(measured):
    for sweeps in (1, 3):
        rows = measured[(measured["sweeps"] == sweeps) & (measured["groups"] == 1)]
        last = rows["position"] + rows["positions"] - 1  # of bins that are whole
        exact = rows[last <= sweeps]
        assert set(exact["position"]) == {p for p in (0, 1, 2) if p == 0 or 2 * p - 1 <= sweeps}
        assert (exact["relative"] / exact["positions"]).max() < 1e-5
        assert rows[rows["position"] > sweeps]["relative"].min() > 1e-4


def test_more_sweeps_have_a_smaller_error(measured):
    one, three = (total(measured[(measured["sweeps"] == k) & (measured["groups"] == 1)]) for k in (1, 3))
    for name in ("error2", "relative", "state", "kl"):
        assert three[name] < one[name] / 3


def test_bins_cover_every_position_once_and_the_answer_is_counted(measured):
    for (_, _, question), rows in measured.groupby(["groups", "sweeps", "question"]):
        length = T if question == 0 else 9
        assert rows["positions"].sum() == length
        assert rows["tokens"].sum() == length - 5
    assert list(measured.columns) == [*KEYS, *measured.columns[len(KEYS) :]]


def test_position_bins_start_where_they_say():
    rows = by_position({"at": torch.arange(40.0)})
    first, n = rows["position"], rows["positions"]
    assert first.tolist() == [0, 1, 2, 4, 8, 16, 32]
    assert (rows["at"] == n * (2 * first + n - 1) / 2).all()  # the sum of the positions from first on
    assert n.sum() == 40


def test_equal_outputs_have_no_error_and_a_shift_of_all_logits_changes_no_prediction():
    torch.manual_seed(0)
    logits, states = torch.randn(6, 97), torch.randn(2, 6, 8)
    tokens, answer = torch.arange(6), torch.tensor([0, 0, 1, 1, 1, 0]).bool()
    same = compare(Outputs(logits, states), Outputs(logits, states), tokens, answer).sum()
    assert all(same[c] == 0 for c in ("error2", "relative", "state", "argmax", "kl"))
    moved = compare(Outputs(logits, states), Outputs(logits + 3, states), tokens, answer).sum()
    assert moved["error2"] == pytest.approx(9 * logits.numel(), rel=1e-4)
    assert moved["argmax"] == 0
    assert moved["kl"] < 1e-5
    assert moved["loss"] == pytest.approx(moved["loss_exact"], rel=1e-4)


def test_the_layerwise_solution_is_the_sequential_one(model):
    rows = measure_errors(model, [example()], [Schedule()], reference="sequential")
    layerwise = total(rows[rows["method"] == "layerwise"])
    assert np.sqrt(layerwise["error2"] / layerwise["norm2"]) < 1e-5
    again = measure_errors(model, [example()], [Schedule()])
    assert total(rows[rows["method"] == "sweeps"])["error2"] == pytest.approx(
        total(again)["error2"], rel=1e-3
    )


def test_no_examples_is_an_error(model):
    with pytest.raises(SSTError, match="no examples"):
        measure_errors(model, [])


def test_a_layer_that_is_switched_off_does_not_blend():
    for where, n, on in (("all", 0, [0, 1, 2]), ("first", 1, [0]), ("last", 2, [1, 2]), ("spread", 1, [1])):
        weights = Condition(0.02, where, n).weights(3)
        assert weights.nonzero()[:, 0].tolist() == on == switched_on(3, where, n)
    bare = Condition(0.05, "last", 1).weights(3)
    table = measure_errors(attach(tiny("llama"), alpha=bare), [example()], [Schedule()])
    both = measure_errors(attach(tiny("llama"), alpha=0.05), [example()], [Schedule()])
    assert 0 < total(table)["error2"] < total(both)["error2"]
    with pytest.raises(SSTError, match="cannot blend"):
        switched_on(3, "first", 4)


def test_the_grid_varies_layers_at_equal_alpha():
    found = grid(30)
    assert len({(c.alpha, c.layers) for c in found}) == len(found)
    assert {c.layers for c in found if c.alpha == 0.027} >= {"all", "10 spread", "3 spread"}


@pytest.fixture
def by_name(monkeypatch, tmp_path):
    """The study with a tiny model in place of a real one, and how often it is measured."""
    tiny_model = attach(tiny("llama"), alpha=0.05)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[3:])
        return measure_errors(*args, **kwargs)

    monkeypatch.setattr(two_pass, "load", lambda *_args, **_kwargs: tiny_model)
    monkeypatch.setattr(two_pass, "load_items", lambda _: ([Item(f"r{n}", "", (), 0) for n in range(3)], {}))
    monkeypatch.setattr(two_pass, "encode", lambda item, _: example(int(item.id[1:])))
    monkeypatch.setattr(two_pass, "measure_errors", counted)
    study = TwoPass([Condition(a, schedules=(Schedule(),)) for a in (0.01, 0.05)])
    run = lambda **how: study.run(tmp_path, model="tiny", **how)["errors"]  # noqa: E731
    return run, calls, tiny_model


def test_a_measurement_goes_on_where_it_was_stopped(by_name):
    run, calls, _ = by_name
    first = run(questions=1)
    assert len(calls) == 2
    whole = run(questions=3, verify=True)
    assert len(calls) == 2 + 4 + 1  # two more questions twice, and the sequential one
    assert len(whole) > len(first)
    assert run(questions=3, verify=True).equals(whole)
    assert len(calls) == 7
    keys = [*BLEND, *KEYS]
    assert not whole.duplicated(keys).any()
    assert set(whole["id"]) == {"r0", "r1", "r2"}


def test_another_model_of_the_same_name_is_refused(by_name):
    run, _, tiny_model = by_name
    run(questions=1)
    with torch.no_grad():
        next(tiny_model.backbone.model.parameters()).mul_(1.5)
    tiny_model.backbone.__dict__.pop("content_hash", None)
    with pytest.raises(SSTError, match="another 'tiny'"):
        run(questions=1)


def test_a_trained_checkpoint_is_measured_with_its_blend_and_the_blend_alone(by_name, monkeypatch):
    run, calls, tiny_model = by_name
    monkeypatch.setattr(two_pass, "checkpoint_folder", lambda _: "trained")
    about = {"backbone": {"name": "bare"}}
    monkeypatch.setattr(two_pass, "read_checkpoint", lambda *_: (about, tiny_model.kind, None))
    table = run(questions=1)
    assert list(table["model"].unique()) == ["tiny", "tiny, blend only"]
    assert len(calls) == 2
    assert table[table["model"] == "tiny"]["groups"].nunique() == 4


def test_a_model_is_asked_for(tmp_path):
    with pytest.raises(SSTError, match="measured on a model"):
        TwoPass().run(tmp_path)


def test_a_model_without_a_blend_has_no_error_to_measure():
    with pytest.raises(SSTError, match="no blend"):
        blend_of(attach(tiny("llama"), alpha=0.0), "tiny", "all")


def table(
    p: float = 1.0, q: float = 1.0, factor: float = 0.2, scale: float = 0.2, questions: int = 8,
    model: str = "planted", seed: int = 0, spread: float = 0.1,
) -> pd.DataFrame:  # fmt: skip
    """Errors of exactly scale * alpha^p L^q factor^(k - 1), times a spread between questions."""
    rng = np.random.default_rng(seed)
    of_question = np.exp(spread * rng.normal(size=questions))
    rows = []
    for alpha in (0.01, 0.02, 0.04):
        for n_layers, layers in ((2, "2 spread"), (10, "all")):
            for sweeps in (1, 2, 4):
                for question in range(questions):
                    for position, positions in ((0, 1), (1, 1), (2, 2)):
                        error = (
                            scale * alpha**p * n_layers**q * factor ** (sweeps - 1) * of_question[question]
                        )
                        error *= position > 0
                        rows.append(
                            {
                                "model": model, "layers": layers, "n_layers": n_layers, "alpha": alpha,
                                "method": "sweeps", "groups": 1, "sweeps": sweeps, "reference": "layerwise",
                                "question": question, "position": position, "positions": positions,
                                "error2": positions * error**2, "norm2": positions,
                                "relative": positions * error, "state": positions * error / 2,
                                "argmax": 0, "kl": positions * error**2, "tokens": positions,
                                "loss": positions * (2 + error), "loss_exact": 2 * positions,
                            }
                        )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (2.0, 0.0), (1.5, 0.5)])
def test_planted_exponents_and_contraction_are_found(p, q):
    found = contraction(table(p, q, factor=0.2, scale=0.5 if p < 2 else 20))
    row = found.exponents.iloc[0]
    assert (row["of_alpha"], row["of_layers"]) == (pytest.approx(p), pytest.approx(q))
    assert row["difference"] == pytest.approx(p - q)
    assert found.rates["factor"].to_numpy() == pytest.approx(0.2)


def noisy(p: float, q: float, seed: int, scale: float) -> pd.DataFrame:
    """A law with noise per question and blend."""
    rows = table(p, q, questions=20, scale=scale)
    noise = np.exp(0.2 * np.random.default_rng(seed).normal(size=(20, 6)))
    cell = rows.groupby(["alpha", "n_layers"]).ngroup().to_numpy()
    rows["error2"] *= noise[rows["question"].to_numpy(), cell] ** 2
    return rows


@pytest.mark.parametrize(("p", "q", "scale"), [(2.0, 0.0, 20), (1.0, 1.0, 0.5), (1.2, 0.6, 0.5)])
def test_noise_between_questions_leaves_the_exponents_in_their_intervals(p, q, scale):
    covered, laws, alone = 0, 0, 0
    for seed in range(10):
        found = contraction(noisy(p, q, seed, scale), resamples=400)
        row = found.exponents.iloc[0]
        covered += int(row["of_alpha_low"] <= p <= row["of_alpha_high"])
        covered += int(row["of_layers_low"] <= q <= row["of_layers_high"])
        laws += "whatever the layers is not refuted" in found.verdict
        alone += "L * alpha alone is not refuted" in found.verdict
    assert covered >= 15  # of 20, at 95% each
    assert laws >= 6 if p == 2 else laws == 0
    assert alone >= 7 if p == q else alone == 0


def test_errors_below_rounding_are_not_fitted():
    rows = table(factor=1e-3)
    assert (contraction(rows).rates["sweeps"] == "1, 2").all() or contraction(rows).rates[
        "factor"
    ].isna().any()
    none = contraction(table(scale=FLOOR / 100))
    assert none.rates["factor"].isna().all()
    with pytest.raises(Untestable, match="above rounding"):
        none.figure()


def test_planted_errors_are_estimated_and_lie_in_their_intervals():
    found = approximation_error(table(scale=0.5, spread=0.3))
    row = found.table[(found.table["layers"] == "all") & (found.table["alpha"] == 0.02)].iloc[0]
    assert row["sweeps"] == 1
    assert row["passes"] == 2
    assert row["L_alpha"] == pytest.approx(0.2)
    assert row["logit_error_low"] < row["logit_error"] < row["logit_error_high"]
    assert row["loss_change"] == pytest.approx(row["state_error"] * 2)  # both are linear in the error
    assert row["argmax"] == 0
    assert row["loss_exact"] == pytest.approx(2)
    first = found.positions[found.positions["position"] == 0]
    assert (first["logit_error"] == 0).all()


@pytest.mark.parametrize(
    ("scale", "words"), [(0.5, "does not hold for"), (0.002, "holds for"), (0.0062, "is not decided for")]
)
def test_the_paper_is_judged_by_the_interval(scale, words):
    found = approximation_error(table(scale=scale, spread=0.3))  # alpha 0.02 and 10 layers are the headline
    assert words in found.verdict


def test_no_error_is_no_finding():
    found = approximation_error(table(scale=0.0))
    assert (found.table["logit_error"] == 0).all()
    assert "holds for" in found.verdict


def test_order_and_names_of_questions_change_nothing():
    rows = table()
    mixed = rows.sample(frac=1, random_state=1).assign(question=lambda t: 90 - 7 * t["question"])
    for analysis in (approximation_error, contraction):
        a, b = (analysis(x).table.select_dtypes("number") for x in (rows, mixed))
        # Which question is drawn how often depends on their order: the ends move within their own error.
        plain = [c for c in a if not c.endswith(("_low", "_high"))]
        pd.testing.assert_frame_equal(a[plain], b[plain])


def test_models_are_not_pooled():
    both = pd.concat([table(scale=0.5), table(scale=0.01, model="other")])
    found = approximation_error(both)
    alone = approximation_error(table(scale=0.5)).table
    pd.testing.assert_frame_equal(
        found.table[found.table["model"] == "planted"].reset_index(drop=True), alone
    )
    assert set(found.headline) == {"planted", "other"}
    assert len(contraction(both).exponents) == 2


def test_one_question_gives_an_estimate_and_no_interval():
    found = approximation_error(table(questions=1))
    assert found.table["logit_error"].notna().all()
    assert found.table["logit_error_low"].isna().all()
    assert "is not testable for" in found.verdict
    one = contraction(table(questions=1))
    assert one.exponents["of_alpha"].iloc[0] == pytest.approx(1)
    assert "refuted" not in one.verdict
    assert "hold" not in one.verdict


def test_rows_that_are_not_finite_are_left_out():
    rows = table()
    broken = rows.copy()
    broken.loc[broken["question"] == 3, "error2"] = np.nan
    a, b = approximation_error(broken).table, approximation_error(rows[rows["question"] != 3]).table
    pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(contraction(broken).table, contraction(rows[rows["question"] != 3]).table)


def test_nothing_to_measure_is_said():
    rows = table()
    for empty in (rows.iloc[:0], pd.DataFrame(), rows.assign(error2=np.nan), rows.assign(method="layerwise")):
        for analysis in (approximation_error, contraction):
            with pytest.raises(Untestable, match=r"is empty|no error of sweeps"):
                analysis(empty)
    with pytest.raises(Untestable, match="blend in all layers"):
        approximation_error(rows[rows["layers"] != "all"])


def test_one_alpha_has_no_exponents():
    found = contraction(table().query("alpha == 0.02"))
    assert found.exponents.empty
    assert "Exponents are not testable" in found.verdict


def test_a_question_that_was_not_finished_is_left_out_of_fits():
    rows = table()
    begun = rows[(rows["question"] == 0) & (rows["sweeps"] == 4)].assign(sweeps=8)
    found = contraction(pd.concat([rows, begun]))
    assert (found.rates["questions"] == 8).all()
    pd.testing.assert_frame_equal(found.rates, contraction(rows).rates)


def test_figures_name_what_they_show():
    rows = pd.concat([table(), table().query("layers == 'all'").assign(groups=2)])
    found = approximation_error(rows)
    drawn = found.figures() | contraction(rows).figures()
    assert "by_groups, planted" in drawn
    for name, figure in drawn.items():
        assert figure.layout.xaxis.title.text, name
        assert figure.layout.yaxis.title.text, name
        assert "8 questions" in figure.layout.title.subtitle.text, name
        assert len(figure.data) > 0, name
    assert any(trace.name == "the paper: alpha squared" for trace in drawn["by_alpha"].data)


def test_the_layerwise_check_is_reported():
    rows = table()
    check = rows[rows["sweeps"] == 1].assign(
        method="layerwise", reference="sequential", error2=1e-12, norm2=1.0
    )
    found = approximation_error(pd.concat([rows, check]))
    assert found.layerwise == pytest.approx(1e-6)
    assert "1.0e-06 from the sequential one" in found.verdict
    pd.testing.assert_frame_equal(found.table, approximation_error(rows).table)
