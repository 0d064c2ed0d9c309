"""The islands' side of the mail: coordinators that come and go, two of one name, lies, clocks, and how much it asks."""

import inspect
import math
import re

import pytest

from diloco_ray.coordination.messages import DataRange, InnerPlan, Verdict
from diloco_ray.errors import CorruptionError, DeadlineError, StoreError
from diloco_ray.log.run_log import record_path
from diloco_ray.simulation.storage import IOCall, TappedStore
from diloco_ray.transport import letters, post_office, run_store, tokens
from diloco_ray.transport.letters import NOTICE, write_letter
from diloco_ray.transport.protocol import Beat, News, Welcome
from diloco_ray.transport.run_store import LOOKS
from tests.mailroom import (
    POLL_S,
    Mailroom,
    Moments,
    VirtualTime,
    digests,
    letter_of,
    letter_path,
    new_room,
    to_the_end,
    whole_run,
)
from tests.small_run import RUN_ID


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    return VirtualTime(monkeypatch)


@pytest.fixture
def room(time: VirtualTime) -> Mailroom:
    return new_room(time)


# ---- coordinators that come and go ----


def test_islands_go_on_with_their_work_over_any_number_of_coordinators(room: Mailroom) -> None:
    workers = [room.worker(0), room.worker(1)]
    for worker in workers:
        worker.hello()
    for _ in range(3):
        workers[0].turn()  # its contribution is accepted, and not committed
        room.begin_life()
        workers[0].turn()
        workers[1].turn()
        room.begin_life()
    to_the_end(workers)
    steps = room.proved()
    assert [len(step.shares) for step in steps] == [2, 2, 2]
    assert [share.incarnation for step in steps for share in step.shares] == [1] * 6
    assert steps[-1].tokens["committed"] == 3 * 128


def test_a_letter_that_no_coordinator_took_is_written_again_to_the_next(room: Mailroom) -> None:
    room.stands_still = True
    looks: list[IOCall] = []

    def begin(call: IOCall) -> None:
        if call.act == "read" and call.path.endswith(".answer"):
            looks.append(call)
        if len(looks) == 2 * LOOKS + 1:
            room.begin_life()
            room.stands_still = False

    worker = room.worker(0, begin)
    worker.hello()
    assert worker.island.incarnation == 1
    assert room.store.list("mail/island-00") == []


def test_a_failed_run_is_waited_for_until_somebody_takes_it_up(room: Mailroom) -> None:
    worker, began_s = room.worker(0), room.time.now_s
    room.say("failed", "the disk is full")
    line = room.line(worker.token, deadline_s=10.0)
    with pytest.raises(DeadlineError, match=r"the run has failed \(the disk is full\), and no coordinator has"):
        line.beat(Beat("island-00", 1))
    assert room.time.now_s - began_s > 10.0

    def take_up() -> None:
        if room.time.now_s > began_s + 40.0 and room.coordinator.fence_epoch == 1:
            room.begin_life()
        room.office.turn()

    room.turn = take_up  # type: ignore[method-assign]
    worker.hello()
    assert room.time.now_s > began_s + 40.0


def test_a_run_that_is_over_needs_no_coordinator_to_say_so(room: Mailroom) -> None:
    late = room.worker(0)
    late.plan = InnerPlan(late.name, 1, "1.1", 0, 0, 2, 0, 0, 2, (DataRange(0, 0, 0, 4),))
    steps = whole_run(room)
    room.say("succeeded", "3 rounds done")
    room.stands_still = True
    line = late.line
    assert line.join(late.island.hello()) == Welcome(1)
    assert line.beat(Beat(late.name, 1)) == "go_on"
    assert line.submit(*late.island.contribution(late.plan)) == Verdict("rejected", "3 rounds done")
    assert line.measured() == set()
    line.leave(late.name, 1, "over")
    news = line.follow(late.name, 1, 0, 30.0)
    assert (news.standing, [record for record, _ in news.records]) == ("ok", steps)
    assert line.follow(late.name, 1, 3, 30.0) == News("over", reason="3 rounds done")
    assert room.store.list("mail/island-00") == []


def test_a_run_that_ends_while_an_answer_is_awaited_is_over_for_whoever_waits(room: Mailroom) -> None:
    worker = room.worker(0)
    worker.hello()
    room.stands_still = True

    def end(call: IOCall) -> None:
        room.say("succeeded", "enough")

    line = room.worker(0, Moments(12, end)).line
    assert line.follow("island-00", 1, 0, 10.0) == News("over", reason="enough")


def test_a_notice_of_a_coordinator_of_before_makes_nobody_write_without_end(room: Mailroom) -> None:
    notice, moments, began_s = room.store.read(NOTICE), Moments(), room.time.now_s
    room.begin_life()
    room.store.write(NOTICE, notice)
    line = room.line(room.token("island-00"), TappedStore(room.store.url, moments), deadline_s=10.0)
    with pytest.raises(DeadlineError, match=r"answer(ed)? 'beat' for 10 s"):
        line.beat(Beat("island-00", 1))
    assert room.time.now_s - began_s <= 10.0 + 2 * POLL_S
    assert moments.num / 2 < 10 * 6


