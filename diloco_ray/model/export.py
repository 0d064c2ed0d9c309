"""The trained model, for others."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def export_model(model: nn.Module, tokenizer_dir: str | Path | None, to: str) -> str:
    model.save_pretrained(to)
    if tokenizer_dir:
        for f in Path(tokenizer_dir).iterdir():
            shutil.copy(f, to)
    return to


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[Tensor]) -> float:
    was = model.training
    model.eval()
    total, n = 0.0, 0
    device = next(model.parameters()).device
    for b in batches:
        b = b.to(device)
        k = b.shape[0] * (b.shape[1] - 1)
        total += model(input_ids=b, labels=b).loss.item() * k
        n += k
    model.train(was)
    return total / n


def sample_text(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature)
    return tokenizer.decode(out[0])
