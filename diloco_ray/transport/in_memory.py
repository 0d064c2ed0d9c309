"""The shortest way: direct calls to a coordinator in the same process, which answers at once and never waits."""

from collections.abc import Mapping

import numpy as np

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import DeadlineError
from diloco_ray.transport.protocol import Beat, Bytes, Hello, News, OpenDoors, Order, SnapshotState, Welcome, told


class InMemoryTransport:
    """A Transport over a coordinator object."""

    def __init__(self, doors: OpenDoors):
        self._doors = doors

    def join(self, hello: Hello) -> Welcome:
        return self._doors.join(hello)

    def beat(self, beat: Beat) -> Order:
        return self._doors.beat(beat)

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        verdict = self._doors.submit(contribution, np.array(payload))
        if verdict.status == "pending":
            raise DeadlineError("the coordinator did not judge a contribution at once", where=contribution.island)
        return verdict

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        return told(self._doors, island, incarnation, after, held) or News("ok")

    def snapshot(self, first: bool = False) -> SnapshotState:
        return self._doors.snapshot(first)

    def leave(self, island: str, incarnation: int, reason: str) -> None:
        self._doors.leave(island, incarnation, reason)

    def measured(self) -> set[int]:
        return self._doors.measured()

    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None:
        self._doors.evaluated(index, round, metrics, sample)
