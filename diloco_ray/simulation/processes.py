"""The processes of a simulated run: the coordinator and the islands as they are, with a front of their own each.

What `runtime` does with Ray's actors is done here with threads in virtual time: the same classes stand behind.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from diloco_ray.coordination.messages import Contribution, Event, Verdict
from diloco_ray.coordination.rounds import next_look_s
from diloco_ray.coordination.state import Key
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.coordinator.jobs import Job
from diloco_ray.errors import DiLoCoError, OvertakenError
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.heart import Heart
from diloco_ray.island.job import Identity, IslandJob
from diloco_ray.island.threads import Mailbox
from diloco_ray.island.worker import Island
from diloco_ray.log.run_store import RunStore
from diloco_ray.simulation.audit import Audit
from diloco_ray.simulation.green import Hub, Process
from diloco_ray.simulation.network import Line, Network
from diloco_ray.transport.protocol import Bytes, News, told

TICK_S = 0.5
JOB_S = 0.02  # one look at a payload, or one outer step, at most, beside what the storage takes
FOLLOW_S = 10.0
VERDICT_TIMEOUT_S = 5.0  # under one attempt of a caller
STEP_S = 1.5  # one inner step
HOUR_S = 3600.0  # by so much at most an island's clock is ahead or behind

Tamper = Callable[[Contribution, Bytes], list[tuple[Contribution, Bytes]]]


class CoordinatorLife:
    """One coordinator process: a loop that alone touches the state, a worker for tensors and files, a clock."""

    def __init__(self, hub: Hub, number: int, store: RunStore, job: CoordinatorJob, audit: Audit):
        self.process = Process(hub, "coordinator")
        self.coordinator: Coordinator | None = None
        self.step_began_fenced = self._is_finishing = self._has_finished = False
        self._hub, self._number, self._audit = hub, number, audit
        self._jobs: Mailbox[Job] = Mailbox(self.process)
        self._arrived: defaultdict[tuple[Key, int, str], list[Bytes]] = defaultdict(list)  # and not yet judged
        self._changed = self.process.condition()
        self.process.start("begin", lambda: self._begin(store, job))

    def _begin(self, store: RunStore, job: CoordinatorJob) -> None:
        holder = f"coordinator {self._number}"
        try:
            self.coordinator = Coordinator(
                store, job, later=self._jobs.put, holder=holder, pid=self._number, clock=self.process.now_s
            )
        except DiLoCoError as error:
            self._audit.may_end("the coordinator", error)
            self.process.kill(f"it could not begin: {error.what}")
        self._tell()
        self.process.start("worker", self._work)
        self.process.start("clock", self._tick)

    @property
    def is_fenced(self) -> bool:
        return self.coordinator is not None and self.coordinator.fence_epoch < self._audit.fence_epoch

    def has_finished(self) -> bool:
        """Whether everything that the end of the run has asked for is written. Asked first, it is asked for."""
        if not self._is_finishing:
            self._is_finishing = True
            self.process.start("finish", lambda: self._jobs.put(self._finish))
        return self._has_finished

    def _finish(self) -> None:
        self._has_finished = True

    def _work(self) -> None:
        """The loop hears of what is done while the next job is on its way."""
        while True:
            job = self._jobs.get()
            self._hub.pause(self._hub.rng.random() * JOB_S)
            self.step_began_fenced = self.is_fenced
            try:
                self.process.start("done", partial(self._do, partial(_receive, event=job())))
            except DiLoCoError as error:
                self._audit.may_end("the coordinator", error)
                self.process.start("done", partial(self._failed, error))

    def _failed(self, error: DiLoCoError) -> None:
        if isinstance(error, OvertakenError):
            self.process.kill(error.what)
        self._do(partial(_fail, error=error))

    def _tick(self) -> None:
        due_s = self._hub.now_s
        while True:
            due_s += TICK_S
            while self._hub.now_s < due_s:
                assert self.coordinator is not None
                look_s = next_look_s(self.coordinator.state)
                if look_s is not None and self._hub.now_s < look_s < due_s:
                    due_s = look_s
                with self._changed:
                    self._changed.wait(due_s - self._hub.now_s)
            self._do(lambda c: c.tick())

    def _do(self, what: Callable[[Coordinator], Any]) -> Any:
        """In the loop: nothing comes between; those who wait are told."""
        answer = self._undisturbed(what)
        self._tell()
        return answer

    def _undisturbed(self, what: Callable[[Coordinator], Any]) -> Any:
        assert self.coordinator is not None
        with self.process.undisturbed():
            return what(self.coordinator)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        while self.coordinator is None:
            with self._changed:
                self._changed.wait(TICK_S)
        match method:
            case "submit":
                return self._judge(*arguments)
            case "follow":
                return self._news(*arguments)
            case "snapshot":
                return self.coordinator.snapshot(*arguments)
            case "beat":  # whoever waits is told of what it changes with the next tick
                return self._undisturbed(lambda c: c.beat(*arguments))
            case _:
                return self._do(lambda c: getattr(c, method)(*arguments))

    def _judge(self, contribution: Contribution, payload: Bytes) -> Verdict:
        verdict: Verdict = self._do(lambda c: c.submit(contribution, payload))
        until_s = self._hub.now_s + VERDICT_TIMEOUT_S
        while verdict.status == "pending" and self._hub.now_s < until_s:
            with self._changed:
                self._changed.wait(until_s - self._hub.now_s)
            assert self.coordinator is not None
            verdict = self.coordinator.verdict_on(contribution)
        self._let_go(contribution, payload, verdict)
        return verdict

    def _let_go(self, c: Contribution, payload: Bytes, verdict: Verdict) -> None:
        """What lies in the sender's memory may be gone once it is judged, however often it has been sent."""
        sent = self._arrived[c.key, c.incarnation, c.payload_sha256]
        sent.append(payload)
        if verdict.status in ("accepted", "committed", "rejected"):
            for data in sent:
                data[:] = 0
            sent.clear()

    def _news(self, island: str, incarnation: int, after: int, wait_s: float, held: str) -> News:
        until_s = self._hub.now_s + wait_s
        while True:
            news: News | None = self._undisturbed(lambda c: told(c, island, incarnation, after, held))
            for record, _ in news.records if news else ():
                self._audit.announced(record)
            if news or self._hub.now_s >= until_s:
                return news or News("ok")
            with self._changed:
                self._changed.wait(until_s - self._hub.now_s)


