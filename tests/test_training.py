"""Training end to end on a tiny model: reproducible, resumable, loadable, and stopped where it must."""

import copy
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_capture import save_model, tiny_llama
from tiny_training import save_backbone, training_recipe, write_gsm8k

from sst_interp.errors import SSTError
from sst_interp.models.checkpoint import ADAPTER_CONFIG as CONFIG
from sst_interp.models.checkpoint import ADAPTER_WEIGHTS as WEIGHTS
from sst_interp.models.loading import load
from sst_interp.training.card import read_about, read_log, write_card
from sst_interp.training.recipe import TrainingRecipe, find_training_recipe
from sst_interp.training.trainer import STATE, Training, rate


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def recipe(tmp_path, backbone):
    return training_recipe(tmp_path, backbone)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, backbone):
    folder = tmp_path_factory.mktemp("trained")
    training = Training(training_recipe(folder, backbone), folder / "out")
    training.run()
    return training


@pytest.fixture
def trained(trained_once, tmp_path):
    """A finished training with a folder of its own. Its model is shared."""
    training = copy.copy(trained_once)
    training.folder = shutil.copytree(trained_once.folder, tmp_path / "out")
    return training


def without_time(training):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in training.log]


def weights_of(folder):
    return load_file(folder / WEIGHTS) | load_file(folder / "stream.safetensors")


