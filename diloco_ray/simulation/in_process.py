"""A whole run in one process, without Ray: the same coordinator, log, islands and evaluator, taking turns.

Islands work one after the other, in island order, so that equal seeds give equal bits: the reference that a run on
Ray is held against, and the fast way to experiments on one machine.
"""

import os
import uuid

from diloco_ray.coordinator.coordinator import Coordinator, Job
from diloco_ray.errors import ClusterError
from diloco_ray.ids import island_name
from diloco_ray.island.evaluator import Evaluator
from diloco_ray.island.worker import Identity, Island
from diloco_ray.run import Run
from diloco_ray.transport.in_memory import InMemoryTransport


def train_in_process(run: Run) -> Coordinator:
    """Trains to the end, or goes on from the last committed record; returns the coordinator with its final state."""
    coordinator = begin(run)
    transport = InMemoryTransport(coordinator)
    islands = [make_island(run, transport, number) for number in range(run.config.max_islands)]
    evaluator = Evaluator(run.island_job(), run.evaluation_plan(), transport)
    evaluator.start()
    for island in islands:
        island.start()
    num_idle = 0  # turns; each one brings a follower that comes late at least one record further
    while evaluator.turn(0.0):
        before = coordinator.state.index
        for island in islands:
            island.turn(0.0)
        num_idle = num_idle + 1 if coordinator.state.index == before else 0
        if num_idle > before + 1 and coordinator.state.phase != "succeeded":
            raise ClusterError(f"no outer step in {num_idle} turns: {coordinator.state.reason or 'no plan'}")
    return coordinator


def begin(run: Run) -> Coordinator:
    """A coordinator whose jobs run at once, in the order they are given."""
    queue: list[Job] = []

    def later(job: Job) -> None:
        queue.append(job)
        if len(queue) == 1:  # else the loop below, further up the stack, comes to it
            while queue:
                coordinator.receive(queue[0]())
                queue.pop(0)

    coordinator = Coordinator(run.store, run.coordinator_job(), later=later, holder="in-process", pid=os.getpid())
    return coordinator


def make_island(run: Run, transport: InMemoryTransport, number: int) -> Island:
    name = island_name(number)
    return Island(run.island_job(), Identity(name, uuid.uuid4().hex, os.getpid(), "here"), transport)