def _fail(coordinator: Coordinator, error: DiLoCoError) -> None:
    coordinator.fail(error)


def _receive(coordinator: Coordinator, event: Event | None) -> None:
    coordinator.receive(event)


class IslandLife:
    """One island process. `tampers`: what becomes of its next contributions on the way, one after the other."""

    def __init__(self, hub: Hub, job: IslandJob, name: str, number: int, network: Network, audit: Audit, speed: float):
        self.process, self.name = Process(hub, name), name
        self.exchange: Exchange | None = None
        self.speed = speed
        self.tampers: list[Tamper] = []
        self.sent: list[tuple[Contribution, Bytes]] = []
        self._hub, self._job, self._audit = hub, job, audit
        self.identity = Identity(name, f"{name}/{number}", number, "node")
        self._line = _AuditedLine(self, network, job.sync.coordinator_timeout_s, job.sync.heartbeat_timeout_s)
        self.process.start("train", self._live)

    def _live(self) -> None:
        sync = self._job.sync
        try:
            skew_s = random.Random(self.identity.pid).uniform(-HOUR_S, HOUR_S)
            clock = partial(self._clock, skew_s)
            island = Island(self._job, self.identity, self._line, clock=clock, threads=self.process)
            self.exchange = island.exchange
            island.exchange.say_hello()
            heart = Heart(
                island.exchange, self._line, sync.heartbeat_every_s, sync.stall_timeout_s, threads=self.process
            )
            island.start()
            island.exchange.start_threads(FOLLOW_S)
            for moment in island.live():
                if moment == "wait":
                    island.exchange.wait(FOLLOW_S)
                else:
                    self._hub.pause(STEP_S / self.speed)
            heart.stop()
            self._line.leave(self.name, island.exchange.incarnation, "the run is over")
        except DiLoCoError as error:
            self._audit.may_end(self.name, error)
            self.process.kill(f"{type(error).__name__}: {error.what}")
        self.process.kill("")

    def _clock(self, skew_s: float) -> float:
        return self.process.now_s() + skew_s

    def take_leave(self, reason: str) -> None:
        """As an island that is told to go, with some time for it."""

        def leave() -> None:
            if self.exchange is not None:
                with suppress(DiLoCoError):
                    self._line.leave(self.name, self.exchange.incarnation, reason)
            self.process.kill(reason)

        self.process.start("leave", leave)

    def goes_out(self, contribution: Contribution, payload: Bytes) -> list[tuple[Contribution, Bytes]]:
        """What is really sent: the last one is what the answer is awaited for."""
        self.sent.append((contribution, payload.copy()))
        if self.tampers:
            return self.tampers.pop(0)(contribution, payload)
        self._check_base(contribution)
        return [(contribution, payload)]

    def _check_base(self, c: Contribution) -> None:
        """Unless the base has moved on since it was measured from, or was not an own copy."""
        exchange, p = self.exchange, c.fragment
        if exchange and exchange.base_versions[p] == c.base_version and not self._job.sync.eager:
            self._audit.measured_from(p, c.base_version, exchange.base[p], self.name)


class _AuditedLine(Line):
    """An island's line, with the auditor and whoever tampers on it."""

    def __init__(self, life: IslandLife, network: Network, deadline_s: float, heartbeat_timeout_s: float):
        super().__init__(network, life.process, deadline_s, heartbeat_timeout_s)
        self._life, self._audit = life, life._audit

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        *others, own = self._life.goes_out(contribution, payload)
        for item in [*others, own]:
            self._audit.sent(*item)
        for other in others:
            super().submit(*other)
        return super().submit(*own)
