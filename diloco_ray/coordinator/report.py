"""What the coordinator tells people: events as they happen, the numbers of each round, and the status document."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from diloco_ray.coordination.messages import CloseRound, Contribution
from diloco_ray.coordination.state import RunState
from diloco_ray.errors import DiLoCoError
from diloco_ray.log.record import Record
from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.events import EventLog, each_event
from diloco_ray.observe.status import BYTES_PER_GRADIENT_VALUE, Statistics, Validation

AVERAGED = ("loss", "gradient_norm", "relative_error")  # over a round's islands
SUMMED = ("inner_seconds", "sync_wait_seconds", "tokens")
MAX_NOTE = 2000  # characters


class Report:
    """Sums since the last round, and the run's events. Knows numbers, decides nothing."""

    def __init__(
        self,
        store: RunStore,
        fence_epoch: int,
        pid: int,
        num_values: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._now_s = clock
        self._log = EventLog(store, fence_epoch)
        self._fence_epoch, self._pid, self._num_values = fence_epoch, pid, num_values
        self.statistics, self.validation = Statistics(), Validation()
        self._round_began_s: float | None = None
        self._has_seen_a_round = False
        self._metrics: list[tuple[str, Mapping[str, float]]] = []  # since the last round, with their islands
        self._bytes_up = self._bytes_down = self._tokens = 0
        self._last_round: Mapping[str, Any] = {"alive": 0, "contributed": 0, "applied": 0}
        self._tokens_per_s: dict[str, float] = {}
        for event in each_event(store):
            self._count(event)

    def _count(self, event: Mapping[str, Any]) -> None:
        """What the status needs of an event, of this life or an earlier one."""
        match event["event"]:
            case "round":
                self.statistics.add_round(event)
                self._last_round = event
            case "evaluation":
                self.validation.add(event)
            case _:
                pass

    @property
    def own_events(self) -> list[dict[str, Any]]:
        """Of this life, oldest first, as far as they are still in memory."""
        return self._log.own

    def own_events_after(self, num_seen: int) -> list[dict[str, Any]]:
        return self._log.after(num_seen)

    def flush(self) -> None:
        self._log.flush()

    # ---- what happens ----

    def started(self, state: RunState) -> None:
        self._log.add("coordinator", pid=self._pid, fence_epoch=self._fence_epoch, outer_steps=state.index)

    def observe(self, state: RunState) -> None:
        if self._round_began_s is None and state.plans:
            self._round_began_s = self._now_s()

    def note(self, text: str) -> None:
        self._log.add("decision", text=text[:MAX_NOTE])

    def accepted(self, c: Contribution, closes: bool) -> None:
        """The contribution that closes a lease tells of all the steps that the island took on it."""
        self._bytes_up += c.payload_bytes
        if closes:
            sums = {name: c.metrics.get(name, 0.0) for name in SUMMED}
            means = {name: c.metrics.get(name, math.nan) for name in AVERAGED}
            self._metrics.append((c.island, {**sums, **means}))

    def committed(
        self,
        record: Record,
        reason: str,
        num_followers: int,
        payload_bytes: int,
        cosines: Sequence[float] | None = None,
    ) -> None:
        """num_followers: islands that replay this record from the same bytes. cosines: between each two shares."""
        self._bytes_down += num_followers * payload_bytes
        self._tokens += sum(share.tokens for share in record.shares)
        statistics = {}
        if cosines is not None:
            statistics = {
                "islands": [share.island for share in record.shares],
                "norms": [share.norm for share in record.shares],
                "cosines": list(cosines),
            }
        self._log.add(
            "outer_step",
            outer_step=record.index,
            fragment=record.fragment,
            version=record.version,
            reason=reason,
            **statistics,
        )

    def round_closed(self, close: CloseRound, state: RunState) -> None:
        now_s = self._now_s()
        metrics = [m for _, m in self._metrics]
        seconds = now_s - (self._round_began_s or now_s)
        if (
            not self._has_seen_a_round
        ):  # one that an earlier coordinator life began is longer than this life's clock says
            seconds = max([seconds, *(m["inner_seconds"] for m in metrics)])
            self._has_seen_a_round = True
        # One worker alone has nobody to exchange gradients with.
        tokens_per_step = state.rules.sequences_per_inner_step * state.ledger.tokens_per_sequence
        steps = self._tokens // tokens_per_step if state.rules.max_islands > 1 else 0
        event = {
            "round": close.round,
            "outer_step": close.index,
            "alive": close.alive,
            "contributed": close.contributed,
            "applied": close.applied,
            "loss": _mean(m["loss"] for m in metrics),
            "gradient_norm": _mean(m["gradient_norm"] for m in metrics),
            "relative_error": _mean(m["relative_error"] for m in metrics),
            "tokens": self._tokens,
            "tokens_per_s": self._tokens / seconds if seconds else 0.0,
            "inner_s": sum(m["inner_seconds"] for m in metrics),
            "sync_wait_s": sum(m["sync_wait_seconds"] for m in metrics),
            "bytes_up": self._bytes_up,
            "bytes_down": self._bytes_down,
            "data_parallel_bytes": steps * 2 * BYTES_PER_GRADIENT_VALUE * self._num_values,
            "seconds": seconds,
        }
        self._count(self._log.add("round", **event))
        for island, m in self._metrics:
            self._tokens_per_s[island] = m["tokens"] / max(m["inner_seconds"], 1e-9)
        self._metrics, self._bytes_up, self._bytes_down, self._tokens = [], 0, 0, 0
        self._round_began_s = now_s

    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None:
        self._count(self._log.add("evaluation", outer_step=index, round=round, sample=sample, **metrics))

    def ended(self, outcome: str, reason: str) -> None:
        self._log.add("end", state=outcome, reason=reason)

    def failed(self, error: DiLoCoError) -> None:
        self._log.add("error", what=error.what, where=error.where, remedy=error.remedy)

    # ---- the status document ----

    def status(self, state: RunState) -> dict[str, Any]:
        """See README, "A contract for scripts"."""
        validation = self.validation
        return {
            "run_id": state.rules.run_id,
            "state": state.phase,
            "reason": state.reason,
            "updated_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "rounds": state.round,
            "num_rounds": state.rules.num_rounds,
            "outer_steps": state.index,
            "islands": [
                {
                    "name": member.name,
                    "state": member.standing,
                    "reason": member.reason,
                    "pid": member.pid,
                    "process": member.process,
                    "node": member.node,
                    "incarnation": member.incarnation,
                    "round": int(member.progress.get("round", state.round)),
                    "step": int(member.progress.get("step", 0)),
                    "steps": int(member.progress.get("steps", state.rules.inner_steps_per_round)),
                    "tokens_per_s": self._tokens_per_s.get(member.name, 0.0),
                    "last_seen_s": self._now_s() - member.last_seen_s if member.last_seen_s else None,
                }
                for member in state.members.values()
            ],
            "coordinator": {"pid": self._pid, "fence_epoch": self._fence_epoch},
            "contributions": {key: self._last_round.get(key, 0) for key in ("alive", "contributed", "applied")},
            "tokens": state.ledger.account(),
            "validation": {"first": validation.first, "last": validation.last, "best": validation.best},
            "bytes": {
                "up": self.statistics.bytes_up,
                "down": self.statistics.bytes_down,
                "data_parallel_equivalent": self.statistics.data_parallel_bytes,
            },
            "seconds": {
                "inner": self.statistics.inner_s,
                "sync_wait": self.statistics.sync_wait_s,
                "total": self.statistics.total_s,
            },
        }


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")
