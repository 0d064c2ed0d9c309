"""The run as the coordinator knows it: one frozen value, changed only by `reduce`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from diloco_ray.coordination.data_ledger import DataLedger, Lease
from diloco_ray.coordination.membership import Member, Members, names
from diloco_ray.coordination.messages import Contribution, InnerPlan
from diloco_ray.coordination.settings import Weighting

Phase = Literal["gathering", "training", "waiting", "succeeded", "failed"]


@dataclass(frozen=True)
class Rules:
    """What the decisions depend on and what never changes while a coordinator lives."""

    run_id: str
    num_rounds: int
    inner_steps_per_round: int
    sequences_per_inner_step: int
    num_fragments: int
    min_islands: int
    max_islands: int
    uplink: str  # codec name
    payload_bytes: tuple[int, ...]  # of an encoded contribution, per fragment
    quorum: int  # contributions from which the grace window runs
    grace_s: float
    heartbeat_timeout_s: float
    waiting_timeout_s: float
    weighting: Weighting = "uniform"
    snapshot_every_rounds: int = 10
    max_norm_ratio: float = 100.0


@dataclass(frozen=True)
class Accepted:
    """A contribution whose payload the coordinator holds; norm is None while it is being inspected."""

    contribution: Contribution
    lease: Lease  # what its weight is taken from: the ledger, never the island's claim
    norm: float | None = None
    accepted_s: float = 0.0


Key = tuple[int, int, str]  # fragment, base version, island
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class RunState:
    rules: Rules
    ledger: DataLedger
    phase: Phase = "gathering"
    reason: str = ""
    index: int = 0  # last committed record
    round: int = 0  # rounds completed
    versions: tuple[int, ...] = (0,)  # per fragment
    members: Members = field(default_factory=dict[str, Member])
    plans: Mapping[str, InnerPlan] = field(default_factory=dict[str, InnerPlan])  # of the open round, by island
    inbox: Mapping[Key, Accepted] = field(default_factory=dict[Key, Accepted])
    offered: frozenset[str] = frozenset()  # islands that sent a contribution in the open round, good or bad
    stepping: frozenset[int] = frozenset()  # fragments whose outer step is being computed
    settled: Mapping[Key, str] = field(default_factory=dict[Key, str])  # digests that the newest outer steps committed
    waiting_since_s: float | None = None
    norms: tuple[float, ...] = ()  # of the newest committed contributions

    @property
    def closing_fragment(self) -> int:
        """Sent last in a round, it decides the fate of the island's lease."""
        return self.rules.num_fragments - 1

    @property
    def alive(self) -> tuple[str, ...]:
        return names(self.members, "alive")

    def is_open(self, fragment: int) -> bool:
        """Whether the open round still waits for the fragment's outer step to be taken."""
        return self.versions[fragment] == self.round and fragment not in self.stepping

    def accepted(self, fragment: int) -> dict[str, Accepted]:
        """Inspected contributions to the fragment's next outer step, in island order."""
        version = self.versions[fragment]
        found = {
            key[2]: item for key, item in self.inbox.items() if key[:2] == (fragment, version) and item.norm is not None
        }
        return dict(sorted(found.items()))

    def quorum_since_s(self, fragment: int) -> float | None:
        """When the grace window of the fragment's next outer step began; None: it has not."""
        times = sorted(item.accepted_s for item in self.accepted(fragment).values())
        return times[self.rules.quorum - 1] if len(times) >= self.rules.quorum else None


def ended(state: RunState) -> bool:
    return state.phase in ("succeeded", "failed")


def plan_for(state: RunState, island: str, incarnation: int) -> InnerPlan | None:
    """The work this process should have in hand now; None means: wait."""
    plan = state.plans.get(island)
    return plan if plan and plan.incarnation == incarnation else None


def with_version(versions: tuple[int, ...], fragment: int, version: int) -> tuple[int, ...]:
    return tuple(version if p == fragment else v for p, v in enumerate(versions))


def of_other_fragments(settled: Mapping[Key, str], fragment: int) -> dict[Key, str]:
    return {key: digest for key, digest in settled.items() if key[0] != fragment}


def without(mapping: Mapping[K, V], *keys: K) -> dict[K, V]:
    return {key: value for key, value in mapping.items() if key not in keys}
