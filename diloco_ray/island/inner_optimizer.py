"""The inner optimizer of one island: AdamW (or SGD, the control), its learning rate, its state on disk.

The schedule runs on the global inner step, so that islands that join late train with everybody's learning rate.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diloco_ray.island.settings import InnerSettings


def build_inner_optimizer(settings: InnerSettings, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """One group, weight decay on every parameter, as in torch.optim; fused AdamW where torch has it."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate_at(settings: InnerSettings, step: int, num_steps: int, own_steps: int | None = None) -> float:
    """Learning rate of global inner step `step` (from 0) of `num_steps`.

    Warmup is linear; cosine falls from the peak at its end to `final_learning_rate_ratio` of it at `num_steps`.
    own_steps: steps since this island began without optimizer state, for the joiner's ramp; None: it has its state.
    """
    rate = settings.learning_rate
    if step < settings.warmup_steps:
        rate *= (step + 1) / settings.warmup_steps
    elif settings.schedule == "cosine":
        done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
        low = settings.final_learning_rate_ratio
        rate *= low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if own_steps is not None and own_steps < settings.joiner_ramp_steps:
        rate *= (own_steps + 1) / settings.joiner_ramp_steps
    return rate


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as `<parameter number>.<name>`, on the CPU."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, entries in sorted(state.items())
        for name, value in sorted(entries.items())
        if isinstance(value, Tensor)
    }


def load_state_tensors_(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`, onto the parameters' devices."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
