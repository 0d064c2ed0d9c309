"""The coordinator: receive what happens, reduce it to decisions, perform them. It owns the log and the first replica.

    receive(event) -> reduce(state, event) -> perform(command)

One thread calls the doors and `receive`. Work on tensors and files is handed to `later`, which runs one job after the
other, elsewhere or at once, and brings its event back. A record is computed, then committed, then announced; if the
commit fails, this coordinator's replica is ahead of the log and nobody has seen it: it stops, and recovery is replay.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import assert_never

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.outer_gradient import pairwise_cosines
from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination.data_ledger import DataLedger
from diloco_ray.coordination.membership import is_current, may_return, why_not
from diloco_ray.coordination.messages import (
    Answer,
    CloseRound,
    Command,
    Committed,
    Contribution,
    End,
    Event,
    Heartbeat,
    Inspect,
    Inspected,
    Joined,
    Left,
    Lost,
    Note,
    Submitted,
    TakeOuterStep,
    Tick,
    Verdict,
)
from diloco_ray.coordination.recovery import expect, recover
from diloco_ray.coordination.reducer import reduce
from diloco_ray.coordination.state import RunState, ended, plan_for
from diloco_ray.coordinator.feed import Feed
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.coordinator.jobs import Job, Jobs
from diloco_ray.coordinator.payloads import Name, Payload, Payloads, name_of
from diloco_ray.coordinator.report import Report
from diloco_ray.coordinator.residuals import Residuals
from diloco_ray.errors import DiLoCoError, FencedError, StoreError
from diloco_ray.ids import sha256_hex
from diloco_ray.log.record import Record, payload_path
from diloco_ray.log.run_log import RunLog, check_fence, take_fence
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import prune_snapshots, restore, save_snapshot
from diloco_ray.transport.protocol import Beat, Bytes, Hello, LogStep, Order, SnapshotState, Tidings, Welcome

LOOK_EVERY_S = 1.0  # at the log's end, on the word of anybody
MAX_VERDICTS = 1000  # answers kept for those who have not yet asked; one that is lost is given again


class Coordinator:
    """One coordinator life. Taking the fence makes it the only writer of the run."""

    def __init__(
        self,
        store: RunStore,
        job: CoordinatorJob,
        *,
        later: Callable[[Job], None],
        holder: str,
        pid: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._store, self._job, self._later, self._now_s = store, job, Jobs(later), clock
        self._uplink, self._combine = get_codec(job.rules.uplink), job.outer.combine_function
        self.error: DiLoCoError | None = None  # what ended this life
        self.fence_epoch = take_fence(store, job.rules.run_id, holder)
        store.sweep()
        self._log = RunLog.open(store)
        while self.fence_epoch < self._log.tail.fence_epoch:  # fences were deleted; along the chain they never fall
            self.fence_epoch = take_fence(store, job.rules.run_id, holder, self._log.tail.fence_epoch)
        self._replica = self._new_replica()
        restore(store, self._log, self._replica)
        self._payloads = Payloads()
        self._verdicts: dict[Name, Verdict] = {}
        self._computed: dict[int, tuple[Record, Bytes, str]] = {}  # committed, not yet announced
        self._cosines: dict[int, list[float]] = {}
        self._residuals = Residuals(store, job.layout, self._log.records[1:]) if job.downlink_error_feedback else None
        self._looked_at_tail_s, self._is_complete = 0.0, False  # whether the last round's record is written
        self.feed = Feed(self._log, self._new_replica)
        self.state = self._first_state()
        self.report = Report(store, self.fence_epoch, pid, job.layout.num_values, clock)
        self.report.started(self.state)

    def _new_replica(self) -> Replica:
        return Replica(self._job.layout, self._job.outer.build(), get_codec(self._job.downlink))

    def _first_state(self) -> RunState:
        job, records = self._job, self._log.records[1:]
        steps = [TakeOuterStep(r.fragment, r.round, r.version - 1, r.shares, r.tokens, "") for r in records]
        ledger = DataLedger(job.shard_sizes, job.sequence_length, str(self.fence_epoch))
        state = recover(RunState(job.rules, ledger, versions=(0,) * job.rules.num_fragments), steps)
        if ended(state):
            return state
        expected = [share.island for share in records[-1].shares] if records else job.expected
        return expect(state, expected, now_s=self._now_s(), within_s=job.join_timeout_s)

    @property
    def is_fenced(self) -> bool:
        """Whether it has found that another coordinator writes the run now."""
        return isinstance(self.error, FencedError)

    # ---- doors: what followers call ----

    def join(self, hello: Hello) -> Welcome:
        self.receive(
            Joined(self._now_s(), hello.island, hello.process, hello.incarnation, hello.pid, hello.node, hello.held)
        )
        if ended(self.state):
            return Welcome(max(1, hello.incarnation))  # it will hear from `news` that the run is over
        member = self.state.members[hello.island]
        if member.standing == "alive" and member.process == hello.process:
            return Welcome(member.incarnation)
        return Welcome(0, why_not(self.state.members, hello.island))

    def beat(self, beat: Beat) -> Order:
        self.receive(Heartbeat(self._now_s(), beat.island, beat.incarnation, beat.progress))
        if ended(self.state):
            return "go_on"  # it will hear from `news` that the run is over
        if not is_current(self.state.members, beat.island, beat.incarnation):
            return "rejoin" if may_return(self.state.members, beat.island, beat.incarnation) else "fenced"
        if beat.lease_id and beat.lease_id not in self.state.ledger.outstanding:
            return "abandon"
        return "go_on"

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        """`pending` while the payload is inspected; ask `verdict_on` after the next change."""
        if self.is_fenced:
            return Verdict("unknown")  # its successor is to judge
        self._verdicts.pop(name_of(contribution), None)
        self._payloads.offer(name_of(contribution), payload)
        self.receive(Submitted(self._now_s(), contribution))
        return self.verdict_on(contribution)

    def verdict_on(self, contribution: Contribution) -> Verdict:
        return self._verdicts.get(name_of(contribution), Verdict("pending"))

    def news(self, island: str, incarnation: int, after: int, held: str) -> Tidings | None:
        """None: nothing new past `after` and no plan that follows `held`. Observers follow with an empty name."""
        if self.is_fenced:
            return None  # the run may go on elsewhere: its successor knows
        is_behind = after < self.state.index
        if ended(self.state):
            return Tidings("ok", records=True) if is_behind else Tidings("over", reason=self.state.reason)
        if island and not is_current(self.state.members, island, incarnation):
            if may_return(self.state.members, island, incarnation):
                return Tidings("rejoin")
            return Tidings("fenced", reason=why_not(self.state.members, island))
        if after > self.state.index and self._now_s() - self._looked_at_tail_s > LOOK_EVERY_S:
            self._looked_at_tail_s = self._now_s()
            self._later(self._check_tail)
        plan = plan_for(self.state, island, incarnation, held)
        return Tidings("ok", is_behind, plan) if is_behind or plan else None

    def records_after(self, after: int) -> tuple[LogStep, ...]:
        """The first of those that `news` speaks of."""
        return self.feed.recent_after(after) or (self.feed.read(after + 1),)

    def snapshot(self, first: bool = False) -> SnapshotState:
        return self.feed.snapshot(first)

    def leave(self, island: str, incarnation: int, reason: str) -> None:
        self.receive(Left(self._now_s(), island, incarnation, reason))

    def lost(self, island: str, process: str, reason: str) -> None:
        """The driver's word that a process is gone."""
        self.receive(Lost(self._now_s(), island, process, reason))

    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None:
        self.report.evaluated(index, round, metrics, sample)
        self._later(self.report.flush)

    def measured(self) -> set[int]:
        return set(self.report.validation.losses)

    def tick(self) -> None:
        self.receive(Tick(self._now_s()))

    def fail(self, error: BaseException) -> None:
        """An error of the store or the machine: nothing is lost, the same command goes on from the last record."""
        self.error = error if isinstance(error, DiLoCoError) else DiLoCoError(f"{type(error).__name__}: {error}")
        self.report.failed(self.error)
        with contextlib.suppress(StoreError):  # which may be what failed
            self.report.flush()
        self.state = replace(self.state, phase="failed", reason=self.error.what)

    # ---- receive, reduce, perform ----

    def receive(self, event: Event | None) -> None:
        if event is None or (ended(self.state) and not isinstance(event, Heartbeat | Left | Submitted)):
            return
        if isinstance(event, Inspected):
            self._payloads.hold_the_copy(name_of(event.contribution))
        if isinstance(event, Committed):
            record, payload, reason = self._computed.pop(event.index)
            self.feed.keep(record, payload)
            cosines = self._cosines.pop(event.index, None)
            self.report.committed(record, reason, len(self.state.alive), payload.size, cosines)
        self.state, commands = reduce(self.state, event)
        self.report.observe(self.state)
        for command in commands:
            self._perform(command)
        if isinstance(event, Submitted | Inspected | Committed):
            self._payloads.drop_but({name_of(item.contribution) for item in self.state.inbox.values()})
            self._verdicts = dict(list(self._verdicts.items())[-MAX_VERDICTS:])

    def _perform(self, command: Command) -> None:
        match command:
            case Inspect(contribution):
                held = self._payloads[name_of(contribution)]
                self._later(lambda: self._inspect(contribution, held))
            case Answer(contribution, verdict):
                self._verdicts[name_of(contribution)] = verdict
                if verdict.status == "accepted":
                    self.report.accepted(contribution, contribution.fragment == self.state.closing_fragment)
            case TakeOuterStep():
                self._later(lambda: self._take_outer_step(command))
            case CloseRound():
                self.report.round_closed(command, self.state)
                if command.snapshot:
                    self._later(self._save_snapshot)
                self._later(self.report.flush)
            case Note(text):
                self.report.note(text)
            case End(outcome, reason):
                self.report.ended(outcome, reason)
                self._later(self.report.flush)
            case _:
                assert_never(command)

    # ---- jobs: run by `later`, one after the other; the only users of replica and log ----

    def _check_tail(self) -> None:
        """For a record that a coordinator of before committed after our look at the log: the next step would run into
        it, but whoever has it works on what comes after."""
        with contextlib.suppress(StoreError):
            self._log.check_tail(self.fence_epoch)

    def _inspect(self, contribution: Contribution, payload: Payload) -> Inspected:
        num_values = self._job.layout.fragments[contribution.fragment].num_values
        norm, problem = payload.inspect(contribution, num_values, self._uplink)
        if not problem:
            self._payloads.copied(name_of(contribution), payload)
        return Inspected(self._now_s(), contribution, norm, problem)

    def _take_outer_step(self, step: TakeOuterStep) -> Committed | None:
        if self._is_complete:
            return None  # due before anybody heard that the run is over
        keys = [((step.fragment, share.round, share.island), share.payload_sha256) for share in step.shares]
        payloads = [self._payloads[key].tensor for key in keys]
        weights = [share.weight for share in step.shares]
        residual = self._residuals.of(step.fragment) if self._residuals else None
        combined, digest = self._replica.outer_step(
            step.fragment, payloads, weights, self._uplink, self._combine, residual
        )
        parent, payload = self._log.tail, combined.numpy()
        payload_sha256 = sha256_hex(payload.data)
        record = Record(
            index=parent.index + 1,
            parent=self._log.tail_digest,
            run_id=self._job.rules.run_id,
            fence_epoch=self.fence_epoch,
            kind="outer_step",
            fragment=step.fragment,
            version=step.base_version + 1,
            round=step.round,
            codec=self._job.downlink,
            payload=payload_path(parent.index + 1, payload_sha256),
            payload_sha256=payload_sha256,
            shares=step.shares,
            parameters_digest=digest.parameters,
            optimizer_digest=digest.optimizer,
            tokens=dict(step.tokens),
        )
        check_fence(self._store, self.fence_epoch)
        if self._residuals:
            self._residuals.save(step.fragment, record.index, payload_sha256)
        self._log.append(record, payload.data)
        self._computed[record.index] = (record, payload, step.reason)
        self._is_complete = record.round == self._job.rules.num_rounds
        if self._job.outer.statistics:
            num_values = self._job.layout.fragments[step.fragment].num_values
            self._cosines[record.index] = pairwise_cosines(payloads, self._uplink, num_values)
        return Committed(self._now_s(), step.fragment, record.version, record.index)

    def _save_snapshot(self) -> None:
        """Of the log's end by now: other fragments may have gone on since the round was closed."""
        save_snapshot(self._store, self._log.tail.index, self._replica, self._log.tail_digest)
        prune_snapshots(self._store, self._job.keep_snapshots)
