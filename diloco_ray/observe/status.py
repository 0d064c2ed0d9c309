"""The numbers of a run: kept while it goes on, rebuilt from its events after a restart, printed by `status --json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from diloco_ray.errors import CorruptionError, RunMismatchError
from diloco_ray.observe.events import Folder

STATUS = "status.json"
STALE_AFTER_S = {True: 8.0, False: 30.0}  # a running run writes its status every half second, to a bucket every ten
BYTES_PER_GRADIENT_VALUE = 4  # data parallel would exchange float32 gradients, up and down, every inner step

ENDED = ("succeeded", "failed", "interrupted")
MOST = 1e18  # of any number of a round


@dataclass
class Statistics:
    """Sums over a run's rounds. Bytes are payload bytes over the islands' links; seconds are island-seconds.

    data_parallel_bytes: what the same islands and inner steps would have exchanged with a float32 gradient up and down
    in every inner step.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    data_parallel_bytes: int = 0
    inner_s: float = 0.0
    sync_wait_s: float = 0.0
    total_s: float = 0.0  # wall clock, from each life's first plan on

    def add_round(self, event: Mapping[str, Any]) -> None:
        self.bytes_up += _number(event, "bytes_up")
        self.bytes_down += _number(event, "bytes_down")
        self.data_parallel_bytes += _number(event, "data_parallel_bytes")
        self.inner_s += _number(event, "inner_s")
        self.sync_wait_s += _number(event, "sync_wait_s")
        self.total_s += _number(event, "seconds")


def _number(event: Mapping[str, Any], name: str) -> Any:
    """0 for null, which is a number that was not finite, and for what no round can have: no event stops a run."""
    value = event.get(name)
    return value if isinstance(value, int | float) and 0 <= value <= MOST else 0


@dataclass
class Validation:
    """Held-out losses of the outer parameters, each with its outer step: the first, the last, the best; None before
    there is one. A loss that was not finite is None, and never the best.
    """

    losses: dict[int, float | None] = field(default_factory=dict[int, float | None])  # by outer step
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    best: dict[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> None:
        step, loss = event.get("outer_step"), event.get("loss")
        if not isinstance(step, int):
            return
        news = {step: loss if isinstance(loss, int | float) and -math.inf < loss < math.inf else None}
        if step in self.losses:  # measured again
            self.first = self.last = self.best = None
            news = {**self.losses, **news}
        self.losses |= news
        for step, loss in news.items():
            point = {"outer_step": step, "loss": loss}
            if self.first is None or step < self.first["outer_step"]:
                self.first = point
            if self.last is None or step > self.last["outer_step"]:
                self.last = point
            best = self.best
            if loss is not None and (best is None or (loss, step) < (best["loss"], best["outer_step"])):
                self.best = point


class StatusFolder(Folder, Protocol):
    """The part of a run store that a status needs."""

    url: str
    is_local: bool

    def exists(self, path: str) -> bool: ...
    def url_of(self, path: str) -> str: ...


def read_status(store: StatusFolder) -> dict[str, Any]:
    """The status document; a run whose driver is gone says `interrupted`."""
    if not store.exists(STATUS):
        raise RunMismatchError(
            f"no {STATUS}: no run, or one whose coordinator has not started yet",
            where=store.url,
            remedy="name a run's folder, such as runs/quickstart; while `train` waits for places, it says so itself",
        )
    try:
        document = json.loads(store.read(STATUS))
    except ValueError as error:
        where, remedy = store.url_of(STATUS), "a running run writes it anew; `diloco-ray verify` checks the log"
        raise CorruptionError(f"{STATUS} is damaged", where=where, remedy=remedy) from error
    age_s = _age_s(document)
    if document["state"] not in ENDED and age_s > STALE_AFTER_S[store.is_local]:
        document["reason"] = f"was {document['state']}; nothing heard for {age_s:.0f} s"
        document["state"] = "interrupted"
        for island in document["islands"]:
            island["state"] = "gone" if island["state"] == "alive" else island["state"]
    return document


def other_writer(store: StatusFolder) -> str:
    """A sentence on the coordinator that wrote this run just now, for whoever is about to write it; "" for none."""
    if not store.exists(STATUS):
        return ""
    status = read_status(store)
    if status["state"] in ENDED:
        return ""
    who = f"another coordinator (life {status['coordinator']['fence_epoch']})"
    what = "taking it over; if the other's command still runs, it ends with exit code 6"
    return f"{who} wrote this run {max(0.0, _age_s(status)):.0f} s ago; {what}"


def _age_s(document: Mapping[str, Any]) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(document["updated_at"])).total_seconds()
