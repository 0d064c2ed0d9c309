"""The inner loop: H optimizer steps on one island's own data, without a word to anyone."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diloco_ray.island.inner_optimizer import InnerOptimizer
from diloco_ray.island.settings import InnerSettings


@dataclass(frozen=True)
class InnerResult:
    """Means over the steps of one round; seconds of the whole."""

    loss: float
    gradient_norm: float
    num_steps: int
    num_tokens: int
    seconds: float


def run_inner_steps(
    model: nn.Module,
    optimizer: InnerOptimizer,
    batches_BT: Iterable[Tensor],
    settings: InnerSettings,
    *,
    learning_rate: Callable[[int], float],
    on_step: Callable[[int], None] = lambda step: None,
) -> InnerResult:
    """One optimizer step per batch. learning_rate and on_step get the step's number in this round, from 0.

    on_step may raise to abandon the round: the model is then between two steps.
    """
    began = time.monotonic()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    # Sums stay on the device: reading them each step would make the host wait for every step.
    loss_sum, norm_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    num_steps = num_tokens = 0
    model.train()
    for inputs_BT in batches_BT:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(num_steps)
        for part in inputs_BT.to(device, non_blocking=True).chunk(settings.accumulate):
            with _precision(settings, device):
                loss = model(input_ids=part, labels=part).loss / settings.accumulate
            loss.backward()
            loss_sum += loss.detach()
        limit = settings.clip_norm if settings.clip_norm is not None else float("inf")
        norm_sum += nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_steps += 1
        num_tokens += inputs_BT.numel()
        on_step(num_steps)
    steps = max(1, num_steps)
    seconds = time.monotonic() - began
    return InnerResult(loss_sum.item() / steps, norm_sum.item() / steps, num_steps, num_tokens, seconds)


def _precision(settings: InnerSettings, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if settings.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
