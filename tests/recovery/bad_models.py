"""Models that go wrong while they train, as a user's may."""

import os
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.model.plain_module import PlainModel

VICTIM = "DILOCO_RAY_TEST_VICTIM"  # a file: the process that creates it is the one that goes wrong


class Poisoned(PlainModel):
    """Learns values that are not finite, in one process of all."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        output = super().forward(input_ids, labels)
        if self.training and _is_victim():
            output.loss = output.loss * torch.nan
        return output


class Greedy(PlainModel):
    """Asks for a petabyte."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        if self.training:
            torch.empty(1 << 50, dtype=torch.uint8)
        return super().forward(input_ids, labels)


def _is_victim() -> bool:
    path, mine = os.environ[VICTIM], str(os.getpid())
    try:
        with open(path, "x") as file:
            file.write(mine)
    except FileExistsError:
        with open(path) as file:
            return file.read() == mine
    return True


def poisoned(vocab_size: int) -> nn.Module:
    return Poisoned(vocab_size)


def greedy(vocab_size: int) -> nn.Module:
    return Greedy(vocab_size)
