"""The inner loop: H optimizer steps on one island's own data, without a word to anyone."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco_ray.island.inner_optimizer import InnerOptimizer
from diloco_ray.island.parallel import Parallel
from diloco_ray.island.settings import InnerSettings


@dataclass(frozen=True)
class InnerResult:
    """Means over the steps taken so far."""

    loss: float
    gradient_norm: float


class InnerLoop:
    """An iterator: each `next` takes one optimizer step, on one batch, and gives its number, from 1.

    learning_rate gets the step's number in this loop, from 0. Between two steps nothing is in flight: the model may be
    read and written.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: InnerOptimizer,
        batches_BT: Iterable[Tensor],
        settings: InnerSettings,
        *,
        learning_rate: Callable[[int], float],
    ):
        self._parallel, self._optimizer, self._settings = parallel, optimizer, settings
        self._model = parallel.forward.train()
        self._batches = iter(batches_BT)
        self._learning_rate = learning_rate
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        # Sums stay on the device: reading them each step would make the host wait for every step.
        self._loss_sum = torch.zeros((), device=self._device)
        self._norm_sum = torch.zeros((), device=self._device)
        self.num_steps = self.num_tokens = 0

    def __iter__(self) -> "InnerLoop":
        return self

    def __next__(self) -> int:
        inputs_BT = next(self._batches)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(self.num_steps)
        accumulate = self._settings.accumulate
        rows = self._parallel.rows(inputs_BT).to(self._device, non_blocking=True)
        for number, part in enumerate(rows.chunk(accumulate), start=1):
            with self._parallel.backward(number == accumulate):
                with _precision(self._settings, self._device):
                    loss = self._model(input_ids=part, labels=part).loss / accumulate
                loss.backward()
            self._loss_sum += loss.detach()
        limit = self._settings.clip_norm if self._settings.clip_norm is not None else float("inf")
        self._norm_sum += self._parallel.clip_(self._parameters, limit)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        self.num_tokens += inputs_BT.numel()
        return self.num_steps

    def result(self) -> InnerResult:
        """Waits for the accelerator, and for the other ranks."""
        steps = max(1, self.num_steps)
        loss_sum = self._parallel.mean(self._loss_sum)
        return InnerResult(loss_sum.item() / steps, self._norm_sum.item() / steps)


def _precision(settings: InnerSettings, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if settings.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
