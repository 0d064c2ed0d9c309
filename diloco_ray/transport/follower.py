"""A follower: a replica kept current by replaying the log. Islands, evaluators and joiners are all one."""

from collections.abc import Iterable

import torch

from diloco_ray.algorithm.replica import Replica
from diloco_ray.errors import CorruptionError
from diloco_ray.log.record import Record
from diloco_ray.transport.protocol import Bytes, Transport


class Follower:
    """Owns a replica and the log index that it stands at."""

    def __init__(self, replica: Replica, transport: Transport):
        self.replica, self.transport = replica, transport
        self.index = -1

    def load_snapshot(self) -> None:
        """Starts from the newest snapshot; the tail of the log follows by `replay`."""
        state = self.transport.snapshot()
        for fragment in self.replica.layout.fragments:
            p = fragment.index
            buffers = tuple(torch.from_numpy(b.copy()) for b in state.buffers[p])
            self.replica.load_(p, state.versions[p], torch.from_numpy(state.parameters[p].copy()), buffers)
        self.index = state.index

    def replay(self, records: Iterable[tuple[Record, Bytes]]) -> None:
        """Applies records in order; one that is already applied is skipped. Raises where a digest differs (I7)."""
        for record, payload in records:
            if record.index <= self.index:
                continue
            if record.index != self.index + 1:
                raise CorruptionError(f"record {record.index} follows {self.index}", where="the log as it was sent")
            digest = self.replica.apply(record.fragment, torch.from_numpy(payload.copy()))  # it came read-only
            if digest != record.state_digest:
                raise CorruptionError(
                    f"replaying record {record.index} gave {digest}, the record says {record.state_digest}",
                    where=f"replica at record {record.index}",
                    remedy="run `diloco-ray verify` on the run; compare this node's torch with the coordinator's",
                )
            self.index = record.index