# ---- two processes of one name ----


def test_the_newer_process_takes_over_and_the_older_hears_that_it_is_fenced(room: Mailroom) -> None:
    old, other, new = room.worker(0), room.worker(1), room.worker(0)
    for worker in (old, other):
        worker.hello()
    old.turn()
    new.hello()
    assert new.island.incarnation == 2
    assert old.line.beat(Beat(old.name, 1)) == "fenced"
    news = old.line.follow(old.name, 1, 0, 5.0)
    assert (news.standing, news.reason) == ("fenced", "island-00 is held by another process")
    assert old.island.join(old.line) == "island-00 is held by another process"
    to_the_end([other, new])
    assert [{share.incarnation for share in step.shares} for step in room.proved()][1:] == [{1, 2}, {1, 2}]


def test_the_older_hears_it_though_the_newers_hello_swept_its_answer_away(room: Mailroom) -> None:
    new = room.worker(0)

    def overtake(call: IOCall) -> None:
        is_due = old.island.incarnation and not new.island.incarnation
        if is_due and call.path.endswith(".answer") and room.store.exists(call.path):
            new.hello()
            assert not room.store.exists(call.path)

    old = room.worker(0, overtake)
    old.hello()
    assert old.line.beat(Beat(old.name, 1)) == "fenced"
    assert new.island.incarnation == 2


def test_the_hello_of_a_fenced_process_sweeps_nothing_away(room: Mailroom) -> None:
    old, new = room.worker(0), room.worker(0)
    old.hello()
    new.hello()
    mine = f"mail/island-00/{new.line._process}-00000099.answer"
    room.store.create(mine, b"for the newer one")
    assert old.island.join(old.line) == "island-00 is held by another process"
    assert room.store.exists(mine)


# ---- answers and notices that are not the coordinator's ----


@pytest.mark.parametrize(
    ("speaks", "body", "why"),
    [
        (None, {}, "form: not a letter"),
        ("island-01", {"answer": "go_on"}, "signature: "),
        ("island-00", {"answer": "obey"}, "not understood: form: all of it"),
        ("island-00", {}, "not understood: form: all of it"),
    ],
)
def test_an_answer_that_is_not_the_coordinators_is_not_believed(
    room: Mailroom, speaks: str | None, body: dict[str, str], why: str
) -> None:
    keys = {name: room.token(name) for name in ("island-00", "island-01")}
    room.stands_still = True

    def forge(call: IOCall) -> None:
        if (call.act, call.moment) == ("create", "after"):
            path = call.path.replace(".request", ".answer")
            room.store.create(path, write_letter(keys[speaks], RUN_ID, path, body) if speaks else b"garbage")

    line = room.line(keys["island-00"], TappedStore(room.store.url, forge))
    with pytest.raises(CorruptionError, match=why):
        line.beat(Beat("island-00", 1))


@pytest.mark.parametrize("data", [b"", b"garbage", b"[]", b"{}", b'{"fence_epoch": "x"}'])
def test_a_notice_that_no_coordinator_wrote_is_an_error_with_the_files_name(room: Mailroom, data: bytes) -> None:
    worker = room.worker(0)
    room.store.write(NOTICE, data)
    with pytest.raises(CorruptionError, match=NOTICE):
        worker.hello()


# ---- what is read of the log ----


@pytest.fixture
def long_room(time: VirtualTime) -> Mailroom:
    """Twelve records, and a thirteenth to come."""
    room = new_room(time, num_rounds=13)
    workers = [room.worker(0), room.worker(1)]
    for worker in workers:
        worker.hello()
    while room.coordinator.state.index < 12:
        for worker in workers:
            worker.turn()
    return room


@pytest.mark.parametrize(("after", "told"), [(0, [1, 2, 3, 4, 5, 6, 7, 8]), (10, [11, 12]), (11, [12])])
def test_records_are_read_one_by_one_and_the_log_is_never_listed(
    long_room: Mailroom, after: int, told: list[int]
) -> None:
    """A listing has 1,000 names a page: at record 100,000 each island would ask for 100 pages at each step."""
    calls: list[IOCall] = []
    line = long_room.worker(0, calls.append).line
    assert [record.index for record, _ in line.follow("", 0, after, 0.0).records] == told
    assert not [call for call in calls if call.act == "list"]
    of_log = [call for call in calls if call.moment == "before" and call.path.startswith(("log/", "payloads/"))]
    assert len(of_log) == 2 * len(told) + (len(told) < run_store.RECORDS_AT_ONCE)


