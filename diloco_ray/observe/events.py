"""A run's events: one JSON object per line, in the run folder, for people and for tables.

Events tell when; the log of outer steps tells what. Each coordinator life writes files of its own, rewritten whole on
each flush (object stores cannot append) and begun anew every SEGMENT_LINES lines.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

SEGMENT_LINES = 500
_FILE = re.compile(r"[0-9]{6,}-[0-9]{4,}\.jsonl")


class Folder(Protocol):
    """The part of a run store that events need."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def list(self, folder: str) -> list[str]: ...


class EventLog:
    """Events of all coordinator lives, oldest first; this life's are added and flushed."""

    def __init__(self, store: Folder, life: int):
        self._store, self._life = store, life
        self.past: list[dict[str, Any]] = read_events(store)
        self.own: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._flushed = self._segment = 0

    def add(self, kind: str, **fields: Any) -> None:
        event = {"event": kind, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **_finite(fields)}
        self.own.append(event)
        self._lines.append(json.dumps(event))

    def flush(self) -> None:
        """Writes what is new. Safe to call from another thread than `add`: lines are only ever appended."""
        num_lines = len(self._lines)
        while self._flushed < num_lines:
            begin = self._segment * SEGMENT_LINES
            end = min(begin + SEGMENT_LINES, num_lines)
            data = "\n".join(self._lines[begin:end]) + "\n"
            self._store.write(f"events/{self._life:06d}-{self._segment:04d}.jsonl", data.encode())
            self._flushed = end
            self._segment += end == begin + SEGMENT_LINES


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a number that is not finite is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def read_events(store: Folder) -> list[dict[str, Any]]:
    """Every event of a run so far."""
    paths = [f"events/{name}" for name in store.list("events") if _FILE.fullmatch(name)]
    lines = [line for path in paths for line in store.read(path).decode(errors="replace").splitlines()]
    return [event for line in lines if (event := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    """None for a damaged line: events are for people, and no reason to stop a run."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def of_kind(events: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] == kind]
