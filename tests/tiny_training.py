"""Small data and recipes for the tests of training and evaluation."""

import json

import torch
from tiny_capture import save_model

from sst_interp.training.data import Batch, Example
from sst_interp.training.objective import answer_loss, last_layer
from sst_interp.training.recipe import TrainingRecipe

EXAMPLES = [
    Example("a", (5, 6, 7, 8, 9, 10), 2),
    Example("b", (6, 7, 8), 1),
    Example("c", (9, 8, 7, 6, 5), 3),
]


def write_gsm8k(path, n=20):
    """Worked answers as GSM8K writes them, of different lengths."""
    rows = [
        {
            "question": " ".join(["sun"] * (1 + number % 5)) + f" {number}",
            "answer": "moon " * (1 + number % 3) + f"is <<1+1=2>>2\n#### {number}",
        }
        for number in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer_batch(rows=2, seed=0, positions=7):
    """Random tokens with two answers."""
    tokens = torch.randint(3, 97, (rows, positions), generator=torch.Generator().manual_seed(seed))
    answer = torch.zeros(rows, positions, dtype=torch.bool)
    answer[0, 2:6] = answer[1:, 3:5] = True
    return Batch(tokens, answer)


def training_recipe(folder, backbone):
    """A recipe with data of its own in `folder`."""
    data = write_gsm8k(folder / "train.jsonl")
    return TrainingRecipe(
        name="tiny", backbone=str(backbone), data=str(data), holdout=5, batch_size=3, dtype="float32", rank=2,
        lora_alpha=4, warmup=2, learning_rate=0.02, alpha_learning_rate=0.1,
    )  # fmt: skip


def save_backbone(folder):
    return save_model(folder / "tiny", max_position_embeddings=256)


def token_batch(rows=2, seed=0, T=8):
    tokens = torch.randint(3, 97, (rows, T), generator=torch.Generator().manual_seed(seed))
    answer = torch.ones(rows, T, dtype=torch.bool)
    answer[:, -1] = answer[0, 0] = False
    return Batch(tokens, answer)


def weight_of(model):
    return next(
        p for n, p in model.backbone.model.named_parameters() if "down_proj" in n or "mlp.c_proj.w" in n
    )


def loss_and_gradients(model, data, *how):
    weight = weight_of(model)
    loss = answer_loss(model, data, last_layer(model, data, *how))
    return loss.detach(), *torch.autograd.grad(loss, (model.alpha, weight))
