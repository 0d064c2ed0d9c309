"""A run's recipe: strict YAML into frozen models, once, at the porch. Nothing below reads files or the environment.

Each room owns its settings; here they are composed and checked against each other.
"""

import difflib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diloco_ray.algorithm.codecs import CODEC_NAMES
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.data.settings import DataSettings
from diloco_ray.errors import ConfigError
from diloco_ray.ids import canonical_json, sha256_hex
from diloco_ray.island.settings import InnerSettings
from diloco_ray.model.settings import ModelSettings

# What may differ when a run is taken up again; every other field is part of what the run is.
CHANGEABLE = (
    "name",
    "islands",
    "rounds",
    "evaluation",
    "storage",
    "cluster",
    "data.prepared",
    "inner.device",
    "inner.threads",
    "inner.compile",
    "inner.checkpoint_every_rounds",
    "inner.checkpoints",
    "sync.quorum",
    "sync.grace_s",
    "sync.heartbeat_every_s",
    "sync.heartbeat_timeout_s",
    "sync.join_timeout_s",
    "sync.waiting_timeout_s",
    "sync.stall_timeout_s",
    "sync.coordinator_timeout_s",
    "sync.max_norm_ratio",
)


class EvaluationSettings(BaseModel):
    """Held-out loss of the outer parameters, measured by a follower of the log, away from the islands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_rounds: int = Field(5, ge=1)
    num_sequences: int = Field(128, ge=1, description="validation sequences measured each time")
    batch_size: int = Field(16, ge=1)
    prompt: str = Field("The ", description="start of the text sample at the end")
    sample_tokens: int = Field(200, ge=0)
    resources: dict[str, float] = Field({}, description="Ray resources of the evaluator, such as {GPU: 1}")


class StorageSettings(BaseModel):
    """The run store: any path fsspec knows (a folder, s3://bucket/prefix, gs://...)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field("runs", description="the run's folder is <path>/<name>")
    snapshot_every_rounds: int = Field(10, ge=1)
    keep_snapshots: int = Field(3, ge=1, description="newest snapshots kept; the first one always is")


class ClusterSettings(BaseModel):
    """Where islands run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(None, description="Ray cluster (default: the one around, else a local one)")
    island_resources: dict[str, float] = Field({"CPU": 1}, description="Ray resources of one island")
    label_selector: dict[str, str] = Field({}, description="labels of the nodes that may hold islands")
    placement_timeout_s: float = Field(300.0, gt=0, description="wait for nodes that can hold the least islands")
    max_island_failures: int = Field(100, ge=0, description="restarts of one island before the run fails")

    @field_validator("island_resources")
    @classmethod
    def _asks_for_something(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or any(amount < 0 for amount in value.values()) or not any(value.values()):
            raise ValueError("name at least one resource with a positive amount, such as {CPU: 1} or {GPU: 1}")
        return value


class RunConfig(BaseModel):
    """One run, whole. `islands` is a number or [least, most]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    islands: tuple[int, int] = (4, 4)
    rounds: int = Field(20, ge=1)
    data: DataSettings = DataSettings()  # type: ignore[call-arg]
    model: ModelSettings
    inner: InnerSettings = InnerSettings()  # type: ignore[call-arg]
    outer: OuterSettings = OuterSettings()
    sync: SyncSettings = SyncSettings()  # type: ignore[call-arg]
    evaluation: EvaluationSettings = EvaluationSettings()  # type: ignore[call-arg]
    storage: StorageSettings = StorageSettings()  # type: ignore[call-arg]
    cluster: ClusterSettings = ClusterSettings()  # type: ignore[call-arg]

    @field_validator("islands", mode="before")
    @classmethod
    def _one_number_means_exactly(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("give a number, or [least, most]")
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "RunConfig":
        least, most = self.islands
        if not 1 <= least <= most:
            raise ValueError(f"islands={list(self.islands)}: choose [least, most] with 1 <= least <= most")
        for field in ("uplink", "downlink"):
            name = getattr(self.sync, field)
            if name not in CODEC_NAMES:
                raise ValueError(f"sync.{field}={name} is no codec; choose one of {', '.join(CODEC_NAMES)}")
        quorum = self.sync.quorum
        if quorum is not None and not least <= quorum <= most:
            raise ValueError(f"sync.quorum={quorum} lies outside islands={list(self.islands)}; choose one inside")
        if self.sync.heartbeat_timeout_s < 2 * self.sync.heartbeat_every_s:
            pair = f"sync.heartbeat_timeout_s={self.sync.heartbeat_timeout_s:g}"
            raise ValueError(f"{pair} is under two beats; choose at least {2 * self.sync.heartbeat_every_s:g}")
        if self.data.shards == "cluster" and (self.data.clusters or 0) > most:
            clusters = f"data.clusters={self.data.clusters} is more than the {most} islands there may be"
            raise ValueError(f"{clusters}: some text would never be trained on; choose at most {most}")
        return self

    @field_validator("name")
    @classmethod
    def _leaves_room_for_shards(cls, value: str) -> str:
        if value == "data":
            raise ValueError("the prepared data lies in <storage.path>/data; choose another name")
        return value

    @property
    def min_islands(self) -> int:
        return self.islands[0]

    @property
    def max_islands(self) -> int:
        return self.islands[1]

    @property
    def num_inner_steps(self) -> int:
        """Global inner steps of the run, the horizon of the learning-rate schedule."""
        return self.rounds * self.inner.steps_per_round

    @property
    def run_url(self) -> str:
        return f"{self.storage.path.rstrip('/')}/{self.name}"

    @property
    def prepared_url(self) -> str:
        """Where the token shards lie: shared by all runs on the same corpus and tokenizer."""
        if self.data.prepared:
            return self.data.prepared
        return f"{self.storage.path.rstrip('/')}/data/{sha256_hex(canonical_json(self.data.content()))[:12]}"

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> "RunConfig":
        """Reads a recipe; overrides are `section.field=value` with a YAML value. The name defaults to the file's."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"no recipe at {file}", where=str(file), remedy="name a YAML file such as jobs/quickstart.yaml"
            )
        try:
            body: Any = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"not YAML: {error}", where=str(file), remedy="mend the line named above") from error
        if not isinstance(body, dict):
            raise ConfigError("a recipe is a mapping of sections", where=str(file), remedy="see jobs/quickstart.yaml")
        recipe = {"name": file.stem, **cast(dict[str, Any], body)}
        return cls.from_dict(recipe, overrides, where=str(file))

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], overrides: Iterable[str] = (), *, where: str = "") -> "RunConfig":
        merged = deepcopy(dict(body))
        for override in overrides:
            _set(merged, override)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise _explain(error, where) from None

    def identity(self) -> dict[str, Any]:
        """The fields that make the run what it is, flat: a resumed run must have the same."""
        flat = _flatten(self.model_dump(mode="json"))
        return {k: v for k, v in flat.items() if not any(k == c or k.startswith(f"{c}.") for c in CHANGEABLE)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per field that differs between two identities."""
    keys = sorted({*old, *new})
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]


def _set(body: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not field=value", remedy="write it like outer.learning_rate=0.6")
    *sections, field = path.strip().split(".")
    for section in sections:
        inner: Any = body.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{section} in override {override!r} is not a section", remedy="name a field of a section"
            )
        body = cast(dict[str, Any], inner)
    try:
        body[field] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not YAML", remedy=f"quote it: {error}") from error


def _flatten(body: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in body.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= _flatten(cast(dict[str, Any], value), f"{path}.")
        else:
            flat[path] = value
    return flat


def _explain(error: ValidationError, where: str) -> ConfigError:
    """All that is wrong with a recipe, each with its path and, for an unknown key, the nearest name there is."""
    lines: list[str] = []
    remedies: list[str] = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), _fields_at(item["loc"][:-1]), n=1, cutoff=0.4)
            known = ", ".join(_fields_at(item["loc"][:-1]))
            lines.append(f"unknown key {path}")
            remedies.append(f"did you mean {near[0]}?" if near else f"choose one of: {known}")
        else:
            whole = item["type"] == "missing" or isinstance(item["input"], dict)
            given = "" if whole else f" (given: {item['input']!r})"
            text = item["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {text}{given}" if path else text)
    what = "; ".join(lines)
    return ConfigError(what, where=where, remedy="; ".join(remedies) or "change the value as said above")


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        model = model.model_fields[part].annotation
    return list(getattr(model, "model_fields", ()))
