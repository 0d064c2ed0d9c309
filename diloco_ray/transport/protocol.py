"""What islands and other followers say to the coordinator, whatever carries it.

Every message is idempotent: a call that failed may have run, and is simply made again. Payloads are flat uint8 arrays;
the coordinator has its own copy before it answers `accepted`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination.messages import Contribution, InnerPlan, Verdict
from diloco_ray.log.record import Record

Bytes = np.ndarray  # (num_bytes,) uint8
ANSWER_BYTES = 64 * 1024**2  # payloads in one answer, but for one record's: no backlog makes one that never arrives


@dataclass(frozen=True)
class Hello:
    """A process asks for an island's name. `held` is work in hand, oldest first, from before a coordinator restart."""

    island: str
    process: str
    pid: int
    node: str
    incarnation: int = 0
    held: tuple[InnerPlan, ...] = ()


@dataclass(frozen=True)
class Welcome:
    incarnation: int
    problem: str = ""  # why the name was refused


@dataclass(frozen=True)
class SnapshotState:
    """The global model at one log index: flat float32 arrays, one per fragment, by name."""

    index: int
    round: int  # rounds that were whole then
    versions: tuple[int, ...]
    parameters: tuple[np.ndarray, ...]
    buffers: tuple[tuple[np.ndarray, ...], ...]

    @staticmethod
    def of(index: int, round: int, replica: Replica) -> "SnapshotState":
        """The replica's own arrays, not copied."""
        fragments = [fragment.index for fragment in replica.layout.fragments]
        return SnapshotState(
            index,
            round,
            tuple(replica.versions),
            tuple(replica.parameters(p).numpy() for p in fragments),
            tuple(tuple(buffer.numpy() for buffer in replica.buffers(p)) for p in fragments),
        )


NewsStanding = Literal["ok", "rejoin", "fenced", "over"]
LogStep = tuple[Record, Bytes]  # a record with its payload


@dataclass(frozen=True)
class Tidings:
    """What a coordinator has to say at once: how the run stands, the work in hand, and whether there are records."""

    standing: NewsStanding
    records: bool = False
    plan: InnerPlan | None = None
    reason: str = ""


@dataclass(frozen=True)
class News:
    """What follows a log index: Tidings, with those records themselves, which may have to be read from the store."""

    standing: NewsStanding
    records: tuple[LogStep, ...] = ()
    plan: InnerPlan | None = None
    reason: str = ""

    @staticmethod
    def of(tidings: Tidings, records: tuple[LogStep, ...]) -> "News":
        return News(tidings.standing, records, tidings.plan, tidings.reason)


@dataclass(frozen=True)
class Beat:
    """A sign of life with what the live table shows; `lease_id` is the work in hand ("" for none)."""

    island: str
    incarnation: int
    lease_id: str = ""
    progress: Mapping[str, float] = field(default_factory=dict)


Order = Literal["go_on", "abandon", "rejoin", "fenced"]


class Transport(Protocol):
    """One follower's line to the coordinator. Every call ends within its deadline or raises DeadlineError."""

    def join(self, hello: Hello) -> Welcome: ...

    def beat(self, beat: Beat) -> Order:
        """`abandon`: the work in hand is void. `rejoin`: a restarted coordinator wants to hear hello again."""
        ...

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        """Never answers `pending`."""
        ...

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        """Waits up to wait_s for a record past `after` or a plan after `held`, a lease id. An observer's name is ""."""
        ...

    def snapshot(self, first: bool = False) -> SnapshotState:
        """The newest usable one, or the first of the run."""
        ...

    def leave(self, island: str, incarnation: int, reason: str) -> None: ...

    def measured(self) -> set[int]:
        """Outer steps that are evaluated already."""
        ...

    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None: ...


class Doors(Protocol):
    """What a coordinator offers to its carriers."""

    def join(self, hello: Hello) -> Welcome: ...
    def beat(self, beat: Beat) -> Order: ...
    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict: ...
    def news(self, island: str, incarnation: int, after: int, held: str) -> Tidings | None: ...
    def leave(self, island: str, incarnation: int, reason: str) -> None: ...
    def measured(self) -> set[int]: ...
    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None: ...


class OpenDoors(Doors, Protocol):
    """Of a coordinator in the same process, which gives records and snapshots as well."""

    def snapshot(self, first: bool) -> SnapshotState: ...
    def records_after(self, after: int) -> tuple[LogStep, ...]: ...


def told(doors: OpenDoors, island: str, incarnation: int, after: int, held: str) -> News | None:
    """The tidings, with the records that they speak of."""
    tidings = doors.news(island, incarnation, after, held)
    return News.of(tidings, doors.records_after(after) if tidings.records else ()) if tidings else None
