"""One model from settings and a seed: the same float32 bits on every machine that builds it with the same libraries.

From a transformers configuration, a folder or name that transformers loads, or a function of the user's own. This
module does not know how the model is trained.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diloco_ray.errors import ConfigError, RunMismatchError
from diloco_ray.model.settings import ModelSettings

_LOOKED_AT_VALUES = (NotImplementedError, RuntimeError)  # which a model on the meta device does not have


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars of transformers, which every process of a run would print."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build_model(settings: ModelSettings, *, seed: int, vocab_size: int, eos_token_id: int) -> nn.Module:
    """A new module, float32 on the CPU, in training mode; the caller's random state is left as it was.

    ConfigError where it cannot be built; RunMismatchError where its vocabulary is smaller than the tokenizer's.
    """
    check_folders(settings)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        if settings.path is not None:
            model = _from_path(settings.path, vocab_size)
        else:
            model = _at_random(settings, vocab_size, eos_token_id)
        if settings.weights is not None:
            model = _with_weights(model, Path(settings.weights).expanduser())
        return model.to(device="cpu", dtype=torch.float32).train()


def build_outline(settings: ModelSettings, *, seed: int, vocab_size: int, eos_token_id: int) -> nn.Module:
    """build_model without the values of its trainable parameters, which are on the meta device; buffers have theirs.

    At no time does it hold more than one parameter's values; but a model that has frozen ones, or looks at values while
    it is built, is built whole.
    """
    check_folders(settings)
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers(), _parameters_without_values():
            torch.manual_seed(seed)
            if settings.path is None:
                model = _at_random(settings, vocab_size, eos_token_id)
            else:
                model = _outline_of_path(settings.path, vocab_size)
        if all(parameter.requires_grad for parameter in model.parameters()):
            return model.to(dtype=torch.float32).train()
    except _LOOKED_AT_VALUES:
        pass
    except ConfigError as error:
        if not isinstance(error.__cause__, _LOOKED_AT_VALUES):
            raise
    return build_model(settings, seed=seed, vocab_size=vocab_size, eos_token_id=eos_token_id)


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """In this block a parameter that a module is given is put on the meta device, if it is to be trained."""
    register = nn.Module.register_parameter

    def register_outline(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.requires_grad and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"))
        register(self, name, param)

    nn.Module.register_parameter = register_outline
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def planned_shapes(
    settings: ModelSettings, *, vocab_size: int, eos_token_id: int, sequence_length: int = 0
) -> dict[str, tuple[int, ...]] | None:
    """parameter_shapes of the model, for which nothing is computed or stored; None where it has to be built for that.

    ConfigError where it cannot be built, or has too few positions for a sequence; RunMismatchError where its
    vocabulary is smaller than the tokenizer's.
    """
    if settings.path is not None:
        return None
    try:
        with torch.device("meta"), quiet_transformers():
            model = _at_random(settings, vocab_size, eos_token_id)
            check_length(model, sequence_length)
            return parameter_shapes(model)
    except _LOOKED_AT_VALUES:
        return None
    except ConfigError as error:
        if isinstance(error.__cause__, _LOOKED_AT_VALUES):
            return None
        raise


def check_folders(settings: ModelSettings) -> None:
    """ConfigError where a folder that is named is not there, or has no weights."""
    if settings.path is not None:
        folder = Path(settings.path).expanduser()
        if settings.path.startswith(("/", ".", "~")) and not folder.is_dir():
            raise ConfigError(f"no folder {folder}", where="model.path", remedy="check the path")
    if settings.weights is not None:
        folder = Path(settings.weights).expanduser()
        if not any(folder.glob("*.safetensors")):
            remedy = "train and export the run that is to be started from, or check the path"
            raise ConfigError(f"no weights in {folder}", where="model.weights", remedy=remedy)


def check_length(model: nn.Module, sequence_length: int) -> None:
    """ConfigError where a model of transformers has fewer positions than a sequence has tokens."""
    config: Any = getattr(model, "config", None)
    own = getattr(config, "max_position_embeddings", None)
    if isinstance(own, int) and 0 < own < sequence_length:
        name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        what = f"the model's {name}={own} is smaller than data.sequence_length={sequence_length}"
        remedy = f"set data.sequence_length to at most {own}, or take a model with {name} of {sequence_length} or more"
        raise ConfigError(what, where="data.sequence_length", remedy=remedy)


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors that training moves, in named_parameters order; tied weights once, frozen ones never.

    Buffers, such as running means, are not among them: each island keeps its own.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of trainable_parameters, in the same order."""
    return {name: tuple(tensor.shape) for name, tensor in trainable_parameters(model).items()}


def _at_random(settings: ModelSettings, vocab_size: int, eos_token_id: int) -> nn.Module:
    if settings.config is not None:
        return _from_config(settings.config, vocab_size, eos_token_id)
    return _from_factory(settings.factory or "", vocab_size=vocab_size, eos_token_id=eos_token_id)


