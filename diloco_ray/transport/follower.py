"""A follower: a replica kept current by replaying the log. Islands, evaluators and joiners are all one."""

from collections import deque
from collections.abc import Iterable

import torch

from diloco_ray.algorithm.replica import Replica
from diloco_ray.errors import CorruptionError
from diloco_ray.log.record import Record
from diloco_ray.transport.protocol import Bytes, SnapshotState, Transport


class Follower:
    """Owns a replica and the log index up to which it has received the log.

    Fragments do not depend on each other: each may stand at an earlier version than what was received of it.
    """

    def __init__(self, replica: Replica, transport: Transport):
        self.replica, self.transport = replica, transport
        self.index = -1
        self._waiting: list[deque[tuple[Record, Bytes]]] = [deque() for _ in replica.layout.fragments]

    def load_snapshot(self, first: bool = False) -> SnapshotState:
        """Starts from the newest snapshot, or the first, and returns it; the tail of the log follows."""
        state = self.transport.snapshot(first)
        for fragment in self.replica.layout.fragments:
            p = fragment.index
            buffers = tuple(torch.from_numpy(b.copy()) for b in state.buffers[p])
            self.replica.load_(p, state.versions[p], torch.from_numpy(state.parameters[p].copy()), buffers)
            self._waiting[p].clear()
        self.index = state.index
        return state

    def received_version(self, fragment: int) -> int:
        return self.replica.versions[fragment] + len(self._waiting[fragment])

    def receive(self, records: Iterable[tuple[Record, Bytes]]) -> list[Record]:
        """Takes records in log order; those not had before."""
        new = [item for item in records if item[0].index > self.index]
        for record, payload in new:
            if record.index != self.index + 1:
                raise CorruptionError(f"record {record.index} follows {self.index}", where="the log as it was sent")
            self._waiting[record.fragment].append((record, payload))
            self.index = record.index
        return [record for record, _ in new]

    def replay(self, fragment: int, version: int | None = None) -> None:
        """Applies what was received of this fragment, up to `version`. Raises where a digest differs (I7)."""
        waiting = self._waiting[fragment]
        while waiting and (version is None or self.replica.versions[fragment] < version):
            record, payload = waiting.popleft()
            digest = self.replica.apply(fragment, torch.from_numpy(payload.copy()))  # it came read-only
            if digest != record.state_digest:
                raise CorruptionError(
                    f"replaying record {record.index} gave {digest}, the record says {record.state_digest}",
                    where=f"replica at record {record.index}",
                    remedy="run `diloco-ray verify` on the run; compare this node's torch with the coordinator's",
                )
