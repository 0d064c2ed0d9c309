"""A run whose islands write letters, in one thread and in virtual time: whoever waits lets the clerk work meanwhile.

No test sleeps, and every call of the storage has its number.
"""

import json
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from diloco_ray.coordination.messages import InnerPlan, Verdict
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.errors import StoreError
from diloco_ray.log.record import Record, seal
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.simulation.storage import IOCall, Tap, TappedStore
from diloco_ray.transport.letters import CALLS, Letter, Token, plain, write_letter
from diloco_ray.transport.post_office import PostOffice
from diloco_ray.transport.protocol import Doors
from diloco_ray.transport.run_store import RunStoreTransport
from diloco_ray.transport.tokens import KeyRing, create_token
from tests.mail import SECRET
from tests.small_run import RUN_ID, SmallIsland, begun, coordinator_of, document_of, new_replica, records, small_job

POLL_S = 1.0


class KilledError(BaseException):
    """Passes every handler of the product, as a kill does."""


class VirtualTime:
    """In place of the `time` of both sides."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now_s = 1000.0
        self.rooms: list[Mailroom] = []
        for side in ("run_store", "post_office", "calls"):
            patch.setattr(f"diloco_ray.transport.{side}.time", self)

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        for room in self.rooms:
            room.turn()


def unheard(call: IOCall) -> None:
    """A tap that does nothing."""


class Mailroom:
    """One run's store, its coordinator, and the office, which may be killed and begun anew.

    tap: of the office's storage calls. stands_still: nobody turns the office. wall_s: the coordinator's calendar.
    """

    def __init__(self, url: str, time: VirtualTime, job: CoordinatorJob | None = None):
        self.time, self.job = time, job or small_job(num_islands=2)
        self.store = begun(RunStore(url), self.job)
        self.store.write("run.json", seal(document_of(self.job)))
        self.tap: Tap = unheard
        self.notes: list[str] = []
        self.wall_s = 1e9
        self.stands_still = False
        self.troubles: list[StoreError] = []
        self.begin_life()
        time.rooms.append(self)

    def begin_life(self) -> None:
        self.coordinator = coordinator_of(self.store, self.job)
        self.begin_office()

    def begin_office(self, doors: Doors | None = None, **options: Any) -> PostOffice:
        """Of the same coordinator."""
        store = TappedStore(self.store.url, lambda call: self.tap(call))
        self.office = PostOffice(
            store,
            doors or self.coordinator,
            KeyRing(store, RUN_ID, SECRET, lambda: self.wall_s, self.time.monotonic),
            run_id=RUN_ID,
            fence_epoch=self.coordinator.fence_epoch,
            max_payload_bytes=max(self.job.rules.payload_bytes),
            note=self.notes.append,
            **options,
        )
        self.say("running")
        return self.office

    def say(self, state: str, reason: str = "") -> None:
        tap, self.tap = self.tap, unheard
        self.office.put_up_notice({}, state, reason)
        self.tap = tap

    def turn(self) -> None:
        if self.stands_still:
            return
        try:
            self.office.turn()
        except StoreError as error:  # as the coordinator's thread has it
            self.troubles.append(error)
        except KilledError:
            self.tap = unheard
            self.killed()

    def killed(self) -> None:
        self.begin_life()

    def token(self, island: str) -> Token:
        return create_token(self.store, RUN_ID, SECRET, island)

    def line(
        self, token: Token, store: RunStore | None = None, deadline_s: float = 60.0, heartbeat_timeout_s: float = 60.0
    ) -> RunStoreTransport:
        return RunStoreTransport(
            store or self.store,
            RUN_ID,
            token,
            uuid.uuid4().hex,
            poll_s=POLL_S,
            deadline_s=deadline_s,
            heartbeat_timeout_s=heartbeat_timeout_s,
            new_replica=lambda: new_replica(self.job),
        )

    def worker(self, number: int, tap: Tap | None = None) -> "Worker":
        store = TappedStore(self.store.url, tap) if tap else self.store
        return Worker(SmallIsland(number, self.job), self, store)

    def proved(self) -> list[Record]:
        """The outer steps, after the whole run was verified."""
        assert verify(self.store, lambda run: new_replica(self.job)).problems == ()
        return records(self.store)


class Worker:
    """An island that trains nothing, and keeps what it has in hand until it is committed."""

    def __init__(self, island: SmallIsland, room: Mailroom, store: RunStore):
        self.island, self.name = island, island.name
        self.token = room.token(island.name)
        self.line = room.line(self.token, store)
        self.index = 0
        self.plan: InnerPlan | None = None
        self.is_over = False

    def hello(self) -> None:
        assert self.island.join(self.line, *([self.plan] if self.plan else [])) == ""

    def turn(self) -> None:
        held = self.plan.lease_id if self.plan else ""
        news = self.line.follow(self.name, self.island.incarnation, self.index, 0.0, held)
        assert news.standing != "fenced", news.reason
        self.is_over = news.standing == "over"
        if news.standing == "rejoin":
            self.hello()
            self.send()
        for record, _ in news.records:
            self.index += 1
            assert record.index == self.index
            if self.plan and record.round > self.plan.round:
                self.plan = None
        if news.plan:
            self.plan = news.plan
            self.send()

    def send(self) -> None:
        """Until it is known what became of it."""
        for _ in range(10):
            if self.plan is None or self.submit(self.plan).status != "unknown":
                return
            self.hello()
        raise AssertionError("nobody knows this island")

    def submit(self, plan: InnerPlan) -> Verdict:
        return self.line.submit(*self.island.contribution(plan))


def to_the_end(workers: Iterable[Worker]) -> None:
    at_work = list(workers)
    for _ in range(100):
        for worker in at_work:
            worker.turn()
        at_work = [worker for worker in at_work if not worker.is_over]
        if not at_work:
            return
    raise AssertionError("the run does not end")


# ---- whole runs ----


def new_room(time: VirtualTime, num_rounds: int = 3) -> Mailroom:
    time.rooms.clear()
    return Mailroom(f"memory://{uuid.uuid4().hex}/run", time, small_job(num_islands=2, num_rounds=num_rounds))


def whole_run(room: Mailroom, tap: Tap | None = None) -> list[Record]:
    """Two islands from hello to the end; tap: of the first one's storage."""
    workers = [room.worker(0, tap), room.worker(1)]
    for worker in workers:
        worker.hello()
    to_the_end(workers)
    return room.proved()


