"""What is trained on: questions with worked answers, as tokens in the chat template, split by a seed."""

from __future__ import annotations

import hashlib
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from sst_interp.errors import SSTError, unknown_name
from sst_interp.model import StateStreamModel
from sst_interp.questions.files import read_file
from sst_interp.questions.prompts import INSTRUCTIONS, ask, message
from sst_interp.questions.question import Item
from sst_interp.training.recipe import TrainingRecipe

GSM8K_HUB = ("openai/gsm8k", "main/train-00000-of-00001.parquet")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Example:
    """One training example as tokens."""

    id: str
    tokens: tuple[int, ...]
    """The whole conversation, up to and including the token that ends the answer."""
    prompt: int
    """Tokens before the answer: no loss is taken on them."""


@dataclass(frozen=True)
class Split:
    """Examples of one dataset, divided by a seed."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    too_long: int
    """Examples longer than the recipe's `max_tokens`, which are in neither part."""
    data_hash: str
    """sha256 of the records (ids, questions, answers), whatever file they came in."""


def load_split(recipe: TrainingRecipe, model: StateStreamModel) -> Split:
    """The recipe's examples: the held-out ones are drawn first, so that no other setting moves them.

    Raises:
        SSTError: the data cannot be found or read, or nothing is left to train on.
    """
    items = read_items(recipe.data)
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
    """One record in the model's chat template, ended by the token that ends a turn.

    The answer is the worked one, without GSM8K's calculator marks; of a multiple-choice record it is the
    letter and the text of the right choice.
    """
    if item.choices:
        question = ask(item, instruction=instruction)
        prompt = question.prompt
        answer = f"({question.gold}) {question.choices[ord(question.gold) - ord('A')]}"
    else:
        answer = _CALCULATOR.sub("", item.worked or str(item.answer))
        default = INSTRUCTIONS["number"] if "####" in answer else ""
        prompt = message(item.text, default if instruction is None else instruction)
    before = model.chat(prompt)
    end = getattr(model.tokenizer, "eos_token_id", None)
    after = model.encode_plain(answer) + ([end] if end is not None else [])
    return Example(item.id, tuple(before + after), len(before))


def read_items(data: str) -> list[Item]:
    """The records of `gsm8k`, `gsm8k:PATH`, or a .csv or .jsonl file.

    `gsm8k` alone is `$SST_INTERP_GSM8K` if that is set, else the training split on the Hugging Face hub.

    Raises:
        SSTError: unknown name, or a file that cannot be fetched or read.
    """
    name, has_path, path = data.partition(":")
    if name == "gsm8k":
        path = path or os.environ.get("SST_INTERP_GSM8K", "")
        if has_path and not path:
            raise SSTError("gsm8k: names no file", "for example gsm8k:train.jsonl")
        return read_file(Path(path).expanduser())[0] if path else _from_hub()
    file = Path(data).expanduser()
    if file.suffix not in (".csv", ".jsonl"):
        raise unknown_name("training data", data, ["gsm8k", "gsm8k:PATH", "FILE.csv", "FILE.jsonl"])
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
