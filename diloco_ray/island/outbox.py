"""An island's contributions, each ours until its fate is known (I3): copied, encoded, headed, kept to be sent again."""

from collections.abc import Callable, Mapping
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


def _copy(fragment: Fragment, tensors: Mapping[str, Tensor], values: Tensor) -> Callable[[], None]:
    """Begins the copy, which from an accelerator goes on beside the next inner step; returns what waits for its end."""
    fragment.gather_(tensors, values, non_blocking=values.is_pinned())
    if not values.is_pinned():
        return lambda: None
    copied = torch.cuda.Event()
    copied.record()
    return copied.synchronize
