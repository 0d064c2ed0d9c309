"""The status document: what scripts are promised, and that its numbers are those of the log."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.ids import canonical_json
from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.events import read_events
from diloco_ray.transport.protocol import Beat
from tests.small_run import METRICS, Life, SmallIsland, begun, join_all, records, small_job

JOB = small_job(num_islands=2)
PROMISED = {
    "state": str,
    "outer_steps": int,
    "islands": list,
    "coordinator": {"pid": int, "fence_epoch": int},
    "contributions": {"alive": int, "contributed": int, "applied": int},
    "tokens": {
        "leased": int,
        "committed": int,
        "rejected": int,
        "expired": int,
        "rewound": int,
        "outstanding": int,
    },
    "bytes": {"up": int, "down": int, "data_parallel_equivalent": int},
    "seconds": {"inner": float, "sync_wait": float, "total": float},
}
OF_AN_ISLAND = {
    "name": str,
    "state": str,
    "pid": int,
    "node": str,
    "incarnation": int,
    "round": int,
    "tokens_per_s": float,
}
POINT = {"outer_step": int, "loss": float}


class Room:
    def __init__(self, folder: Path):
        self.store = begun(RunStore(str(folder / "run")), JOB)
        self.life = Life(self.store, JOB)
        self.islands = [SmallIsland(0, JOB), SmallIsland(1, JOB)]

    def one_round(self) -> None:
        for island in self.islands:
            assert self.life.submit(*island.contribution(self.life.plan_of(island))).status == "accepted"

    def status(self) -> dict[str, Any]:
        """As a script reads it."""
        coordinator = self.life.coordinator
        return json.loads(canonical_json(coordinator.report.status(coordinator.state)))


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def assert_promised(body: dict[str, Any], promise: dict[str, Any]) -> None:
    for name, kind in promise.items():
        assert name in body
        if isinstance(kind, dict):
            assert_promised(body[name], kind)
        else:
            assert isinstance(body[name], (int, float) if kind is float else kind), name


def assert_all_promised(status: dict[str, Any], num_islands: int) -> None:
    assert_promised(status, PROMISED)
    assert len(status["islands"]) == num_islands
    for island in status["islands"]:
        assert_promised(island, OF_AN_ISLAND)
    assert status["validation"].keys() >= {"first", "last", "best"}
    for point in status["validation"].values():
        assert point is None or point.keys() == POINT.keys()


def test_every_promised_field_is_there_from_the_first_moment_to_the_end(room: Room) -> None:
    assert_all_promised(room.status(), 2)
    join_all(room.life.coordinator, room.islands)
    assert_all_promised(room.status(), 2)
    for _ in range(3):
        room.one_round()
        assert_all_promised(room.status(), 2)
    room.life.coordinator.evaluated(3, 3, {"loss": 1.5}, "a sample")
    assert_all_promised(room.status(), 2)
    assert room.status()["state"] == "succeeded"


def test_the_numbers_are_those_of_the_log_and_of_what_was_sent(room: Room) -> None:
    join_all(room.life.coordinator, room.islands)
    assert room.status()["state"] == "training"
    for _ in range(2):
        room.one_round()
    status, log = room.status(), records(room.store)
    num_values = JOB.layout.num_values
    assert status["outer_steps"] == status["rounds"] == 2
    assert status["contributions"] == {"alive": 2, "contributed": 2, "applied": 2}
    assert status["coordinator"] == {"pid": 1, "fence_epoch": 1}
    assert status["tokens"]["committed"] == log[-1].tokens["committed"] == 2 * 2 * 64
    assert status["tokens"]["outstanding"] == 2 * 64
    assert status["bytes"] == {
        "up": sum(share.payload_bytes for record in log for share in record.shares),
        "down": 2 * 2 * get_codec(JOB.downlink).num_bytes(num_values),
        "data_parallel_equivalent": 2 * 2 * 2 * 4 * num_values * JOB.rules.inner_steps_per_round,
    }
    assert status["seconds"]["inner"] == pytest.approx(4 * METRICS["inner_seconds"])
    assert status["seconds"]["sync_wait"] == pytest.approx(4 * METRICS["sync_wait_seconds"])
    (first, _) = status["islands"]
    assert (first["name"], first["pid"], first["incarnation"], first["node"]) == ("island-00", 100, 1, "here")
    assert first["tokens_per_s"] == METRICS["tokens"] / METRICS["inner_seconds"]


def test_a_refused_contribution_is_counted_as_contributed_and_not_as_applied(room: Room) -> None:
    join_all(room.life.coordinator, room.islands)
    good, bad = room.islands
    for _ in range(3):
        plan = room.life.plan_of(bad)
        assert room.life.submit(*bad.contribution(plan, bad.values(0, 0) * math.nan)).status == "rejected"
    assert room.life.submit(*good.contribution(room.life.plan_of(good))).status == "accepted"
    status = room.status()
    assert status["contributions"] == {"alive": 1, "contributed": 2, "applied": 1}
    assert status["tokens"]["rejected"] == 3 * 64
    assert [island["state"] for island in status["islands"]] == ["alive", "quarantined"]
    assert status["islands"][1]["reason"].startswith("values: ")


ABSURD = [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e13, -1.0, 5e-324]
ABSURD += [pytest.param(10**400, id="no end of digits")]


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("name", [*METRICS, "all of them"])
def test_whatever_an_island_says_of_itself_there_is_a_status_in_this_life_and_the_next(
    room: Room, name: str, value: float
) -> None:
    join_all(room.life.coordinator, room.islands)
    metrics = dict.fromkeys(METRICS, value) if name == "all of them" else {**METRICS, name: value}
    for _ in range(2):
        for island in room.islands:
            plan = room.life.plan_of(island)
            assert room.life.submit(*island.contribution(plan, metrics=metrics)).status == "accepted"
            assert_all_promised(room.status(), 2)
    before = room.status()
    assert max(before["seconds"].values()) <= 4e12
    room.life.settle()
    room.life = Life(room.store, JOB)
    assert_all_promised(room.status(), 2)
    assert room.status()["seconds"] == before["seconds"]
    for event in read_events(room.store):
        json.dumps(event, allow_nan=False)


@pytest.mark.parametrize("value", ABSURD)
def test_whatever_an_island_says_of_its_progress_there_is_a_status(room: Room, value: float) -> None:
    join_all(room.life.coordinator, room.islands)
    told = dict.fromkeys(("round", "step", "steps", "loss", "tokens_per_s", "of its own"), value)
    assert room.life.coordinator.beat(Beat("island-01", 1, "", told)) == "go_on"
    assert_all_promised(room.status(), 2)
    (_, found) = room.status()["islands"]
    assert (found["round"], found["step"], found["steps"]) == ((0, 0, 0) if value == 5e-324 else (0, 0, 2))


def test_events_that_an_earlier_version_or_a_hand_has_spoilt_stop_no_later_life(room: Room) -> None:
    """Sums that had no end are null in them."""
    join_all(room.life.coordinator, room.islands)
    room.one_round()
    room.life.settle()
    before = room.status()
    spoilt = [
        {"event": "round", "bytes_up": None, "inner_s": None, "alive": 1, "contributed": 1, "applied": 1},
        {"event": "round", "seconds": 1e308, "sync_wait_s": "x"},
        {"event": "evaluation"},
        {"event": "evaluation", "outer_step": "x", "loss": None},
        {"event": 7},
    ]
    room.store.write("events/000001-0001.jsonl", "\n".join(map(json.dumps, spoilt)).encode())
    room.life = Life(room.store, JOB)
    after = room.status()
    assert_all_promised(after, 2)
    assert (after["bytes"], after["seconds"], after["validation"]) == tuple(
        before[name] for name in ("bytes", "seconds", "validation")
    )
    assert room.life.coordinator.measured() == set()


def test_a_status_costs_as_much_after_many_rounds_as_after_few(room: Room) -> None:
    """It is asked for several times a second, on the loop that hears heartbeats: what is looked at is counted."""

    def looks(num_events: int) -> int:
        report = room.life.coordinator.report
        for number in range(num_events):
            report.evaluated(number, number, {"loss": 2.0}, "")
            report.note("a decision")
        num_lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal num_lines
            num_lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            report.status(room.life.coordinator.state)
        finally:
            sys.settrace(before)
        return num_lines

    few, many = looks(2), looks(2000)
    assert many == few


def test_a_beat_shows_where_an_island_is(room: Room) -> None:
    join_all(room.life.coordinator, room.islands)
    progress = {"round": 1, "step": 1, "steps": 2}
    assert room.life.coordinator.beat(Beat("island-01", 1, room.life.plan_of(room.islands[1]).lease_id, progress))
    found = room.status()["islands"][1]
    assert (found["round"], found["step"], found["steps"]) == (1, 1, 2)


def test_validation_has_the_first_the_last_and_the_best_point_once_each(room: Room) -> None:
    evaluated = room.life.coordinator.evaluated
    for index, loss in ((0, 5.0), (2, 1.0), (2, 1.0), (3, 2.0)):
        evaluated(index, index, {"loss": loss}, "")
    assert room.status()["validation"] == {
        "first": {"outer_step": 0, "loss": 5.0},
        "last": {"outer_step": 3, "loss": 2.0},
        "best": {"outer_step": 2, "loss": 1.0},
    }
    assert room.life.coordinator.measured() == {0, 2, 3}


def test_a_loss_that_is_not_finite_is_null_and_not_the_best(room: Room) -> None:
    for index, loss in ((1, math.nan), (2, 1.0), (3, math.inf)):
        room.life.coordinator.evaluated(index, index, {"loss": loss}, "")
    validation = room.status()["validation"]
    assert validation["first"] == {"outer_step": 1, "loss": None}
    assert validation["last"] == {"outer_step": 3, "loss": None}
    assert validation["best"] == {"outer_step": 2, "loss": 1.0}


def test_a_run_that_diverged_from_the_start_has_no_best_point(room: Room) -> None:
    room.life.coordinator.evaluated(1, 1, {"loss": math.nan}, "")
    assert room.status()["validation"]["best"] is None


def test_the_sums_outlive_the_coordinator(room: Room) -> None:
    join_all(room.life.coordinator, room.islands)
    for _ in range(2):
        room.one_round()
    room.life.coordinator.evaluated(2, 2, {"loss": 1.0}, "")
    room.life.settle()
    before = room.status()
    room.life = Life(room.store, JOB)
    after = room.status()
    for name in ("bytes", "seconds", "contributions", "validation", "rounds", "outer_steps"):
        assert after[name] == before[name]
    assert after["coordinator"]["fence_epoch"] == 2
    assert after["tokens"] == records(room.store)[-1].tokens
    assert [event["event"] for event in read_events(room.store)].count("round") == 2
