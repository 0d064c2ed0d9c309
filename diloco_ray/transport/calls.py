"""A carrier whose every message is a call to the coordinator. How a call is made, and made again, is the carrier's."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import DeadlineError
from diloco_ray.transport.protocol import Beat, Bytes, Hello, News, Order, SnapshotState, Welcome

# On a slow line these take longer than others: each attempt is given twice as long as the one before.
WITH_TENSORS = ("submit", "follow", "snapshot")


class CallingTransport(ABC):
    """The Transport's messages as calls of the coordinator's doors by their names."""

    _deadline_s: float  # how long a silent coordinator is waited for

    @abstractmethod
    def _call(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        """The answer. wait_s: how much longer than usual it may take. DeadlineError where none comes."""

    def join(self, hello: Hello) -> Welcome:
        return self._call("join", hello)

    def beat(self, beat: Beat) -> Order:
        return self._call("beat", beat)

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        """Again while it is inspected: a coordinator whose storage is slow answers, and has no verdict yet."""
        until_s = self._now_s() + self._deadline_s
        while (verdict := self._submit(contribution, payload)).status == "pending":
            if self._now_s() > until_s:
                raise DeadlineError(
                    f"the coordinator has had no verdict on a contribution for {self._deadline_s:g} s",
                    where=contribution.island,
                    remedy="look at the coordinator's log, and whether its storage answers",
                )
        return verdict

    def _submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        return self._call("submit", contribution, payload)

    def _now_s(self) -> float:
        return time.monotonic()

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        return self._call("follow", island, incarnation, after, wait_s, held, wait_s=wait_s)

    def snapshot(self, first: bool = False) -> SnapshotState:
        return self._call("snapshot", first)

    def leave(self, island: str, incarnation: int, reason: str) -> None:
        self._call("leave", island, incarnation, reason)

    def measured(self) -> set[int]:
        return self._call("measured")

    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None:
        self._call("evaluated", index, round, metrics, sample)