class Moments:
    """Counts the moments of storage calls, and does something at one of them."""

    def __init__(self, at: int = -1, act: Callable[[IOCall], None] = lambda call: None):
        self._at, self._act = at, act
        self.num = 0

    def __call__(self, call: IOCall) -> None:
        self.num += 1
        if self.num - 1 == self._at:
            self._act(call)


def digests(steps: list[Record]) -> list[str]:
    assert [len(step.shares) for step in steps] == [2] * len(steps)
    return [step.parameters_digest for step in steps]


# ---- letters by hand ----


def letter_path(island: str, number: int = 1, process: str = "a" * 32) -> str:
    return f"mail/{island}/{process}-{number:08d}.request"


def letter_of(
    token: Token, path: str, epoch: int, call: str, *arguments: Any, payload: np.ndarray | bytes = b""
) -> bytes:
    body = {"call": call, "arguments": plain(CALLS[call][0], arguments), "epoch": epoch}
    return write_letter(token, RUN_ID, path, body, payload if isinstance(payload, bytes) else payload.tobytes())


def answer_to(store: RunStore, path: str) -> dict[str, Any]:
    """The answer's body, signed or not."""
    answer = path.replace(".request", ".answer")
    return json.loads(Letter.opened(answer, store.read(answer)).header)
