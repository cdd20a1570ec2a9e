"""The notebooks run, say what they show and what not, and carry nothing of the machine they ran on."""

import importlib.util
import json
import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REAL = {"01-quick-start", "09-evaluate-with-lm-eval"}
"""Notebooks that need the real weights; the others need no network."""
EXTRAS = {"09-evaluate-with-lm-eval": "lm_eval"}
"""Notebooks that need a package that is optional: they are not run without it."""
CLAIMS = {
    "01-quick-start": (),
    "02-basin-shifts": ("C1", "C9"),
    "03-position-0-and-the-halting-probe": ("C8", "C12", "C13"),
    "04-overthinking-and-routing": ("C10", "C11"),
    "05-two-pass-against-exact": ("C15",),
    "06-your-own-model-and-questions": (),
    "07-causal-patching": ("C16", "C16b"),
    "08-train-exactly": (),
    "09-evaluate-with-lm-eval": (),
}
LARGEST = 2_000_000
MACHINE = re.compile(r"/(tmp|home|root|Users|work|workspace|usr|opt|mnt|builds?)/|:\\\\Users|site-packages")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_refresh():
    spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh = load_refresh()


def outputs(notebook):
    return [output for cell in refresh.code_cells(notebook) for output in cell.outputs]


def words_of(notebook):
    """Everything a reader can read: prose, code, and outputs without the bytes of pictures."""
    shown = [{k: v for k, v in o.get("data", {}).items() if k != refresh.PNG} for o in outputs(notebook)]
    texts = [o.get("text", "") for o in outputs(notebook)]
    return "\n".join([*(cell.source for cell in notebook.cells), *texts, json.dumps(shown)])


def assert_says_what_it_shows(notebook, stem):
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    headings = [line for line in last.splitlines() if line.startswith("#")]
    assert headings == ["## What this shows", "## What it does not show"]
    stated = re.search(r"^Claims: (.*)$", first, re.MULTILINE)
    assert stated, "the first cell says which claims it touches"
    assert all(re.search(rf"\b{claim}\b", stated[1]) for claim in CLAIMS[stem])
    assert re.search(r"\bC\d", stated[1]) or not CLAIMS[stem]


def test_every_notebook_is_known():
    assert {path.stem for path in NOTEBOOKS} == set(CLAIMS)


@each
def test_what_is_kept_reads_well_without_a_script(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert_says_what_it_shows(notebook, path.stem)
    assert path.stat().st_size < LARGEST
    assert not MACHINE.search(words_of(notebook))
    counts = [cell.execution_count for cell in refresh.code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "not executed from top to bottom"
    shown = outputs(notebook)
    assert shown
    assert not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    pictures = [o for o in shown if refresh.PNG in o.get("data", {})]
    assert pictures
    assert all(refresh.PNG in data for data in refresh.figures(notebook)), "a figure without a picture"


def marked(path):
    marks = [pytest.mark.notebook, *([pytest.mark.real] if path.stem in REAL else [])]
    if (package := EXTRAS.get(path.stem)) and find_spec(package) is None:
        marks.append(pytest.mark.skip(reason=f"{package} is not installed"))
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
def test_it_runs(path, tmp_path):
    notebook = refresh.execute(path, tmp_path)
    assert_says_what_it_shows(notebook, path.stem)
    assert all(cell.outputs for cell in refresh.code_cells(notebook)[1:]), "a cell that shows nothing"
    assert list(refresh.figures(notebook))
    assert not MACHINE.search(words_of(notebook))


@pytest.mark.notebook
def test_a_notebook_that_fails_is_an_error(tmp_path):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        refresh.execute(tmp_path / "broken.ipynb", tmp_path)
