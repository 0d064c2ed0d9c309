"""A coordinator's office that is open, and islands that write to it: the run-store carrier, in one process."""

import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.letters import Token
from diloco_ray.transport.post_office import PostOffice
from diloco_ray.transport.protocol import Beat, Bytes, Hello, News, Order, SnapshotState, Welcome
from diloco_ray.transport.run_store import RunStoreTransport
from diloco_ray.transport.tokens import KeyRing, create_token
from tests.small_run import new_replica

SECRET = "a secret of these tests only"
POLL_S = 0.05


def office_of(
    store: RunStore,
    coordinator: Coordinator,
    job: CoordinatorJob,
    notes: list[str],
    config: Mapping[str, Any] | None = None,
) -> PostOffice:
    """config: the recipe that it lets islands know."""
    keys = KeyRing(store, job.rules.run_id, SECRET)
    office = PostOffice(
        store,
        coordinator,
        keys,
        run_id=job.rules.run_id,
        fence_epoch=coordinator.fence_epoch,
        max_payload_bytes=max(job.rules.payload_bytes),
        note=notes.append,
    )
    office.put_up_notice(config or {})
    return office


@contextmanager
def office_open(
    store: RunStore, coordinator: Coordinator, job: CoordinatorJob, config: Mapping[str, Any] | None = None
) -> Iterator[list[str]]:
    """In this block a thread turns it; yields what it notes."""
    notes: list[str] = []
    office, closing = office_of(store, coordinator, job, notes, config), threading.Event()

    def turn() -> None:
        while not closing.wait(POLL_S / 5):
            office.turn()

    clerk = threading.Thread(target=turn, daemon=True)
    clerk.start()
    try:
        yield notes
    finally:
        closing.set()
        clerk.join(30)


def line_of(store: RunStore, job: CoordinatorJob, token: Token, deadline_s: float = 60.0) -> RunStoreTransport:
    return RunStoreTransport(
        store,
        job.rules.run_id,
        token,
        uuid.uuid4().hex,
        poll_s=POLL_S,
        deadline_s=deadline_s,
        heartbeat_timeout_s=60.0,
        new_replica=lambda: new_replica(job),
    )


class Correspondents:
    """A Transport for whoever speaks: each island writes with a token of its own."""

    def __init__(self, store: RunStore, job: CoordinatorJob):
        self._store, self._job = store, job
        self._lines: dict[str, RunStoreTransport] = {}

    def of(self, island: str) -> RunStoreTransport:
        name = island or "observer"
        if name not in self._lines:
            token = create_token(self._store, self._job.rules.run_id, SECRET, name)
            self._lines[name] = line_of(self._store, self._job, token)
        return self._lines[name]

    def join(self, hello: Hello) -> Welcome:
        return self.of(hello.island).join(hello)

    def beat(self, beat: Beat) -> Order:
        return self.of(beat.island).beat(beat)

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        return self.of(contribution.island).submit(contribution, payload)

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        return self.of(island).follow(island, incarnation, after, wait_s, held)

    def snapshot(self, first: bool = False) -> SnapshotState:
        return self.of("").snapshot(first)

    def leave(self, island: str, incarnation: int, reason: str) -> None:
        self.of(island).leave(island, incarnation, reason)

    def measured(self) -> set[int]:
        return self.of("").measured()

    def evaluated(self, index: int, round: int, metrics: Any, sample: str) -> None:
        self.of("").evaluated(index, round, metrics, sample)
