"""Training data: questions with worked answers, as tokens in the chat template, split by a seed."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sst_interp.errors import SSTError, unknown_name
from sst_interp.models.model import StateStreamModel
from sst_interp.questions.datasets import known_datasets, load_items, read_file
from sst_interp.questions.item import INSTRUCTIONS, Item, ask, message
from sst_interp.training.recipe import TrainingRecipe

GSM8K_HUB = ("openai/gsm8k", "main/train-00000-of-00001.parquet")
WINDOW = 32
"""Batches that are sorted by length together: enough to waste little on padding, few enough to mix."""
MIXED = 512
"""Examples that are sorted together where a step takes as many as fit."""
WIDTH = 32
"""Batches are padded to a multiple of this: CPU kernels are compiled per shape, so few shapes are fast."""
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Example:
    """One training example as tokens."""

    id: str
    tokens: tuple[int, ...]
    """The whole conversation, up to and including the token that ends the answer."""
    prompt: int
    """How many tokens stand before the answer. They carry no loss."""


@dataclass(frozen=True)
class Split:
    """Examples of one dataset, divided by a seed."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    too_long: int
    """How many examples are longer than the recipe's `max_tokens`. Neither part has them."""
    data_hash: str
    """sha256 of the records (ids, questions, answers), whatever file they came in."""


def load_split(recipe: TrainingRecipe, model: StateStreamModel) -> Split:
    """The recipe's examples. The held-out ones are drawn first, so that no other setting moves them.

    Raises:
        SSTError: the data is missing or cannot be read, or nothing is left to train on.
    """
    names = (recipe.data,) if isinstance(recipe.data, str) else recipe.data
    items = [item for name in names for item in read_items(name)]
    order = list(range(len(items)))
    random.Random(f"holdout:{recipe.seed}").shuffle(order)
    if recipe.holdout >= len(items):
        raise SSTError(
            f"holdout = {recipe.holdout} leaves nothing to train on: {recipe.data} has {len(items)} examples",
            f"for example holdout = {len(items) // 10}",
        )
    examples = [encode(item, model, recipe.instruction) for item in items]
    fits = [len(example.tokens) <= recipe.max_tokens for example in examples]
    held_out = sorted(i for i in order[: recipe.holdout] if fits[i])
    train = sorted(i for i in order[recipe.holdout :] if fits[i])
    if not train:
        raise SSTError(
            f"all {len(items)} examples are longer than max_tokens = {recipe.max_tokens}",
            f"the shortest has {min(len(e.tokens) for e in examples)} tokens",
        )
    digest = hashlib.sha256(
        "\x1e".join(f"{i.id}\x1f{i.text}\x1f{i.worked or i.answer}" for i in items).encode()
    )
    return Split(
        tuple(examples[i] for i in train),
        tuple(examples[i] for i in held_out),
        len(items) - sum(fits),
        digest.hexdigest(),
    )


def encode(item: Item, model: StateStreamModel, instruction: str | None = None) -> Example:
    """One record in the model's chat template, up to the token that ends a turn.

    The answer is the worked one without GSM8K's calculator marks, or the right choice's letter and text.
    """
    if item.choices:
        question = ask(item, instruction=instruction)
        prompt = question.prompt
        answer = f"({question.gold}) {question.choices[ord(question.gold) - ord('A')]}"
    else:
        answer = _CALCULATOR.sub("", item.worked or str(item.answer))
        default = INSTRUCTIONS["number"] if "####" in answer else ""
        default = default if item.instruction is None else item.instruction
        prompt = message(item.text, default if instruction is None else instruction)
    before = model.chat(prompt)
    end = getattr(model.tokenizer, "eos_token_id", None)
    after = model.encode_plain(answer) + ([end] if end is not None else [])
    return Example(item.id, tuple(before + after), len(before))


