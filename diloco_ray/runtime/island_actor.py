"""Islands and the evaluator as Ray actors: one process each, one long call that is the process's whole life."""

import contextlib
import os
import time
from typing import Any

import ray

from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.errors import DiLoCoError
from diloco_ray.island.evaluator import EvaluationPlan, Evaluator
from diloco_ray.island.heart import Heart
from diloco_ray.island.job import Identity, IslandJob
from diloco_ray.island.worker import Island
from diloco_ray.transport.ray_object_store import RayTransport

FOLLOW_S = 10.0  # one long poll


@ray.remote(max_restarts=0, max_task_retries=0)
class IslandActor:
    """An island that is a node, or part of one, of the coordinator's own Ray cluster."""

    def live(
        self, job: IslandJob, name: str, process: str, coordinator: Any, sync: SyncSettings, speed: float = 1.0
    ) -> str:
        """Trains until the run is over. Errors end the process and reach the driver with their text.

        speed: under 1 for an island that is to be slower than its processor.
        """
        transport = RayTransport(coordinator, sync.coordinator_timeout_s)
        island = Island(job, Identity(name, process, os.getpid(), ray.util.get_node_ip_address()), transport)
        island.start()
        exchange = island.exchange
        heart = Heart(exchange, transport, sync.heartbeat_every_s, sync.stall_timeout_s)
        exchange.start_threads(FOLLOW_S)
        began_s = time.monotonic()
        try:
            for moment in island.live():
                if moment == "wait":
                    exchange.wait(FOLLOW_S)
                elif speed < 1.0:
                    time.sleep((time.monotonic() - began_s) * (1.0 / speed - 1.0))
                began_s = time.monotonic()
        finally:
            heart.stop()
            exchange.stop()
        with contextlib.suppress(DiLoCoError):
            transport.leave(name, exchange.incarnation, "the run is over")
        return name


@ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0)
class EvaluatorActor:
    """Follows the log beside the islands."""

    def live(self, job: IslandJob, plan: EvaluationPlan, coordinator: Any, silence_s: float) -> None:
        evaluator = Evaluator(job, plan, RayTransport(coordinator, silence_s))
        evaluator.start()
        while evaluator.turn(FOLLOW_S):
            pass
