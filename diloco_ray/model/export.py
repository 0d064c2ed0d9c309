"""What leaves a run: the outer model as files that transformers loads, its held-out loss, and a sample of its text.

This module does not know of runs or logs; the weights are in the module that it is given.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from diloco_ray.errors import ConfigError, StoreError
from diloco_ray.model.build import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METADATA = "diloco_ray.json"


def export_model(
    model: nn.Module, tokenizer_path: Path | None, to: str, metadata: Mapping[str, Any] | None = None
) -> str:
    """Writes model, tokenizer files and metadata (as diloco_ray.json) into the folder `to`; returns its address.

    `to` is any fsspec path. A local folder appears whole or not at all. An earlier export there is replaced; a folder
    with anything else in it is a StoreError. A module that is not of transformers becomes model.safetensors alone.
    """
    fs, target = fsspec.url_to_fs(to, use_listings_cache=False)
    is_local = isinstance(fs, LocalFileSystem)
    address = target if is_local else fs.unstrip_protocol(target)
    try:
        _free_or_ours(fs, target, address)
        if is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        beside = Path(target).parent if is_local else None
        with tempfile.TemporaryDirectory(prefix=".export-", dir=beside) as scratch:
            stage = Path(scratch) / "model"
            stage.mkdir()
            _save(model, tokenizer_path, stage, metadata)
            if is_local:
                if Path(target).exists():
                    Path(target).rename(Path(scratch) / "earlier")
                stage.rename(target)
            else:
                if fs.exists(target):
                    fs.rm(target, recursive=True)
                for path in sorted(path for path in stage.rglob("*") if path.is_file()):
                    fs.put_file(str(path), f"{target}/{path.relative_to(stage).as_posix()}")
    except OSError as error:
        remedy = "check that the folder can be written and that there is room"
        raise StoreError(f"{type(error).__name__}: {error}", where=address, remedy=remedy) from error
    return address


@torch.no_grad()
def validation_loss(model: nn.Module, batches_BT: Iterable[Tensor]) -> float:
    """Mean cross-entropy in nats over all predicted tokens (T - 1 of each sequence), in evaluation mode.

    ValueError where there are no batches.
    """
    device = next(model.parameters()).device
    loss_sum, num_predicted = 0.0, 0
    with _evaluating(model):
        for inputs_BT in batches_BT:
            inputs_BT = inputs_BT.to(device)
            number = inputs_BT.shape[0] * (inputs_BT.shape[1] - 1)
            loss_sum += model(input_ids=inputs_BT, labels=inputs_BT).loss.item() * number
            num_predicted += number
    if not num_predicted:
        raise ValueError("no batches to measure a loss on")
    return loss_sum / num_predicted


@torch.no_grad()
def sample_text(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The prompt and what the model makes of it, up to its eos token; temperature 0 takes the likeliest each time.

    Stops where the model has no more positions. ConfigError for a model whose forward gives no .logits.
    """
    eos_token_id = tokenizer.eos_token_id
    tokens: list[Any] = tokenizer.encode(prompt, add_special_tokens=False) or [eos_token_id]
    device = next(model.parameters()).device
    tokens_BT = torch.tensor([tokens], device=device)
    limit = _num_positions(model)
    num_new = max_new_tokens if limit is None else min(max_new_tokens, limit - len(tokens))
    cache: dict[str, Any] = {"use_cache": True} if hasattr(model, "generate") else {}
    generator = torch.Generator().manual_seed(seed)
    inputs_BT = tokens_BT
    with _evaluating(model):
        for _ in range(num_new):
            output = model(input_ids=inputs_BT, **cache)
            if getattr(output, "logits", None) is None:
                remedy = "let forward(input_ids) give .logits"
                raise ConfigError(f"{type(model).__name__} gives no logits to sample from", remedy=remedy)
            token = _choose(output.logits[0, -1, : len(tokenizer)], temperature, generator)
            if token == eos_token_id:
                break
            tokens.append(token)
            inputs_BT = torch.tensor([tokens], device=device)
            if getattr(output, "past_key_values", None) is not None:
                cache["past_key_values"], inputs_BT = output.past_key_values, inputs_BT[:, -1:]
    return str(tokenizer.decode(tokens))


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    # On the CPU, so that a seed means the same text on every device.
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))


def _num_positions(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _save(model: nn.Module, tokenizer_path: Path | None, stage: Path, metadata: Mapping[str, Any] | None) -> None:
    from safetensors.torch import save_model
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        with quiet_transformers():
            model.save_pretrained(stage)
    else:
        save_model(model, str(stage / "model.safetensors"))
    if tokenizer_path is not None:
        shutil.copytree(tokenizer_path, stage, dirs_exist_ok=True)
    (stage / METADATA).write_text(json.dumps(dict(metadata or {}), indent=2, sort_keys=True) + "\n")


def _free_or_ours(fs: Any, target: str, address: str) -> None:
    if fs.exists(f"{target}/{METADATA}") or not fs.exists(target):
        return
    if not fs.isdir(target) or fs.ls(target):
        raise StoreError("something else lies here", where=address, remedy="name a new or empty folder")
