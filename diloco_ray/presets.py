"""The DiLoCo family: each preset a name for a few fields of one engine; and the layers that a recipe is made of.

    defaults < preset in the recipe < fields of the recipe < preset given by --set < other --set

So one word on the command line changes the algorithm of any recipe, and whatever is said beside it still counts. A
preset given by --set takes the place of the recipe's. What comes out holds plain numbers and the preset's name, so
that resolving it again changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from pydantic import BaseModel

from diloco_ray.errors import ConfigError
from diloco_ray.settings import nearest_of

ONE_ROUND = "H"  # inner.steps_per_round as it is in the end
SAME_STEPS = "x H"  # the number of rounds that has as many inner steps as before

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2311.08105, Algorithm 1: the defaults
    "diloco": {},
    # Federated averaging (arXiv 1602.05629): the outer step takes the mean
    "fedavg": {"outer.optimizer": "sgd", "outer.learning_rate": 1.0},
    # arXiv 2501.18512, Algorithm 2; the outer learning rate of its two islands
    "streaming": {
        "sync.fragments": 4,
        "sync.partition": "strided",
        "sync.overlap": 5,
        "sync.mixing": 0.5,
        "outer.learning_rate": 0.4,
        "sync.uplink": "e3m0",
        "sync.downlink": "int8",
    },
    # arXiv 2502.12996: naive delay, and its eager updates
    "delayed": {"sync.overlap": ONE_ROUND},
    "eager": {"sync.overlap": ONE_ROUND, "sync.eager": True},
    # arXiv 2401.09135: delayed Nesterov and dynamic local updates
    "async": {"sync.closes": "arrival", "outer.optimizer": "delayed_nesterov", "inner.steps": "by_speed"},
    # arXiv 2604.21428
    "decoupled": {
        "sync.fragments": 24,
        "sync.partition": "balanced",
        "sync.overlap": 2,
        "sync.closes": "quorum",
        "sync.quorum": 1,
        "outer.combine": "radial",
        "sync.weighting": "tokens_squared_per_step",
        "sync.uplink": "int4",
        "sync.downlink": "int8",
    },
    # The control experiment: the mean of all islands after every inner step; what is counted in rounds is stretched
    "data_parallel": {
        "inner.steps_per_round": 1,
        "rounds": SAME_STEPS,
        "evaluation.every_rounds": SAME_STEPS,
        "storage.snapshot_every_rounds": SAME_STEPS,
        "inner.checkpoint_every_rounds": SAME_STEPS,
        "outer.optimizer": "sgd",
        "outer.learning_rate": 1.0,
        "sync.uplink": "float32",
        "sync.downlink": "float32",
    },
}

Overrides = Iterable[str] | Mapping[str, Any]

_H, _PRESET = "inner.steps_per_round", "sync.preset"
_MISSING = object()


class Resolved(NamedTuple):
    """body: the recipe with its preset and the overrides in it. sources: where each field that is not a default comes
    from, by its path: "preset", "recipe" or "--set"."""

    body: dict[str, Any]
    sources: dict[str, str]


def resolve(recipe: Mapping[str, Any], overrides: Overrides, default_of: Callable[[str], Any]) -> Resolved:
    """Lays the layers on each other. default_of: the value of a field that no layer names, by its path.

    ConfigError for a preset that is none, and for an override that cannot be read.
    """
    recipe = {key: _plain(value) for key, value in recipe.items()}
    sets = _sets(overrides)
    for path, value, _ in sets:
        if "." not in path and isinstance(value, dict):
            recipe.pop(path, None)  # --set section={...} takes the place of the recipe's section
    named = [name for name in (_preset_in(path, value) for path, value, _ in sets) if name is not _MISSING]
    preset = named[-1] if named else _at(recipe, _PRESET, default_of)
    fields = _fields_of(preset)
    layers = [("preset", fields), ("recipe", recipe)]
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in reversed(layers) if named else layers:
        _merge(merged, layer)
        sources |= dict.fromkeys(flatten(layer), source)
    for path, value, override in sets:
        if "." not in path and isinstance(value, dict):
            _merge(merged, {path: value})
        else:
            _set(merged, path, value, override)
        sources |= dict.fromkeys(flatten({path: value}), "--set")
    for path, value in PRESETS[preset].items():
        if value in (ONE_ROUND, SAME_STEPS) and sources[path] == "preset":
            _set(merged, path, _number(path, value, recipe, merged, sources, default_of), path)
    return Resolved(merged, sources)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe as its file has it, named after the file unless it says otherwise."""
    file = Path(path).expanduser()
    if not file.is_file():
        remedy = "name a YAML file such as jobs/quickstart.yaml"
        raise ConfigError(f"no recipe at {file}", where=str(file), remedy=remedy)
    try:
        body: Any = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=str(file), remedy="mend the line named above") from error
    if not isinstance(body, dict):
        raise ConfigError("a recipe is a mapping of sections", where=str(file), remedy="see jobs/quickstart.yaml")
    return {"name": file.stem, **cast(dict[str, Any], body)}


