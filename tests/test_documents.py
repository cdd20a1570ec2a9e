"""What the documents name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
NAMED = re.compile(
    r"`((?:sst_interp|analyses|benchmarks|tests|notebooks|docs|data)/[\w./-]+\.(?:py|md|toml|ipynb))`"
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document):
    named = set(NAMED.findall(document.read_text()))
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_the_pattern_finds_paths():
    assert NAMED.findall("see `analyses/overlap.py` and `docs/lrt.md`, not `runs/demo`") == [
        "analyses/overlap.py",
        "docs/lrt.md",
    ]
