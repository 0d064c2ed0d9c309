"""The pace of a run, as measured: how fast islands step, and how long a quorum and an outer step take.

Decoupled DiLoCo (arXiv 2604.21428) waits for late contributions no longer than the overlap hides:

    grace <= gamma (tau step_time - quorum_time - sync_time)

and DyLU (arXiv 2401.09135) gives island w floor(v_w / v_max H) inner steps a round. Times are moving averages. What is
measured moves only waits and amounts of work, never a weight.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

NEWEST = 0.3  # share of the newest measurement in a moving average
MOST_TIMES = 20.0  # as fast as the median that an island counts as: by its word alone it could leave the others no time


@dataclass(frozen=True)
class Pace:
    step_s: Mapping[str, float] = field(default_factory=dict[str, float])  # of one inner step, by island
    quorum_s: float | None = None  # from a step's first contribution to its quorum
    sync_s: float | None = None  # from closing a step to its commit
    launched_s: Mapping[int, float] = field(default_factory=dict[int, float])  # when an outer step began, by fragment

    @property
    def fastest_step_s(self) -> float:
        """0 before the first measurement. No faster than `MOST_TIMES` times the median island."""
        if not self.step_s:
            return 0.0
        times = self.step_s.values()
        return max(min(times), statistics.median_low(times) / MOST_TIMES)

    def stepped(self, island: str, step_s: float) -> "Pace":
        """An island's word about its own speed; what cannot be is passed over."""
        if not (math.isfinite(step_s) and step_s > 0.0):
            return self
        return replace(self, step_s={**self.step_s, island: _average(self.step_s.get(island), step_s)})

    def forgotten(self, island: str) -> "Pace":
        """The speed of an island that is gone is nobody's measure."""
        if island not in self.step_s:
            return self
        return replace(self, step_s={name: step_s for name, step_s in self.step_s.items() if name != island})

    def launched(self, fragment: int, now_s: float, quorum_s: float) -> "Pace":
        launched_s = {**self.launched_s, fragment: now_s}
        return replace(self, launched_s=launched_s, quorum_s=_average(self.quorum_s, quorum_s))

    def committed(self, fragment: int, now_s: float) -> "Pace":
        return replace(self, sync_s=_average(self.sync_s, now_s - self.launched_s.get(fragment, now_s)))

    def grace_s(self, overlap: int, share: float, longest_s: float) -> float:
        """How long late contributions are waited for once the quorum is in."""
        hidden_s = overlap * self.fastest_step_s - (self.quorum_s or 0.0) - (self.sync_s or 0.0)
        return min(longest_s, max(0.0, share * hidden_s))

    def inner_steps(self, island: str, most: int) -> int:
        """Of one round, by the island's speed against the fastest one; `most` before it is known."""
        if island not in self.step_s:
            return most
        share = min(1.0, self.fastest_step_s / self.step_s[island])
        return max(1, math.floor(share * most + 1e-9))


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else (1.0 - NEWEST) * before + NEWEST * newest
