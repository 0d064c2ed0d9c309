"""A gang's side of the exchange: what the island's loop asks for, the same on every rank.

    rank 0      Lead: hello, heartbeats, plans, the log as it comes, contributions until their fate is known
    all ranks   Part: replica, base and encoding, each its span

Whatever the loop does next depends on what rank 0 has heard; so each such question is one decision of rank 0's that all
ranks take part in (`Gang.decide`), at the same point of the loop. Between two of them rank 0 may hear what it likes. A
record is replayed, by all, when its fragment is fetched or measured from, not when it comes.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from diloco_ray.algorithm.fragments import Fragment, Layout
from diloco_ray.coordination.messages import Contribution, InnerPlan
from diloco_ray.errors import CorruptionError
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.gang import Gang
from diloco_ray.island.job import Identity, IslandJob
from diloco_ray.island.outbox import Outgoing
from diloco_ray.island.part import Part
from diloco_ray.island.threads import Threads
from diloco_ray.log.record import Record
from diloco_ray.transport.follower import Follower
from diloco_ray.transport.protocol import LogStep, SnapshotState, Transport

_PLAN = TypeAdapter(InnerPlan)


class _Relay(Follower):
    """A follower of the log that replays nothing: what may be replayed is put aside for the whole gang."""

    state: SnapshotState | None = None

    def load_snapshot(self, first: bool = False) -> SnapshotState:
        self.state = self.transport.snapshot(first)
        self.replica.versions = list(self.state.versions)
        self.released: list[deque[LogStep]] = [deque() for _ in self.state.versions]
        for waiting in self._waiting:
            waiting.clear()
        self.index = self.state.index
        return self.state

    def replay(self, fragment: int, version: int | None = None) -> None:
        """The replica's version is the one that the gang comes to with its next fetch."""
        waiting = self._waiting[fragment]
        while waiting and (version is None or self.replica.versions[fragment] < version):
            self.released[fragment].append(waiting.popleft())
            self.replica.versions[fragment] += 1


class Lead(Exchange):
    """An exchange without values of its own: its fragments are empty, payloads come to it encoded."""

    def __init__(self, job: IslandJob, identity: Identity, transport: Transport, threads: Threads | None):
        empty = Layout(tuple(Fragment(fragment.index, ()) for fragment in job.layout.fragments))
        super().__init__(replace(job, layout=empty), identity, transport, threads)
        self._follower: _Relay = _Relay(self._follower.replica, transport)
        self.replayed = [0 for _ in job.layout.fragments]  # versions that the gang stands at

    def take_snapshot(self) -> SnapshotState | None:
        state, self._follower.state = self._follower.state, None
        return state

    def take_released(self, fragment: int) -> list[LogStep]:
        """What the gang is to replay now."""
        with self.bell:
            released = self._follower.released[fragment]
            steps = [released.popleft() for _ in range(len(released))]
            self.replayed[fragment] = self._follower.replica.versions[fragment]
        return steps

    def post_encoded(
        self,
        plan: InnerPlan,
        fragment: Fragment,
        base_version: int,
        payload: Tensor,
        inner_steps: int,
        metrics: Mapping[str, float],
    ) -> None:
        """As `post`."""
        item = Outgoing(plan, fragment, base_version, inner_steps, payload, _is_there, metrics)
        with self.bell:
            self._outbox.items.append(item)
        (self._posted.put if self._has_threads else self._deliver)(item)

    def _encode(self, item: Outgoing) -> tuple[Contribution, Tensor]:
        payload = item.values
        return self._outbox.headed(item, payload, item.base_version, self.incarnation, item.metrics), payload


def _is_there() -> None:
    """An encoded payload has nothing to come from an accelerator."""


