"""What an island's threads hand to each other: plans that came, and the word that something has changed.

Both are guarded by one lock, the `Bell`. Neither knows the coordinator.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diloco_ray.coordination.messages import InnerPlan
from diloco_ray.island.threads import Threads


class Bell:
    """A lock, which may be taken again by its holder; `ringing` tells waiting threads of what was changed under it."""

    def __init__(self, threads: Threads):
        self._condition = threads.condition()
        self.num_rings = self._num_heard = 0

    def __enter__(self) -> None:
        self._condition.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._condition.__exit__(*error)

    @contextmanager
    def ringing(self) -> Iterator[None]:
        with self._condition:
            try:
                yield
            finally:
                self.num_rings += 1
                self._condition.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Until it has rung since the last wait; one thread waits."""
        with self._condition:
            if self.num_rings == self._num_heard:
                self._condition.wait(timeout_s)
            self._num_heard = self.num_rings


class Plans:
    """In hand, to come, and void."""

    def __init__(self):
        self.in_hand: InnerPlan | None = None
        self.newest_lease = ""
        self.void: set[str] = set()  # leases
        self._coming: deque[InnerPlan] = deque()

    def receive(self, plan: InnerPlan, sent: Iterable[InnerPlan]) -> None:
        """A plan for a round that was planned already replaces what was planned. sent: of what is not settled yet."""
        known = self._known(sent)
        self.void |= {old.lease_id for old in known if old.round >= plan.round} - {plan.lease_id}
        self.newest_lease = plan.lease_id
        if plan.lease_id not in {old.lease_id for old in known}:
            self._coming.append(plan)

    def take(self) -> InnerPlan | None:
        """The next one, which is then in hand; None where there is none to do."""
        while self._coming and self._coming[0].lease_id in self.void:
            self._coming.popleft()
        if self._coming:
            self.in_hand = self._coming.popleft()
            return self.in_hand
        return None

    def held(self, sent: Iterable[InnerPlan]) -> tuple[InnerPlan, ...]:
        """All that is not void, oldest first."""
        by_lease = {plan.lease_id: plan for plan in self._known(sent) if plan.lease_id not in self.void}
        return tuple(sorted(by_lease.values(), key=lambda plan: plan.round))

    def _known(self, sent: Iterable[InnerPlan]) -> list[InnerPlan]:
        return [*sent, *([self.in_hand] if self.in_hand else []), *self._coming]
