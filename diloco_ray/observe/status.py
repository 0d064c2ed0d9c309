"""The numbers of a run: kept while it goes on, rebuilt from its events after a restart, printed by `status --json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from diloco_ray.errors import CorruptionError, RunMismatchError
from diloco_ray.observe.events import Folder, of_kind

STATUS = "status.json"
STALE_AFTER_S = {True: 8.0, False: 30.0}  # a running run writes its status every half second, to a bucket every ten
BYTES_PER_GRADIENT_VALUE = 4  # data parallel would exchange float32 gradients, up and down, every inner step


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
        self.bytes_up += event.get("bytes_up", 0)
        self.bytes_down += event.get("bytes_down", 0)
        self.data_parallel_bytes += event.get("data_parallel_bytes", 0)
        self.inner_s += event.get("inner_s", 0.0)
        self.sync_wait_s += event.get("sync_wait_s", 0.0)
        self.total_s += event.get("seconds", 0.0)


def statistics_of(events: Sequence[Mapping[str, Any]]) -> Statistics:
    statistics = Statistics()
    for event in of_kind(events, "round"):
        statistics.add_round(event)
    return statistics


def validation_of(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """First, last and best held-out loss of the outer parameters, each with its outer step; empty before the first.

    A loss that was not finite is None, and never the best.
    """
    found = {event["outer_step"]: event["loss"] for event in of_kind(events, "evaluation")}
    points = [{"outer_step": step, "loss": loss} for step, loss in sorted(found.items())]
    if not points:
        return {"first": None, "last": None, "best": None}
    finite = [point for point in points if point["loss"] is not None]
    return {
        "first": points[0],
        "last": points[-1],
        "best": min(finite, key=lambda point: point["loss"], default=None),
    }


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
    age_s = (datetime.now(UTC) - datetime.fromisoformat(document["updated_at"])).total_seconds()
    if document["state"] not in ("succeeded", "failed") and age_s > STALE_AFTER_S[store.is_local]:
        document["reason"] = f"was {document['state']}; nothing heard for {age_s:.0f} s"
        document["state"] = "interrupted"
        for island in document["islands"]:
            island["state"] = "gone" if island["state"] == "alive" else island["state"]
    return document
