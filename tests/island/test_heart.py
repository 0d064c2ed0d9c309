"""The heart beats beside the training thread and brings it bad news between two inner steps."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from diloco_ray.config import RunConfig
from diloco_ray.coordination.messages import Contribution, DataRange, InnerPlan, Verdict
from diloco_ray.errors import DeadlineError, FencedError
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.heart import HUNG, Heart
from diloco_ray.island.job import Identity, RoundAbandonedError
from diloco_ray.run import open_run
from diloco_ray.transport.protocol import Beat, Bytes, Hello, News, Order, SnapshotState, Welcome
from tests.island.exchange_room import SeenThreads

WAIT_S = 30.0


class Telephone:
    """A line to a coordinator that answers what the test says."""

    def __init__(self) -> None:
        self.beats: list[Beat] = []
        self.hellos: list[Hello] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self._answer: Order | Exception = "go_on"
        self._welcome = Welcome(1)
        self.news = News("ok")
        self._rings = threading.Condition()

    def answers(self, order: Order | Exception) -> None:
        self._answer = order

    def welcomes(self, welcome: Welcome) -> None:
        self._welcome = welcome

    def hears(self, num_beats: int) -> None:
        """Waits for so many more beats: what was answered to all but the last of them has been dealt with."""
        with self._rings:
            wanted = len(self.beats) + num_beats
            assert self._rings.wait_for(lambda: len(self.beats) >= wanted, WAIT_S)

    # ---- the Transport ----

    def beat(self, beat: Beat) -> Order:
        self.meanwhile()
        with self._rings:
            self.beats.append(beat)
            self._rings.notify_all()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def join(self, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        return self._welcome

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        return Verdict("accepted")

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        return self.news

    def snapshot(self, first: bool = False) -> SnapshotState:
        raise AssertionError("no heart asks for a snapshot")

    def leave(self, island: str, incarnation: int, reason: str) -> None: ...

    def measured(self) -> set[int]:
        return set()

    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None: ...


class Room:
    """A real exchange whose training thread is the test, and its heart."""

    def __init__(self, body: dict[str, Any], stall_timeout_s: float = 600.0):
        self.line = Telephone()
        job = open_run(RunConfig.from_dict(body)).island_job()
        self.exchange = Exchange(job, Identity("island-00", "process", 1, "here"), self.line)
        self.exchange.say_hello()
        self.threads = SeenThreads()
        self.heart = Heart(self.exchange, self.line, 0.001, stall_timeout_s, self.threads)

    def work(self, lease_id: str) -> InnerPlan:
        plan = InnerPlan("island-00", 1, lease_id, 0, 0, 6, 0, 0, 1, (DataRange(0, 0, 0, 24),))
        self.exchange.plan = plan
        return plan

    def wait_for_the_end(self) -> None:
        [thread] = self.threads.all
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.fixture
def room(tiny: dict[str, Any]) -> Iterator[Room]:
    room = Room(tiny)
    yield room
    room.heart.stop()
    room.wait_for_the_end()


def test_a_beat_says_who_it_is_what_it_works_on_and_how_far_it_is(room: Room) -> None:
    room.work("1.1")
    room.exchange.progress = {"round": 1, "step": 3, "steps": 6}
    room.line.hears(2)
    assert room.line.beats[-1] == Beat("island-00", 1, "1.1", {"round": 1, "step": 3, "steps": 6})


def test_a_beat_without_work_names_none(room: Room) -> None:
    room.line.hears(2)
    assert room.line.beats[-1] == Beat("island-00", 1, "", {})


def test_while_all_is_well_the_steps_go_on(room: Room) -> None:
    plan = room.work("1.1")
    room.line.hears(3)
    room.exchange.check(plan)


def test_work_that_is_void_is_abandoned_at_the_next_step_and_other_work_is_not(room: Room) -> None:
    plan = room.work("1.1")
    room.line.answers("abandon")
    room.line.hears(2)
    with pytest.raises(RoundAbandonedError):
        room.exchange.check(plan)
    room.line.answers("go_on")
    room.line.hears(2)
    room.exchange.check(room.work("1.2"))


def test_an_answer_that_comes_when_the_work_is_done_abandons_nothing(room: Room) -> None:
    """Its contributions may be committed by then, which makes the lease as void as any that was given up."""
    plan = room.work("1.1")
    room.line.meanwhile = lambda: setattr(room.exchange, "plan", None)
    room.line.answers("abandon")
    room.line.hears(3)
    room.exchange.check(plan)


def test_bad_news_wakes_a_training_thread_that_waits(room: Room) -> None:
    room.work("1.1")
    room.line.hears(2)
    room.exchange.wait(0.0)  # all that was heard so far is seen
    woken: list[int] = []
    waiting = threading.Thread(target=lambda: woken.append(room.exchange.wait(WAIT_S) or 1), daemon=True)
    waiting.start()
    room.line.answers("abandon")
    waiting.join(WAIT_S / 2)
    assert woken == [1]


def test_a_restarted_coordinator_hears_hello_with_the_work_in_hand(room: Room) -> None:
    plan = room.work("1.1")
    room.line.welcomes(Welcome(5))
    room.line.answers("rejoin")
    room.line.hears(2)
    room.line.answers("go_on")
    room.line.hears(2)
    assert room.line.hellos[1].held == (plan,)
    assert room.line.hellos[1].incarnation == 1
    assert room.line.beats[-1].incarnation == 5
    room.exchange.check(plan)


def test_a_name_that_went_to_another_process_stops_the_training(room: Room) -> None:
    plan = room.work("1.1")
    room.line.answers("fenced")
    room.wait_for_the_end()
    with pytest.raises(FencedError, match="another process"):
        room.exchange.check(plan)


def test_a_name_that_is_quarantined_stops_the_training_with_the_reason_and_a_remedy(room: Room) -> None:
    plan = room.work("1.1")
    room.line.news = News("fenced", reason="island-00 is quarantined after 3 bad payloads in a row: values")
    room.line.answers("fenced")
    room.wait_for_the_end()
    with pytest.raises(FencedError, match="quarantined after 3 bad payloads in a row: values") as caught:
        room.exchange.check(plan)
    assert "inner.learning_rate" in caught.value.remedy


def test_a_name_refused_at_the_hello_stops_the_training_with_the_reason(room: Room) -> None:
    plan = room.work("1.1")
    room.line.welcomes(Welcome(0, "island-00 is quarantined: values"))
    room.line.answers("rejoin")
    room.wait_for_the_end()
    with pytest.raises(FencedError, match="quarantined"):
        room.exchange.check(plan)


@pytest.mark.parametrize("error", [DeadlineError("silent for 600 s"), RuntimeError("a broken line")])
def test_whatever_stops_the_heart_stops_the_training(room: Room, error: Exception) -> None:
    plan = room.work("1.1")
    room.line.answers(error)
    room.wait_for_the_end()
    with pytest.raises(type(error), match=str(error)):
        room.exchange.check(plan)
    with pytest.raises(type(error), match=str(error)):
        room.exchange.next_plan()


def test_a_stopped_heart_beats_no_more(room: Room) -> None:
    plan = room.work("1.1")
    room.line.hears(1)
    room.heart.stop()
    room.wait_for_the_end()
    assert room.heart._has_stopped
    count = len(room.line.beats)
    room.exchange.check(plan)
    assert len(room.line.beats) == count


# ---- a hung training thread ----


def wait_for(exits: list[int]) -> None:
    until = time.monotonic() + WAIT_S
    while not exits and time.monotonic() < until:
        time.sleep(0.005)


@pytest.fixture
def short_of_breath(tiny: dict[str, Any]) -> Iterator[Room]:
    room = Room(tiny, stall_timeout_s=0.05)
    yield room
    room.heart.stop()
    room.wait_for_the_end()


def test_work_without_a_step_for_too_long_ends_the_process(short_of_breath: Room) -> None:
    exits = short_of_breath.threads.exits
    short_of_breath.work("1.1")
    wait_for(exits)
    assert set(exits) == {HUNG}


def test_steps_waiting_and_having_no_work_are_signs_of_life(short_of_breath: Room) -> None:
    exits = short_of_breath.threads.exits
    time.sleep(0.15)  # no work
    short_of_breath.work("1.1")
    for step in range(30):
        short_of_breath.exchange.progress = {"step": step}
        time.sleep(0.005)
    short_of_breath.exchange.is_waiting = True
    time.sleep(0.15)
    assert exits == []
    short_of_breath.exchange.is_waiting = False
    wait_for(exits)
    assert set(exits) == {HUNG}


def test_a_process_that_is_to_end_ends_with_its_status_and_says_why() -> None:
    code = (
        "from diloco_ray.island.threads import OsThreads; OsThreads().end_process(75, 'no step for 5 s'); print('on')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
    assert (ended.returncode, ended.stdout) == (HUNG, "")
    assert ended.stderr.endswith("no step for 5 s: ending this process\n")