@pytest.mark.parametrize(("num_payloads", "told"), [(0.5, [1]), (1.5, [1, 2]), (2.0, [1, 2]), (2.5, [1, 2, 3])])
def test_a_backlog_is_read_in_parts_of_so_many_bytes_and_a_record(
    long_room: Mailroom, num_payloads: float, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(long_room.store.read(long_room.coordinator._log.records[1].payload))
    monkeypatch.setattr(run_store, "ANSWER_BYTES", num_payloads * size)
    read: list[str] = []
    line = long_room.worker(0, lambda call: read.append(call.path) if call.moment == "after" else None).line
    assert [record.index for record, _ in line.follow("", 0, 0, 0.0).records] == told
    assert len([path for path in read if path.startswith("payloads/")]) == len(told)


def test_a_record_that_is_told_of_and_not_to_be_seen_is_waited_for_until_the_deadline_and_named(
    long_room: Mailroom, capsys: pytest.CaptureFixture[str]
) -> None:
    time, store, path = long_room.time, long_room.store, record_path(12)
    data = store.read(path)
    store.delete(path)
    began_s = time.now_s
    line = long_room.line(long_room.token("island-00"), deadline_s=10.0)
    with pytest.raises(StoreError, match="does not exist") as caught:
        line.follow("", 0, 11, 0.0)
    assert caught.value.where == store.url_of(path)
    assert 10.0 < time.now_s - began_s < 10.0 + 5 * POLL_S
    assert capsys.readouterr().err.count("cannot read the log") == 1

    def show() -> None:
        long_room.office.turn()
        if time.now_s > began_s + 20.0 and not store.exists(path):
            store.create(path, data)

    long_room.turn = show  # type: ignore[method-assign]
    assert [record.index for record, _ in line.follow("", 0, 11, 0.0).records] == [12]


def test_a_joiner_whose_snapshot_is_pruned_while_it_is_read_takes_a_newer_one(time: VirtualTime) -> None:
    room = new_room(time, num_rounds=20)
    workers = [room.worker(0), room.worker(1)]
    for worker in workers:
        worker.hello()

    def go_on_to(index: int) -> None:
        while room.coordinator.state.index < index:
            for worker in workers:
                worker.turn()

    def overtake(call: IOCall) -> None:
        if call.path == "snapshots/00000008/fragment-000.safetensors":
            go_on_to(16)

    go_on_to(8)
    line = room.worker(0, overtake).line
    assert line.snapshot().index == 16
    assert line.snapshot(first=True).index == 0


# ---- how often the storage is asked ----


def quick_looks() -> int:
    """Until the pause, from a tenth of poll_s and half as long again each time, is poll_s."""
    return math.ceil(math.log(10, 1.5))


@pytest.mark.parametrize("wait_s", [10.0, 30.0])
def test_an_idle_island_asks_the_storage_no_more_than_so_often(room: Mailroom, wait_s: float) -> None:
    """One long poll: whom to write to, the letter, looks for the answer, and each fifth time two more; a deletion."""
    worker = room.worker(0)
    worker.hello()
    moments = Moments()
    line = room.worker(0, moments).line
    began_s = room.time.now_s
    assert line.follow("island-00", 1, 0, wait_s) == News("ok")
    assert room.time.now_s - began_s <= wait_s + 2 * POLL_S
    looks = quick_looks() + (wait_s + 2 * POLL_S) / POLL_S
    assert moments.num / 2 <= 3 + looks * (1 + 2 / LOOKS)


def test_an_idle_office_lists_each_folder_once_a_turn_and_does_no_more(room: Mailroom) -> None:
    workers = [room.worker(0), room.worker(1)]
    for worker in workers:
        worker.hello()
    for worker in workers:
        worker.plan = room.coordinator.state.open_plans(worker.name)[0]
        held = worker.plan.lease_id
        path, epoch = letter_path(worker.name), room.coordinator.fence_epoch
        room.store.create(path, letter_of(worker.token, path, epoch, "follow", worker.name, 1, 0, 1e9, held))
    room.office.turn()
    moments = Moments()
    room.tap = moments
    for _ in range(10):
        room.office.turn()
    assert moments.num / 2 == 10 * (1 + len(workers))


# ---- clocks ----


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0, 1e9])
def test_a_wall_clock_that_is_wrong_or_jumps_changes_nothing(time: VirtualTime, skew_s: float) -> None:
    """Tokens without an end: of those with one, test_tokens tells."""
    undisturbed = digests(whole_run(new_room(time)))
    room = new_room(time)

    def jump(call: IOCall) -> None:
        room.wall_s += skew_s

    room.tap = jump
    began_s = time.now_s
    assert digests(whole_run(room)) == undisturbed
    assert time.now_s - began_s < 60.0


def test_neither_side_of_the_mail_looks_at_a_wall_clock() -> None:
    """The key ring does, for what has expired."""
    for module in (letters, run_store, post_office):
        code = inspect.getsource(module)
        assert not re.search(r"time\.time\b|datetime|localtime|gmtime|modified|created|mtime", code), module.__name__
    assert inspect.getsource(tokens.KeyRing).count("time.time") == 1
