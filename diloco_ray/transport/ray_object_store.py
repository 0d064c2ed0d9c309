"""The way for islands that are nodes of one Ray cluster: calls to the coordinator's actor.

Payloads are flat uint8 arrays, top-level arguments: Ray ships them through its object store without pickling a copy.
The coordinator answers when its own process holds them. A snapshot is an object of the coordinator's, one for all who
ask while it is read: what it answers is a reference. A call that failed may have run; it is made again, with the same
content, until the deadline.
"""

import math
import sys
import time
from typing import Any

import ray
from ray import exceptions

from diloco_ray.errors import DeadlineError
from diloco_ray.transport.calls import WITH_TENSORS, CallingTransport

CALL_S = 60.0  # the first attempt at most; an answer that takes longer is asked for again
PAUSE_S = 0.2
GONE = (exceptions.RayActorError, exceptions.ObjectLostError)  # the coordinator, or what lay in its memory
NO_ROOM = (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError)


class RayTransport(CallingTransport):
    """A Transport over the coordinator's actor handle."""

    def __init__(self, coordinator: Any, deadline_s: float, heartbeat_timeout_s: float = math.inf):
        """See `CallingTransport`; an evaluator has no heart."""
        super().__init__(deadline_s, heartbeat_timeout_s)
        self._coordinator = coordinator

    def _call(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        """While Ray restarts the coordinator its calls fail; a get may even hang after a cut, hence the time-out.

        Where an object store is full, even after spilling to disk, it may have room again once others have been served.
        """
        until, attempt_s, is_told = time.monotonic() + self._deadline_s, self._attempt_s(method, CALL_S), False
        while True:
            try:
                answer = ray.get(getattr(self._coordinator, method).remote(*arguments), timeout=attempt_s + wait_s)
                return ray.get(answer, timeout=attempt_s) if isinstance(answer, ray.ObjectRef) else answer
            except (*NO_ROOM, *GONE, exceptions.GetTimeoutError) as error:
                if method in WITH_TENSORS and isinstance(error, exceptions.GetTimeoutError):
                    attempt_s *= 2
                trouble, remedy = f"the coordinator did not answer '{method}'", "look at the coordinator's log"
                if isinstance(error, NO_ROOM):
                    trouble = f"Ray's object store had no room for '{method}'"
                    remedy = "give Ray more object_store_memory, or its spilling folder more disk"
                    if not is_told:
                        print(f"{trouble}; waiting up to {self._deadline_s:g} s for it", file=sys.stderr, flush=True)
                    is_told = True
                if time.monotonic() > until:
                    raise DeadlineError(
                        f"{trouble} for {self._deadline_s:g} s",
                        where=str(error).splitlines()[0],
                        remedy=f"{remedy}; the same command goes on from the last committed record",
                    ) from error
                # Else it and the frames it passed through refer to each other, and what was sent or has come stays in
                # Ray's store until Python looks for garbage: in a training loop, for long.
                error.__traceback__ = None
                time.sleep(PAUSE_S)
