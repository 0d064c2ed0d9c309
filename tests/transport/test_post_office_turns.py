"""The post office turn by turn: nobody's letters hold up another's, none is answered twice, and none is lost."""

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.errors import FencedError
from diloco_ray.simulation.storage import IOCall
from diloco_ray.transport import post_office
from diloco_ray.transport.letters import NOTICE, write_letter
from diloco_ray.transport.post_office import MAX_IN_HAND, MAX_NOTE, MAX_NOTES
from diloco_ray.transport.protocol import Beat
from tests.mailroom import Mailroom, VirtualTime, answer_to, letter_of, letter_path, to_the_end
from tests.small_run import RUN_ID, files


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    return VirtualTime(monkeypatch)


@pytest.fixture
def room(time: VirtualTime) -> Mailroom:
    return Mailroom(f"memory://{uuid.uuid4().hex}/run", time)


@pytest.fixture
def folder(time: VirtualTime, tmp_path: Path) -> Mailroom:
    return Mailroom(str(tmp_path / "run"), time)


def beat_at(room: Mailroom, token: Any, number: int = 1, epoch: int | None = None) -> tuple[str, bytes]:
    """The letter's path and what is in it."""
    path = letter_path(token.island, number)
    epoch = room.coordinator.fence_epoch if epoch is None else epoch
    return path, letter_of(token, path, epoch, "beat", Beat(token.island, 1))


def is_answered(room: Mailroom, path: str) -> bool:
    return room.store.exists(path.replace(".request", ".answer"))


class Heard:
    """Doors that count who knocks, and do at the n-th knock what a test wants."""

    def __init__(self, room: Mailroom, at_knock: Callable[[], None] = lambda: None):
        self._room, self._at_knock = room, at_knock
        self.knocks: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def door(*arguments: Any) -> Any:
            if name != "news":
                self.knocks.append(name)
                self._at_knock()
            return getattr(self._room.coordinator, name)(*arguments)

        return door


# ---- once ----


def test_a_letter_that_is_put_back_after_it_was_answered_is_not_opened_again(room: Mailroom) -> None:
    doors, token = Heard(room), room.token("island-00")
    office = room.begin_office(doors)  # type: ignore[arg-type]
    path, data = beat_at(room, token)
    room.store.create(path, data)
    office.turn()
    assert is_answered(room, path)
    room.store.delete(path.replace(".request", ".answer"))
    for _ in range(2):
        room.store.create(path, data)
        office.turn()
        assert (doors.knocks, is_answered(room, path), room.store.exists(path)) == (["beat"], False, False)


def test_a_letter_to_a_coordinator_of_before_is_given_back_and_opens_no_door(room: Mailroom) -> None:
    token = room.token("island-00")
    path, data = beat_at(room, token, epoch=1)
    room.begin_life()
    doors = Heard(room)
    office = room.begin_office(doors)  # type: ignore[arg-type]
    room.store.create(path, data)
    office.turn()
    assert answer_to(room.store, path) == {"not_for": 2}
    assert (doors.knocks, room.store.exists(path)) == ([], False)


def test_a_letter_to_a_coordinator_to_come_is_left_to_it(room: Mailroom) -> None:
    path, data = beat_at(room, room.token("island-00"), epoch=2)
    room.store.create(path, data)
    room.office.turn()
    assert room.store.exists(path)
    assert not is_answered(room, path)
    room.begin_life()
    room.office.turn()
    assert answer_to(room.store, path) == {"answer": "rejoin"}


def test_the_word_of_a_coordinator_that_was_overtaken_does_not_cover_its_successors(room: Mailroom) -> None:
    old = room.office
    room.begin_life()
    notice = room.store.read(NOTICE)
    with pytest.raises(FencedError, match="a newer coordinator"):
        old.put_up_notice({}, "failed", "it could not write")
    assert room.store.read(NOTICE) == notice


# ---- what is no mail ----


