"""An island's contributions, each ours until its fate is known (I3): copied, encoded, headed, kept to be sent again."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Fragment
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_
from diloco_ray.coordination.messages import Contribution, InnerPlan
from diloco_ray.ids import sha256_hex
from diloco_ray.island.job import IslandJob
from diloco_ray.log.record import Record


@dataclass
class Outgoing:
    """One contribution; header and payload are there once it is encoded."""

    plan: InnerPlan
    fragment: Fragment
    base_version: int
    inner_steps: int
    values: Tensor
    ready: Callable[[], None]  # waits until `values` have come from the accelerator
    metrics: Mapping[str, float]
    contribution: Contribution | None = None
    was_sent_back: bool = False  # the coordinator was full
    payload: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    @property
    def key(self) -> tuple[int, int]:
        """Fragment and round."""
        return self.fragment.index, self.plan.round


class Outbox:
    """In the order in which they were posted. Guarded by the exchange's lock, but for `encode`."""

    def __init__(self, job: IslandJob):
        self._job, self._uplink = job, get_codec(job.sync.uplink)
        sizes = [fragment.num_values for fragment in job.layout.fragments]
        self._values = [torch.empty(size, pin_memory=torch.cuda.is_available()) for size in sizes]
        feedback = job.sync.error_feedback is not None
        self.residuals = [torch.zeros(size) for size in sizes] if feedback else []
        self.items: list[Outgoing] = []

    @property
    def plans(self) -> list[InnerPlan]:
        return [item.plan for item in self.items]

    def add(
        self,
        plan: InnerPlan,
        fragment: Fragment,
        base_version: int,
        tensors: Mapping[str, Tensor],
        inner_steps: int,
        metrics: Mapping[str, float],
    ) -> Outgoing:
        """The last one of this fragment must be encoded: its values lie where these go."""
        values = self._values[fragment.index]
        ready = _copy(fragment, tensors, values)
        item = Outgoing(plan, fragment, base_version, inner_steps, values, ready, metrics)
        self.items.append(item)
        return item

    def encode(self, item: Outgoing, base: Tensor, base_version: int, incarnation: int) -> tuple[Contribution, Tensor]:
        """Q(base - island), and what is left over kept for the next time where there is error feedback."""
        item.ready()
        p, sync = item.fragment.index, self._job.sync
        payload = torch.empty(self._uplink.num_bytes(item.values.numel()), dtype=torch.uint8)
        feedback = {"residual": self.residuals[p], "decay": sync.error_feedback} if self.residuals else {}
        stats = encode_outer_gradient_(base, item.values, self._uplink, payload, **feedback)
        told = {**item.metrics, "norm": stats.norm, "relative_error": stats.relative_error}
        return self.headed(item, payload, base_version, incarnation, told), payload

    def headed(
        self, item: Outgoing, payload: Tensor, base_version: int, incarnation: int, metrics: Mapping[str, float]
    ) -> Contribution:
        return Contribution(
            run_id=self._job.run_id,
            island=item.plan.island,
            incarnation=incarnation,
            fragment=item.fragment.index,
            round=item.plan.round,
            base_version=base_version,
            inner_steps=item.inner_steps,
            lease_id=item.plan.lease_id,
            codec=self._uplink.name,
            payload_sha256=sha256_hex(payload.numpy().data),
            payload_bytes=payload.numel(),
            metrics=dict(metrics),
        )

    def is_encoded(self, fragment: int) -> bool:
        return all(item.contribution for item in self.items if item.fragment.index == fragment)

    def payload_of(self, plan: InnerPlan, fragment: int) -> Tensor | None:
        """None while it is being encoded, or if there is none."""
        for item in self.items:
            if item.plan.lease_id == plan.lease_id and item.fragment.index == fragment and item.contribution:
                return torch.from_numpy(item.payload)
        return None

    def drop(self, which: Callable[[Outgoing], bool]) -> None:
        self.items = [item for item in self.items if not which(item)]


class Fates:
    """Of each fragment, the round up to which it is known what became of this island's contributions.

    Where islands go in step, an outer step decides on its whole round. Elsewhere the island's own share does, in a
    record; or, where that is of an earlier life and lies before the snapshot that this one began with, the
    coordinator's word. Guarded by the exchange's lock, but for `told` and `words`.
    """

    def __init__(self, job: IslandJob, island: str):
        self._in_step, self._island = job.sync.closes == "all", island
        self._known = [-1 for _ in job.layout.fragments]
        self._words: list[tuple[int, int]] = []

    def begin(self, versions: Iterable[int]) -> None:
        """From a snapshot."""
        if self._in_step:
            self._known = [version - 1 for version in versions]

    def read(self, record: Record) -> None:
        own = [share.round for share in record.shares if share.island == self._island]
        for round in [record.version - 1] if self._in_step else own:
            self._know(record.fragment, round)

    def told(self, item: Outgoing) -> None:
        """The coordinator awaits it no more."""
        if not self._in_step:
            self._words.append(item.key)

    @property
    def words(self) -> list[tuple[int, int]]:
        """What was told and is not believed yet: a record may be on its way that says more."""
        return list(self._words)

    def believe(self, words: Iterable[tuple[int, int]]) -> None:
        """When every record is here that was there when these were told."""
        for word in words:
            self._know(*word)
            self._words.remove(word)

    def _know(self, fragment: int, round: int) -> None:
        self._known[fragment] = max(self._known[fragment], round)

    def are_known(self, fragment: int, round: int) -> bool:
        return self._known[fragment] >= round


def _copy(fragment: Fragment, tensors: Mapping[str, Tensor], values: Tensor) -> Callable[[], None]:
    """Begins the copy, which from an accelerator goes on beside the next inner step; returns what waits for its end."""
    fragment.gather_(tensors, values, non_blocking=values.is_pinned())
    if not values.is_pinned():
        return lambda: None
    copied = torch.cuda.Event()
    copied.record()
    return copied.synchronize
