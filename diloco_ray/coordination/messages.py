"""The nouns that travel between islands and coordinator, and the events and commands of the reducer.

Everything is frozen data. Sizes are in bytes, times in seconds of the coordinator's clock, data ranges in training
sequences. A contribution's payload (encoded bytes) travels beside its message and is never looked at here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diloco_ray.ids import PROTOCOL_VERSION


@dataclass(frozen=True, order=True)
class DataRange:
    """Training sequences [start, stop) of one epoch of one data shard, counted in that epoch's shuffled order.

    Data shards are numbered from 0; where data is iid there is only that one.
    """

    shard: int
    epoch: int
    start: int
    stop: int

    @property
    def num_sequences(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class InnerPlan:
    """What one island is asked to do: how many inner steps, on which data, for which of its rounds."""

    island: str
    incarnation: int
    lease_id: str
    round: int  # that its contributions are for: the run's where islands go in step, else the island's own count
    base_index: int  # log index from which an island begins that does not go on from its own parameters
    inner_steps: int
    silent_steps: int  # of these, the first ones: a round, or several, whose contribution is dropped
    first_inner_step: int  # global inner step, which the learning-rate schedule runs on
    num_islands: int  # alive when the plan was made
    ranges: tuple[DataRange, ...]

    @property
    def first_round(self) -> int:
        """`round`, unless contributions before it are dropped."""
        return self.round - self.silent_steps // (self.inner_steps - self.silent_steps)


@dataclass(frozen=True)
class Contribution:
    """Header of one encoded outer gradient (base - island) of one fragment. The payload travels beside it."""

    run_id: str
    island: str
    incarnation: int
    fragment: int
    round: int
    base_version: int
    inner_steps: int  # since the island last merged this fragment
    lease_id: str
    codec: str
    payload_sha256: str
    payload_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    protocol_version: int = PROTOCOL_VERSION

    @property
    def key(self) -> tuple[int, int, str]:
        """Committed at most once (invariant I2)."""
        return self.fragment, self.round, self.island


@dataclass(frozen=True)
class Verdict:
    """The answer to a contribution. `pending`: its payload is being inspected. `unknown`: say hello again.

    `full`: there is no room for it now, nothing is wrong with it, and it is to be sent again.
    """

    status: Literal["pending", "accepted", "committed", "rejected", "unknown", "full"]
    reason: str = ""


@dataclass(frozen=True)
class Share:
    """One contribution's part in an outer step. `spent` is empty but on the fragment that closes the lease."""

    island: str
    incarnation: int
    round: int
    base_version: int
    weight: float
    tokens: int
    spent: tuple[DataRange, ...]
    payload_sha256: str
    payload_bytes: int
    norm: float


# ---- events: what happened in the world; `now_s` is the coordinator's clock ----


@dataclass(frozen=True)
class Joined:
    now_s: float
    island: str
    process: str  # unique per operating-system process
    incarnation: int  # 0 for a new process; else what an earlier coordinator life gave it
    pid: int
    node: str
    held: tuple[InnerPlan, ...] = ()  # work in hand when the coordinator, not the island, was restarted


@dataclass(frozen=True)
class Heartbeat:
    now_s: float
    island: str
    incarnation: int
    progress: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Lost:
    now_s: float
    island: str
    process: str  # "" means: whichever process holds the name
    reason: str


@dataclass(frozen=True)
class Left:
    now_s: float
    island: str
    incarnation: int
    reason: str


@dataclass(frozen=True)
class Submitted:
    now_s: float
    contribution: Contribution


@dataclass(frozen=True)
class Inspected:
    now_s: float
    contribution: Contribution
    norm: float
    problem: str = ""  # "" means: digest right, every value finite


@dataclass(frozen=True)
class Committed:
    now_s: float
    fragment: int
    version: int
    index: int


@dataclass(frozen=True)
class Tick:
    now_s: float


Event = Joined | Heartbeat | Lost | Left | Submitted | Inspected | Committed | Tick


# ---- commands: what the coordinator is to do ----


@dataclass(frozen=True)
class Inspect:
    """Check the payload's digest, that it is finite, and take its norm; report `Inspected`."""

    contribution: Contribution


@dataclass(frozen=True)
class Answer:
    """Tell whoever waits on this contribution; drop the payload if it is rejected."""

    contribution: Contribution
    verdict: Verdict


@dataclass(frozen=True)
class TakeOuterStep:
    """Combine the shares' payloads in this order, commit the record, report `Committed`."""

    fragment: int
    round: int  # rounds that are whole with this step
    base_version: int
    shares: tuple[Share, ...]
    tokens: Mapping[str, int]
    reason: str


@dataclass(frozen=True)
class CloseRound:
    """A round is whole: tell observers; save a snapshot where one is due."""

    round: int
    index: int
    alive: int
    contributed: int
    applied: int
    snapshot: bool


@dataclass(frozen=True)
class Note:
    """A decision with its arithmetic, for people."""

    text: str


@dataclass(frozen=True)
class End:
    """The run is over."""

    state: Literal["succeeded", "failed"]
    reason: str


Command = Inspect | Answer | TakeOuterStep | CloseRound | Note | End
