"""The inner optimizer of one island: AdamW, Muon, or SGD (the control), its learning rate, its state on disk.

The schedule runs on the global inner step, so that islands that join late train with everybody's learning rate.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diloco_ray.algorithm.fragments import is_embedding
from diloco_ray.errors import ConfigError
from diloco_ray.island.settings import InnerSettings


class MuonAndAdamW:
    """Two optimizers that step as one. Their parameters are numbered through, those of the first one first."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


InnerOptimizer = torch.optim.Optimizer | MuonAndAdamW


def build_inner_optimizer(settings: InnerSettings, parameters: Mapping[str, Tensor]) -> InnerOptimizer:
    """Weight decay on every parameter, as in torch.optim; fused AdamW where torch has it.

    Muon (arXiv 2502.16982) orthogonalises the momentum of the hidden matrices; AdamW takes the rest: embeddings, head,
    norms, biases. Muon's updates are scaled to the size that AdamW's usually have, so that one learning rate and one
    weight decay serve both; its other numbers are torch's. ConfigError where this torch has no Muon.
    """
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw":
        return _adamw(settings, list(parameters.values()))
    check_available(settings)
    hidden = [tensor for name, tensor in parameters.items() if is_hidden_matrix(name, tensor)]
    rest = [tensor for name, tensor in parameters.items() if not is_hidden_matrix(name, tensor)]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        decay = settings.weight_decay
        muon = torch.optim.Muon(hidden, settings.learning_rate, decay, adjust_lr_fn="match_rms_adamw")
        parts.append(muon)
    if rest:
        parts.append(_adamw(settings, rest))
    return MuonAndAdamW(parts)


def is_hidden_matrix(name: str, tensor: Tensor) -> bool:
    """Whether Muon is for it: two dimensions, and neither an embedding nor the head by its name."""
    return tensor.ndim == 2 and not is_embedding(name, tuple(tensor.shape))


def check_available(settings: InnerSettings) -> None:
    """ConfigError where this torch has no such optimizer."""
    if settings.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        remedy = "install torch 2.9 or later, or choose adamw"
        raise ConfigError(f"torch {torch.__version__} has no Muon", where="inner.optimizer", remedy=remedy)


def _adamw(settings: InnerSettings, parameters: list[Tensor]) -> torch.optim.AdamW:
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


def longest_move(settings: InnerSettings, num_values: int) -> float:
    """A norm that no outer gradient of one round has: ten times what the inner steps can move so many values by.

    A step of AdamW moves a value by its learning rate times |m| / sqrt(v), which is at most
    (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), after Cauchy and Schwarz, and usually no more than 1. Muon's steps are
    scaled to be no longer. The ten times are room for weight decay, for merging and for encoding. 0 where nothing is
    known: SGD, whose steps are as long as gradients and parameters are, and b1^2 >= b2.
    """
    first, second = settings.betas
    if settings.optimizer == "sgd" or first**2 >= second:
        return 0.0
    steepest = (1.0 - first) / math.sqrt((1.0 - second) * (1.0 - first**2 / second))
    return 10.0 * settings.steps_per_round * settings.learning_rate * max(1.0, steepest) * math.sqrt(num_values)


def state_tensors(optimizer: InnerOptimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as `<parameter number>.<name>`, on the CPU."""
    return {
        f"{first + number}.{name}": value.detach().cpu().contiguous()
        for first, _, part in _numbered(optimizer)
        for number, entries in sorted(part.state_dict()["state"].items())
        for name, value in sorted(entries.items())
        if isinstance(value, Tensor)
    }


def load_state_tensors_(optimizer: InnerOptimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`, onto the parameters' devices."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    for first, stop, part in _numbered(optimizer):
        own = {number - first: entries for number, entries in state.items() if first <= number < stop}
        part.load_state_dict({"state": own, "param_groups": part.state_dict()["param_groups"]})


def _numbered(optimizer: InnerOptimizer) -> Iterator[tuple[int, int, torch.optim.Optimizer]]:
    """Each torch optimizer with the numbers first .. stop - 1 of its parameters."""
    stop = 0
    for part in optimizer.parts if isinstance(optimizer, MuonAndAdamW) else [optimizer]:
        first, stop = stop, stop + sum(len(group["params"]) for group in part.param_groups)
        yield first, stop, part
