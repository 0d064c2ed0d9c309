"""What a real Ray holds, by its own account: object store, references, actors, workers."""

import math
import time
from typing import Any, NamedTuple

import ray
from ray._private import internal_api
from ray._private.state import actors as all_actors

PAYLOAD_BYTES = 100_000  # of what travels through the store, at least: Ray sends less with the call itself
SETTLES_WITHIN_S = 60.0  # Ray deletes what nobody refers to in batches, once a second


class Held(NamedTuple):
    """At one moment, on a cluster of one node."""

    stored_bytes: int
    stored_objects: int
    references: int  # to objects and actors, of all workers and of this process
    actors: int
    workers: int  # this process as well

    @staticmethod
    def now() -> "Held":
        """Every worker is asked, so none may stand still."""
        (node,) = ray.nodes()
        stats: Any = internal_api.node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
        return Held(
            stored_bytes=stats.store_stats.object_store_bytes_used,
            stored_objects=stats.store_stats.num_local_objects,
            references=sum(worker.num_object_refs_in_scope for worker in stats.core_workers_stats),
            actors=sum(actor["State"] == "ALIVE" for actor in all_actors().values()),
            workers=stats.num_workers,
        )


def stored_bytes() -> int:
    """In the object stores of all nodes. No worker is asked: one may stand still."""
    name = "object_store_memory"
    return round(ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0))


def wait_for_store(what: str, *, least: float = 0, most: float = math.inf) -> None:
    """Until so many bytes are in it."""
    until = time.monotonic() + SETTLES_WITHIN_S
    while not least <= (found := stored_bytes()) <= most:
        assert time.monotonic() < until, f"{what}: {found:,} bytes"
        time.sleep(0.05)
