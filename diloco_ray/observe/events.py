"""A run's events: one JSON object per line, in the run folder, for people and for tables.

Events tell when; the log of outer steps tells what. Each coordinator life writes files of its own, rewritten whole on
each flush (object stores cannot append) and begun anew every SEGMENT_LINES lines.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

SEGMENT_LINES = 500
_FILE = re.compile(r"[0-9]{6,}-[0-9]{4,}\.jsonl")
KEPT = 10_000  # events of a life, at least, that whoever watches may ask for


class Folder(Protocol):
    """The part of a run store that events need."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def list(self, folder: str) -> list[str]: ...


class EventLog:
    """This life's events: added, and flushed. Of a long life the newest stay in memory; all are in the files."""

    def __init__(self, store: Folder, life: int):
        self._store, self._life = store, life
        self.own: list[dict[str, Any]] = []
        self._num_gone = 0  # of `own`, from its beginning
        self._lines: list[str] = []  # of the segment that is being written, and of those to come
        self._flushed = self._segment = 0

    def add(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The event as it is written."""
        event = {"event": kind, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **_finite(fields)}
        self.own.append(event)
        self._lines.append(json.dumps(event))
        if len(self.own) >= 2 * KEPT:
            del self.own[:KEPT]
            self._num_gone += KEPT
        return event

    def after(self, num_seen: int) -> list[dict[str, Any]]:
        """What was added after the first so many, and is still in memory."""
        return self.own[max(0, num_seen - self._num_gone) :]

    def flush(self) -> None:
        """Writes what is new. Safe to call from another thread than `add`: lines are only ever appended to."""
        num_lines = len(self._lines)
        while self._flushed < num_lines:
            segment, end = self._segment, min(SEGMENT_LINES, num_lines)
            data = "\n".join(self._lines[:end]) + "\n"
            self._store.write(f"events/{self._life:06d}-{segment:04d}.jsonl", data.encode())
            if segment != self._segment:
                return  # somebody else flushes as well
            self._flushed = end
            if end == SEGMENT_LINES:
                del self._lines[:end]
                self._flushed, self._segment, num_lines = 0, segment + 1, num_lines - end


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a number that is not finite is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def read_events(store: Folder) -> list[dict[str, Any]]:
    """Every event of a run so far, of all coordinator lives, oldest first."""
    return list(each_event(store))


def each_event(store: Folder) -> Iterator[dict[str, Any]]:
    """As `read_events`, with one file in memory at a time."""
    for name in filter(_FILE.fullmatch, store.list("events")):
        lines = store.read(f"events/{name}").decode(errors="replace").splitlines()
        yield from (event for line in lines if (event := _parsed(line)) is not None)


def _parsed(line: str) -> dict[str, Any] | None:
    """None for a damaged line: events are for people, and no reason to stop a run."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def of_kind(events: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] == kind]
