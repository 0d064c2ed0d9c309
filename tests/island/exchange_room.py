"""An exchange without a model: a coordinator behind a line that listens in, or a line that says what it is told."""

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diloco_ray.coordination.messages import Contribution, InnerPlan, Verdict
from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.data.settings import DataSettings
from diloco_ray.ids import island_name
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.job import Identity, IslandJob
from diloco_ray.island.settings import InnerSettings
from diloco_ray.island.threads import OsThreads
from diloco_ray.log.run_store import RunStore
from diloco_ray.model.settings import ModelSettings
from diloco_ray.transport.in_memory import InMemoryTransport
from diloco_ray.transport.protocol import Beat, Bytes, Hello, News, Order, SnapshotState, Welcome
from tests.small_run import begun, coordinator_of, small_job

PATIENCE_S = 30.0
METRICS = {"loss": 2.0, "inner_seconds": 0.5}


class SeenThreads(OsThreads):
    """The system's own, to be waited for; the process does not end though it is told to."""

    def __init__(self) -> None:
        self.exits: list[int] = []
        self.all: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        self.all.append(threading.Thread(target=work, name=name, daemon=True))
        self.all[-1].start()

    def end_process(self, status: int, why: str) -> None:
        self.exits.append(status)


class Line(InMemoryTransport):
    """To a coordinator that may be replaced. Calls come one by one, whatever thread they come from."""

    def __init__(self, coordinator: Coordinator):
        super().__init__(coordinator)
        self.hellos: list[Hello] = []
        self.sent: list[tuple[Contribution, Bytes]] = []
        self.error: Exception | None = None  # of the next submission
        self._lock = threading.RLock()

    def now_to(self, coordinator: Coordinator) -> None:
        with self._lock:
            self._doors = coordinator

    def join(self, hello: Hello) -> Welcome:
        with self._lock:
            self.hellos.append(hello)
            return super().join(hello)

    def beat(self, beat: Beat) -> Order:
        with self._lock:
            return super().beat(beat)

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        with self._lock:
            if self.error:
                raise self.error
            self.sent.append((contribution, np.array(payload)))
            return super().submit(contribution, payload)

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        with self._lock:
            news = super().follow(island, incarnation, after, wait_s, held)
        if wait_s and news == News("ok"):
            time.sleep(0.002)  # a short long poll
        return news


class Script:
    """A line that says what it was told to say, once; then that there is nothing new."""

    def __init__(self, snapshot: SnapshotState | None = None):
        self.news: deque[News] = deque()
        self.held: list[str] = []  # what `follow` was told of
        self.hellos: list[Hello] = []
        self.sent: list[Contribution] = []
        self.payloads: list[Bytes] = []
        self.verdict = Verdict("accepted")
        self.order: Order = "go_on"
        self._snapshot = snapshot

    def join(self, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        return Welcome(max(1, hello.incarnation))

    def beat(self, beat: Beat) -> Order:
        return self.order

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        self.sent.append(contribution)
        self.payloads.append(np.array(payload))
        return self.verdict

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        self.held.append(held)
        if wait_s and not self.news:
            time.sleep(0.002)
        return self.news.popleft() if self.news else News("ok")

    def snapshot(self, first: bool = False) -> SnapshotState:
        assert self._snapshot is not None
        return self._snapshot

    def leave(self, island: str, incarnation: int, reason: str) -> None: ...

    def measured(self) -> set[int]:
        return set()

    def evaluated(self, *arguments: Any) -> None: ...


def island_job(job: CoordinatorJob, **sync: Any) -> IslandJob:
    """sync: fields of SyncSettings that differ from float32 both ways of this coordinator's job."""
    plain = {"uplink": job.rules.uplink, "downlink": job.downlink, "closes": job.rules.closes}
    return IslandJob(
        run_id=job.rules.run_id,
        seed=0,
        num_inner_steps=6,
        layout=job.layout,
        data=DataSettings(corpus="none"),
        prepared_url="",
        model=ModelSettings(config={"model_type": "llama"}),
        inner=InnerSettings(),
        outer=job.outer,
        sync=SyncSettings(**{**plain, **sync}),
        checkpoints_url="",
    )


def identity(number: int) -> Identity:
    return Identity(island_name(number), uuid.uuid4().hex, 100 + number, "here")


class Room:
    """Exchanges of so many islands around one coordinator."""

    def __init__(self, folder: Path, num_islands: int = 2, num_fragments: int = 1, sync: Any = None, **rules: Any):
        self.job = small_job(num_islands, num_fragments, **rules)
        self.store = begun(RunStore(str(folder / "run")), self.job)
        self.coordinator = coordinator_of(self.store, self.job)
        self.line = Line(self.coordinator)
        own = island_job(self.job, **(sync or {}))
        self.threads = SeenThreads()
        self.exchanges = [Exchange(own, identity(number), self.line, self.threads) for number in range(num_islands)]
        for exchange in self.exchanges:
            exchange.start()

    @property
    def fragments(self) -> Any:
        return self.job.layout.fragments

    def restart_coordinator(self) -> None:
        self.coordinator = coordinator_of(self.store, self.job)
        self.line.now_to(self.coordinator)

    def begin(self, exchange: Exchange) -> InnerPlan:
        """The next plan; every fragment is fetched."""
        plans: list[InnerPlan] = []

        def has_come() -> bool:
            exchange.poll()
            plan = exchange.next_plan()
            plans.extend([plan] if plan else [])
            return bool(plans)

        wait_for(has_come)
        for fragment in self.fragments:
            exchange.fetch(fragment.index)
        return plans[0]

    def moved(self, exchange: Exchange, fragment: int, by: float = 0.01) -> dict[str, Tensor]:
        """The model's tensors after training that moved each value of the fragment by so much."""
        tensors = {name: torch.zeros(shape) for f in self.fragments for name, shape in shapes_of(f).items()}
        self.fragments[fragment].scatter_(exchange.base[fragment] + by, tensors)
        return tensors

    def post(self, exchange: Exchange, plan: InnerPlan, fragment: int = 0, by: float = 0.01) -> None:
        tensors = self.moved(exchange, fragment, by)
        exchange.post(plan, self.fragments[fragment], tensors, plan.inner_steps, METRICS)


def held_by(exchange: Exchange) -> tuple[InnerPlan, ...]:
    """What it would say that it holds, to a coordinator that it says hello to."""
    return exchange._plans.held(exchange._outbox.plans)


def shapes_of(fragment: Any) -> dict[str, tuple[int, ...]]:
    return {slot.name: slot.shape for slot in fragment.slots}


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.001)
