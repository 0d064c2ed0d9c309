"""A storm, on paper: its schedule, what counts as noticed and as over, and sequences that were committed twice."""

from typing import Any

import pytest

from diloco_ray.coordination.messages import DataRange, Share
from diloco_ray.log.record import Record
from diloco_ray.runtime.chaos import num_doubled
from diloco_ray.runtime.storm import SHARES, Fault, schedule


def test_a_storm_has_as_many_faults_as_its_rate_says_and_is_the_same_for_the_same_seed() -> None:
    planned = schedule(600, 15, seed=1)
    assert len(planned) == 150
    assert planned == schedule(600, 15, seed=1) != schedule(600, 15, seed=2)
    assert [fault.at_s for fault in planned] == sorted(fault.at_s for fault in planned)
    assert 0 <= planned[0].at_s < 6 < 894 <= planned[-1].at_s < 900
    assert {fault.kind for fault in planned} == set(SHARES)


def status(state: str = "alive", process: str = "a", last_seen_s: float = 0.2, **run: Any) -> dict[str, Any]:
    island = {"name": "island-00", "state": state, "process": process, "last_seen_s": last_seen_s}
    return {"islands": [island], "coordinator": {"fence_epoch": 1}, "outer_steps": 7, **run}


def times_of(kind: str, *seen: tuple[float, dict[str, Any]], ends_s: float = 10.0) -> tuple[float | None, float | None]:
    island, before = ("", 1) if kind == "coordinator" else ("island-00", "a")
    fault = Fault(kind, island, 1, before, at_s=10.0, ends_s=ends_s, outer_steps=7)
    for seen_s, document in seen:
        fault.observe(document, seen_s)
    return fault.detected_s, fault.recovered_s


@pytest.mark.parametrize(
    ("kind", "seen", "ends_s", "noticed_s", "over_s"),
    [
        ("kill", [(11, status()), (12, status("lost")), (15, status(process="b"))], 10, 12, 15),
        ("kill", [(11, status()), (15, status(process="b"))], 10, 15, 15),
        ("freeze", [(11, status(last_seen_s=1.5)), (13, status())], 12, None, 13),
        ("hang", [(15, status("lost")), (21, status(process="b"))], 30, 15, 21),
        ("hang", [(15, status("lost")), (29, status("lost")), (31, status())], 30, 15, 31),
        ("preempt", [(11, status("left")), (12, status("left"))], 10, 11, None),
    ],
)
def test_an_island_is_over_it_when_it_is_alive_again(
    kind: str, seen: list[Any], ends_s: float, noticed_s: float | None, over_s: float | None
) -> None:
    assert times_of(kind, *seen, ends_s=ends_s) == (noticed_s, over_s)


def test_the_coordinator_is_over_it_when_its_next_life_has_taken_an_outer_step() -> None:
    after = {"fence_epoch": 2}
    lives = [(11, status()), (14, status(coordinator=after)), (16, status(coordinator=after, outer_steps=8))]
    assert times_of("coordinator", *lives) == (14, 16)


def test_sequences_that_two_leases_spent_are_counted() -> None:
    def record(*pieces: DataRange) -> Record:
        share = Share("island-00", 1, 0, 0, 1.0, 0, pieces, "", 0, 0.0)
        return Record(1, "", "", 1, "outer_step", 0, 1, 1, "", "", "", (share,), "", "", {})

    once = [record(DataRange(0, 0, 0, 4)), record(DataRange(0, 0, 4, 8)), record(DataRange(0, 1, 0, 4))]
    assert num_doubled(once) == 0
    assert num_doubled([*once, record(DataRange(0, 0, 2, 5), DataRange(1, 0, 0, 9))]) == 3
