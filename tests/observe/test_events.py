"""Events: what is added is on disk after a flush, life by life, and NaN never is."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.log.run_store import RunStore
from diloco_ray.observe import events
from diloco_ray.observe.events import SEGMENT_LINES, EventLog, of_kind, read_events


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["number"] for event in events]


def add(log: EventLog, first: int, stop: int) -> None:
    for number in range(first, stop):
        log.add("counted", number=number)


def test_what_is_added_is_seen_at_once_and_written_at_a_flush(store: RunStore) -> None:
    log = EventLog(store, 1)
    add(log, 0, 2)
    assert numbers(log.own) == [0, 1]
    assert read_events(store) == []
    log.flush()
    assert read_events(store) == log.own


def test_an_event_has_its_kind_and_its_time(store: RunStore) -> None:
    log = EventLog(store, 1)
    log.add("decision", text="go on")
    (event,) = log.own
    assert (event["event"], event["text"]) == ("decision", "go on")
    assert event["time"].endswith("+00:00")


def test_a_flush_with_nothing_new_writes_nothing(store: RunStore) -> None:
    log = EventLog(store, 1)
    log.flush()
    assert store.list("events") == []


def test_long_lives_are_cut_into_segments_that_are_never_written_again(store: RunStore) -> None:
    log = EventLog(store, 1)
    add(log, 0, SEGMENT_LINES)
    log.flush()
    assert store.list("events") == ["000001-0000.jsonl"]
    store.write("events/000001-0000.jsonl", store.read("events/000001-0000.jsonl") + b'{"event":"mark","number":-1}\n')
    add(log, SEGMENT_LINES, 2 * SEGMENT_LINES + 3)
    log.flush()
    assert store.list("events") == [f"000001-{segment:04d}.jsonl" for segment in range(3)]
    assert numbers(read_events(store)) == [*range(SEGMENT_LINES), -1, *range(SEGMENT_LINES, 2 * SEGMENT_LINES + 3)]


@pytest.mark.parametrize("every", [1, 7, SEGMENT_LINES, SEGMENT_LINES + 1])
def test_however_often_it_is_flushed_every_event_is_there_once_and_in_order(store: RunStore, every: int) -> None:
    log = EventLog(store, 1)
    total = SEGMENT_LINES + 20
    for first in range(0, total, every):
        add(log, first, min(first + every, total))
        if first + every >= SEGMENT_LINES - 30:  # a flush for each of the first ones takes long and tells nothing
            log.flush()
    assert numbers(read_events(store)) == list(range(total))


def test_a_later_life_reads_the_past_and_writes_files_of_its_own(store: RunStore) -> None:
    first = EventLog(store, 1)
    add(first, 0, 3)
    first.flush()
    assert read_events(store) == first.own
    second = EventLog(store, 2)
    assert second.own == []
    add(second, 3, 5)
    second.flush()
    assert numbers(read_events(store)) == [0, 1, 2, 3, 4]


def test_of_a_long_life_the_newest_stay_in_memory_and_all_are_written(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEPT", 1000)
    log, seen = EventLog(store, 1), list[int]()
    for first in range(0, 5000, 50):
        add(log, first, first + 50)
        seen += numbers(log.after(len(seen)))
        if first % 700 == 0:
            log.flush()
        assert len(log.own) < 2 * 1000
        assert len(log._lines) < 700 + SEGMENT_LINES + 50
    assert seen == list(range(5000)), "whoever watches misses some"
    assert numbers(log.after(0)) == numbers(log.own) == list(range(4000, 5000))
    assert log.after(5000) == log.after(9999) == []
    log.flush()
    assert numbers(read_events(store)) == list(range(5000))


def test_two_that_flush_at_once_leave_nothing_out(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(store, 1)
    add(log, 0, SEGMENT_LINES + 7)
    write, others = store.write, [log.flush]
    monkeypatch.setattr(store, "write", lambda path, data: (write(path, data), others and others.pop()())[0])
    log.flush()
    add(log, SEGMENT_LINES + 7, SEGMENT_LINES + 9)
    log.flush()
    assert numbers(read_events(store)) == list(range(SEGMENT_LINES + 9))


def test_a_first_life_that_still_writes_does_not_touch_the_second_ones_events(store: RunStore) -> None:
    first, second = EventLog(store, 1), EventLog(store, 2)
    add(second, 10, 12)
    second.flush()
    add(first, 0, 2)
    first.flush()
    assert numbers(read_events(store)) == [0, 1, 10, 11]


def test_a_number_that_is_not_finite_is_null(store: RunStore) -> None:
    log = EventLog(store, 1)
    log.add("round", loss=math.nan, norm=math.inf, down=-math.inf, tokens=3, seconds=0.5)
    log.flush()
    (line,) = store.read("events/000001-0000.jsonl").decode().splitlines()
    event = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert event == log.own[0]
    values = [event[name] for name in ("loss", "norm", "down", "tokens", "seconds")]
    assert values == [None, None, None, 3, 0.5]


def test_text_with_line_ends_stays_one_event(store: RunStore) -> None:
    log = EventLog(store, 1)
    log.add("evaluation", sample="first\nsecond\u2028third\x85fourth")
    log.flush()
    assert read_events(store) == log.own


def test_events_are_told_apart_by_their_kind(store: RunStore) -> None:
    log = EventLog(store, 1)
    log.add("round", round=1)
    log.add("decision", text="x")
    log.add("round", round=2)
    assert [event["round"] for event in of_kind(log.own, "round")] == [1, 2]
