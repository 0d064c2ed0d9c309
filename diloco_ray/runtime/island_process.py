"""The lives of islands and of the evaluator: one process each, one long call that is the process's whole life."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.errors import DiLoCoError
from diloco_ray.island.evaluator import EvaluationPlan, Evaluator
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.heart import Heart
from diloco_ray.island.job import Identity, IslandJob, PreemptedError
from diloco_ray.island.worker import Island
from diloco_ray.runtime.cluster import this_node_is_draining
from diloco_ray.runtime.island_actor import collecting_later
from diloco_ray.transport.protocol import Transport
from diloco_ray.transport.ray_object_store import RayTransport

FOLLOW_S = 10.0  # one long poll
FAREWELL_S = 10.0  # for what is posted, of an island that has been told to go; notices give half a minute or more
LOOK_EVERY_S = 2.0  # whether this node is draining
PREEMPTED, OVER = "preempted", "the run is over"  # why an island left

Connect = Callable[[], Transport]


def live_as_island(
    job: IslandJob, name: str, process: str, connect: Connect, sync: SyncSettings, speed: float = 1.0
) -> str:
    """Trains until the run is over, or this process is told to go; returns which. What is done is sent before, work
    in hand is given back. Errors end the process and reach the driver with their text.

    connect: opens the line to the coordinator. speed: under 1 for an island to be slower than its processor.
    """
    with collecting_later():
        transport = connect()
        island = Island(job, Identity(name, process, os.getpid(), ray.util.get_node_ip_address()), transport)
    exchange, why = island.exchange, OVER
    with _preemptible(exchange):
        try:
            _train(island, sync, speed)
        except PreemptedError:
            why = PREEMPTED
        finally:
            exchange.stop(FAREWELL_S if why == PREEMPTED else 0.0)
    with contextlib.suppress(DiLoCoError):
        transport.leave(name, exchange.incarnation, why)
    return why


def _train(island: Island, sync: SyncSettings, speed: float) -> None:
    exchange = island.exchange
    exchange.say_hello()
    heart = Heart(exchange, exchange.transport, sync.heartbeat_every_s, sync.stall_timeout_s)
    try:
        island.start()  # on a slow line the model takes longer than silence is borne
        exchange.start_threads(FOLLOW_S)
        began_s = time.monotonic()
        for moment in island.live():
            if moment == "wait":
                exchange.wait(FOLLOW_S)
            elif speed < 1.0:
                time.sleep((time.monotonic() - began_s) * (1.0 / speed - 1.0))
            began_s = time.monotonic()
    finally:
        heart.stop()


@contextlib.contextmanager
def _preemptible(exchange: Exchange) -> Iterator[None]:
    """In this block, SIGTERM or Ray's notice that the node is draining ends the island's work with PreemptedError."""
    done = threading.Event()

    def tell(*_: object) -> None:
        exchange.fail(PreemptedError())

    def look() -> None:
        while not done.wait(LOOK_EVERY_S):
            if this_node_is_draining():
                tell()

    rays_own = signal.signal(signal.SIGTERM, tell)
    threading.Thread(target=look, name="notice", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.signal(signal.SIGTERM, rays_own)


def live_as_evaluator(job: IslandJob, plan: EvaluationPlan, coordinator: Any, silence_s: float) -> None:
    """Follows the log beside the islands."""
    with collecting_later():
        evaluator = Evaluator(job, plan, RayTransport(coordinator, silence_s))
        evaluator.start()
    while evaluator.turn(FOLLOW_S):
        pass
