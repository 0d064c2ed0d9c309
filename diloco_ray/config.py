"""A run's recipe: strict YAML into frozen models, once, at the porch. Nothing below reads files or the environment.

Each room owns its settings; here they are composed and checked against each other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from diloco_ray.algorithm.codecs import CODEC_NAMES, DOWNLINK_CODEC_NAMES
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.coordination.settings import ExperimentSettings, SyncSettings
from diloco_ray.data.settings import DataSettings
from diloco_ray.ids import canonical_json, sha256_hex
from diloco_ray.island.settings import InnerSettings
from diloco_ray.model.settings import ModelSettings
from diloco_ray.presets import Overrides, Resolved, flatten, read_recipe, resolve
from diloco_ray.settings import Number, Settings, explain, nearest_of

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a run, so of its folder

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
    "sync.preset",
    "sync.quorum",
    "sync.grace_s",
    "sync.grace_share",
    "sync.launch_interval_s",
    "sync.max_staleness",
    "sync.heartbeat_every_s",
    "sync.heartbeat_timeout_s",
    "sync.join_timeout_s",
    "sync.waiting_timeout_s",
    "sync.stall_timeout_s",
    "sync.coordinator_timeout_s",
    "sync.poll_s",
    "sync.max_norm_ratio",
    "sync.max_inbox_bytes",
    "outer.statistics",
    "experiment.speeds",
)


class EvaluationSettings(Settings):
    """Held-out loss of the outer parameters, measured by a follower of the log, away from the islands."""

    every_rounds: int = Field(5, ge=1)
    num_sequences: int = Field(128, ge=1, description="validation sequences measured each time")
    batch_size: int = Field(16, ge=1)
    prompt: str = Field("The ", description="start of the text sample at the end")
    sample_tokens: int = Field(200, ge=0)
    resources: dict[str, Number] = Field({}, description="Ray resources of the evaluator, such as {GPU: 1}")


class StorageSettings(Settings):
    """The run store: any path fsspec knows (a folder, s3://bucket/prefix, gs://...)."""

    path: str = Field("runs", description="the run's folder is <path>/<name>")
    snapshot_every_rounds: int = Field(10, ge=1)
    keep_snapshots: int = Field(3, ge=1, description="newest snapshots kept; the first one always is")


class ClusterSettings(Settings):
    """Where islands run."""

    address: str | None = Field(None, description="Ray cluster (default: the one around, else a local one)")
    island_resources: dict[str, Number] = Field({"CPU": 1}, description="Ray resources of each rank of an island")
    label_selector: dict[str, str] = Field(
        {}, description="labels of the nodes that may hold an island; {island} is its name"
    )
    external_islands: int = Field(
        0, ge=0, description="of the islands, how many are clusters of their own that `diloco-ray join` the run store"
    )
    rank_timeout_s: Number = Field(300.0, ge=1, description="wait of an island's ranks for one of them")
    placement_timeout_s: Number = Field(300.0, gt=0, description="wait for nodes that can hold the least islands")
    max_island_failures: int = Field(100, ge=0, description="restarts of one island before the run fails")

    @field_validator("island_resources")
    @classmethod
    def _asks_for_something(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or any(amount < 0 for amount in value.values()) or not any(value.values()):
            raise ValueError(
                "an island needs something to run on; name a resource with a positive amount, such as {CPU: 1}"
            )
        return value


class RunConfig(Settings):
    """One run, whole. `islands` is a number or [least, most]."""

    name: str = Field("run", pattern=NAME)
    seed: int = Field(0, ge=0, le=2**63 - 1)
    islands: tuple[int, int] = Field((4, 4), strict=False)
    rounds: int = Field(20, ge=1)
    data: DataSettings = DataSettings()  # type: ignore[call-arg]
    model: ModelSettings
    inner: InnerSettings = InnerSettings()  # type: ignore[call-arg]
    outer: OuterSettings = OuterSettings()
    sync: SyncSettings = SyncSettings()  # type: ignore[call-arg]
    experiment: ExperimentSettings = ExperimentSettings()  # type: ignore[call-arg]
    evaluation: EvaluationSettings = EvaluationSettings()  # type: ignore[call-arg]
    storage: StorageSettings = StorageSettings()  # type: ignore[call-arg]
    cluster: ClusterSettings = ClusterSettings()  # type: ignore[call-arg]

    @field_validator("islands", mode="before")
    @classmethod
    def _one_number_means_exactly(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | list | tuple):
            raise ValueError("not a number of islands; give a whole number such as 4, or [least, most]")
        return (value, value) if isinstance(value, int) else cast(Any, value)

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "RunConfig":
        least, most = self.islands
        if not 1 <= least <= most:
            raise ValueError(f"islands={list(self.islands)} cannot be; choose [least, most] with 1 <= least <= most")
        for field, names in (("uplink", CODEC_NAMES), ("downlink", DOWNLINK_CODEC_NAMES)):
            name: str = getattr(self.sync, field)
            if name not in names:
                raise ValueError(f"sync.{field}={name} is no codec of the {field}; {nearest_of(name, names)}")
        if self.sync.weighting != "uniform" and not self.outer.uses_weights:
            pair = f"sync.weighting={self.sync.weighting} with outer.combine={self.outer.combine}"
            raise ValueError(f"{pair}: its values have no weights; choose sync.weighting=uniform or another combine")
        least = 1 if self.sync.closes == "quorum" else least
        if not least <= self.quorum <= most:
            where = f"lies outside islands={list(self.islands)}"
            raise ValueError(f"sync.quorum={self.quorum} {where}; choose {least} to {most}, or null")
        self._overlap_fits()
        self._experiment_fits()
        self._external_islands_fit()
        if self.data.shards == "cluster" and (self.data.clusters or 0) > most:
            clusters = f"data.clusters={self.data.clusters} is more than the {most} islands there may be"
            raise ValueError(f"{clusters}, so some text would never be trained on; choose at most {most}")
        return self

    def _overlap_fits(self) -> None:
        overlap, steps = self.sync.overlap, self.inner.steps_per_round
        given = f"sync.overlap={overlap} with inner.steps_per_round={steps}"
        if overlap > steps:
            raise ValueError(f"{given}: an overlap is no longer than a round; choose sync.overlap from 0 to {steps}")
        if overlap and self.sync.closes == "all" and self.inner.steps == "by_speed":
            why = "islands that take fewer steps than others have no common moment to merge at"
            raise ValueError(f"{given} and inner.steps=by_speed: {why}; set sync.overlap=0, or sync.closes=quorum")
        if overlap == steps and self.experiment.drop_probability:
            what = f"{given} and experiment.drop_probability={self.experiment.drop_probability}"
            why = "whoever was silent has not merged what its next contribution would be measured from"
            raise ValueError(f"{what}: {why}; choose sync.overlap below {steps}")
        if not self.sync.eager:
            return
        if overlap != steps:
            raise ValueError(f"{given}: an eager update takes a whole round; set sync.overlap={steps}")
        if self.sync.closes != "all" or self.sync.weighting != "uniform":
            why = "an island must know its share of the next step beforehand"
            what = f"sync.eager with sync.closes={self.sync.closes} and sync.weighting={self.sync.weighting}: {why}"
            raise ValueError(f"{what}; set sync.closes=all and sync.weighting=uniform")
        for field, value in (("sync.anchor", self.sync.anchor), ("sync.mixing", self.sync.mixing)):
            if value not in ("base", 0.0):
                why = "an eager island measures from its own replica, whole"
                raise ValueError(f"sync.eager with {field}={value}: {why}; leave {field} at its default")
        if self.experiment.drop_probability:
            what = f"sync.eager with experiment.drop_probability={self.experiment.drop_probability}"
            raise ValueError(f"{what}: an own part that is lost cannot be taken back; set it to 0")
        if self.outer.combine != "mean":
            why = "the own part of a step is its share of the mean"
            raise ValueError(f"sync.eager with outer.combine={self.outer.combine}: {why}; set outer.combine=mean")
        if not self.outer.is_linear:
            why = "a step in two parts is not the step of their sum"
            what = f"sync.eager with outer.optimizer={self.outer.optimizer}: {why}"
            raise ValueError(f"{what}; choose nesterov, sgd or heavy_ball")

    def _experiment_fits(self) -> None:
        experiment = self.experiment
        disturbed = [
            f"experiment.{field}={getattr(experiment, field)}"
            for field, undisturbed in (("drop_probability", 0.0), ("islands_by_round", "constant"))
            if getattr(experiment, field) != undisturbed
        ]
        if disturbed and self.sync.closes != "all":
            what = f"{' and '.join(disturbed)} with sync.closes={self.sync.closes}"
            raise ValueError(f"{what}: only defined where a round has an end for all; set sync.closes=all")
        if len(experiment.speeds) > self.max_islands:
            what = f"experiment.speeds={list(experiment.speeds)} has more values than the {self.max_islands} islands"
            raise ValueError(f"{what} there may be; give at most {self.max_islands}")

    def _external_islands_fit(self) -> None:
        external = self.cluster.external_islands
        if external > self.max_islands:
            what = f"cluster.external_islands={external} is more than the {self.max_islands} islands there may be"
            raise ValueError(f"{what}; choose at most {self.max_islands}, or allow more `islands`")
        if external and self.sync.heartbeat_timeout_s < 5 * self.sync.poll_s:
            what = f"sync.heartbeat_timeout_s={self.sync.heartbeat_timeout_s:g} with sync.poll_s={self.sync.poll_s:g}"
            least = 5 * self.sync.poll_s
            raise ValueError(f"{what}: a heartbeat by mail takes a few looks; choose at least {least:g}")

    @field_validator("name")
    @classmethod
    def _leaves_room_for_shards(cls, value: str) -> str:
        if value == "data":
            raise ValueError("that is where <storage.path> has the prepared data; choose another name")
        return value

    @property
    def min_islands(self) -> int:
        return self.islands[0]

    @property
    def max_islands(self) -> int:
        return self.islands[1]

    @property
    def quorum(self) -> int:
        """Contributions that start the grace window of an outer step."""
        return self.sync.quorum or (1 if self.sync.closes == "quorum" else self.min_islands)

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

    @model_validator(mode="before")
    @classmethod
    def _preset_in_numbers(cls, body: Any) -> Any:
        return resolve(cast(Mapping[str, Any], body), (), default_of).body if isinstance(body, Mapping) else body

    def __init__(self, **body: Any):
        """Sections are settings or mappings. ConfigError for what cannot be."""
        try:
            super().__init__(**body)
        except ValidationError as error:
            raise explain(error, type(self), "RunConfig") from None

    __init__.__pydantic_base_init__ = True  # pyright: ignore  # `model_validate` does not come by here

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Overrides = ()) -> "RunConfig":
        """Reads a recipe, named after its file unless it says otherwise. Overrides are `section.field=value` with a
        YAML value, or a mapping of such paths, or of sections, to values."""
        return cls.from_dict(read_recipe(path), overrides, where=str(path))

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], overrides: Overrides = (), *, where: str = "") -> "RunConfig":
        """The run that a recipe and its overrides describe, its preset written out in numbers."""
        resolved = layered(body, overrides)
        try:
            return cls.model_validate(resolved.body)
        except ValidationError as error:
            raise explain(error, cls, where, resolved.sources) from None

    def identity(self) -> dict[str, Any]:
        """The fields that make the run what it is, flat: a resumed run must have the same."""
        flat = flatten(self.model_dump(mode="json"))
        return {k: v for k, v in flat.items() if not any(k == c or k.startswith(f"{c}.") for c in CHANGEABLE)}


def layered(recipe: Mapping[str, Any], overrides: Overrides = ()) -> Resolved:
    """The recipe with its preset and overrides in it, not validated, and where each field comes from."""
    return resolve(recipe, overrides, default_of)


def default_of(path: str) -> Any:
    """The default of a field, by its path."""
    model: Any = RunConfig
    *sections, field = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[field].default


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per field that differs between two identities."""
    keys = sorted({*old, *new})
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]
