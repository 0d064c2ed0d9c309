"""What an island is told, once, and who it is."""

from dataclasses import dataclass

from diloco_ray.algorithm.fragments import Layout
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.data.settings import DataSettings
from diloco_ray.errors import FencedError
from diloco_ray.island.settings import InnerSettings
from diloco_ray.model.settings import ModelSettings


@dataclass(frozen=True)
class IslandJob:
    """The same for every island of a run."""

    run_id: str
    seed: int
    num_inner_steps: int  # horizon of the learning-rate schedule
    layout: Layout
    data: DataSettings
    prepared_url: str
    model: ModelSettings
    inner: InnerSettings
    outer: OuterSettings
    sync: SyncSettings
    checkpoints_url: str  # each island has a folder of its own in it


@dataclass(frozen=True)
class Identity:
    """One process that holds an island's name."""

    island: str
    process: str
    pid: int
    node: str


def fenced(island: str, reason: str) -> FencedError:
    """What ends a process that may not hold its island's name any more."""
    remedy = "nothing, if that one is meant to do the work; else end it, or give this one a name and token of its own"
    if "is quarantined" in reason:
        remedy = "mend what made its payloads bad, such as too high an inner.learning_rate, and give the command again"
    return FencedError(reason or "another process took this island's name", where=island, remedy=remedy)


class RoundAbandonedError(Exception):
    """Raised between two inner steps: the plan in hand is no longer awaited."""


class RunOverError(Exception):
    """Raised between two inner steps: the run has ended."""


class PreemptedError(Exception):
    """Raised between two inner steps: the machine, or this process's place on it, is to be taken away."""