def same(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(trained):
    looks = [line["held_out_exact"] for line in trained.log if "held_out_exact" in line]
    assert len(looks) >= 3
    assert looks[-1] < looks[0] - 0.5
    assert trained.log[-1]["held_out_as_trained"] == pytest.approx(looks[-1], rel=0.1)
    assert read_about(trained.folder)["state"] == "complete"
    assert not (trained.folder / STATE).exists()


@pytest.mark.parametrize("stop", ["ctrl-c", "kill"])
def test_an_interrupted_training_takes_the_same_steps(trained, recipe, tmp_path, stop):
    class Killed(BaseException):
        pass

    def end(training, _line):
        if training.done == 2:
            if stop == "kill":
                training.save()
                return
            raise KeyboardInterrupt
        if training.done == 4 and stop == "kill":  # two steps after the last save: they are taken again
            raise Killed

    first = Training(recipe, tmp_path / "again")
    with pytest.raises((KeyboardInterrupt, Killed)):
        first.run(end)
    assert (tmp_path / "again" / STATE).is_file()
    second = Training(recipe, tmp_path / "again")
    assert second.done == 2
    second.run()
    assert without_time(second) == without_time(trained)
    assert same(second.folder, trained.folder)


def test_the_same_seed_gives_the_same_checkpoint_and_another_another(trained, recipe, tmp_path):
    again = Training(recipe, tmp_path / "again")
    again.run()
    assert same(again.folder, trained.folder)
    other = Training(replace(recipe, seed=1), tmp_path / "other")
    other.run()
    assert not same(other.folder, trained.folder)


@pytest.mark.parametrize(
    "how",
    [{"sweeps": 2}, {"groups": 2}, {"method": "exact"}, {"method": "sequential"}, {"method": "none"}],
    ids=str,
)
def test_every_method_trains(recipe, tmp_path, how):
    training = Training(replace(recipe, **how, examples=9), tmp_path / "out")
    training.run()
    losses = [line["loss"] for line in training.log if "loss" in line]
    assert losses[-1] < losses[0]


def test_the_baseline_is_matched(recipe, tmp_path):
    """The same order of the same data from the same start; without a stream it leaves alpha at zero."""
    stream, baseline = (
        Training(replace(recipe, method=method), tmp_path / method) for method in ("two_pass", "none")
    )
    assert stream.schedule == baseline.schedule
    for name, value in baseline.masters.values.items():
        assert torch.equal(value, stream.masters.values[name])
    baseline.run()
    model = load(tmp_path / "none", dtype="float32")
    assert not bool(model.alpha.any())


def test_a_loaded_checkpoint_is_the_trained_model(trained):
    loaded = load(trained.folder, dtype="float32")
    assert torch.equal(loaded.alpha, trained.model.alpha)
    tokens = [[5, 6, 7, 8, 9, 5, 6]]
    with torch.no_grad():
        ours, theirs = (m.replay(tokens, 3).logits for m in (trained.model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = load(trained.recipe.backbone, 0.0, dtype="float32").replay(tokens, 3).logits
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_peft_reads_the_adapters(trained):
    base = tiny_llama(torch.float32, max_position_embeddings=256)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, trained.folder)(tokens).logits
        model = load(trained.folder, 0.0, dtype="float32")
        ours = model.backbone.model(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_file_names_a_folder_of_this_machine(trained_once):
    text = (trained_once.folder / CONFIG).read_text()
    assert json.loads(text)["base_model_name_or_path"] == trained_once.recipe.backbone
    assert str(trained_once.folder.parent) not in text.replace(trained_once.recipe.backbone, "")


def test_blend_weights_stay_within_their_bounds(recipe, tmp_path):
    bounds = (0.02, 0.03)
    wild = replace(recipe, alpha_learning_rate=50.0, alpha=0.025, alpha_bounds=bounds)
    training = Training(wild, tmp_path / "out")
    training.run()
    alpha = training.model.alpha
    assert alpha.min() >= bounds[0]
    assert alpha.max() <= bounds[1]
    assert alpha.max() - alpha.min() > 0.009


def damage(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(next(iter(w))), "1 tensors are missing, surplus"),
        (lambda w: w.update(extra=torch.ones(2)), "1 tensors are missing, surplus"),
        (lambda w: w.update({k: v[:, :1].clone() for k, v in list(w.items())[:1]}), "of another shape"),
        (lambda w: next(iter(w.values())).fill_(torch.nan), "non-finite"),
    ],
)
def test_weights_that_do_not_land_are_refused(trained, tmp_path, change, message):
    copy = shutil.copytree(trained.folder, tmp_path / "copy")
    damage(copy, change)
    with pytest.raises(SSTError, match=message):
        load(copy, dtype="float32")


def test_a_damaged_adapter_file_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained.folder, tmp_path / "copy")
    (copy / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(SSTError, match="cannot be read"):
        load(copy)


def test_another_backbone_is_refused(trained, tmp_path):
    other = save_model(tmp_path / "other", seed=9, max_position_embeddings=256)
    copy = shutil.copytree(trained.folder, tmp_path / "copy")
    config = json.loads((copy / "stream.json").read_text())
    config["backbone"]["name"] = str(other)
    (copy / "stream.json").write_text(json.dumps(config))
    with pytest.raises(SSTError, match="belongs to another backbone"):
        load(copy)


def test_a_loss_that_is_not_finite_stops_with_the_last_state_kept(recipe, tmp_path):
    training = Training(recipe, tmp_path / "out")
    training.step()
    training.save()
    before = {p.name: p.read_bytes() for p in training.folder.iterdir()}
    with torch.no_grad():
        training.masters.logit.fill_(torch.nan)
    values = {name: v.clone() for name, v in training.masters.values.items() if name != "alpha.logit"}
    with pytest.raises(SSTError, match="step 2: the loss"):
        training.run()
    assert {p.name: p.read_bytes() for p in training.folder.iterdir()} == before
    assert all(torch.equal(v, training.masters.values[name]) for name, v in values.items())
    assert Training(recipe, tmp_path / "out").done == 1


def test_a_loss_that_is_not_finite_before_any_state_leaves_the_log(recipe, tmp_path):
    training = Training(recipe, tmp_path / "out")
    after = lambda now, _: now.done == 2 and now.masters.logit.data.fill_(torch.nan)  # noqa: E731
    with pytest.raises(SSTError, match="step 3: the loss") as told:
        training.run(after)
    assert str(told.value.hint).startswith("no state was saved yet; training.jsonl has the steps before")
    assert not (training.folder / STATE).exists()
    assert read_log(training.folder)["step"].tolist() == [0, 1, 2]
    assert read_log(training.folder)["loss"].notna().sum() == 2
    assert Training(recipe, tmp_path / "out").done == 0


def test_a_loss_that_is_not_finite_leaves_the_steps_since_the_last_state(recipe, tmp_path):
    training = Training(recipe, tmp_path / "out")
    training.step()
    training.save()
    training.step()
    with torch.no_grad():
        training.masters.logit.fill_(torch.nan)
    with pytest.raises(SSTError, match="step 3: the loss") as told:
        training.step()
    assert str(told.value.hint).startswith("the last saved state is kept; ")
    assert read_log(training.folder)["step"].tolist() == [1, 2]
    assert Training(recipe, tmp_path / "out").done == 1


def other_shapes(path):
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(
        {
            name: t.repeat(2) if t.dim() == 1 else t.repeat(*t.shape[:0], 2, 1) if t.dim() else t
            for name, t in tensors.items()
        },
        path,
        about,
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: save_file({"x": torch.ones(1)}, path),
        other_shapes,
    ],
    ids=["empty", "cut off", "something else", "of other shapes"],
)
def test_a_damaged_state_is_named_and_left_alone(recipe, tmp_path, change):
    training = Training(recipe, tmp_path / "out")
    training.step()
    training.save()
    change(training.folder / STATE)
    before = {p.name: p.read_bytes() for p in training.folder.iterdir()}
    with pytest.raises(SSTError, match=f"{STATE} is damaged: ") as told:
        Training(recipe, tmp_path / "out")
    assert "--fresh" in str(told.value.hint)
    assert {p.name: p.read_bytes() for p in training.folder.iterdir()} == before