def test_foreign_files_and_folders_are_left_where_they_lie_unread(folder: Mailroom) -> None:
    name = f"{'a' * 32}-00000001.request"
    paths = [
        f"mail/{name}",
        "mail/README",
        f"mail/.hidden/{name}",
        f"mail/-dash/{name}",
        f"mail/two words/{name}",
        f"mail/{'x' * 64}/{name}",
        f"mail/island-00/deeper/{name}",
        f"mail/island-00/{name}.bak",
        f"mail/island-00/x{name}",
        f"mail/island-00/{name.upper()}",
        f"mail/island-00/{'a' * 32}-1.request",
        "mail/island-00/photo.jpg",
        f"mail/island-01/{name}/inside",  # a folder with a letter's name
    ]
    for path in paths:
        folder.store.create(path, b"foreign")
    calls: list[IOCall] = []
    folder.tap = calls.append
    for _ in range(3):
        assert not folder.office.turn()
    assert {call.act for call in calls} == {"list"}
    workers = [folder.worker(0), folder.worker(1)]
    for worker in workers:
        worker.hello()
    to_the_end(workers)
    assert [folder.store.read(path) for path in paths] == [b"foreign"] * len(paths)
    assert [len(record.shares) for record in folder.proved()] == [2, 2, 2]
    assert folder.notes == []


