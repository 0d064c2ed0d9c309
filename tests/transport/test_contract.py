"""One contract, kept by every way between islands and coordinator."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination.messages import InnerPlan, Verdict
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.errors import CorruptionError, DeadlineError, RunMismatchError
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.follower import Follower
from diloco_ray.transport.in_memory import InMemoryTransport
from diloco_ray.transport.protocol import Beat, Hello, News, Transport
from tests.mail import Correspondents, office_open
from tests.small_run import SmallIsland, begun, coordinator_of, join_all, new_replica, records, restored, small_job

JOB = small_job(num_islands=2)
JOB_PAYLOAD = get_codec(JOB.downlink).num_bytes(JOB.layout.num_values)
PATIENCE_S = 60.0
RAY = pytest.param("ray", marks=pytest.mark.ray)
CARRIERS = ["in memory", "run store: folder", "run store: memory", "run store: S3", RAY]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this test's own; the path is short because sockets' paths must be."""
    import ray

    scratch = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(address="local", num_cpus=2, _temp_dir=scratch, **quiet)
    yield
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def opened(carrier: str, store: RunStore, request: pytest.FixtureRequest) -> Iterator[Transport]:
    if carrier == "in memory":
        yield InMemoryTransport(coordinator_of(store, JOB))
        return
    if carrier.startswith("run store"):
        with by_mail(store) as transport:
            yield transport
        return
    request.getfixturevalue("cluster")
    import ray

    from diloco_ray.runtime.coordinator_actor import CoordinatorActor
    from diloco_ray.transport.ray_object_store import RayTransport

    actor = CoordinatorActor.remote(store.url, JOB)
    try:
        ray.get(actor.measured.remote(), timeout=PATIENCE_S)
        yield RayTransport(actor, PATIENCE_S)
    finally:
        ray.kill(actor, no_restart=True)


@contextlib.contextmanager
def by_mail(store: RunStore) -> Iterator[Transport]:
    """A coordinator whose office is open, and whoever writes to it."""
    coordinator = coordinator_of(store, JOB)
    with office_open(store, coordinator, JOB):
        yield Correspondents(store, JOB)


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> RunStore:
    return begun(RunStore(str(tmp_path / "run")), JOB)


@pytest.fixture
def store(carrier: str, tmp_path: Path, request: pytest.FixtureRequest) -> RunStore:
    where = {"run store: memory": f"memory://{uuid.uuid4().hex}/run"}.get(carrier, str(tmp_path / "run"))
    if carrier == "run store: S3":
        where = f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    return begun(RunStore(where), JOB)


@pytest.fixture
def line(carrier: str, request: pytest.FixtureRequest, store: RunStore) -> Iterator[Transport]:
    with opened(carrier, store, request) as transport:
        yield transport


@pytest.fixture
def islands() -> list[SmallIsland]:
    return [SmallIsland(0, JOB), SmallIsland(1, JOB)]


def news_for(line: Transport, island: SmallIsland, after: int = 0, held: str = "") -> News:
    return line.follow(island.name, island.incarnation, after, PATIENCE_S, held)


def plan_for(line: Transport, island: SmallIsland, after: int = 0) -> InnerPlan:
    plan = news_for(line, island, after).plan
    assert plan is not None
    return plan


def follower_of(line: Transport) -> Follower:
    follower = Follower(new_replica(JOB), line)
    follower.load_snapshot()
    return follower


def catch_up(follower: Follower, index: int) -> None:
    """As an observer, to this log index: a call may bring less than all."""
    for _ in range(20):
        if follower.index >= index:
            return
        for record in follower.receive(follower.transport.follow("", 0, follower.index, PATIENCE_S).records):
            follower.replay(record.fragment)
    raise AssertionError(f"still at {follower.index}")


def one_round(line: Transport, islands: list[SmallIsland], after: int) -> None:
    for island in islands:
        plan = plan_for(line, island, after)
        assert line.submit(*island.contribution(plan)).status == "accepted"


