"""The mail under faults: outages and kills at every storage call of an island and of the coordinator's office.

One thread and virtual time: each story has its calls in one order, so that every one of them can fail.
"""

import pytest

from diloco_ray.errors import StoreError
from diloco_ray.simulation.storage import IOCall
from tests.mailroom import POLL_S, KilledError, Moments, VirtualTime, digests, new_room, whole_run

OUTAGE_S = 4.0
TOLD = "training goes on to the end of its round"


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    return VirtualTime(monkeypatch)


class Outage:
    """From one moment on, for some time."""

    def __init__(self, time: VirtualTime, at: int):
        self._time, self._at, self._num, self.until_s = time, at, 0, -1.0

    def __call__(self, call: IOCall) -> None:
        self._num += 1
        if self._num - 1 == self._at:
            self.until_s = self._time.now_s + OUTAGE_S
        if self._time.now_s < self.until_s:
            raise OSError("503 slow down")


def test_an_island_outlives_an_outage_of_its_storage_at_any_call_and_says_so_once(
    time: VirtualTime, capsys: pytest.CaptureFixture[str]
) -> None:
    count = Moments()
    undisturbed = digests(whole_run(new_room(time, 1), count))
    assert count.num > 40
    for at in range(count.num):
        outage = Outage(time, at)
        assert digests(whole_run(new_room(time, 1), outage)) == undisturbed, f"moment {at}"
        told = capsys.readouterr().err.count(TOLD)
        assert time.now_s >= outage.until_s > 0 or told == 0
        assert told <= 1, f"moment {at}"


def test_an_outage_without_end_is_the_storages_error_once_the_deadline_is_over(
    time: VirtualTime, capsys: pytest.CaptureFixture[str]
) -> None:
    room = new_room(time)

    def tap(call: IOCall) -> None:
        if call.act != "delete":
            raise OSError("503 slow down")

    worker = room.worker(0, tap)
    worker.line._deadline_s = 20.0
    began_s = time.now_s
    with pytest.raises(StoreError, match="503 slow down"):
        worker.hello()
    assert 20.0 < time.now_s - began_s <= 20.0 + 2 * POLL_S
    assert capsys.readouterr().err.count(TOLD) == 1


def test_the_office_outlives_an_outage_of_its_storage_at_any_call(time: VirtualTime) -> None:
    room, count = new_room(time, 1), Moments()
    room.tap = count
    undisturbed = digests(whole_run(room))
    assert count.num > 100
    for at in range(count.num):
        room = new_room(time, 1)
        room.tap = Outage(time, at)
        assert digests(whole_run(room)) == undisturbed, f"moment {at}"


@pytest.mark.parametrize("what", ["the coordinator", "its office alone"])
def test_a_coordinator_killed_at_any_storage_call_of_its_office_loses_nothing_and_doubles_nothing(
    time: VirtualTime, what: str
) -> None:
    """Its successor is another life with another fence; or the same one that has forgotten what was in hand."""

    def kill(call: IOCall) -> None:
        raise KilledError

    room, count = new_room(time, 1), Moments()
    room.tap = count
    undisturbed = digests(whole_run(room))
    for at in range(count.num):
        room = new_room(time, 1)
        room.tap = Moments(at, kill)
        room.killed = room.begin_life if what == "the coordinator" else room.begin_office  # type: ignore[method-assign]
        assert digests(whole_run(room)) == undisturbed, f"moment {at}"
        committed = room.proved()[-1].tokens
        assert (committed["committed"], committed["rejected"]) == (128, 0), f"moment {at}"
        assert room.notes == [], f"moment {at}"
