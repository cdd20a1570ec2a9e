"""What the commands of every study share."""

import pytest
import typer
from typer.testing import CliRunner

from sst_interp import places, studies
from sst_interp.approximation.commands import app as approximation
from sst_interp.documents import NOT_YET
from sst_interp.latent.commands import app as latent
from sst_interp.pretraining.commands import app as pretraining


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a study of its own: `mine.parquet`."""
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "mine.parquet").touch()
    monkeypatch.setattr(studies, "STUDIES", folder)
    return folder


def test_the_folder_is_the_one_asked_for_else_the_working_folders_else_the_shipped(here, tmp_path):
    assert studies.measured(tmp_path, ("mine*",)) == tmp_path
    assert studies.measured(None, ("other.parquet", "mine*")) == here
    assert studies.measured(None, ("other*",)) == places.shipped("studies")


NAMES = ["approximation", "latent", "pretraining"]


@pytest.mark.parametrize("app", [approximation, latent, pretraining], ids=NAMES)
def test_the_folder_of_another_study_does_not_hide_what_ships(here, app):
    shown = CliRunner().invoke(app, ["show"])
    assert shown.exit_code == 0
    assert "## " in shown.output
    assert NOT_YET not in shown.output


def test_reading_is_two_commands(here, tmp_path):
    app = typer.Typer()
    studies.add_reading(app, "mine", lambda folder: {"name": folder.name}, ("mine*",), "docs/mine.md")
    assert CliRunner().invoke(app, ["show"]).output == "\n## name\n\nstudies\n"
    page = tmp_path / "page.md"
    page.write_text("<!-- name -->\n<!-- end of name -->\n<!-- else -->\n<!-- end of else -->\n")
    assert CliRunner().invoke(app, ["document", str(page)]).exit_code != 0  # it asks for a table of nobody
    page.write_text("<!-- name -->\n<!-- end of name -->\n")
    assert CliRunner().invoke(app, ["document", str(page)]).output == f"{page}: name\n"
    assert "studies" in page.read_text()
