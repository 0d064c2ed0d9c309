"""The run as the coordinator knows it: one frozen value, changed only by `reduce`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from diloco_ray.coordination.data_ledger import DataLedger, Lease
from diloco_ray.coordination.membership import Member, Members, names
from diloco_ray.coordination.messages import Contribution, InnerPlan
from diloco_ray.coordination.pace import Pace
from diloco_ray.coordination.settings import Closes, Weighting

Phase = Literal["gathering", "training", "waiting", "succeeded", "failed"]


@dataclass(frozen=True)
class Rules:
    """What the decisions depend on and what never changes while a coordinator lives. See `SyncSettings`."""

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
    closes: Closes = "all"
    overlap: int = 0
    grace_share: float = 0.9
    launch_interval_s: float | None = None
    max_staleness: int = 64
    steps_by_speed: bool = False
    drop_probability: float = 0.0
    drop_seed: int = 0
    islands_by_round: tuple[int, ...] = ()  # how many take part; empty: all that there are
    snapshot_every_rounds: int = 10
    max_norm_ratio: float = 100.0
    longest: tuple[float, ...] = ()  # norms that outer gradients of H inner steps do not have, per fragment; 0: unknown
    max_inbox_bytes: int = 2 * 1024**3

    @property
    def in_step(self) -> bool:
        """Whether islands go round by round together, so that a contribution is for one outer step and no other."""
        return self.closes == "all"

    @property
    def sequences_per_round(self) -> int:
        """Of one island."""
        return self.inner_steps_per_round * self.sequences_per_inner_step

    def islands_in(self, round: int) -> int:
        """The most that may take part in this round."""
        return self.islands_by_round[round] if round < len(self.islands_by_round) else self.max_islands


@dataclass(frozen=True)
class Accepted:
    """A contribution whose payload the coordinator holds; norm is None while it is being inspected."""

    contribution: Contribution
    lease: Lease  # what its weight is taken from: the ledger, never the island's claim
    inner_steps: int
    norm: float | None = None
    accepted_s: float = 0.0
    again: str = ""  # the lease under which its island, in a later life, sent what this counts for


Key = tuple[int, int, str]  # fragment, round, island
Settled = Mapping[tuple[int, str], tuple[int, str]]  # by fragment and island: round and digest
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
    opened: int = -1  # the latest round that work was handed out for as it began
    versions: tuple[int, ...] = (0,)  # per fragment
    members: Members = field(default_factory=dict[str, Member])
    plans: Mapping[str, tuple[InnerPlan, ...]] = field(default_factory=dict[str, tuple[InnerPlan, ...]])  # by island
    num_plans: Mapping[str, int] = field(default_factory=dict[str, int])  # rounds of its own that an island was given
    inbox: Mapping[Key, Accepted] = field(default_factory=dict[Key, Accepted])
    sent_back: frozenset[Key] = frozenset()  # contributions that there was no room for when they came
    told: Mapping[str, int] = field(
        default_factory=dict[str, int]
    )  # notes on an island's words, less one for each round
    offered: frozenset[str] = frozenset()  # islands that sent a contribution since the last round ended, good or bad
    stepping: Mapping[int, tuple[Key, ...]] = field(default_factory=dict[int, tuple[Key, ...]])  # being computed
    settled: Settled = field(default_factory=dict[tuple[int, str], tuple[int, str]])  # the latest that is committed
    waiting_since_s: float | None = None
    norms: Mapping[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])  # newest, by fragment
    pace: Pace = field(default_factory=Pace)

    @property
    def closing_fragment(self) -> int:
        """Sent last in a round, it decides the fate of the island's lease."""
        return self.rules.num_fragments - 1

    @property
    def alive(self) -> tuple[str, ...]:
        return names(self.members, "alive")

    @property
    def all_plans(self) -> list[InnerPlan]:
        return [plan for plans in self.plans.values() for plan in plans]

    def is_whole(self, plan: InnerPlan) -> bool:
        """Whether the contribution that closes the plan's lease is accepted, and no other of it is waited for."""
        item = self.inbox.get((self.closing_fragment, plan.round, plan.island))
        closed = item is not None and item.norm is not None and item.contribution.lease_id == plan.lease_id
        return closed and not (self.rules.in_step and any(self._lacks(p, plan) for p in range(self.closing_fragment)))

    def _lacks(self, fragment: int, plan: InnerPlan) -> bool:
        item = self.inbox.get((fragment, plan.round, plan.island))
        return self.versions[fragment] <= plan.round and (item is None or item.norm is None)

    def open_plans(self, island: str) -> tuple[InnerPlan, ...]:
        return tuple(plan for plan in self.plans.get(island, ()) if not self.is_whole(plan))

    def accepted(self, fragment: int) -> dict[Key, Accepted]:
        """Inspected contributions that may enter the fragment's next outer step, in island order."""
        found = {
            key: item
            for key, item in self.inbox.items()
            if key[0] == fragment and item.norm is not None and self._is_due(key)
        }
        return dict(sorted(found.items(), key=lambda item: (item[0][2], item[0][1])))

    def _is_due(self, key: Key) -> bool:
        """An island's leases are spent in the order in which they were given."""
        fragment, round, island = key
        if self.rules.in_step:
            return round == self.versions[fragment]
        return fragment != self.closing_fragment or all(plan.round >= round for plan in self.open_plans(island))


def updated(state: RunState, **changes: Any) -> RunState:
    """The very same state where nothing is different."""
    return replace(state, **changes) if any(getattr(state, name) != new for name, new in changes.items()) else state


def ended(state: RunState) -> bool:
    return state.phase in ("succeeded", "failed")


def plan_for(state: RunState, island: str, incarnation: int, held: str) -> InnerPlan | None:
    """The work this process should have after the plan `held` (a lease id); None means: wait."""
    plans = state.open_plans(island)
    leases = [plan.lease_id for plan in plans]
    following = plans[leases.index(held) + 1 :] if held in leases else plans
    return following[0] if following and following[0].incarnation == incarnation else None


def with_settled(settled: Settled, fragment: int, island: str, round: int, payload_sha256: str) -> Settled:
    """What is settled does not go back: contributions may be committed in another order than they were made in."""
    if settled.get((fragment, island), (-1, ""))[0] > round:
        return settled
    return {**settled, (fragment, island): (round, payload_sha256)}


def with_version(versions: tuple[int, ...], fragment: int, version: int) -> tuple[int, ...]:
    return tuple(version if p == fragment else v for p, v in enumerate(versions))


def without(mapping: Mapping[K, V], *keys: K) -> dict[K, V]:
    return {key: value for key, value in mapping.items() if key not in keys}
