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
# While an answer to one of these is awaited in vain, the coordinator hears nothing of the island.
SIGNS_OF_LIFE = ("join", "beat")


class CallingTransport(ABC):
    """The Transport's messages as calls of the coordinator's doors by their names."""

    def __init__(self, deadline_s: float, heartbeat_timeout_s: float):
        """deadline_s: how long a coordinator is waited for that is silent, or gives no verdict. heartbeat_timeout_s:
        how long it bears an island's silence."""
        self._deadline_s, self._heartbeat_timeout_s = deadline_s, heartbeat_timeout_s

    def _now_s(self) -> float:
        return time.monotonic()

    @abstractmethod
    def _call(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        """The answer. wait_s: how much longer than usual it may take. DeadlineError where none comes."""

    def _attempt_s(self, method: str, usual_s: float) -> float:
        """How long an attempt may take, the first one where each takes longer: of those that are signs of life there
        are several before the island is given up."""
        return min(usual_s, self._heartbeat_timeout_s / 4) if method in SIGNS_OF_LIFE else usual_s

    def join(self, hello: Hello) -> Welcome:
        return self._call("join", hello)

    def beat(self, beat: Beat) -> Order:
        return self._call("beat", beat)

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        """Again while the coordinator has it in hand and cannot tell: it may be busy, or its storage slow."""
        until_s = self._now_s() + self._deadline_s
        while (verdict := self._offer(contribution, payload)).status == "pending":
            if self._now_s() > until_s:
                fragment, round, island = contribution.key
                raise DeadlineError(
                    f"the coordinator gave no verdict on fragment {fragment}, round {round + 1} for "
                    f"{self._deadline_s:g} s, though it answers",
                    where=island,
                    remedy="look whether the coordinator's storage is slow; the same command goes on from the last "
                    "committed record",
                )
        return verdict

    def _offer(self, contribution: Contribution, payload: Bytes) -> Verdict:
        return self._call("submit", contribution, payload)

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