def test_a_place_that_cannot_be_is_refused_before_anything_is_loaded(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("sst_interp.training.trainer.load", lambda *_: pytest.fail("loaded"))
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(SSTError, match="cannot be written"):
            Training(recipe, folder)


def test_a_changed_recipe_does_not_resume(recipe, tmp_path):
    training = Training(recipe, tmp_path / "out")
    training.step()
    training.save()
    before = {p.name: p.read_bytes() for p in training.folder.iterdir()}
    with pytest.raises(SSTError, match=r"learning_rate = 0\.02; the recipe now says 0\.5"):
        Training(replace(recipe, learning_rate=0.5), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in training.folder.iterdir()} == before
    assert Training(replace(recipe, save_minutes=1.0), tmp_path / "out").done == 1
    assert Training(replace(recipe, learning_rate=0.5), tmp_path / "out", fresh=True).done == 0


def test_other_data_does_not_resume(recipe, tmp_path):
    training = Training(recipe, tmp_path / "out")
    training.step()
    training.save()
    write_gsm8k(tmp_path / "train.jsonl", n=19)
    with pytest.raises(SSTError, match="was begun with other data"):
        Training(recipe, tmp_path / "out")


def test_a_finished_training_is_not_overwritten(trained):
    with pytest.raises(SSTError, match="trained already"):
        Training(trained.recipe, trained.folder)


def test_a_folder_that_is_something_else_is_not_overwritten(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(SSTError, match="not a training"):
        Training(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_the_card_is_made_of_what_was_measured(trained):
    text = (trained.folder / "README.md").read_text()
    log = read_log(trained.folder)
    assert f"{len(log) - 1} steps" in text
    assert f"| learning_rate | `{trained.recipe.learning_rate}` |" in text
    assert "Not evaluated yet" in text
    assert write_card(trained.folder).read_text() == text


def cards():
    shipped = Path(__file__).parents[1] / "data" / "checkpoints"
    return sorted(shipped.glob("*/README.md"))


@pytest.mark.parametrize("card", [None, *cards()], ids=lambda p: p.parent.name if p else "trained now")
def test_the_hub_reads_the_card(trained, card):
    """Its metadata by huggingface_hub, under names that the hub knows; then the text, from a heading on."""
    read = ModelCard.load(card or trained.folder / "README.md")
    said = read.data.to_dict()
    known = {*inspect.signature(ModelCardData).parameters, "base_model_relation"}
    assert set(said) <= known - {"eval_results", "kwargs"}
    assert (said["library_name"], said["pipeline_tag"], said["license"]) == (
        "peft", "text-generation", "apache-2.0",
    )  # fmt: skip
    adapters = json.loads(((card.parent if card else trained.folder) / CONFIG).read_text())
    assert said["base_model"] == adapters["base_model_name_or_path"]
    assert all(isinstance(tag, str) for tag in said["tags"])
    assert read.text.lstrip().startswith("# ")
    assert "{{" not in read.content
    again = ModelCard(str(read))
    assert again.data.to_dict() == said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown training recipe key 'learning_rat'"),
        ({"alpha": 0.2}, "not between its bounds"),
        ({"alpha_bounds": [0.1, 0.01]}, "the lower first"),
        ({"alpha_bounds": [0.1]}, "the lower first"),
        ({"method": "magic"}, "method = 'magic'"),
        ({"method": "none", "sweeps": 2}, "makes no sweeps"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"learning_rate": 0}, "learning_rate = 0"),
        ({"clip": float("nan")}, "clip = nan"),
        ({"choices": {"blend": "convexe"}}, "choice blend"),
        ({"choices": 3}, "is not a table"),
        ({"name": "../x"}, "plain folder name"),
        ({"targets": "q_proj"}, "targets = 'q_proj'"),
    ],
)
def test_a_wrong_recipe_is_one_line(values, message):
    with pytest.raises(SSTError, match=message):
        TrainingRecipe.from_dict({"name": "t", "backbone": "b", "data": "d"} | values)


