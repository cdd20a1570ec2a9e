"""What holds of every study: it goes on where it was stopped, and shows, documents and names what it has."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from tiny_studies import NAMES, gradients, planted, some_text, tiny_study
from typer.testing import CliRunner

from sst_interp import paths
from sst_interp.cli.studies import app
from sst_interp.errors import SSTError
from sst_interp.experiments.studies import study as study_module
from sst_interp.experiments.studies.decoders import Pretraining
from sst_interp.experiments.studies.show import Across, interval, lines_of, number
from sst_interp.experiments.studies.study import Study, TrainingStudy, find_study, register_study, studies
from sst_interp.experiments.studies.tasks import SEPARATOR
from sst_interp.experiments.table import Table, same_plan
from sst_interp.tables import NOT_YET, fill, markdown

ROOT = Path(__file__).parents[1]
SHIPPED = paths.shipped("studies")
SHIPPED_RESULTS = {}
EVERY = [
    "calibration", "exact-training", "fixed-point", "lrt-equivalence", "lrt-schedules", "organisms",
    "pretraining", "recall", "two-pass",
]  # fmt: skip


@pytest.fixture(autouse=True)
def shipped_once(monkeypatch):
    """What ships is evaluated once for all tests of this file."""
    results = Study.results

    def once(study: Study, folder: str | Path):
        if Path(folder) != SHIPPED:
            return results(study, folder)
        if study.name not in SHIPPED_RESULTS:
            SHIPPED_RESULTS[study.name] = results(study, folder)
        return SHIPPED_RESULTS[study.name]

    monkeypatch.setattr(Study, "results", once)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Name -> the tables of a tiny study that was not stopped, and the passes that it took."""

    @cache
    def run(name: str) -> tuple[dict[str, pd.DataFrame], int]:
        study, more = tiny_study(name)
        calls: list[tuple[int, int]] = []
        folder = tmp_path_factory.mktemp("whole")
        tables = study.run(folder, seeds=(0, 1), progress=lambda _, *n: calls.append(n), **more)
        total = calls[-1][1]
        assert calls[-1] == (total, total)
        return tables, total

    return run


class StoppedError(Exception):
    """As if the process was killed."""


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """The same rows but for the times that they took."""
    a, b = (t.drop(columns="seconds", errors="ignore") for t in (a, b))
    a, b = (t.sort_values(list(t)).reset_index(drop=True) for t in (a, b))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["between two tables", "in a training"])
def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, whole, name, where):
    study, more = tiny_study(name)
    tables, total = whole(name)
    put, puts, steps = Table.put, [], []

    def stopped_put(self, folder, rows):
        puts.append(self.file)
        if len(puts) == 4:
            raise StoppedError
        put(self, folder, rows)

    def stop(_words, done, _total):
        steps.append(done)
        if done > total // 2:
            raise StoppedError

    cut, progress = tmp_path / "cut", None
    if where == "in a training":
        progress = stop
    else:
        monkeypatch.setattr(Table, "put", stopped_put)
    with pytest.raises(StoppedError):
        study.run(cut, seeds=(0, 1), progress=progress, **more)
    monkeypatch.setattr(Table, "put", put)
    left, taken = sum(study.passes(job) for job in study.missing(cut, (0, 1))), []
    assert 0 < left < total
    resumed = study.run(cut, seeds=(0, 1), progress=lambda _, *n: taken.append(n), **more)
    assert taken[-1] == (left, left)
    for table in resumed:
        same(tables[table], resumed[table])
    again = study.run(cut, seeds=(0, 1), progress=lambda *_: pytest.fail("nothing is missing"), **more)
    assert all(again[table].equals(resumed[table]) for table in again)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_of_another_plan_is_refused_and_no_training_is_done(tmp_path, name):
    study, more = tiny_study(name)
    study.run(tmp_path, seeds=(), **more)
    plan, key = study.plan, "small" if name == "lrt-schedules" else "steps"
    longer = {"small": replace(plan.small, steps=9)} if key == "small" else {"steps": 9}
    other = type(study)(replace(plan, **longer), study.arms)
    with pytest.raises(SSTError, match=f"holds a study with {key} = "):
        other.run(tmp_path, seeds=(0,), progress=lambda *_: pytest.fail("trained"), **more)


