"""What all settings have in common: how strictly a recipe's values are read, and how a refusal reads."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from diloco_ray.errors import ConfigError

_EXPONENT_WITHOUT_POINT = re.compile(r"[-+]?\d+[eE][-+]?\d+|[-+]?\d*\.\d+[eE]\d+|[-+]?\d+\.\d*[eE]\d+")


def as_meant(value: Any) -> Any:
    """YAML reads 1e-3 and 1.0e3 as text."""
    return float(value) if isinstance(value, str) and _EXPONENT_WITHOUT_POINT.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(as_meant)]  # 1 and 1e-3 as well as 0.5; neither true nor "0.5"


class Settings(BaseModel):
    """A section of a recipe: no unknown keys, no value of another type, no number that is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# What a value of this kind looks like, by the type of pydantic's error.
_KINDS = {
    "int_type": "a whole number such as 2, without quotes",
    "float_type": "a number such as 0.5, without quotes",
    "finite_number": "a finite number such as 0.5",
    "bool_type": "true or false",
    "string_type": "text, in quotes where YAML would read something else",
    "dict_type": "a mapping such as {CPU: 1}",
    "tuple_type": "a list such as [1, 2]",
    "model_type": "a section: indented lines of field: value",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def explain(
    error: ValidationError, model: type[BaseModel], where: str, sources: Mapping[str, str] | None = None
) -> ConfigError:
    """All that is wrong with a recipe, each with its path, its value and a remedy.

    A ValueError of our own says what and remedy, with a semicolon between. sources: where each field is from.
    """
    lines: list[str] = []
    remedies: list[str] = []
    if all(_source(item["loc"], sources or {}) == "--set" for item in error.errors()):
        where = "--set"
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {path}")
            remedies.append(_remedy_of_unknown(model, item["loc"]))
            continue
        whole = item["type"] == "missing" or isinstance(item["input"], dict)
        given = "" if whole else f" (given: {item['input']!r})"
        text, remedy = item["msg"], _remedy(item, path)
        if item["type"] == "value_error":
            text, _, remedy = text.removeprefix("Value error, ").rpartition("; ")
        lines.append(f"{path}: {text}{given}" if path else text)
        remedies.append(remedy)
    return ConfigError("; ".join(lines), where=where, remedy="; ".join(dict.fromkeys(remedies)))


def _source(path: tuple[int | str, ...], sources: Mapping[str, str]) -> str:
    """Of the field at the path, or of the list that it is in."""
    names = [str(part) for part in path]
    return next((s for n in range(len(names), 0, -1) if (s := sources.get(".".join(names[:n])))), "")


def nearest_of(name: str, names: Iterable[str]) -> str:
    """The remedy for a word that is none of these."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4) or [
        one for one in names if name == "".join(word[:1] for word in one.split("_"))
    ]
    return f"{f'did you mean {near[0]}? There are' if near else 'choose one of'} {', '.join(names)}"


def _remedy(item: Any, path: str) -> str:
    kind, limits = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return nearest_of(str(item["input"]), re.findall(r"'([^']*)'", limits["expected"]))
    if kind in _KINDS:
        return f"write {path} as {_KINDS[kind]}"
    bounds = [f"{word} {limits[bound]}" for bound, word in _BOUNDS.items() if bound in limits]
    return f"choose {path} {bounds[0]}" if bounds else f"see {path} in docs/recipes.md"


def _remedy_of_unknown(model: Any, path: tuple[int | str, ...]) -> str:
    """Most often a field without its section, or with another's, and else a slip of the hand."""
    name = str(path[-1])
    elsewhere = [field for field in _paths(model) if field.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return nearest_of(name, _fields_at(model, path[:-1]))


def _paths(model: Any, prefix: str = "") -> list[str]:
    """Of every section and field."""
    found: list[str] = []
    for name, field in getattr(model, "model_fields", {}).items():
        found += [f"{prefix}{name}", *_paths(field.annotation, f"{prefix}{name}.")]
    return found


def _fields_at(model: Any, path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        model = model.model_fields[part].annotation
    return list(getattr(model, "model_fields", ()))
