"""What is trained, in fp32: AdamW over copies of the adapters and over the stream's own weights.

A bf16 weight of 1 cannot take a step of 0.001. So the optimiser works on fp32 masters; the model computes
with their bf16 roundings. Blend weights are trained as the logit of their place between the bounds:

    alpha = low + (high - low) * sigmoid(logit)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sst_interp.training.recipe import TrainingRecipe


class MasterWeights:
    """The trained values, their optimiser, and the learning rate of every step.

    Args:
        adapters: the model's adapter weights by name; they are overwritten after every step.
        shape: of the blend weights, [layer, d_model]; None without a blend.
        steps: of the whole training, for the learning rate.
        memory: weights of a Latent Recurrent Transformer, which are trained as they are.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        adapters: dict[str, nn.Parameter],
        shape: tuple[int, int] | None,
        steps: int,
        memory: dict[str, Tensor] | None = None,
    ) -> None:
        self.recipe, self.adapters, self.steps = recipe, adapters, steps
        dtype = torch.float64 if recipe.dtype == "float64" else torch.float32
        self.values = {name: nn.Parameter(p.detach().to(dtype).clone()) for name, p in adapters.items()}
        groups = [
            {
                "params": list(self.values.values()),
                "lr": recipe.learning_rate,
                "weight_decay": recipe.weight_decay,
            }
        ]
        self.logit: nn.Parameter | None = None
        if shape is not None:
            low, high = recipe.alpha_bounds
            device = next(iter(adapters.values())).device
            place = torch.full(shape, (recipe.alpha - low) / (high - low), dtype=dtype, device=device)
            self.logit = self.values["alpha.logit"] = nn.Parameter(torch.logit(place))
            groups.append({"params": [self.logit], "lr": recipe.alpha_learning_rate, "weight_decay": 0.0})
        self.memory = {name: nn.Parameter(w.detach().to(dtype).clone()) for name, w in (memory or {}).items()}
        """A Latent Recurrent Transformer's weights by name, differentiable."""
        if self.memory:
            self.values |= {f"memory.{name}": value for name, value in self.memory.items()}
            params = list(self.memory.values())
            groups.append({"params": params, "lr": recipe.lrt_learning_rate, "weight_decay": 0.0})
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        self._peaks = [group["lr"] for group in groups]

    def alpha(self) -> Float[Tensor, "layer d_model"]:
        """The blend weights, differentiable."""
        assert self.logit is not None
        low, high = self.recipe.alpha_bounds
        return low + (high - low) * torch.sigmoid(self.logit)

    def stream(self) -> dict[str, Tensor] | None:
        """The stream's own weights by name, differentiable; None if none are trained."""
        if self.logit is not None:
            return {"alpha": self.alpha()}
        return dict(self.memory) if self.memory else None

    def gradient_norm(self) -> float:
        """Norm of the whole gradient, which is taken over from the model."""
        for name, parameter in self.adapters.items():
            if parameter.grad is not None:
                self.values[name].grad = parameter.grad.to(self.values[name].dtype)
                parameter.grad = None
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def step(self, number: int, norm: float) -> None:
        """Step `number` (from 0) with the gradients taken over, scaled down to the recipe's clip.

        A memory is clipped apart from the adapters: its gradient is ten to a hundred times theirs, and would
        decide by how much they are scaled.
        """
        memory = list(self.memory.values())
        apart = {id(value) for value in memory}
        adapters = [value for value in self.values.values() if id(value) not in apart]
        for part in (adapters, memory) if memory else ():
            gradients = [value.grad for value in part if value.grad is not None]
            nn.utils.clip_grads_with_norm_(part, self.recipe.clip, nn.utils.get_total_norm(gradients))
        if not memory:
            nn.utils.clip_grads_with_norm_(adapters, self.recipe.clip, torch.tensor(norm))
        for group, peak in zip(self.optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate(number, self.steps, self.recipe.warmup)
        self.optimiser.step()
        self.forget()
        self.write_back()

    def forget(self) -> None:
        """Drop all gradients."""
        self.optimiser.zero_grad()
        for parameter in self.adapters.values():
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the current values, rounded to its dtype."""
        for name, parameter in self.adapters.items():
            parameter.copy_(self.values[name])

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as named tensors."""
        tensors = {f"value/{name}": value.detach() for name, value in self.values.items()}
        for name, value in self.values.items():
            for key, moment in self.optimiser.state.get(value, {}).items():
                tensors[f"{key}/{name}"] = moment
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up a `state`."""
        for name, value in self.values.items():
            value.copy_(tensors[f"value/{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimiser.state[value] = {key: tensors[f"{key}/{name}"].clone() for key in keys}
        self.write_back()


def rate(number: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at step `number` of `steps`: linear up over `warmup` steps, then linear
    down to a tenth.
    """
    if number < warmup:
        return (number + 1) / warmup
    return 1 - 0.9 * (number - warmup) / max(1, steps - warmup)