@pytest.mark.parametrize("name", ["exact-training", "lrt-schedules", "pretraining"])
def test_times_are_of_every_arm_in_every_round(tmp_path, name):
    study, more = tiny_study(name, rounds=2)
    times = study.run(tmp_path, seeds=(), **more)["times"]
    assert times.groupby("arm")["round"].apply(list).to_dict() == {arm.name: [0, 1] for arm in study.arms}
    assert (times["seconds"] > 0).all()
    assert study.run(tmp_path, seeds=(), **more)["times"].equals(times)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_tables_are_of_the_study_s_own_plan_and_whole(tmp_path, name):
    study = find_study(name)
    assert isinstance(study, TrainingStudy)
    plan = json.loads((SHIPPED / study.plan_file).read_text())
    own = study.plan if name != "pretraining" else replace(study.plan, text=plan["text"])
    same_plan(SHIPPED / study.plan_file, own)
    assert study.missing(SHIPPED, (0, 1, 2)) == []


@pytest.mark.parametrize("name", EVERY)
def test_what_ships_is_shown_and_its_page_has_it_word_for_word(name):
    study = find_study(name)
    page = (ROOT / study.page).read_text()
    shown = study.show(SHIPPED)
    assert sorted(shown) == sorted(study.names())
    for table, text in shown.items():
        assert f"<!-- {table} -->\n\n{text}\n" in page, f"sst-interp study document {study.page}"
        assert "nan" not in text
        assert not text.startswith((NOT_YET, "Not testable"))
        assert text.startswith("|") != table.endswith("verdict")


def test_a_study_is_found_by_its_name():
    assert list(studies()) == EVERY
    for name, study in studies().items():
        assert study.name == name
        assert study.question.endswith("?")
    with pytest.raises(SSTError, match="unknown study 'recal'") as told:
        find_study("recal")
    assert "'recall'" in str(told.value.hint)