def _from_config(fields: dict[str, Any], vocab_size: int, eos_token_id: int) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = fields["model_type"]
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=3)
        remedy = f"did you mean {' or '.join(near)}?" if near else "name one that it knows, such as llama or gpt2"
        raise ConfigError(
            f"transformers knows no model_type {model_type!r}", where="model.config.model_type", remedy=remedy
        )
    # The families' own defaults are the ids of their own tokenizers.
    own = {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "bos_token_id": eos_token_id, "pad_token_id": None}
    try:
        config = AutoConfig.for_model(**{**own, **fields})
    except Exception as error:  # each family checks its fields in its own way
        raise _not_built("model.config", error) from error
    _all_fields_do_something(fields, AutoConfig)
    return _initialised(config, "model.config", vocab_size)


def _from_path(path: str, vocab_size: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path).expanduser()
    is_local = folder.is_dir()
    name = str(folder) if is_local else path
    try:
        config = AutoConfig.from_pretrained(name)
        if is_local and not any(folder.glob("*.safetensors")):
            if any(folder.glob("*.bin")):
                what, remedy = f"{folder} has weights, but none as safetensors", "save it again with save_pretrained"
                raise ConfigError(what, where="model.path", remedy=remedy)
            return _initialised(config, "model.path", vocab_size)
        _vocabulary_is_large_enough(config, "model.path", vocab_size)
        return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        what = f"model {path!r} cannot be loaded: {error}"
        raise ConfigError(what, where="model.path", remedy="name a folder, or a model that the hub has") from error


def _outline_of_path(path: str, vocab_size: int) -> nn.Module:
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    return _initialised(AutoConfig.from_pretrained(str(folder) if folder.is_dir() else path), "model.path", vocab_size)


def _initialised(config: Any, where: str, vocab_size: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    _vocabulary_is_large_enough(config, where, vocab_size)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # each family checks its fields in its own way
        raise _not_built(where, error) from error


def _from_factory(factory: str, **known: int) -> nn.Module:
    """Calls the user's function with those of `known` that it names."""
    module, _, function = factory.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
        parameters = inspect.signature(build).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        remedy = "name it as package.module:function, importable where the islands run"
        raise ConfigError(f"no function {factory}: {error}", where="model.factory", remedy=remedy) from error
    model = build(**{name: value for name, value in known.items() if name in parameters})
    if not isinstance(model, nn.Module):
        what = f"{factory} returned {type(model).__name__}, not a torch.nn.Module"
        raise ConfigError(what, where="model.factory", remedy="return the model itself")
    return model


def _with_weights(model: nn.Module, folder: Path) -> nn.Module:
    """The model as `export` wrote it into the folder; every tensor has to be there and fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model
    from transformers import PreTrainedModel

    try:
        if not isinstance(model, PreTrainedModel):
            load_model(model, folder / "model.safetensors")
            return model
        loading: Any = type(model).from_pretrained  # its type does not know of output_loading_info
        loaded, info = loading(
            folder, config=model.config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _unfit(folder, str(error)) from error
    unfit = sorted([*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])])
    if unfit:
        raise _unfit(folder, ", ".join(unfit[:5]))
    return loaded


def _unfit(folder: Path, what: str) -> ConfigError:
    remedy = "start from an export of a model with the same fields"
    return ConfigError(f"the weights in {folder} do not fit: {what}", where="model.weights", remedy=remedy)


def _all_fields_do_something(fields: dict[str, Any], auto_config: Any) -> None:
    """transformers keeps unknown fields without a word, and a misspelt one would train another model than was meant."""
    model_type = fields["model_type"]
    usual = auto_config.for_model(model_type)
    for name in fields.keys() - {"model_type", "attn_implementation"}:
        if hasattr(usual, name):
            continue
        with_it = auto_config.for_model(model_type, **{name: fields[name]}).to_dict()
        if {key: value for key, value in with_it.items() if key != name} == usual.to_dict():
            near = difflib.get_close_matches(name, usual.to_dict(), n=1)
            remedy = f"did you mean {near[0]}?" if near else f"see the configuration of {model_type} in transformers"
            raise ConfigError(f"{model_type} has no field {name}", where=f"model.config.{name}", remedy=remedy)


def _vocabulary_is_large_enough(config: Any, where: str, vocab_size: int) -> None:
    own = config.get_text_config().vocab_size
    if own < vocab_size:
        what = f"the model's vocab_size={own} is smaller than the tokenizer's {vocab_size}"
        remedy = "leave vocab_size out, or use the model's own tokenizer as data.tokenizer"
        raise RunMismatchError(what, where=f"{where}.vocab_size", remedy=remedy)


def _not_built(where: str, error: Exception) -> ConfigError:
    what = f"the model cannot be built: {type(error).__name__}: {error}"
    return ConfigError(what, where=where, remedy="change the field that the message speaks of")
