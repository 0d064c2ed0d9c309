"""Messages that are calls: a verdict that takes long is asked for again, and so is a sign of life, soon enough."""

import asyncio
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import DeadlineError
from diloco_ray.log.run_store import RunStore
from diloco_ray.runtime import coordinator_actor
from diloco_ray.transport.letters import CALLS, plain, write_letter
from diloco_ray.transport.protocol import Beat, Bytes, Hello, Order
from tests.mailroom import Mailroom, VirtualTime
from tests.small_run import RUN_ID, Life, SmallIsland, begun, records, small_job

JOB = small_job(num_islands=1)
Actor: Callable[..., Any] = coordinator_actor.CoordinatorActor.__ray_metadata__.modified_class


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    return VirtualTime(monkeypatch)


@pytest.fixture
def room(time: VirtualTime) -> Mailroom:
    return Mailroom(f"memory://{uuid.uuid4().hex}/run", time, JOB)


class SlowLife(Life):
    """Its jobs are done when a contribution has come for the last time."""

    def __init__(self, room: Mailroom, num_times: int):
        super().__init__(room.store, room.job)
        self.verdicts: list[str] = []
        self._num_times, submit = num_times, self.coordinator.submit

        def submitted(contribution: Contribution, payload: Bytes) -> Verdict:
            verdict = submit(contribution, payload)
            self.verdicts.append(verdict.status)
            if len(self.verdicts) == self._num_times:
                self.settle()
            return self.coordinator.verdict_on(contribution)

        self.coordinator.submit = submitted  # type: ignore[method-assign]
        room.coordinator = self.coordinator
        room.begin_office()


def test_a_contribution_is_sent_again_without_a_hello_until_there_is_a_verdict_on_it(room: Mailroom) -> None:
    """A coordinator whose storage is slow may take longer over it than a call lasts."""
    life, worker = SlowLife(room, 30), room.worker(0)
    worker.hello()
    contribution = worker.island.contribution(life.plan_of(worker.island))
    assert worker.line.submit(*contribution) == Verdict("accepted")
    assert life.verdicts == ["pending"] * 30
    assert life.notes().count("island-00 joined") == 1
    assert worker.line.submit(*contribution) == Verdict("committed")


def test_a_coordinator_that_gives_no_verdict_is_given_up_by_name_at_the_deadline(room: Mailroom) -> None:
    life, worker = SlowLife(room, 10**6), room.worker(0)
    worker.hello()
    began_s, line = room.time.now_s, room.line(worker.token, deadline_s=40.0)
    with pytest.raises(DeadlineError, match=r"no verdict on fragment 0, round 1 for 40 s") as caught:
        line.submit(*worker.island.contribution(life.plan_of(worker.island)))
    assert caught.value.where == "island-00"
    assert 40.0 < room.time.now_s - began_s < 60.0


def test_the_actor_says_that_there_is_no_verdict_yet_and_keeps_what_it_inspects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that did not know the island would say so: that is another answer."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "here")
    monkeypatch.setattr(coordinator_actor, "VERDICT_TIMEOUT_S", 0.05)
    store, island, done = begun(RunStore(str(tmp_path / "run")), JOB), SmallIsland(0, JOB), threading.Event()

    async def story() -> list[str]:
        actor = Actor(store.url, JOB)
        actor._worker.submit(done.wait)
        island.incarnation = (await actor.join(island.hello())).incarnation
        header, payload = island.contribution(actor._coordinator.state.open_plans(island.name)[0])
        said = [(await actor.submit(header, payload)).status]
        while len(said) < 1000 and said[-1] == "pending":
            said.append((await actor.submit(header, np.zeros_like(payload))).status)
            if len(said) == 3:
                done.set()
        done.set()
        await actor.finish()
        return said

    said = asyncio.run(story())
    assert len(said) > 3
    assert (set(said[:-1]), said[-1]) == ({"pending"}, "accepted")
    assert [share.island for share in records(store)[0].shares] == ["island-00"]


def test_a_beat_whose_letter_is_never_answered_is_written_again_before_the_island_is_given_up(room: Mailroom) -> None:
    """This coordinator stumbled over the first one, and does not try it again."""
    worker, beat, heard = room.worker(0), room.coordinator.beat, list[float]()
    worker.hello()

    def stumble_once(said: Beat) -> Order:
        heard.append(room.time.now_s)
        if len(heard) == 1:
            raise RuntimeError("a door that breaks")
        return beat(said)

    room.coordinator.beat = stumble_once  # type: ignore[method-assign]
    line = room.line(worker.token, deadline_s=600.0, heartbeat_timeout_s=60.0)
    assert line.beat(Beat("island-00", 1)) == "go_on"
    assert len(heard) == 2
    assert heard[1] - heard[0] < 20.0
    assert room.store.list("mail/island-00") == []


def test_the_hello_of_a_process_that_died_before_it_was_read_is_not_there_to_take_the_name(
    room: Mailroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that stood still would find both, and answer them in the order of their names. What else lies
    there is left to it."""
    worker, dead, create, there = room.worker(0), "f" * 32, room.store.create, list[str]()
    calls = {"00000001": ("join", (Hello("island-00", dead, 1, "there"),)), "00000002": ("measured", ())}
    for number, (call, arguments) in calls.items():
        path = f"mail/island-00/{dead}-{number}.request"
        body = {"call": call, "arguments": plain(CALLS[call][0], arguments), "epoch": room.coordinator.fence_epoch}
        create(path, write_letter(worker.token, RUN_ID, path, body))

    def look_and_create(path: str, data: bytes) -> None:
        if path.endswith(".request"):
            there.extend(room.store.list("mail/island-00"))
        create(path, data)

    monkeypatch.setattr(room.store, "create", look_and_create)
    worker.hello()
    assert there == [f"{dead}-00000002.request"]
    assert room.coordinator.state.members["island-00"].process != dead
