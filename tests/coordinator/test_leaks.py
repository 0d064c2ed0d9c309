"""A long life of joins, losses, leaves, bad payloads and restarts leaves nothing behind (I13)."""

import gc
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from diloco_ray.coordinator.coordinator import MAX_VERDICTS
from diloco_ray.log.run_store import RunStore
from tests.island.exchange_room import wait_for
from tests.small_run import Life, SmallIsland, begun, join_all, records, small_job

JOB = small_job(num_islands=3, num_rounds=10**6, snapshot_every_rounds=5)


class Room:
    """Three islands, one of which is always replaced in some way, and a coordinator that is restarted."""

    def __init__(self, folder: Path):
        self.store = begun(RunStore(str(folder / "run")), JOB)
        self.start()

    def start(self) -> None:
        self.life = Life(self.store, JOB)
        self.islands = [SmallIsland(number, JOB) for number in range(3)]
        join_all(self.life.coordinator, self.islands)

    def trouble(self, number: int) -> None:
        """What befalls the last island in this round, after it has been given work."""
        coordinator, victim = self.life.coordinator, self.islands[-1]
        match number % 5:
            case 0:
                coordinator.lost(victim.name, victim.process, "killed")
            case 1:
                coordinator.leave(victim.name, victim.incarnation, "preempted")
            case 2:
                plan = self.life.plan_of(victim)
                bad = victim.contribution(plan, victim.values(plan.round, 0) * float("nan"))
                assert self.life.submit(*bad).status == "rejected"
                return
            case 3:  # while what it sent is being inspected
                coordinator.submit(*victim.contribution(self.life.plan_of(victim)))
                coordinator.lost(victim.name, victim.process, "killed")
            case _:
                self.start()
                return
        self.islands[-1] = SmallIsland(2, JOB)
        join_all(coordinator, self.islands[-1:])

    def round(self, number: int) -> None:
        self.trouble(number)
        self.life.settle()
        at_work = [island for island in self.islands if self.life.coordinator.state.open_plans(island.name)]
        for island in at_work:
            assert self.life.submit(*island.contribution(self.life.plan_of(island))).status == "accepted"

    def rounds(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            self.round(number)


def held_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def num_open_files(folder: Path) -> int:
    """Of this run: the process may serve other tests' connections as well."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.startswith(str(folder)) for link in links)


def test_after_many_rounds_of_trouble_nothing_is_held_that_was_not_held_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the records and the events, which are the run itself: some 8,000 bytes a round."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    tracemalloc.start()
    room = Room(tmp_path)
    room.rounds(0, 20)
    threads, before = threading.active_count(), held_bytes()
    room.rounds(20, 100)
    coordinator, grown_per_round = room.life.coordinator, (held_bytes() - before) / 80
    tracemalloc.stop()
    print(f"\n{grown_per_round:.0f} bytes a round")
    assert len(records(room.store)) == 100
    assert grown_per_round < 10_000, "a payload alone has 4,864"
    assert num_open_files(tmp_path) == 0
    wait_for(lambda: threading.active_count() <= threads)  # those that read ahead end in their own time
    state = coordinator.state
    assert (len(coordinator._payloads), coordinator._computed, coordinator._cosines) == (0, {}, {})
    assert (state.inbox, state.stepping, state.sent_back) == ({}, {}, frozenset())
    assert len(coordinator._verdicts) <= MAX_VERDICTS
    assert set(state.members) == {island.name for island in room.islands}
    assert len(state.ledger.outstanding) == len(state.alive) == 3
    assert len(room.store.list("snapshots")) <= JOB.keep_snapshots + 1
    assert not list(tmp_path.rglob(".tmp-*")), "a hidden file is left"


def test_an_island_that_flaps_a_thousand_times_costs_the_others_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    room = Room(tmp_path)
    coordinator, num_events = room.life.coordinator, 2 * 1000
    for number in range(1000):
        victim = room.islands[-1]
        coordinator.lost(victim.name, victim.process, "killed")
        room.islands[-1] = SmallIsland(2, JOB)
        join_all(coordinator, room.islands[-1:])
        if number % 100 == 0:
            for island in room.islands[:2]:
                assert room.life.submit(*island.contribution(room.life.plan_of(island))).status == "accepted"
            room.life.submit(*room.islands[-1].contribution(room.life.plan_of(room.islands[-1])))
    state = coordinator.state
    assert len(records(room.store)) == 10
    assert state.members["island-02"].incarnation == 1001
    assert set(state.members) == {island.name for island in room.islands}
    assert len(state.ledger.outstanding) == len(state.alive) == 3
    account = state.ledger.account()
    assert account["leased"] == sum(account[fate] for fate in account if fate != "leased")
    assert num_events <= len(coordinator.report.own_events) < 3 * num_events