class GangExchange:
    """What `Island` asks of an `Exchange`, on one rank of a gang. All but poll and wait take all ranks."""

    def __init__(
        self,
        job: IslandJob,
        identity: Identity,
        gang: Gang,
        part: Part,
        transport: Transport | None,
        threads: Threads | None = None,
    ):
        """transport: rank 0's, None elsewhere."""
        self.job, self.identity, self.gang, self.part = job, identity, gang, part
        self.lead = Lead(job, identity, transport, threads) if transport is not None else None
        self.residuals, self.base = part.residuals, part.base
        self.on_encoded: Callable[[InnerPlan, int], None] = lambda plan, fragment: None
        self._plan: InnerPlan | None = None
        self._progress: dict[str, float] = {}
        self._payloads: dict[int, Tensor] = {}  # this rank's part of what was last sent of a fragment
        self._trouble: Exception | None = None

    @property
    def plan(self) -> InnerPlan | None:
        return self._plan

    @plan.setter
    def plan(self, plan: InnerPlan | None) -> None:
        self._plan = plan
        if self.lead:
            self.lead.plan = plan

    @property
    def progress(self) -> dict[str, float]:
        return self._progress

    @progress.setter
    def progress(self, progress: dict[str, float]) -> None:
        self._progress = progress
        if self.lead:
            self.lead.progress = progress

    # ---- its life ----

    def say_hello(self) -> None:
        self._lead_alone(lambda lead: lead.say_hello(), "hello")

    def start(self) -> None:
        self._lead_alone(lambda lead: lead.start(), "snapshot")
        self.part.load(self.lead.take_snapshot() if self.lead else None)

    def poll(self) -> None:
        if self.lead:
            self.lead.poll()

    def wait(self, timeout_s: float) -> None:
        """On rank 0, until something has changed; the others meet it at the next decision, well within its patience."""
        if self.lead:
            self.lead.wait(min(timeout_s, self.gang.timeout_s / 4))

    def fail(self, error: Exception) -> None:
        """Ends the island, on all ranks, at the next decision."""
        self._trouble = error

    def check(self, plan: InnerPlan | None = None) -> None:
        self._decide(lambda lead: lead.check(plan), "plan")

    def next_plan(self) -> InnerPlan | None:
        found = self._decide(_next_plan, "plan")
        self._plan = _PLAN.validate_python(found, strict=False) if found else None
        return self._plan

    def abandon(self, plan: InnerPlan) -> None:
        self._plan = None
        if self.lead:
            self.lead.abandon(plan)

    # ---- sending ----

    def post(
        self,
        plan: InnerPlan,
        fragment: Fragment,
        tensors: Mapping[str, Tensor],
        inner_steps: int,
        metrics: Mapping[str, float],
    ) -> None:
        p = fragment.index
        values = self.part.gather(p, tensors)
        from_base = self.job.sync.anchor == "base" and not plan.silent_steps
        if not from_base:
            self._replay(p)
        base = self.base[p] if from_base else self.part.replica.parameters(p)
        self._payloads[p], payload, stats = self.part.encode(p, values, base)
        self.on_encoded(plan, p)
        if self.residuals:  # on all ranks before any contribution of theirs counts
            self._decide(lambda lead: None, "residual")
        if self.lead and payload is not None:
            told = {**metrics, "norm": stats.norm, "relative_error": stats.relative_error}
            base_version = (self.lead.base_versions if from_base else self.lead.replayed)[p]
            self.lead.post_encoded(plan, fragment, base_version, payload, inner_steps, told)

    def payload_of(self, plan: InnerPlan, fragment: int) -> Tensor | None:
        """This rank's part of it."""
        return self._payloads.get(fragment)

    def is_encoded(self, fragment: int) -> bool:
        """On all ranks before `post` returns."""
        return True

    # ---- merging ----

    @property
    def index(self) -> int:
        return self._decide(lambda lead: lead.index, "log")

    def aim(self, fragment: int, round: int | None) -> None:
        if self.lead:
            self.lead.aim(fragment, round)

    def has_closed(self, fragment: int, round: int) -> bool:
        return self._decide(lambda lead: lead.has_closed(fragment, round), "log")

    def stands_at(self, fragment: int, version: int) -> bool:
        return self._decide(lambda lead: lead.stands_at(fragment, version), "log")

    def is_settled(self, fragment: int, round: int) -> bool:
        return self._decide(lambda lead: lead.is_settled(fragment, round), "log")

    def arrived(self) -> list[int]:
        return self._decide(lambda lead: lead.arrived(), "log")

    def fetch(self, fragment: int) -> Tensor:
        self._replay(fragment)
        if self.lead:
            self.lead.base_versions[fragment] = self.lead.replayed[fragment]
        return self.part.fetch(fragment)

    def _replay(self, p: int) -> None:
        """All that was released; CorruptionError, on rank 0, where a digest differs (I7)."""
        steps = self.lead.take_released(p) if self.lead else []
        for number in range(self._decide(lambda lead: len(steps), "log")):
            record, payload = steps[number] if self.lead else (None, None)
            digest = self.part.step(p, None if payload is None else torch.from_numpy(payload.copy()))
            self._decide(lambda lead, record=record, digest=digest: _check(record, digest), "digest")

    def _lead_alone(self, act: Callable[[Lead], None], what: str) -> None:
        """The transport has deadlines of its own; this one is for what has none, such as a file system that is gone."""
        lead, within_s = self.lead, 3 * self.job.sync.coordinator_timeout_s
        self.gang.lead_alone(lambda: act(lead) if lead else None, what, within_s, lambda: self._trouble)

    def _decide(self, make: Callable[[Lead], Any], what: str) -> Any:
        lead = self.lead
        return self.gang.decide(lambda: make(lead) if lead else None, what, self._trouble)


def _next_plan(lead: Lead) -> dict[str, Any] | None:
    plan = lead.next_plan()
    return None if plan is None else _PLAN.dump_python(plan, mode="json")


def _check(record: Record | None, digest: Any) -> None:
    if record is not None and digest != record.state_digest:
        raise CorruptionError(
            f"replaying record {record.index} gave {digest}, the record says {record.state_digest}",
            where=f"the ranks' replica at record {record.index}",
            remedy="run `diloco-ray verify` on the run; compare these nodes' torch with the coordinator's",
        )