def test_names_that_lead_elsewhere_are_not_followed(room: Mailroom, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk has no such names; a bucket may."""
    name, calls, before = f"{'a' * 32}-00000001.request", [], files(room.store)
    room.tap = calls.append
    store: Any = room.office._store
    names = ["..", ".", "", "../log", "island-00/..", "/etc", "a\\b", "coordinator.json", "a\0b", "\ud800"]
    monkeypatch.setattr(store, "list", lambda folder: names)
    assert not room.office.turn()
    monkeypatch.setattr(store, "list", lambda folder: ["island-00"])
    lies = [f"../{name}", f"../../log/{name}", f"/{name}", f"{name}/..", f"{name}\n", f"x/{name}", ""]
    monkeypatch.setattr(store, "sizes", lambda folder: dict.fromkeys(lies, 10))
    assert not room.office.turn()
    assert calls == []
    assert files(room.store) == before


# ---- one island's letters and the others' ----


def test_an_island_that_floods_its_folder_is_served_little_by_little_and_holds_up_nobody(room: Mailroom) -> None:
    bad, good = room.token("island-00"), room.token("island-01")
    flood = [letter_path("island-00", number) for number in range(100)]
    for path in flood:
        room.store.create(path, b"garbage")
    path, data = beat_at(room, good)
    room.store.create(path, data)
    room.office.turn()
    assert is_answered(room, path)
    assert sum(room.store.exists(path) for path in flood) == 100 - MAX_IN_HAND
    for _ in range(100 // MAX_IN_HAND):
        room.office.turn()
    path, data = beat_at(room, bad, 999)
    room.store.create(path, data)
    room.office.turn()
    assert is_answered(room, path)


def test_a_folder_that_cannot_be_listed_holds_up_nobody(room: Mailroom) -> None:
    def tap(call: IOCall) -> None:
        if call == IOCall("list", "mail/island-00", "before"):
            raise PermissionError(13, "not for you")

    room.tap = tap
    for token in (room.token("island-00"), room.token("island-01")):
        path, data = beat_at(room, token)
        room.store.create(path, data)
    room.office.turn()
    assert is_answered(room, path)
    assert len(room.notes) == 1
    assert "not for you" in room.notes[0]


@pytest.mark.parametrize("error", [KeyError("poison"), OverflowError(), RuntimeError("closed"), TimeoutError()])
def test_a_letter_over_which_a_door_breaks_ends_nobodys_mail(room: Mailroom, error: Exception) -> None:
    """Busy is another matter: that door is tried again."""
    errors = [error]

    def break_once() -> None:
        if errors:
            raise errors.pop()

    doors, others = Heard(room, break_once), [room.token("island-00"), room.token("island-01")]
    office, paths = room.begin_office(doors), []  # type: ignore[arg-type]
    for token in others:
        path, data = beat_at(room, token)
        room.store.create(path, data)
        paths.append(path)
    for _ in range(3):
        office.turn()
    is_busy = isinstance(error, TimeoutError)
    assert [is_answered(room, path) for path in paths] == [is_busy, True]
    assert len(doors.knocks) == (3 if is_busy else 2)
    assert len(room.notes) == 1


def test_people_are_not_flooded_with_notes(room: Mailroom) -> None:
    token = room.token("island-00")
    for number in range(3 * MAX_NOTES):
        path, body = letter_path("island-00", number), {"call": f"{number}\x1b[2J{'y' * 10_000}", "epoch": 1}
        room.store.create(path, write_letter(token, RUN_ID, path, body))
        room.office.turn()
    assert len(room.notes) == MAX_NOTES
    assert all(len(note) <= MAX_NOTE and note.isprintable() for note in room.notes)


# ---- large letters ----


def test_a_heartbeat_does_not_wait_behind_a_large_payload(room: Mailroom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_office, "SMALL_BYTES", 2000)
    workers = [room.worker(0), room.worker(1)]
    for worker in workers:
        worker.hello()
    plan = room.coordinator.state.open_plans("island-00")[0]
    large = letter_path("island-00", 1)
    contribution, payload = workers[0].island.contribution(plan)
    room.store.create(large, letter_of(workers[0].token, large, 1, "submit", contribution, payload=payload))
    small, data = beat_at(room, workers[0].token, 2)
    room.store.create(small, data)
    may_read, is_reading = threading.Event(), threading.Event()

    def tap(call: IOCall) -> None:
        if call == IOCall("read", large, "before"):
            is_reading.set()
            assert may_read.wait(60)

    with ThreadPoolExecutor(1) as beside:
        office = room.begin_office(beside=beside)
        room.tap = tap
        office.turn()
        assert is_reading.wait(60)
        office.turn()
        assert is_answered(room, small)
        assert not is_answered(room, large)
        may_read.set()
    assert answer_to(room.store, large)["answer"]["status"] == "accepted"


def test_a_heartbeat_does_not_wait_behind_a_small_contribution_that_is_not_judged_yet(room: Mailroom) -> None:
    """As while an outer step is computed. Its size alone does not say that it is one: its payload may be short."""
    worker, other = room.worker(0), room.worker(1)
    worker.hello()
    other.hello()
    (plan,) = room.coordinator.state.open_plans("island-00")
    sent, short = letter_path("island-00", 1), worker.island.contribution(plan)[1][:3]
    room.store.create(
        sent, letter_of(worker.token, sent, 1, "submit", worker.island.contribution(plan)[0], payload=short)
    )
    beat, data = beat_at(room, worker.token, 2)
    room.store.create(beat, data)
    may_judge = threading.Event()

    class Busy(Heard):
        def submit(self, *arguments: Any) -> Any:
            assert may_judge.wait(60)
            return room.coordinator.submit(*arguments)

    with ThreadPoolExecutor(1) as beside:
        office = room.begin_office(Busy(room), beside=beside)  # type: ignore[arg-type]
        office.turn()
        assert is_answered(room, beat)
        assert not is_answered(room, sent)
        may_judge.set()
    assert answer_to(room.store, sent)["answer"]["status"] == "rejected"


class Inline(Executor):
    """At once, and what is raised is told to nobody: as if nobody asked the future."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.mark.parametrize("data", [b"garbage", None])
@pytest.mark.parametrize("act", ["read", "create", "delete"])
def test_a_large_letter_at_which_the_storage_fails_is_taken_up_again(
    room: Mailroom, monkeypatch: pytest.MonkeyPatch, act: str, data: bytes | None
) -> None:
    monkeypatch.setattr(post_office, "SMALL_BYTES", 0)
    troubles = ["503"]

    def tap(call: IOCall) -> None:
        if call.act == act and troubles:
            raise OSError(troubles.pop())

    office = room.begin_office(beside=Inline())
    room.tap = tap
    path, letter = beat_at(room, room.token("island-00"))
    room.store.create(path, letter if data is None else data)
    for _ in range(2):
        office.turn()
    assert set(answer_to(room.store, path)) == {"answer" if data is None else "refused"}
    assert not room.store.exists(path)
