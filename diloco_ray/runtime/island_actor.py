"""Islands and the evaluator as Ray actors. Light to import: what they live by comes when their process is there.

A start imports thousands of modules, among which Python looks for garbage again and again: a quarter of the time that
it takes. So they are imported with the collector switched off, and then out of its sight.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

import ray

from diloco_ray.errors import ConfigError

GANG_CALLS = 5  # its life, where its ranks are, and questions meanwhile


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """In this block no garbage is sought, and none of what is there by its end is looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _lives() -> Any:
    with collecting_later():
        from diloco_ray.runtime import island_process

        return island_process


@ray.remote(max_restarts=0, max_task_retries=0)
class IslandActor:
    """An island of one process, on the coordinator's Ray cluster or one of its own."""

    def __init__(self) -> None:
        self._lives = _lives()

    def place(self) -> tuple[str, int]:
        """Ray's id of its node, and its process there."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def live(self, *arguments: Any) -> str:
        """As `island_process.live_as_island`."""
        return self._lives.live_as_island(*arguments)


@ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0)
class GangActor:
    """An island of several ranks. These are processes of their own, and end with this one.

    Start it with max_concurrency=GANG_CALLS. cluster: ClusterSettings.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster, self._is_sent_home = cluster, False
        self._placement_group: Future[Any] = Future()

    def place(self) -> tuple[str, int]:
        """Ray's id of its node, and its process there."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def placement_group(self) -> Any:
        """That of its ranks, once they are there."""
        return self._placement_group.result()

    def placed(self, placement_group: Any) -> None:
        """A rank's word, where it is; the others say the same."""
        with contextlib.suppress(InvalidStateError):
            self._placement_group.set_result(placement_group)

    def send_home(self) -> None:
        """The ranks learn of it as of a notice that their node is draining."""
        self._is_sent_home = True

    def is_sent_home(self) -> bool:
        return self._is_sent_home

    def live(self, *arguments: Any) -> str:
        """As `gang_process.live_as_gang`."""
        try:
            from diloco_ray.runtime import gang_process
        except ImportError as error:
            remedy = "install the Ray that constraints.txt names, or set inner.ranks=1"
            what = f"Ray {ray.__version__} is too old for islands of several ranks: {error}"
            raise ConfigError(what, where="inner.ranks", remedy=remedy) from error
        return gang_process.live_as_gang(self._cluster, ray.get_runtime_context().current_actor, *arguments)


@ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0)
class EvaluatorActor:
    """Follows the log beside the islands."""

    def __init__(self) -> None:
        self._lives = _lives()

    def live(self, *arguments: Any) -> None:
        """As `island_process.live_as_evaluator`."""
        self._lives.live_as_evaluator(*arguments)
