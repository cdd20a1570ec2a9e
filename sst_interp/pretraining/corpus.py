"""A text as tokens: a small byte-level BPE learnt on its training part, windows to train on, windows held
out.

A window never leaves its passage. Held-out windows do not overlap; training windows start anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.pretraining.text import Document, Text
from sst_interp.training.batches import Batch


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of the training part, and the windows that are held out."""

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
    """Split a text by document, learn its vocabulary, and cut windows.

    Args:
        vocabulary: symbols of the BPE, the 256 bytes among them.
        positions: of a window.
        windows: held out at most.
        share: of documents held out.

    Raises:
        SSTError: fewer than 256 symbols; the text is too short to fill a window on either side.
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
    found = [(k, window) for own in rounds for k, window in enumerate(own) if window is not None][:windows]
    if not kept or not found:
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
    held = torch.stack([window for _, window in found])
    n_bytes = bytes_of_symbols(tokenizer)
    return Corpus(torch.cat(kept), torch.cat(starts), held, n_bytes, len({k for k, _ in found}))


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
    found = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.long)
    for symbol, number in tokenizer.get_vocab().items():
        found[number] = len(symbol)
    return found