def flatten(body: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested sections by their paths."""
    flat: dict[str, Any] = {}
    for key, value in body.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(cast(dict[str, Any], value), f"{path}.")
        else:
            flat[path] = value
    return flat


def _fields_of(preset: Any) -> dict[str, Any]:
    """The fields of a preset, as a recipe would write them."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}", where=_PRESET, remedy=nearest_of(str(preset), PRESETS))
    body: dict[str, Any] = {}
    for path, value in PRESETS[preset].items():
        _set(body, path, value, path)
    return body


def _number(
    path: str,
    value: str,
    recipe: Mapping[str, Any],
    merged: Mapping[str, Any],
    sources: Mapping[str, str],
    default_of: Callable[[str], Any],
) -> Any:
    """What the preset's word stands for. Where a field it depends on is no number, that field is refused later."""
    if value == ONE_ROUND:
        steps = _at(merged, _H, default_of)
        return steps if isinstance(steps, int) else default_of(path)
    before, steps = _at(recipe, path, default_of), _at(recipe, _H, default_of)
    was_set = sources[_H] != "preset"  # rounds of another length, so not as many as there are steps
    return before if was_set or not (isinstance(before, int) and isinstance(steps, int)) else before * steps


# ---- nested mappings ----


def _plain(value: Any) -> Any:
    """A copy that is the recipe's own; of a section that is a model already, the fields that were given."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else deepcopy(value)


def _at(body: Mapping[str, Any], path: str, default_of: Callable[[str], Any]) -> Any:
    value: Any = body
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return default_of(path)
        value = cast(dict[str, Any], value)[part]
    return value


def _merge(body: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        below: Any = body.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(cast(dict[str, Any], below), cast(dict[str, Any], value))
        else:
            body[key] = deepcopy(cast(Any, value))


def _preset_in(path: str, value: Any) -> Any:
    """The preset that an override names, if it does."""
    if path == _PRESET:
        return value
    section, _, field = _PRESET.partition(".")
    if path == section and isinstance(value, dict):
        return cast(dict[str, Any], value).get(field, _MISSING)
    return _MISSING


def _sets(overrides: Overrides) -> list[tuple[str, Any, str]]:
    """The path and the value of each override, and how it reads. A section of a mapping is its fields."""
    if not isinstance(overrides, Mapping):
        return [_parsed(override) for override in ([overrides] if isinstance(overrides, str) else overrides)]
    fields: dict[str, Any] = {}
    for path, value in cast(Mapping[str, Any], overrides).items():
        is_section = isinstance(value, dict) and "." not in path
        within = cast(dict[str, Any], value) if is_section else {}
        fields |= {f"{path}.{field}": inner for field, inner in within.items()} if is_section else {path: value}
    return [(path, _plain(value), f"{path}={value}") for path, value in fields.items()]


def _parsed(override: str) -> tuple[str, Any, str]:
    """The path and the value of `section.field=value`, and the override itself."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not field=value", remedy="write it like outer.learning_rate=0.6")
    try:
        return path.strip(), yaml.safe_load(text), override
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not YAML", remedy=f"quote it: {error}") from error


def _set(body: dict[str, Any], path: str, value: Any, override: str) -> None:
    *sections, field = path.split(".")
    for section in sections:
        inner: Any = body.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{section} in override {override!r} is not a section", remedy="name a field of a section"
            )
        body = cast(dict[str, Any], inner)
    body[field] = value
