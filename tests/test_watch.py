"""Training logs: each step's numbers arrive in the library that was asked for; the JSONL stays as it is."""

import importlib.util
import json
import math
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_training import save_backbone, training_recipe

from sst_interp.cli import experiments
from sst_interp.errors import SSTError
from sst_interp.training.trainer import Training
from sst_interp.training.watch import find_log, watching

LINES = [{"step": 1, "loss": 2.5, "held_out_exact": 2.0}, {"step": 2, "loss": 2.25, "gradient_norm": 0.5}]


def there(name):
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"pip install {name}")


def scalars(folder):
    """{name: [(step, value)]} of TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


@there("tensorboard")
def test_tensorboard_has_every_number(tmp_path):
    with watching("tensorboard", tmp_path, "mine", {"learning_rate": 0.1}) as watch:
        for line in LINES:
            watch(line)
    assert scalars(tmp_path / "tensorboard") == {
        "loss": [(1, 2.5), (2, 2.25)], "held_out_exact": [(1, 2.0)], "gradient_norm": [(2, 0.5)],
    }  # fmt: skip


@there("tensorboard")
def test_steps_that_are_made_again_are_there_once(tmp_path):
    """Killed after step 2, saved at step 1: the same command makes step 2 again."""
    for done, lines in ((0, LINES), (1, [{"step": 2, "loss": 1.0}])):
        with watching("tensorboard", tmp_path, "mine", {}, done) as watch:
            for line in lines:
                watch(line)
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 2.5), (2, 1.0)]


TRAIN = """
import sys
from pathlib import Path
from sst_interp.training.watch import watching
with watching(sys.argv[1], Path(sys.argv[2]), "mine", {"rank": 2}) as watch:
    for line in %r:
        watch(line)
"""


def logged_by(name, tmp_path):
    """What a process without a network leaves: it logs `LINES` with the library itself."""
    how = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}
    command = [sys.executable, "-c", TRAIN % LINES, name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**keep, **how}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@there("trackio")
def test_trackio_has_every_number(tmp_path):
    logged_by("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "sst-interp.db") as tables:
        rows = tables.execute("select run_name, step, metrics from metrics order by step").fetchall()
        (config,) = tables.execute("select config from configs").fetchone()
    assert [(run, {"step": step, **json.loads(numbers)}) for run, step, numbers in rows] == [
        ("mine", line) for line in LINES
    ]
    assert json.loads(config)["rank"] == 2


@there("wandb")
def test_weights_and_biases_has_every_number(tmp_path):
    """Offline, in the training's folder; `wandb sync` uploads it."""
    logged_by("wandb", tmp_path)
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    data, at, rows, config = file.read_bytes(), 7, [], {}
    while at + 7 <= len(data):  # LevelDB's log: checksum, length, type; these records fit into one block
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        assert kind == 1
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        items = [(item.nested_key[0] if item.nested_key else item.key, json.loads(item.value_json))
                 for item in record.history.item]  # fmt: skip
        if items:
            rows.append({"step": record.history.step.num} | {k: v for k, v in items if k[0] != "_"})
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert rows == LINES
    assert config["rank"] == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_library_of_runs_is_given_every_number(tmp_path, monkeypatch, name):
    calls = []
    fake = SimpleNamespace(
        init=lambda **how: calls.append(("init", how)),
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def stopped():
        with watching(name, tmp_path, "mine", {"rank": 2}) as watch:
            for line in LINES:
                watch(line)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (_, how), *logged, last = calls
    assert how["name"] == "mine"
    assert how["config"] == {"rank": 2}
    assert how.get("mode") == ("offline" if name == "wandb" else None)
    assert logged == [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in LINES]
    assert last == "finish"


def test_a_log_that_there_is_not_is_an_error(monkeypatch):
    with pytest.raises(SSTError, match="unknown log 'tensorbord'") as error:
        find_log("tensorbord")
    assert "tensorboard" in str(error.value)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SSTError, match="--log trackio needs trackio") as error:
        find_log("trackio")
    assert error.value.hint == "pip install trackio"


@there("tensorboard")
def test_the_command_logs_and_trains_as_without(tmp_path, monkeypatch, capsys):
    recipe = replace(training_recipe(tmp_path, save_backbone(tmp_path)), examples=6)
    monkeypatch.setattr("sst_interp.training.recipe.find_training_recipe", lambda _: recipe)
    Training(recipe, tmp_path / "plain").run()
    experiments.train(recipe="tiny", out=tmp_path / "watched", fresh=False, log="tensorboard")
    steps = {}
    for name in ("plain", "watched"):
        lines = [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        steps[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    assert steps["watched"] == steps["plain"]
    seen = scalars(tmp_path / "watched" / "tensorboard")
    losses = [(line["step"], line["loss"]) for line in steps["plain"] if "loss" in line]
    assert [step for step, _ in seen["loss"]] == [step for step, _ in losses]
    assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(seen["loss"], losses, strict=True))
    assert {"gradient_norm", "alpha_mean", "held_out_exact"} <= set(seen)
