"""A run without a model: a real store with its beginning, a coordinator's job, and islands that send what they like."""

import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import partition
from diloco_ray.algorithm.replica import Replica
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.coordination.messages import Contribution, Event, InnerPlan, Verdict
from diloco_ray.coordination.state import Rules
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.coordinator.jobs import Job
from diloco_ray.ids import island_name, sha256_hex
from diloco_ray.log.record import Record, model_digest
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import restore, save_snapshot
from diloco_ray.transport.protocol import Hello

RUN_ID = "5" * 32
SHAPES = {"embedding": (40, 16), "body": (20, 20), "head": (16, 11)}
CODEC = get_codec("float32")
METRICS = {
    "loss": 2.0,
    "gradient_norm": 1.0,
    "inner_seconds": 0.5,
    "sync_wait_seconds": 0.1,
    "tokens": 64.0,
    "norm": 0.1,
    "relative_error": 0.0,
}


def small_job(num_islands: int = 2, num_fragments: int = 1, **rules: Any) -> CoordinatorJob:
    """rules: fields of Rules that differ."""
    layout = partition(SHAPES, num_fragments)
    standard = Rules(
        run_id=RUN_ID,
        num_rounds=3,
        inner_steps_per_round=2,
        sequences_per_inner_step=2,
        num_fragments=num_fragments,
        min_islands=1,
        max_islands=num_islands,
        uplink=CODEC.name,
        payload_bytes=tuple(CODEC.num_bytes(fragment.num_values) for fragment in layout.fragments),
        quorum=num_islands,
        grace_s=600.0,
        heartbeat_timeout_s=600.0,
        waiting_timeout_s=600.0,
        snapshot_every_rounds=2,
    )
    return CoordinatorJob(
        rules=replace(standard, **rules),
        layout=layout,
        outer=OuterSettings(),
        downlink="int8",
        downlink_error_feedback=False,
        shard_sizes=(100,),
        sequence_length=16,
        expected=tuple(island_name(number) for number in range(num_islands)),
        join_timeout_s=600.0,
        keep_snapshots=3,
    )


def document_of(job: CoordinatorJob) -> dict[str, Any]:
    """What run.json says of it."""
    inner = {"steps_per_round": job.rules.inner_steps_per_round, "batch_size": job.rules.sequences_per_inner_step}
    config = {"data": {"sequence_length": job.sequence_length}, "inner": inner, "sync": {"closes": job.rules.closes}}
    layout, sizes = job.layout.to_dict(), list(job.shard_sizes)
    return {"run_id": job.rules.run_id, "config": config, "layout": layout, "shard_sizes": sizes}


def new_replica(job: CoordinatorJob) -> Replica:
    return Replica(job.layout, job.outer.build(), get_codec(job.downlink))


def begun(store: RunStore, job: CoordinatorJob) -> RunStore:
    """The store with snapshot 0 and record 0 in it."""
    replica = new_replica(job)
    generator = torch.Generator().manual_seed(3)
    replica.load_from_({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})
    digest = model_digest([replica.digest(fragment.index) for fragment in job.layout.fragments])
    record = Record(
        index=0,
        parent="",
        run_id=job.rules.run_id,
        fence_epoch=0,
        kind="init",
        fragment=0,
        version=0,
        round=0,
        codec=job.downlink,
        payload="",
        payload_sha256="",
        shares=(),
        parameters_digest=digest.parameters,
        optimizer_digest=digest.optimizer,
        tokens=dict.fromkeys(("leased", "committed", "rejected", "expired", "rewound", "outstanding"), 0),
    )
    save_snapshot(store, 0, replica, record.digest())
    RunLog.open(store).append(record)
    return store


def restored(store: RunStore, job: CoordinatorJob) -> Replica:
    """The global model as the store alone gives it."""
    replica = new_replica(job)
    restore(store, RunLog.open(store), replica)
    return replica