def test_missing_keys_and_files_are_one_line(tmp_path):
    with pytest.raises(SSTError, match="backbone is missing"):
        TrainingRecipe.from_dict({"name": "t"})
    with pytest.raises(SSTError, match="cannot read recipe"):
        find_training_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(SSTError, match="unknown training recipe"):
        find_training_recipe("smollm2-135m-sts")
    (tmp_path / "bad.toml").write_text("x =")
    with pytest.raises(SSTError, match="not valid TOML"):
        find_training_recipe(str(tmp_path / "bad.toml"))


def test_unknown_targets_are_one_line(recipe, tmp_path):
    with pytest.raises(SSTError, match="no linear layer is called nothing"):
        Training(replace(recipe, targets=("nothing",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shipped_recipes_differ_in_the_stream_alone():
    stream, baseline = map(find_training_recipe, ("smollm2-135m-sst", "smollm2-135m-baseline"))
    assert [key for key, *_ in stream.differences(baseline)] == ["method"]


def test_the_learning_rate_warms_up_and_decays():
    rates = [rate(n, 100, 10) for n in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    "lost", [(CONFIG,), (WEIGHTS,), (CONFIG, WEIGHTS), (CONFIG, WEIGHTS, "training.json")], ids=str
)
@pytest.mark.parametrize("says", [True, False], ids=["stream.json says so", "as version 0.1 wrote it"])
def test_a_checkpoint_without_its_adapters_is_refused(trained, tmp_path, lost, says):
    copy = shutil.copytree(trained.folder, tmp_path / "copy")
    for name in lost:
        (copy / name).unlink()
    config = json.loads((copy / "stream.json").read_text())
    assert config["adapters"] is True
    if not says:
        if len(lost) == 3:
            pytest.skip("nothing in the folder says that there were any")
        del config["adapters"]
        (copy / "stream.json").write_text(json.dumps(config))
    with pytest.raises(SSTError, match=f"lacks {lost[0]}"):
        load(copy, dtype="float32")


HOSTILE = {
    "prompt tuning": {
        "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "et",
    },
    "another type": {"peft_type": "ADALORA"},
    "no type": {"peft_type": None},
    "a type in a list": {"peft_type": ["LORA"]},
    "megatron": {"megatron_config": {"a": 1}},
    "a module to import": {"megatron_core": "evil"},
    "classes to import": {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
    "other layers": {"layer_replication": [[0, 2], [1, 3]]},
    "a regular expression": {"target_modules": "(a+)+$"},
    "regular expressions": {"target_modules": ["(a+)+$"]},
    "ranks by regular expression": {"rank_pattern": {"(a+)+$": 2}},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
    "a start of its own": {"init_lora_weights": "pissa"},
    "no rank": {"r": 0},
    "a rank in words": {"r": "two"},
    "a scale that is none": {"lora_alpha": float("nan")},
    "an unknown setting": {"next_years_setting": 1},
}  # fmt: skip


@pytest.mark.parametrize("said", HOSTILE.values(), ids=HOSTILE.keys())
def test_adapters_are_plain_lora_and_peft_never_sees_others(trained, tmp_path, monkeypatch, said):
    copy = shutil.copytree(trained.folder, tmp_path / "copy")
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps(config | said))
    monkeypatch.setattr("peft.get_peft_model", lambda *_: pytest.fail("PEFT was asked"))
    monkeypatch.setattr("peft.LoraConfig.from_pretrained", lambda *_: pytest.fail("PEFT read the file"))
    with pytest.raises(SSTError, match=CONFIG) as told:
        load(copy, dtype="float32")
    assert "\n" not in told.value.message


def test_adapters_nested_too_deeply_are_refused(trained, tmp_path):
    copy = shutil.copytree(trained.folder, tmp_path / "copy")
    (copy / CONFIG).write_text("[" * 100_000)
    with pytest.raises(SSTError, match="nested too deeply"):
        load(copy, dtype="float32")


@pytest.mark.parametrize("where", ["write_card", "finish"])
def test_a_training_killed_between_its_last_step_and_its_card_is_finished(
    trained, recipe, tmp_path, monkeypatch, where
):
    class Killed(BaseException):
        pass

    def die(_folder):
        raise Killed

    with monkeypatch.context() as patched:
        if where == "write_card":
            patched.setattr(f"sst_interp.training.trainer.{where}", die)
        with pytest.raises(Killed):
            Training(recipe, tmp_path / "again").run(finish=die)
    assert read_about(tmp_path / "again")["state"] == "complete"
    assert (tmp_path / "again" / STATE).is_file()
    training = Training(recipe, tmp_path / "again")
    monkeypatch.setattr(training, "step", lambda: pytest.fail("trained on"))
    training.run()
    names = {path.name for path in trained.folder.iterdir()}
    assert {path.name for path in training.folder.iterdir()} == names >= {"README.md"}
    assert same(training.folder, trained.folder)
    assert without_time(training) == without_time(trained)
    with pytest.raises(SSTError, match="trained already"):
        Training(recipe, tmp_path / "again")


def test_a_training_killed_while_its_first_file_was_written_begins_anew(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".training.json.tmp").write_text("{")
    assert Training(recipe, tmp_path / "out").done == 0


def test_fresh_erases_the_earlier_checkpoint_and_what_was_measured_of_it(trained, recipe):
    (trained.folder / "evaluation").mkdir()
    for name in ("gsm8k-d1.parquet", "model.json", "notes.txt"):
        (trained.folder / "evaluation" / name).write_text("x")
    (trained.folder / "mine.txt").write_text("x")
    Training(replace(recipe, seed=5), trained.folder, fresh=True)
    left = {str(path.relative_to(trained.folder)) for path in trained.folder.rglob("*")}
    assert left == {"training.json", "mine.txt", "evaluation", "evaluation/notes.txt"}


def test_a_training_that_is_begun_again_without_a_state_leaves_no_earlier_evaluation(recipe, tmp_path):
    """Killed between the new `training.json` and the erasing of the old files."""
    Training(recipe, tmp_path / "out")
    (tmp_path / "out" / "evaluation").mkdir()
    (tmp_path / "out" / "evaluation" / "gsm8k-d1.parquet").write_text("x")
    Training(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation").exists()
