"""The model of a run, the same on every island."""

from typing import Any

import torch
from torch import Tensor, nn

from diloco_ray.model.settings import ModelSettings


def build_model(settings: ModelSettings, *, seed: int, vocab_size: int, eos_token_id: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.path:
            return AutoModelForCausalLM.from_pretrained(settings.path, dtype=torch.float32)
        body: dict[str, Any] = dict(settings.config or {})
        kind = body.pop("model_type")
        body.setdefault("vocab_size", vocab_size)
        config = AutoConfig.for_model(kind, **body, eos_token_id=eos_token_id, bos_token_id=None, pad_token_id=None)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in trainable_parameters(model).items()}