def test_a_new_study_is_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "_STUDIES", dict(studies()))

    @register_study
    class Mine(Study):
        name, question, page = "mine", "Is it?", "docs/mine.md"
        tables = {"rows": Table("mine.parquet", ("seed",))}  # noqa: RUF012
        findings = ()

        def run(self, folder, *, progress=None):
            self.tables["rows"].put(folder, pd.DataFrame({"seed": [0], "x": [1]}))
            return self.read(folder)

    assert "mine" in studies()
    assert find_study("mine").run(tmp_path)["rows"]["x"].tolist() == [1]
    assert Mine().measured(tmp_path)


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", EVERY)
def test_the_command_shows_what_is_measured_and_says_what_is_not(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "another.parquet").touch()  # does not hide what ships
    shown = invoke("show", name)
    assert NOT_YET not in shown
    for table in find_study(name).names():
        assert f"## {table}\n" in shown
    empty = invoke("show", name, "--studies", tmp_path / "studies")
    assert f"{NOT_YET} `{find_study(name).command}` measures it." in empty
    said = json.loads(invoke("show", name, "--json"))
    assert said["measured"]
    assert all(finding["table"] for finding in said["findings"].values())
    said = json.loads(invoke("show", name, "--json", "--studies", "studies"))
    assert not said["measured"]
    assert all(finding["not_testable"] for finding in said["findings"].values())
    with pytest.raises(SSTError, match="nowhere is not a folder of studies"):
        invoke("show", name, "--studies", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(SSTError, match="file is not a folder of studies"):
        invoke("show", name, "--studies", tmp_path / "file")


def test_the_working_folder_s_own_tables_come_before_those_that_ship(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = find_study("recall")
    assert study.folder() == SHIPPED
    study.tables["accuracy"].put("studies", planted("recall"))
    assert study.folder() == Path("studies")
    assert find_study("exact-training").folder() == SHIPPED
    assert "5 seeds" in invoke("show", "recall")


def test_a_damaged_table_is_named(tmp_path):
    for name in EVERY:
        study = find_study(name)
        for table in study.tables.values():
            (tmp_path / table.file).write_bytes(b"PAR1 nothing more PAR1")
            with pytest.raises(SSTError, match=rf"{table.file} is damaged: ") as told:
                study.show(tmp_path)
            assert "delete it" in str(told.value.hint)
            (tmp_path / table.file).unlink()


def test_a_document_is_filled_from_the_tables_and_only_between_its_marks(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "own"
    folder.mkdir()
    names = ("training", "gradients", "text losses", "latent training", "recall", "groups")
    blocks = [f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in names]
    page.write_text("# A page\n\n" + "".join(blocks) + "after\n<!-- else -->\nkept\n<!-- end of else -->\n")
    said = invoke("document", page, "--studies", folder)
    assert said == f"{page}: {', '.join(names)}\n"
    assert page.read_text().count(NOT_YET) == len(names)
    for name, table in (("exact-training", "losses"), ("pretraining", "losses"), ("lrt-schedules", "losses")):
        find_study(name).tables[table].put(folder, planted(name))
    find_study("exact-training").tables["gradients"].put(folder, gradients())
    invoke("document", page, "--studies", folder)
    text = page.read_text()
    assert text.count(NOT_YET) == 2
    assert text.startswith("# A page\n\n<!-- training -->\n\n| setting |")
    assert "after\n<!-- else -->\nkept\n" in text
    assert "old" not in text
    assert text.count("\n| alpha in") == 6 + 8
    assert "| LRT, both | zero memory |" in text
    assert "| interleaved S=2 |" in text
    invoke("document", page, "--studies", folder)
    assert page.read_text() == text


def test_documents_that_cannot_be_filled_are_one_line(tmp_path):
    page = tmp_path / "page.md"
    for content, words in ((b"\xff\xfe", "is not UTF-8"), (b"no place", "has no place for a table")):
        page.write_bytes(content)
        with pytest.raises(SSTError, match=words):
            invoke("document", page)
        assert page.read_bytes() == content
    with pytest.raises(SSTError, match="cannot read"):
        invoke("document", tmp_path / "none.md")
    page.write_text("<!-- other -->\n<!-- end of other -->")
    with pytest.raises(SSTError, match="other"):
        fill(page, {"one": "text"})


def test_a_markdown_table_leaves_what_is_missing_empty():
    assert markdown([{"a": 0.12345, "b": float("nan")}]) == "| a | b |\n| --- | --- |\n| 0.123 |  |"
    assert markdown([]) == NOT_YET


def test_rows_that_agree_before_a_wide_column_are_one_line():
    rows = pd.DataFrame({"arm": ["a", "b", "a"], "n": [2, 2, 4], "x": [0.5, float("nan"), 0.25], "seeds": 3})
    rows = rows.assign(x_low=[0.4, 0, float("nan")], x_high=1.0)
    columns = {"arm": "arm", "{} pairs": Across("n", interval("x")), "seeds": "seeds"}
    assert lines_of(rows, columns) == [
        {"arm": "a", "2 pairs": "0.5 [0.4, 1]", "4 pairs": "0.25", "seeds": 3},
        {"arm": "b", "2 pairs": "", "4 pairs": "", "seeds": 3},
    ]
    plain = lines_of(rows, {"arm": "arm", "x": number("x", ".1f")})
    assert [line["x"] for line in plain] == ["0.5", "", "0.2"]
    assert lines_of(rows.iloc[:0], columns) == []


def test_the_command_trains_on_a_file_and_shows_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny, _ = tiny_study("pretraining")
    monkeypatch.setattr(Pretraining, "new_plan", lambda _self: tiny.plan)
    monkeypatch.setattr(Pretraining, "default_arms", tiny.arms)
    monkeypatch.setattr(Pretraining, "default_rounds", 1)
    documents = [" ".join(d.passages) for d in some_text().documents]
    (tmp_path / "mine.txt").write_text(f"\n{SEPARATOR}\n".join(documents))
    said = invoke("run", "pretraining", "--text", "mine.txt", "--seeds", "1", "--steps", "2")
    assert "LRT, both" in said
    assert "(one seed)" in said
    assert set(pd.read_parquet("studies/pretraining-losses.parquet")["steps"]) == {2}


def test_wrong_options_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for words, said in (
        (("run", "recal"), "unknown study"),
        (("run", "recall", "smollm2-135m"), "the study recall takes no model"),
        (("run", "two-pass", "smollm2-135m", "--seeds", "2"), "the study two-pass takes no seeds"),
        (("run", "recall", "--text", "a.txt"), "the study recall takes no text"),
        (("run", "two-pass"), "measured on a model"),
        (("run", "lrt-equivalence", "small", "--sizes", "a,b"), "sizes 'a,b' are not numbers"),
        (("run", "lrt-equivalence", "small", "--sizes", ""), "sizes '' are not numbers"),
        (("run", "lrt-equivalence", "small", "--sizes", "nan"), "size = nan"),
        (("run", "recall", "--out", "file"), "file cannot be written"),
        (("run", "two-pass", "smollm2-135m", "--out", "file"), "file cannot be written"),
    ):
        with pytest.raises(SSTError, match=said):
            invoke(*words)
    assert not (tmp_path / "studies").exists()


def test_studies_are_listed():
    listed = json.loads(invoke("list", "--json"))
    assert [row["study"] for row in listed] == EVERY
    assert all(row["question"] in invoke("list") for row in listed)
