"""The lives of islands and of the evaluator: one process each, one long call that is the process's whole life."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray
from ray import exceptions
from ray.util.placement_group import get_current_placement_group

from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.errors import DiLoCoError
from diloco_ray.island.evaluator import EvaluationPlan, Evaluator
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.gang import Gang
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
        island = Island(job, _identity(name, process), connect())
    return _live(island, island.exchange, sync, speed)


def live_as_rank(
    job: IslandJob,
    name: str,
    process: str,
    connect: Connect,
    sync: SyncSettings,
    speed: float,
    rank_timeout_s: float,
    home: Any,
) -> str:
    """As `live_as_island`, for one rank of an island, in a process group that is there already. home: its GangActor."""
    with collecting_later():
        home.placed.remote(get_current_placement_group())
        gang = Gang(name, rank_timeout_s)
        island = Island(job, _identity(name, process), connect() if gang.leads else None, gang=gang)
    return _live(island, island.exchange if gang.leads else None, sync, speed, partial(_is_sent_home, home))


def _is_sent_home(home: Any) -> bool:
    try:
        return ray.get(home.is_sent_home.remote(), timeout=LOOK_EVERY_S)
    except exceptions.RayError:
        return False


def _identity(name: str, process: str) -> Identity:
    return Identity(name, process, os.getpid(), ray.util.get_node_ip_address())


def _live(
    island: Island,
    lead: Exchange | None,
    sync: SyncSettings,
    speed: float,
    is_sent_home: Callable[[], bool] = lambda: False,
) -> str:
    """lead: of the process that speaks with the coordinator."""
    why = OVER
    with _preemptible(island.link.fail, is_sent_home):
        try:
            _train(island, lead, sync, speed)
        except PreemptedError:
            why = PREEMPTED
        finally:
            if lead:
                lead.stop(FAREWELL_S if why == PREEMPTED else 0.0)
    with contextlib.suppress(DiLoCoError):
        if lead:
            lead.transport.leave(lead.identity.island, lead.incarnation, why)
    return why


def _train(island: Island, lead: Exchange | None, sync: SyncSettings, speed: float) -> None:
    heart = None
    island.link.say_hello()
    if lead:
        heart = Heart(lead, lead.transport, sync.heartbeat_every_s, sync.stall_timeout_s)
    try:
        island.start()  # on a slow line the model takes longer than silence is borne
        if lead:
            lead.start_threads(FOLLOW_S)
        began_s = time.monotonic()
        for moment in island.live():
            if moment == "wait":
                island.link.wait(FOLLOW_S)
            elif lead and speed < 1.0:  # other ranks wait for this one
                time.sleep((time.monotonic() - began_s) * (1.0 / speed - 1.0))
            began_s = time.monotonic()
    finally:
        if heart:
            heart.stop()


@contextlib.contextmanager
def _preemptible(fail: Callable[[Exception], None], is_sent_home: Callable[[], bool]) -> Iterator[None]:
    """In this block, SIGTERM or Ray's notice that the node is draining ends the island's work with PreemptedError.

    Only a process's main thread hears signals: for a rank, which Ray Train runs in another, `is_sent_home` is asked.
    """
    done, hears_signals = threading.Event(), threading.current_thread() is threading.main_thread()

    def tell(*_: object) -> None:
        fail(PreemptedError())

    def look() -> None:
        while not done.wait(LOOK_EVERY_S):
            with contextlib.suppress(exceptions.RaySystemError, RuntimeError):  # a head that is away for a moment
                if this_node_is_draining() or is_sent_home():
                    tell()

    rays_own = signal.signal(signal.SIGTERM, tell) if hears_signals else None
    threading.Thread(target=look, name="notice", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if hears_signals:
            signal.signal(signal.SIGTERM, rays_own)


def live_as_evaluator(job: IslandJob, plan: EvaluationPlan, coordinator: Any, silence_s: float) -> None:
    """Follows the log beside the islands."""
    with collecting_later():
        evaluator = Evaluator(job, plan, RayTransport(coordinator, silence_s))
        evaluator.start()
    while evaluator.turn(FOLLOW_S):
        pass