def coordinator_of(store: RunStore, job: CoordinatorJob) -> Coordinator:
    """Its jobs run at once, in the order in which they are given."""
    queue: deque[Job] = deque()

    def later(job: Job) -> None:
        queue.append(job)
        if len(queue) == 1:
            while queue:
                coordinator.receive(queue[0]())
                queue.popleft()

    coordinator = Coordinator(store, job, later=later, holder="test", pid=1)
    return coordinator


class Life:
    """One life of a coordinator whose jobs wait until they are asked for."""

    def __init__(self, store: RunStore, job: CoordinatorJob):
        self.jobs: deque[Job] = deque()
        self.coordinator = Coordinator(store, job, later=self.jobs.append, holder="test", pid=1)

    def run_job(self) -> Event | None:
        """Runs the first job; its event is not received."""
        return self.jobs.popleft()()

    def settle(self) -> None:
        """Runs every job and receives what it says."""
        while self.jobs:
            self.coordinator.receive(self.run_job())

    def submit(self, contribution: Contribution, payload: np.ndarray) -> Verdict:
        """The verdict, once every job is done."""
        self.coordinator.submit(contribution, payload)
        self.settle()
        return self.coordinator.verdict_on(contribution)

    def plan_of(self, island: "SmallIsland") -> InnerPlan:
        """What the island is to contribute to next."""
        return self.coordinator.state.open_plans(island.name)[0]

    def notes(self) -> str:
        return "\n".join(event.get("text", "") for event in self.coordinator.report.own_events)


class SmallIsland:
    """Sends outer gradients that are a function of its number, the round and the fragment."""

    def __init__(self, number: int, job: CoordinatorJob):
        self.number, self.job = number, job
        self.name = island_name(number)
        self.process = uuid.uuid4().hex
        self.incarnation = 0

    def hello(self, *held: InnerPlan) -> Hello:
        return Hello(self.name, self.process, 100 + self.number, "here", self.incarnation, held)

    def join(self, doors: Any, *held: InnerPlan) -> str:
        """What is wrong, "" if the name is this process's now."""
        welcome = doors.join(self.hello(*held))
        self.incarnation = welcome.incarnation
        return welcome.problem

    def values(self, round: int, fragment: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * self.number + 10 * round + fragment)
        return torch.randn(self.job.layout.fragments[fragment].num_values, generator=generator) * 0.01

    def contribution(
        self, plan: InnerPlan, values: torch.Tensor | None = None, fragment: int = 0, **fields: Any
    ) -> tuple[Contribution, np.ndarray]:
        """Header and payload; fields of the header that are to lie are given."""
        values = self.values(plan.round, fragment) if values is None else values
        payload = values.to(torch.float32).numpy().view(np.uint8)
        header = Contribution(
            run_id=self.job.rules.run_id,
            island=self.name,
            incarnation=self.incarnation,
            fragment=fragment,
            round=plan.round,
            base_version=plan.round,  # where islands go in step
            inner_steps=plan.inner_steps,
            lease_id=plan.lease_id,
            codec=CODEC.name,
            payload_sha256=sha256_hex(payload.data),
            payload_bytes=payload.size,
            metrics=METRICS,
        )
        return replace(header, **fields), payload


def join_all(doors: Any, islands: Iterable[SmallIsland]) -> None:
    """doors: a coordinator or a transport."""
    for island in islands:
        assert island.join(doors) == ""


def records(store: RunStore) -> list[Record]:
    """Outer steps only."""
    return RunLog.open(store).records[1:]


def files(store: RunStore, folder: str = "") -> dict[str, bytes]:
    """Every file of the run with its bytes."""
    found: dict[str, bytes] = {}
    for name in store.list(folder):
        path = f"{folder}/{name}" if folder else name
        below = files(store, path) if "." not in name else {}
        found |= below or ({path: store.read(path)} if "." in name else {})
    return found