def read_items(data: str) -> list[Item]:
    """The records of `gsm8k`, `gsm8k:PATH`, another dataset that has a name, or a .csv or .jsonl file.

    `gsm8k` alone reads `$SST_INTERP_GSM8K` if that is set, else the training split on the Hugging Face hub.

    Raises:
        SSTError: unknown name, or a file that cannot be fetched or read.
    """
    name, has_path, path = data.partition(":")
    if name == "gsm8k":
        path = path or os.environ.get("SST_INTERP_GSM8K", "")
        if has_path and not path:
            raise SSTError("gsm8k: names no file", "for example gsm8k:train.jsonl")
        return read_file(Path(path).expanduser())[0] if path else _from_hub()
    if name in known_datasets():
        return load_items(data)[0]
    file = Path(data).expanduser()
    if file.suffix not in (".csv", ".jsonl"):
        names = ["gsm8k:PATH", *known_datasets(), "FILE.csv", "FILE.jsonl"]
        raise unknown_name("training data", data, names)
    return read_file(file)[0]


def _from_hub() -> list[Item]:
    import pandas as pd
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(*GSM8K_HUB, repo_type="dataset")
    except Exception as error:  # huggingface_hub raises a dozen kinds, its HTTP client some more
        raise SSTError(
            f"GSM8K cannot be fetched from the hub ({type(error).__name__})",
            'check the network, or fetch its train.jsonl yourself: data = "gsm8k:train.jsonl"',
        ) from error
    rows = pd.read_parquet(file).to_dict("records")
    return [
        Item(str(n), row["question"], (), row["answer"].rpartition("####")[2].strip(), row["answer"])
        for n, row in enumerate(rows, 1)
    ]


@dataclass(frozen=True)
class Batch:
    """Examples of one step. Padding is on the right, where no token of the example sees it."""

    tokens: Int[Tensor, "row position"]
    answer: Bool[Tensor, "row position"]
    """Positions whose *next* token is part of the answer. They carry the loss."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.tokens.to(device), self.answer.to(device))


def schedule(
    lengths: Sequence[int], batch_size: int, examples: int | None, seed: int, positions: int | None = None
) -> list[list[int]]:
    """Indices of every step's examples: epochs of a seeded shuffle, batched by length.

    Args:
        lengths: tokens per example.
        batch_size: examples per step; the last step of an epoch may have fewer.
        examples: how many in all; None for one epoch.
        positions: instead of `batch_size`, a step takes as many examples as fit, padding included.
    """
    if positions is not None:
        batch_size = MIXED // WINDOW
    total = len(lengths) if examples is None else examples
    steps: list[list[int]] = []
    epoch = 0
    while total > 0:
        rng = random.Random(f"order:{seed}:{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        order = order[:total]
        batches = []
        for start in range(0, len(order), WINDOW * batch_size):
            window = sorted(order[start : start + WINDOW * batch_size], key=lambda i: (lengths[i], i))
            batches += _cut(window, lengths, batch_size, positions)
        rng.shuffle(batches)
        steps += batches
        total -= len(order)
        epoch += 1
    return steps


def _cut(
    window: list[int], lengths: Sequence[int], batch_size: int, positions: int | None
) -> list[list[int]]:
    """The examples of a window, shortest first, cut into batches."""
    if positions is None:
        return [window[k : k + batch_size] for k in range(0, len(window), batch_size)]
    batches: list[list[int]] = [[]]
    for i in window:
        if batches[-1] and (len(batches[-1]) + 1) * padded(lengths[i]) > positions:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(longest: int, width: int = WIDTH) -> int:
    """Positions of a batch whose longest example has this many tokens."""
    return -(-longest // width) * width


def make_batch(examples: Sequence[Example], width: int = WIDTH) -> Batch:
    """The examples as tensors, as wide as the longest, rounded up to a multiple of `width`."""
    columns = padded(max(len(example.tokens) for example in examples), width)
    tokens = torch.zeros(len(examples), columns, dtype=torch.long)
    answer = torch.zeros(len(examples), columns, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        answer[row, example.prompt - 1 : len(example.tokens) - 1] = True
    return Batch(tokens, answer)


def refuse_short_batches(longest: Sequence[int], groups: int) -> None:
    """Raise SSTError if a batch has fewer positions than there are interleaved groups.

    Args:
        longest: tokens of the longest example of every step.
    """
    shortest = min(longest, default=groups)
    if groups > padded(shortest):
        raise SSTError(
            f"groups = {groups} is more than the {padded(shortest)} positions of the shortest batch "
            f"(step {list(longest).index(shortest) + 1})",
            f"at most {padded(shortest)}: as many groups as positions compute one position after the other",
        )