def same_state(a: Replica, b: Replica) -> bool:
    return a.versions == b.versions and a.digest(0) == b.digest(0)


# ---- join, beat, leave ----


def test_a_new_process_gets_the_next_incarnation_and_keeps_it_when_it_asks_again(
    line: Transport, islands: list[SmallIsland]
) -> None:
    first = islands[0]
    assert first.join(line) == ""
    assert first.incarnation == 1
    assert first.join(line) == ""
    assert first.incarnation == 1
    second = SmallIsland(0, JOB)
    assert second.join(line) == ""
    assert second.incarnation == 2


def test_who_lost_its_name_to_a_newer_process_is_told_why(line: Transport, islands: list[SmallIsland]) -> None:
    old, new = islands[0], SmallIsland(0, JOB)
    join_all(line, [old, new])
    assert old.join(line) == "island-00 is held by another process"


def test_a_beat_is_answered_with_what_the_island_is_to_do(line: Transport, islands: list[SmallIsland]) -> None:
    island, other = islands
    assert line.beat(Beat(island.name, 1)) == "rejoin"
    join_all(line, [island, other])
    plan = plan_for(line, island)
    assert line.beat(Beat(island.name, 1, plan.lease_id, {"step": 1})) == "go_on"
    assert line.beat(Beat(island.name, 1)) == "go_on"
    assert line.beat(Beat(island.name, 1, "0.0")) == "abandon"
    join_all(line, [SmallIsland(0, JOB)])
    assert line.beat(Beat(island.name, 1, plan.lease_id)) == "fenced"


def test_a_beat_answers_abandon_once_the_lease_is_settled(line: Transport, islands: list[SmallIsland]) -> None:
    join_all(line, islands)
    plan = plan_for(line, islands[0])
    one_round(line, islands, 0)
    catch_up(follower_of(line), 1)
    assert line.beat(Beat(islands[0].name, 1, plan.lease_id)) == "abandon"


def test_who_left_may_come_back_and_the_others_go_on_without_it(
    line: Transport, islands: list[SmallIsland], store: RunStore
) -> None:
    stays, goes = islands
    join_all(line, islands)
    plan = plan_for(line, goes)
    line.leave(goes.name, goes.incarnation, "preempted")
    line.leave(goes.name, goes.incarnation, "preempted")
    assert line.beat(Beat(goes.name, goes.incarnation, plan.lease_id)) == "rejoin"
    assert news_for(line, goes).standing == "rejoin"
    assert line.submit(*goes.contribution(plan)) == Verdict("unknown")
    one_round(line, [stays], 0)
    catch_up(follower_of(line), 1)
    assert [share.island for share in records(store)[0].shares] == [stays.name]
    assert goes.join(line) == ""


def test_a_word_of_farewell_from_an_older_process_changes_nothing(line: Transport, islands: list[SmallIsland]) -> None:
    old, new = islands[0], SmallIsland(0, JOB)
    join_all(line, [old, new, islands[1]])
    line.leave(old.name, old.incarnation, "late")
    assert line.beat(Beat(new.name, new.incarnation)) == "go_on"
    assert news_for(line, old).standing == "fenced"


# ---- submit ----


def test_a_contribution_is_accepted_and_the_same_one_again_gets_the_same_answer(
    line: Transport, islands: list[SmallIsland], store: RunStore
) -> None:
    join_all(line, islands)
    sent = islands[0].contribution(plan_for(line, islands[0]))
    assert line.submit(*sent) == line.submit(*sent) == Verdict("accepted")
    one_round(line, islands[1:], 0)
    catch_up(follower_of(line), 1)
    assert line.submit(*sent) == Verdict("committed")
    assert len(records(store)) == 1
    assert len(records(store)[0].shares) == 2


