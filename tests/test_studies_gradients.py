"""The gradients of every schedule against exact ones: planted tables, and a tiny model measured for real."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_training import save_backbone

from sst_interp.errors import Untestable
from sst_interp.experiments.studies import gradient_errors as module
from sst_interp.experiments.studies.gradient_errors import (
    BASE,
    CONDITIONS,
    SCHEDULES,
    Condition,
    conditions_table,
    gradient_errors,
    measure_gradient_errors,
    schedules_table,
)
from sst_interp.training.data import Batch


def planted(conditions=CONDITIONS, two_pass=0.6, solved=0.04):
    rows = []
    for condition in conditions:
        for n, schedule in enumerate([*SCHEDULES, "token by token"]):
            error = {"two-pass": two_pass, "solved, 2 and 2": solved, "token by token": 2e-7}.get(
                schedule, 0.1
            )
            row = {"schedule": schedule, "error": error, "cosine": 1 - error, "loss_change": 0.0}
            rows.append(row | asdict(condition) | {"model": "m", "layers": 30, "seconds": 1.0 + n})
    return pd.DataFrame(rows)


def test_the_verdict_says_what_was_planted():
    found = gradient_errors(planted())
    assert "The two-pass gradient is 60% off, the solved one 0.04 at" in found.verdict
    assert "2e-07 from back-propagation" in found.verdict
    two = found.rows[found.rows["schedule"] == "two-pass"]
    assert (two["time"] == 1).all()
    assert schedules_table(found).count("\n") == len(SCHEDULES) + 2  # a head, its line, a row each, the check
    assert conditions_table(found).count("\n") == len(CONDITIONS) + 1
    for figure in found.figures().values():
        assert len(figure.data) == len(SCHEDULES) - 1
        assert all(len(trace.x) > 2 for trace in figure.data)


@pytest.mark.parametrize("rows", [pd.DataFrame(), planted([Condition(alpha=0.05)])])
def test_without_the_base_condition_nothing_is_said(rows):
    with pytest.raises(Untestable, match="study run exact-training"):
        gradient_errors(rows)


def test_a_tiny_model_is_measured_once(tmp_path, monkeypatch):
    backbone = save_backbone(tmp_path)

    def text_rows(model, rows, tokens):
        ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))
        answer = torch.ones_like(ids, dtype=torch.bool)
        answer[:, -1] = False
        return Batch(ids, answer)

    monkeypatch.setattr(module, "text_rows", text_rows)
    conditions = (Condition(alpha=0.05, length=24), Condition(alpha=0.05, share=0.5, length=24))
    rows = measure_gradient_errors(tmp_path, str(backbone), conditions)
    assert rows.groupby("share")["layers"].first().tolist() == [2, 3]
    error = rows[rows["share"] == 1].set_index("schedule")["error"]
    assert error["token by token"] < 1e-5
    assert error["solved, 8 and 8"] < error["solved, 4 and 4"] < error["solved, 1 and 1"] < error["two-pass"]
    assert error["solved, 8 and 0"] > error["solved, 8 and 8"]
    assert np.isfinite(rows[["error", "cosine", "loss_change", "seconds"]]).all().all()
    monkeypatch.setattr(module, "compared", None)  # what is there is not measured again
    again = measure_gradient_errors(tmp_path, str(backbone), conditions)
    assert again.equals(rows)


def test_the_base_is_what_the_paper_trains_with():
    assert BASE in CONDITIONS
    assert len(set(CONDITIONS)) == len(CONDITIONS)
