"""A whole run in one process, without Ray: the same coordinator, log, islands and evaluator, in virtual time.

Each inner step takes one second of a virtual clock, or as many as an island's speed says; exchanging takes none. The
island that is furthest behind steps first, ties in island order: equal seeds give equal bits, whatever the preset. It
is the reference that a run on Ray is held against, and the fast way to experiments on one machine.
"""

import os
import uuid
from collections.abc import Iterator

from diloco_ray.coordination.membership import names
from diloco_ray.coordination.rounds import next_look_s
from diloco_ray.coordination.state import ended
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.jobs import Job
from diloco_ray.errors import ClusterError, FencedError
from diloco_ray.ids import island_name
from diloco_ray.island.evaluator import Evaluator
from diloco_ray.island.job import Identity
from diloco_ray.island.worker import Island, Moment
from diloco_ray.run import Run
from diloco_ray.transport.in_memory import InMemoryTransport
from diloco_ray.transport.protocol import Beat


class Clock:
    """Seconds since the beginning; moved by hand."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class _Life:
    """One island, and the virtual time at which it takes its next step."""

    def __init__(self, island: Island, step_s: float):
        self.island, self.step_s = island, step_s
        self.moments: Iterator[Moment] = island.live()
        self.next_s = 0.0
        self.waits = self.has_ended = False


def train_in_process(run: Run) -> Coordinator:
    """Trains to the end, or goes on from the last committed record; returns the coordinator with its final state.

    ClusterError where the run failed.
    """
    clock = Clock()
    coordinator = begin(run, clock)
    transport = InMemoryTransport(coordinator)
    lives = [
        _Life(make_island(run, transport, number, clock), 1.0 / run.speed_of(number))
        for number in range(run.config.max_islands)
    ]
    evaluator = Evaluator(run.island_job(), run.evaluation_plan(), transport)
    evaluator.start()
    for life in lives:
        life.island.start()
    looked_at: object = None
    while not ended(coordinator.state):
        waiting = [life for life in lives if life.waits]
        stepping = [life for life in lives if not life.waits and not life.has_ended]
        if looked_at != (looked_at := _progress_of(coordinator)):
            for life in waiting:
                _move(life, clock, coordinator)
        elif stepping:
            life = min(stepping, key=lambda life: life.next_s)
            look_s = next_look_s(coordinator.state)
            if look_s is not None and clock.now_s < look_s < life.next_s:
                _look_again(coordinator, lives, clock)
            else:
                clock.now_s = max(clock.now_s, life.next_s)
                _move(life, clock, coordinator)
        elif not sum([_move(life, clock, coordinator) for life in waiting]):
            _look_again(coordinator, lives, clock)
        evaluator.turn(0.0)
    while evaluator.turn(0.0):
        pass
    if coordinator.state.phase == "failed":
        raise ClusterError(
            f"the run failed: {coordinator.state.reason}",
            where=run.store.url,
            remedy="mend the cause; the same command goes on from the last committed record",
        )
    return coordinator


def _look_again(coordinator: Coordinator, lives: list[_Life], clock: Clock) -> None:
    """Time goes on to when the coordinator may do something though no island says anything."""
    look_s = next_look_s(coordinator.state)
    if look_s is None:
        raise ClusterError(f"every island waits: {coordinator.state.reason or coordinator.state.phase}")
    clock.now_s = max(clock.now_s, look_s)
    for life in lives:
        exchange = life.island.exchange
        lease_id = exchange.plan.lease_id if exchange.plan else ""
        if coordinator.beat(Beat(exchange.identity.island, exchange.incarnation, lease_id)) == "abandon":
            exchange.void(lease_id)
    coordinator.tick()


def _progress_of(coordinator: Coordinator) -> tuple[int, int]:
    return coordinator.state.index, coordinator.state.ledger.leased


def _move(life: _Life, clock: Clock, coordinator: Coordinator) -> bool:
    """Whether the island has got on: taken a step, heard something, or ended, as a quarantined one does."""
    before = life.island.exchange.bell.num_rings
    try:
        moment = next(life.moments, None)
    except FencedError:
        if life.island.exchange.identity.island not in names(coordinator.state.members, "quarantined"):
            raise
        moment = None
    life.waits, life.has_ended = moment == "wait", moment is None
    if moment == "step":
        life.next_s = clock.now_s + life.step_s
    return not life.waits or life.island.exchange.bell.num_rings > before


def begin(run: Run, clock: Clock | None = None) -> Coordinator:
    """A coordinator whose jobs run at once, in the order they are given."""
    queue: list[Job] = []

    def later(job: Job) -> None:
        queue.append(job)
        if len(queue) == 1:  # else the loop below, further up the stack, comes to it
            while queue:
                coordinator.receive(queue[0]())
                queue.pop(0)

    coordinator = Coordinator(
        run.store, run.coordinator_job(), later=later, holder="in-process", pid=os.getpid(), clock=clock or Clock()
    )
    return coordinator


def make_island(run: Run, transport: InMemoryTransport, number: int, clock: Clock | None = None) -> Island:
    name = island_name(number)
    identity = Identity(name, uuid.uuid4().hex, os.getpid(), "here")
    return Island(run.island_job(), identity, transport, clock=clock or Clock())