def test_a_bad_payload_is_rejected_with_its_reason_and_the_round_is_repeated(
    line: Transport, islands: list[SmallIsland], store: RunStore
) -> None:
    join_all(line, islands)
    plan = plan_for(line, islands[0])
    verdict = line.submit(*islands[0].contribution(plan, islands[0].values(0, 0) / 0.0))
    assert verdict.status == "rejected"
    assert verdict.reason.startswith("values: ")
    again = news_for(line, islands[0], held=plan.lease_id).plan
    assert again is not None
    assert again.ranges == plan.ranges
    one_round(line, islands, 0)
    catch_up(follower_of(line), 1)
    assert records(store)[0].tokens["rejected"] == 64


def test_another_payload_under_the_same_key_is_a_conflict(line: Transport, islands: list[SmallIsland]) -> None:
    join_all(line, islands)
    plan = plan_for(line, islands[0])
    assert line.submit(*islands[0].contribution(plan)).status == "accepted"
    other = line.submit(*islands[0].contribution(plan, islands[0].values(0, 0) * 2))
    assert other.reason.startswith("conflict: ")


def test_who_never_joined_is_asked_to_say_hello(line: Transport, islands: list[SmallIsland]) -> None:
    join_all(line, islands)
    stranger = SmallIsland(3, JOB)
    stranger.incarnation = 1
    assert line.submit(*stranger.contribution(plan_for(line, islands[0]))) == Verdict("unknown")


# ---- follow, snapshot ----


def test_an_island_hears_of_its_plan_and_not_again_of_one_that_is_done(
    line: Transport, islands: list[SmallIsland]
) -> None:
    join_all(line, islands)
    plan = plan_for(line, islands[0])
    assert (plan.island, plan.round, plan.base_index) == (islands[0].name, 0, 0)
    news = line.follow(islands[0].name, 1, 0, 0.01, plan.lease_id)
    assert news == News("ok")


def test_a_snapshot_and_the_records_after_it_give_the_coordinators_model(
    line: Transport, islands: list[SmallIsland], store: RunStore
) -> None:
    """The small run saves a snapshot every second round and at its end."""
    join_all(line, islands)
    early = follower_of(line)
    for done in range(3):
        one_round(line, islands, done)
        catch_up(early, done + 1)
        late = follower_of(line)
        catch_up(late, done + 1)
        assert same_state(early.replica, late.replica)
        assert same_state(early.replica, restored(store, JOB))
    assert early.index == 3
    assert {record.state_digest for record in records(store)[-1:]} == {early.replica.digest(0)}
    assert line.follow("", 0, 3, PATIENCE_S).standing == "over"
    assert news_for(line, islands[0], after=3).standing == "over"


def test_a_follower_far_behind_is_given_every_record_in_order(
    line: Transport, islands: list[SmallIsland], store: RunStore
) -> None:
    join_all(line, islands)
    behind = follower_of(line)
    for done in range(3):
        one_round(line, islands, done)
        catch_up(follower_of(line), done + 1)
    catch_up(behind, 3)
    assert same_state(behind.replica, restored(store, JOB))


