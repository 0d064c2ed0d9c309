"""Islands and the evaluator as Ray actors: one process each, one long call that is the process's whole life."""

import contextlib
import os
from typing import Any

import ray

from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.errors import DiLoCoError
from diloco_ray.island.evaluator import EvaluationPlan, Evaluator
from diloco_ray.island.heart import Heart
from diloco_ray.island.worker import Identity, Island, IslandJob
from diloco_ray.transport.ray_object_store import RayTransport

FOLLOW_S = 10.0  # one long poll


@ray.remote(max_restarts=0, max_task_retries=0)
class IslandActor:
    """An island that is a node, or part of one, of the coordinator's own Ray cluster."""

    def live(self, job: IslandJob, name: str, process: str, coordinator: Any, sync: SyncSettings) -> str:
        """Trains until the run is over. Errors end the process and reach the driver with their text."""
        transport = RayTransport(coordinator, sync.coordinator_timeout_s)
        island = Island(job, Identity(name, process, os.getpid(), ray.util.get_node_ip_address()), transport)
        island.start()
        heart = Heart(island, transport, sync.heartbeat_every_s, sync.stall_timeout_s)
        try:
            while island.turn(FOLLOW_S):
                pass
        finally:
            heart.stop()
        with contextlib.suppress(DiLoCoError):
            transport.leave(name, island.incarnation, "the run is over")
        return name


@ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0)
class EvaluatorActor:
    """Follows the log beside the islands."""

    def live(self, job: IslandJob, plan: EvaluationPlan, coordinator: Any, silence_s: float) -> None:
        evaluator = Evaluator(job, plan, RayTransport(coordinator, silence_s))
        evaluator.start()
        while evaluator.turn(FOLLOW_S):
            pass
