"""Tiny captured runs of every kind of model on the same questions."""

import importlib
from dataclasses import replace

import torch
from tiny import lrt
from tiny_capture import recipe_for, tiny_llama, word_tokenizer, write_questions

from sst_interp.models.model import attach, attach_looped

WORDS = {
    "backbone": "Backbone without a stream",
    "sst": "State Stream Transformer",
    "lrt": "Latent Recurrent Transformer",
    "looped": "Depth-looped model",
}


def models():
    """One of each kind on the same backbone, named as it is."""
    made = {
        "backbone": attach(tiny_llama(), alpha=0),
        "sst": attach(tiny_llama(), alpha=torch.linspace(0.1, 0.3, 3)),
        "lrt": lrt("both", hf=tiny_llama()),
        "looped": attach_looped(tiny_llama()),
    }
    for model in made.values():
        model.tokenizer, model.name = word_tokenizer(), "tiny"
    return made


def capture_kinds(folder, questions=3, csv=None, only=(), **changes):
    """{kind: run}, each in `folder/KIND`; of all kinds, or `only` of these."""
    capture = importlib.import_module("sst_interp.runs.capture").capture
    csv = csv or write_questions(folder / "words.csv", questions)
    recipe = recipe_for(csv, questions=questions, **({"max_new_tokens": 4} | changes))
    runs = {}
    for kind, model in models().items():
        if only and kind not in only:
            continue
        kinds = {"backbone": {"alpha": 0}, "looped": {"kind": "looped"}}
        own = replace(recipe, name=kind, **kinds.get(kind, {}))
        runs[kind] = capture(own, model, folder / kind, progress=False)
    return runs