def test_a_backlog_is_told_in_parts(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diloco_ray.coordinator.feed.ANSWER_BYTES", 2 * JOB_PAYLOAD)
    line, islands = InMemoryTransport(coordinator_of(store, JOB)), [SmallIsland(number, JOB) for number in range(2)]
    join_all(line, islands)
    for done in range(3):
        one_round(line, islands, done)
    told = [[record.index for record, _ in line.follow("", 0, after, 0.0).records] for after in range(3)]
    assert told == [[1, 2], [2, 3], [3]]
    monkeypatch.setattr("diloco_ray.coordinator.feed.ANSWER_BYTES", 0)
    assert [record.index for record, _ in line.follow("", 0, 0, 0.0).records] == [1]


def test_measurements_are_remembered_by_their_outer_step_and_come_from_inside(line: Transport) -> None:
    assert line.measured() == set()
    if isinstance(line, Correspondents):
        with pytest.raises(RunMismatchError, match="the run's own evaluator measures it, not an island"):
            line.evaluated(2, 2, {"loss": 1.5}, "")
        assert line.measured() == set()
        return
    line.evaluated(2, 2, {"loss": 1.5}, "")
    line.evaluated(2, 2, {"loss": 1.5}, "")
    assert line.measured() == {2}


# ---- what only one of them can do ----


@pytest.mark.ray
def test_over_ray_a_follower_sleeps_until_there_is_news(
    request: pytest.FixtureRequest, islands: list[SmallIsland], folder: RunStore
) -> None:
    with opened("ray", folder, request) as line:
        join_all(line, islands)
        plans = {island.name: plan_for(line, island) for island in islands}
        heard: list[News] = []
        sleeper = threading.Thread(target=lambda: heard.append(line.follow("", 0, 0, PATIENCE_S)), daemon=True)
        sleeper.start()
        assert line.follow(islands[0].name, 1, 0, 0.2, plans[islands[0].name].lease_id) == News("ok")
        assert heard == []
        for island in islands:
            assert line.submit(*island.contribution(plans[island.name])).status == "accepted"
        sleeper.join(PATIENCE_S)
        assert [record.index for record, _ in heard[0].records] == [1]


def wait_until_gone(actor: Any) -> None:
    """A kill returns before it has killed: the first calls after it may still be answered."""
    import ray

    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            ray.get(actor.measured.remote(), timeout=PATIENCE_S)
        except ray.exceptions.RayActorError:
            return
        time.sleep(0.05)
    raise AssertionError(f"the actor still answers {PATIENCE_S:g} s after it was killed")


@pytest.mark.ray
def test_over_ray_a_dead_coordinator_is_waited_for_until_the_deadline_and_named(
    request: pytest.FixtureRequest, folder: RunStore
) -> None:
    request.getfixturevalue("cluster")
    import ray

    from diloco_ray.runtime.coordinator_actor import CoordinatorActor
    from diloco_ray.transport.ray_object_store import RayTransport

    actor = CoordinatorActor.remote(folder.url, JOB)
    ray.get(actor.measured.remote(), timeout=PATIENCE_S)
    ray.kill(actor, no_restart=True)
    wait_until_gone(actor)
    with pytest.raises(DeadlineError, match=r"did not answer 'measured' for 0\.5 s"):
        RayTransport(actor, 0.5).measured()


@pytest.mark.ray
def test_over_ray_all_who_ask_while_a_snapshot_is_read_get_one_object_of_one_read(
    request: pytest.FixtureRequest, folder: RunStore
) -> None:
    """Those who gave up and ask again too: else reads for nobody pile up before theirs. A pipe is read once."""
    import ray

    path = Path(folder.url) / "snapshots" / "00000000" / "fragment-000.safetensors"
    data = path.read_bytes()
    with opened("ray", folder, request) as line:
        actor = line._coordinator  # type: ignore[attr-defined]
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(actor.snapshot.remote(False), timeout=0.2)
        asked = [actor.snapshot.remote(False) for _ in range(8)]
        assert line.measured() == set()  # answered after the others were asked
        path.write_bytes(data)
        given = ray.get(asked, timeout=PATIENCE_S)
        assert len(set(given)) == 1
        assert ray.get(given[0], timeout=PATIENCE_S).index == 0
        path.unlink()
        path.write_bytes(data)
        later = ray.get(actor.snapshot.remote(False), timeout=PATIENCE_S)
        assert later != given[0]  # nobody keeps it
        path.write_bytes(data[:-1])
        for _ in range(2):
            with pytest.raises(CorruptionError, match="sha256"):
                line.snapshot()
        path.write_bytes(data)
        assert same_state(follower_of(line).replica, restored(folder, JOB))


@pytest.mark.ray
def test_over_ray_a_snapshot_that_went_with_its_coordinator_is_asked_for_again(
    request: pytest.FixtureRequest, folder: RunStore
) -> None:
    request.getfixturevalue("cluster")
    import ray

    from diloco_ray.runtime.coordinator_actor import CoordinatorActor
    from diloco_ray.transport.ray_object_store import RayTransport

    dead = CoordinatorActor.remote(folder.url, JOB)
    answers = [ray.get(dead.snapshot.remote(False), timeout=PATIENCE_S)]
    ray.kill(dead, no_restart=True)
    wait_until_gone(dead)
    with opened("ray", folder, request) as line:
        actor = line._coordinator  # type: ignore[attr-defined]
        answer = SimpleNamespace(remote=lambda first: answers.pop() if answers else actor.snapshot.remote(first))
        assert RayTransport(SimpleNamespace(snapshot=answer), PATIENCE_S).snapshot().index == 0
    assert answers == []


class CrowdedStore:
    """A coordinator's handle whose object store has no room for the first so many calls."""

    def __init__(self, error: Exception, num_refusals: int):
        self.error, self.num_refusals, self.num_calls = error, num_refusals, 0

    @property
    def measured(self) -> "CrowdedStore":
        return self

    def remote(self) -> set[int]:
        self.num_calls += 1
        if self.num_calls <= self.num_refusals:
            raise self.error
        return {7}


@pytest.mark.parametrize("kind", ["ObjectStoreFullError", "OutOfDiskError"])
def test_over_ray_a_full_object_store_is_waited_for_with_a_word_and_until_the_deadline(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real one fills only where spilling fails too; its errors are raised here as Ray raises them, by the call."""
    import ray

    from diloco_ray.transport.ray_object_store import RayTransport

    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    full = getattr(ray.exceptions, kind)("the store is full\nand so on")
    passing = CrowdedStore(full, 2)
    assert RayTransport(passing, PATIENCE_S).measured() == {7}
    assert passing.num_calls == 3
    told = capsys.readouterr().err.splitlines()
    assert told == [f"Ray's object store had no room for 'measured'; waiting up to {PATIENCE_S:g} s for it"]
    with pytest.raises(DeadlineError, match=r"no room for 'measured' for 0\.3 s") as caught:
        RayTransport(CrowdedStore(full, 10**6), 0.3).measured()
    assert "object_store_memory" in caught.value.remedy


def test_over_ray_what_carries_tensors_is_given_longer_each_time_and_a_sign_of_life_is_soon_given_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a slow line a payload takes longer than any fixed time. An answer to a beat that never comes must not be
    awaited until the island is given up for its silence."""
    import ray

    from diloco_ray.transport.ray_object_store import RayTransport

    asked: list[float] = []

    def get(answer: Any, timeout: float) -> Any:
        asked.append(timeout)
        if len(asked) < 4:
            raise ray.exceptions.GetTimeoutError("not yet")
        return answer

    class Anyone:
        def __getattr__(self, method: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: method)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("diloco_ray.transport.ray_object_store.PAUSE_S", 0.0)
    line: Any = RayTransport(Anyone(), PATIENCE_S, heartbeat_timeout_s=60.0)
    line.snapshot()
    assert asked == [60.0, 120.0, 240.0, 480.0]
    for say, message in ((line.beat, Beat("island-00", 1)), (line.join, Hello("island-00", "process", 1, "here"))):
        asked.clear()
        say(message)
        assert asked == [15.0] * 4
    asked.clear()
    patient: Any = RayTransport(Anyone(), PATIENCE_S, heartbeat_timeout_s=3600.0)
    patient.beat(Beat("island-00", 1))
    assert asked == [60.0] * 4


def test_in_memory_a_coordinator_that_does_not_judge_at_once_is_an_error(
    islands: list[SmallIsland], folder: RunStore
) -> None:
    line: Any = InMemoryTransport(Coordinator(folder, JOB, later=lambda job: None, holder="test", pid=1))
    join_all(line, islands)
    with pytest.raises(DeadlineError, match="did not judge"):
        line.submit(*islands[0].contribution(plan_for(line, islands[0])))
