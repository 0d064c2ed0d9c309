"""What followers of the log are sent: the newest records with their payloads, and the newest usable snapshot."""

import itertools
from collections import deque
from collections.abc import Callable

import numpy as np

from diloco_ray.algorithm.replica import Replica
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.snapshot import list_snapshots, load_newest
from diloco_ray.transport.protocol import ANSWER_BYTES, Bytes, LogStep, SnapshotState

RECENT_BYTES = 512 * 1024**2  # payloads kept in memory; older ones are read from the store


class Feed:
    """new_replica: an empty one, for a snapshot to be read into."""

    def __init__(self, log: RunLog, new_replica: Callable[[], Replica]):
        self._log, self._new_replica = log, new_replica
        self._recent: deque[LogStep] = deque()

    def keep(self, record: Record, payload: Bytes) -> None:
        self._recent.append((record, payload))
        num_bytes = sum(kept.size for _, kept in self._recent)
        while num_bytes > RECENT_BYTES and len(self._recent) > 1:
            num_bytes -= self._recent.popleft()[1].size

    def recent_after(self, after: int) -> tuple[LogStep, ...]:
        """The first records past `after`, if they are in memory."""
        recent = tuple(item for item in self._recent if item[0].index > after)
        if not recent or recent[0][0].index != after + 1:
            return ()
        sizes = itertools.accumulate(payload.size for _, payload in recent)
        return recent[: max(1, sum(size <= ANSWER_BYTES for size in sizes))]

    def read(self, index: int) -> LogStep:
        """From the store: a follower that is far behind gets one record at a time."""
        record = self._log.records[index]
        return record, np.frombuffer(self._log.payload(record), np.uint8)

    def snapshot(self, first: bool) -> SnapshotState:
        """The newest usable snapshot, or the first, read from the store: joiners need nobody's live memory."""
        store, records, replica = self._log.store, self._log.records, self._new_replica()

        def listed() -> list[int]:
            return [0] if first else [index for index in list_snapshots(store) if index < len(records)]

        index = load_newest(store, listed, replica, lambda index: records[index].digest())
        return SnapshotState.of(index, records[index].round, replica)
