"""What the coordinator has done beside its loop: work on tensors and files, one job after the other."""

from collections.abc import Callable

from diloco_ray.coordination.messages import Event

Job = Callable[[], Event | None]


class Jobs:
    """later: runs what it is given one after the other, elsewhere or at once, and brings event or error back.

    After one that raised, no other is done: its error may still be on its way, and a step that was computed and not
    committed has left the replica ahead of the log.
    """

    def __init__(self, later: Callable[[Job], None]):
        self._later, self._has_failed = later, False

    def __call__(self, job: Job) -> None:
        self._later(lambda: self._run(job))

    def _run(self, job: Job) -> Event | None:
        if self._has_failed:
            return None
        try:
            return job()
        except BaseException:
            self._has_failed = True
            raise
