"""A scenario: a small run, its network, and what goes wrong in it: by a script, by chance, or both.

recipe: {islands: [1, 3], sync: {preset: decoupled}}     fields that differ from BASE
network: {loss: 0.1}
faults:                                                  in every story
  - {kill: island-01, at_s: 12.5}
  - {freeze: coordinator, after_round: 2, for_s: 60}
  - {kill: coordinator, point: "after create log/*", skip: 1}
chance: {faults: [1, 4], kinds: [kill, cut, bad_payload]}   drawn for each seed
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from diloco_ray.config import RunConfig
from diloco_ray.errors import ConfigError
from diloco_ray.ids import island_name
from diloco_ray.simulation.network import STRICT, LeastAndMost, NetworkSettings
from diloco_ray.simulation.processes import STEP_S
from diloco_ray.simulation.storage import IOCall

Kind = Literal[
    "kill", "freeze", "cut", "mute", "deafen", "slow", "leave", "usurp", "bad_payload",
    "full", "sluggish", "refuse", "repeat",
]  # fmt: skip
BadPayload = Literal[
    "nan", "huge", "zero", "short", "long", "terabyte", "pickle", "other_digest", "inflated", "foreign",
    "stale", "replayed", "forged", "doubled", "conflict",
]  # fmt: skip

OTHERS: dict[str, tuple[str, ...]] = {  # whom a fault may strike, but for islands
    "kill": ("coordinator", "everything"),
    "freeze": ("coordinator", "everything"),
    "usurp": ("coordinator",),
    "full": ("storage",),
    "sluggish": ("storage",),
    "refuse": ("storage",),
    "repeat": ("storage",),
}
OWN_FIELDS: dict[str, tuple[str, ...]] = {  # what a fault has beside its time
    **dict.fromkeys(("freeze", "cut", "mute", "deafen", "leave", "full", "sluggish"), ("for_s",)),
    "slow": ("factor", "for_s"),
    "bad_payload": ("how",),
}
BASE: dict[str, Any] = {
    "islands": [1, 3],
    "rounds": 5,
    "data": {"tokenizer": "bytes", "sequence_length": 8},
    "model": {"factory": "diloco_ray.simulation.toy:build"},
    "inner": {
        "steps_per_round": 2,
        "batch_size": 2,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "threads": 1,
        "checkpoint_every_rounds": 2,  # so that some come back to one that is older than their round
    },
    "sync": {
        "grace_s": 20.0,
        "heartbeat_every_s": 2.0,
        "heartbeat_timeout_s": 10.0,
        "join_timeout_s": 30.0,
        "waiting_timeout_s": 600.0,
        "stall_timeout_s": 120.0,
        "coordinator_timeout_s": 300.0,
        "uplink": "float32",
    },
    "storage": {"snapshot_every_rounds": 2, "keep_snapshots": 2},
    "evaluation": {"sample_tokens": 0},
}


class Fault(BaseModel):
    """One thing that goes wrong. Exactly one of at_s, after_round, point says when.

    who: an island, coordinator, everything, storage, or (of bad payloads) an island. point: "before create log/*",
    a moment of a storage call and a pattern of paths; `skip` so many of them first.
    """

    model_config = STRICT

    kind: Kind
    who: str
    at_s: float | None = Field(None, ge=0)
    after_round: int | None = Field(None, ge=0)
    point: str | None = Field(None, pattern=r"^(before|after) (write|create|delete|list|read|exists) \S+$")
    skip: int = Field(0, ge=0)
    for_s: float = Field(15.0, gt=0)
    how: BadPayload = "nan"
    factor: float = Field(10.0, gt=1)

    @model_validator(mode="before")
    @classmethod
    def _kind_is_the_key(cls, body: Any) -> Any:
        """{kill: island-01} is {kind: kill, who: island-01}."""
        if isinstance(body, dict) and "kind" not in body:
            kinds = [key for key in body if key in get_args(Kind)]
            if len(kinds) == 1:
                return {"kind": kinds[0], "who": body[kinds[0]], **{k: v for k, v in body.items() if k != kinds[0]}}
        return body

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "Fault":
        if sum(when is not None for when in (self.at_s, self.after_round, self.point)) != 1:
            raise ValueError("no time, or more than one; give exactly one of at_s, after_round, point")
        if self.kind == "refuse" and not self.point:
            raise ValueError("no call is named that the storage refuses; give its point")
        if self.kind == "repeat" and not (self.point or "").startswith("after create "):
            raise ValueError("no create is named that is made once more; give its point: after create, and a path")
        its_own = (*OWN_FIELDS.get(self.kind, ()), *(("skip",) if self.point else ()))
        for name in ("skip", "for_s", "how", "factor"):
            if name in self.model_fields_set and name not in its_own:
                owner = "without a point" if name == "skip" else f"of kind {self.kind}"
                raise ValueError(f"{name} says nothing of a fault {owner}; leave it out")
        return self

    def is_at(self, call: IOCall) -> bool:
        """Whether this is the kind of moment that `point` names."""
        if self.point is None:
            return False
        moment, act, pattern = self.point.split()
        return (call.moment, call.act) == (moment, act) and fnmatchcase(call.path, pattern)

    def __str__(self) -> str:
        when = f"at {self.at_s:.2f} s" if self.at_s is not None else f"after round {self.after_round}"
        when = f"{self.point} (skip {self.skip})" if self.point else when
        more = {"bad_payload": f" {self.how}", "slow": f" x{self.factor:g}"}.get(self.kind, "")
        lasts = f" for {self.for_s:.1f} s" if "for_s" in OWN_FIELDS.get(self.kind, ()) else ""
        return f"{self.kind}{more} {self.who} {when}{lasts}"


class Chance(BaseModel):
    """Faults drawn for each seed: how many, which, and until when."""

    model_config = STRICT

    faults: LeastAndMost[int] = (0, 0)
    kinds: tuple[Kind, ...] = Field(get_args(Kind), min_length=1)
    until_s: float = Field(20.0, gt=0)

    def draw(self, rng: random.Random, islands: int) -> list[Fault]:
        return [self._one(rng, islands) for _ in range(rng.randint(*self.faults))]

    def _one(self, rng: random.Random, islands: int) -> Fault:
        kind = rng.choice(self.kinds)
        island = island_name(rng.randrange(islands))
        body: dict[str, Any] = {"kind": kind, "who": island}
        for_s = rng.choice([1.0, 8.0, 30.0, 100.0])
        body |= {"for_s": for_s} if "for_s" in OWN_FIELDS.get(kind, ()) else {}
        if kind in ("kill", "freeze"):
            body["who"] = rng.choice([island, island, "coordinator", "everything" if kind == "kill" else "coordinator"])
        elif kind in ("full", "sluggish", "refuse", "repeat"):
            body["who"] = "storage"
        elif kind == "usurp":
            body["who"] = rng.choice([island, "coordinator"])
        elif kind == "bad_payload":
            body["how"] = rng.choice(get_args(BadPayload))
        if kind == "repeat":
            body |= {"point": rng.choice(CREATES), "skip": rng.randrange(8)}
        elif kind == "refuse" or (kind == "kill" and body["who"] == "coordinator" and rng.random() < 0.6):
            body |= {"point": rng.choice(POINTS), "skip": rng.randrange(8)}
        else:
            body["at_s"] = round(rng.uniform(0.0, self.until_s), 2)
        return Fault(**body)


POINTS = tuple(
    f"{moment} {point}"
    for moment in ("before", "after")
    for point in (
        "write payloads/*",
        "create log/*",
        "create fences/*",
        "list fences",
        "write snapshots/*",
        "delete *",
        "read log/*",
    )
)
CREATES = tuple(point for point in POINTS if point.startswith("after create "))


class Scenario(BaseModel):
    """variants: on top of the recipe, one of them drawn for each seed. may_fail: the run may end as failed, with a
    reason; else it has to succeed however long the story was. longest_s: of virtual time; what is not over then hangs.
    """

    model_config = STRICT

    about: str = ""
    recipe: dict[str, Any] = {}
    variants: tuple[dict[str, Any], ...] = Field(({},), min_length=1)
    network: NetworkSettings = Field(default_factory=lambda: NetworkSettings.model_validate({}))
    faults: tuple[Fault, ...] = ()
    chance: Chance = Field(default_factory=lambda: Chance.model_validate({}))
    may_fail: bool = False
    longest_s: float = Field(7200.0, gt=0, le=1e6)

    def recipe_of(self, seed: int) -> dict[str, Any]:
        return merged(self.recipe, random.Random(f"recipe {seed}").choice(self.variants))


@dataclass(frozen=True)
class Named:
    """given: what the command line calls it, where that is not its name: the path of a file."""

    name: str
    scenario: Scenario
    given: str = ""


def scenarios(which: str) -> list[Named]:
    """A scenario file, one that comes with the package by its name, or `all` of those. ConfigError otherwise."""
    ours = sorted(resources.files("diloco_ray.simulation").joinpath("scenarios").iterdir(), key=lambda file: file.name)
    known = {Path(file.name).stem: file.read_text(encoding="utf-8") for file in ours if file.name.endswith(".yaml")}
    if which == "all":
        return [Named(name, _parse(text, name)) for name, text in known.items()]
    if which in known:
        return [Named(which, _parse(known[which], which))]
    if not Path(which).is_file():
        raise ConfigError(
            f"no scenario {which!r}", where="SCENARIO", remedy=f"a file, all, or one of {', '.join(known)}"
        )
    try:
        text = Path(which).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"not to be read: {error}", where=which, remedy="give a YAML file in UTF-8") from error
    return [Named(Path(which).stem, _parse(text, which), which)]


def _parse(text: str, where: str) -> Scenario:
    try:
        scenario = Scenario.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=where, remedy="mend the line named above") from error
    except ValidationError as error:
        first = error.errors()[0]
        what, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        what = f"{'.'.join(map(str, first['loc'])) or 'a scenario'}: {what}{given}"
        few = "leave it out, or name one at least" if first["type"] == "too_short" else ""
        remedy = remedy or few or 'docs/reliability.md, "The fault matrix", says what a scenario may have'
        raise ConfigError(what, where=where, remedy=remedy) from error
    _check(scenario, where)
    return scenario


def _check(scenario: Scenario, where: str) -> None:
    """Whichever variant is drawn: it is the recipe of a run that a story can be told of, and long enough for it, and
    every fault has somebody to strike."""
    num_islands: list[int] = []
    for number, variant in enumerate(scenario.variants):
        place = f"{where}: recipe{f' with variants.{number}' if variant else ''}"
        try:
            config = RunConfig.from_dict({"name": "story", **merged(merged(BASE, scenario.recipe), variant)})
        except ConfigError as error:
            raise ConfigError(error.what, where=f"{place} {error.where}".rstrip(), remedy=error.remedy) from error
        ranks, outside = config.inner.ranks, config.cluster.external_islands
        if ranks > 1 or outside:
            remedy = "leave both out: a simulated island is one process, and all of them share one Ray"
            what = f"inner.ranks={ranks}, cluster.external_islands={outside}"
            raise ConfigError(what, where=place, remedy=remedy)
        if scenario.longest_s < (calm_s := config.num_inner_steps * STEP_S):
            what = f"longest_s: {scenario.longest_s:g} s, and {config.num_inner_steps} inner steps take {calm_s:g} s"
            raise ConfigError(what, where=place, remedy="choose a multiple of that, or fewer rounds")
        num_islands.append(config.max_islands)
    islands = [island_name(number) for number in range(min(num_islands))]
    for number, fault in enumerate(scenario.faults):
        others = OTHERS.get(fault.kind, ())
        there_are = others if others == ("storage",) else (*islands, *others)
        if fault.who not in there_are:
            what = f"faults.{number}: {fault.kind} of {fault.who}, which is not in this scenario"
            raise ConfigError(what, where=where, remedy=f"name one of {', '.join(there_are)}")


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section."""
    shared = [key for key in base.keys() & more.keys() if isinstance(base[key], dict) and isinstance(more[key], dict)]
    return {**base, **more, **{key: merged(base[key], more[key]) for key in shared}}


def of_these(faults: Sequence[Fault], which: Sequence[int] | None) -> list[Fault]:
    """Those with these numbers, or all. ConfigError for a number that none of them has."""
    if unknown := [number for number in which or () if number >= len(faults)]:
        there_are = f"0 to {len(faults) - 1}" if faults else "none at all"
        raise ConfigError(
            f"this story has no fault {', '.join(map(str, unknown))}: its faults are {there_are}",
            where="--faults",
            remedy="without --faults the story is told with all of them, each with what it is",
        )
    return [fault for number, fault in enumerate(faults) if which is None or number in which]
