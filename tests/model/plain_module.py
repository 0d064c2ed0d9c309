"""A language model without transformers: what a user's factory may return."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class PlainModel(nn.Module):
    def __init__(self, vocab_size: int, with_logits: bool = True, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.with_logits = with_logits

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(self.embedding(input_ids))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits if self.with_logits else None)


def build(vocab_size: int) -> nn.Module:
    return PlainModel(vocab_size)


def build_fixed() -> nn.Module:
    return PlainModel(50, with_logits=False)


def build_nothing() -> None:
    return None
