"""The exchange of one island: what is sent is sent once and kept until its fate is known; what comes is merged in turn.

Once without threads, against a coordinator or a script; then with its two threads.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_
from diloco_ray.coordination.messages import DataRange, InnerPlan, Verdict
from diloco_ray.errors import ClusterError, DeadlineError, FencedError
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.job import RoundAbandonedError, RunOverError
from diloco_ray.log.record import Record
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.protocol import Bytes, News, SnapshotState, told
from tests.island.exchange_room import (
    METRICS,
    PATIENCE_S,
    Room,
    Script,
    SeenThreads,
    coordinator_of,
    held_by,
    identity,
    island_job,
    shapes_of,
    wait_for,
)
from tests.small_run import RUN_ID, SmallIsland, begun, join_all, new_replica, records, restored, small_job

PLAN = InnerPlan("island-00", 1, "1.1", 0, 0, 6, 0, 0, 1, (DataRange(0, 0, 0, 24),))


def plan(lease_id: str, round: int) -> InnerPlan:
    return replace(PLAN, lease_id=lease_id, round=round)


def values_in(payload: Bytes, num_values: int) -> Tensor:
    """Of a float32 payload."""
    return torch.from_numpy(payload.copy()).view(torch.float32)[:num_values]


JOB = replace(small_job(3, num_rounds=20), expected=("island-01", "island-02"))
Played = tuple[SnapshotState, list[tuple[Record, Bytes]]]


def begin_of(folder: Path, num_rounds: int = 0) -> Played:
    """A run of island-01 and island-02: its beginning, and its first records, one a round."""
    coordinator = coordinator_of(begun(RunStore(str(folder / "played")), JOB), JOB)
    snapshot = coordinator.snapshot()
    islands = [SmallIsland(number, JOB) for number in (1, 2)]
    join_all(coordinator, islands)
    for _ in range(num_rounds):
        for island in islands:
            (plan,) = coordinator.state.plans[island.name]
            assert coordinator.submit(*island.contribution(plan)).status == "accepted"
    news = told(coordinator, "", 0, 0, "")
    return snapshot, list(news.records) if news else []


def started(line: Any, **sync: Any) -> Exchange:
    """island-00, which is not part of that run's records."""
    exchange = Exchange(island_job(JOB, **sync), identity(0), line, SeenThreads())
    exchange.start()
    return exchange


def post(exchange: Exchange, plan: InnerPlan, values: Tensor | None = None) -> None:
    """values: of the model after training, zeros without."""
    fragment = JOB.layout.fragments[0]
    tensors = {name: torch.zeros(shape) for name, shape in shapes_of(fragment).items()}
    if values is not None:
        fragment.scatter_(values, tensors)
    exchange.post(plan, fragment, tensors, plan.inner_steps, METRICS)


# ---- sending ----


def test_what_is_posted_is_sent_at_once_with_its_header(tmp_path: Path) -> None:
    room = Room(tmp_path)
    one, _ = room.exchanges
    plan = room.begin(one)
    room.post(one, plan)
    ((header, payload),) = room.line.sent
    assert (header.run_id, header.island, header.incarnation) == (RUN_ID, "island-00", 1)
    assert (header.fragment, header.round, header.base_version, header.inner_steps) == (0, 0, 0, 2)
    assert (header.lease_id, header.codec, header.payload_bytes) == (plan.lease_id, "float32", payload.size)
    sent = values_in(payload, room.fragments[0].num_values)
    assert torch.equal(sent, one.base[0] - (one.base[0] + 0.01))  # old minus new
    assert header.metrics == {**METRICS, "norm": pytest.approx(sent.norm().item()), "relative_error": 0.0}
    assert (header.fragment, header.round, header.island) in room.coordinator.state.inbox


def test_a_contribution_is_kept_until_its_outer_step_is_known(tmp_path: Path) -> None:
    room = Room(tmp_path)
    one, other = room.exchanges
    plan, others = room.begin(one), room.begin(other)
    room.post(one, plan)
    assert one.payload_of(plan, 0) is not None
    assert one.payload_of(plan, 0).numpy().tobytes() == room.line.sent[0][1].tobytes()  # type: ignore[union-attr]
    one.poll()
    assert not one.is_settled(0, 0)
    assert held_by(one) == (plan,)
    room.post(other, others)
    one.poll()
    assert one.is_settled(0, 0)
    assert one.payload_of(plan, 0) is None
    one.plan = None  # as the worker does when its inner steps are taken
    assert [held.round for held in held_by(one)] == [1]  # the next one has come with the record
    assert torch.equal(one.fetch(0), restored(room.store, room.job).parameters(0))
    assert one.base_versions == [1]


def test_a_restarted_coordinator_hears_of_the_work_and_gets_the_same_contribution_again(tmp_path: Path) -> None:
    room = Room(tmp_path)
    one, other = room.exchanges
    plan, others = room.begin(one), room.begin(other)
    room.post(one, plan)
    one.plan = None
    room.restart_coordinator()
    one.poll()  # it hears that it is to come back, and does
    assert room.line.hellos[-1].held == (plan,)
    assert room.line.hellos[-1].incarnation == 1
    one.poll()
    assert [header for header, _ in room.line.sent] == [room.line.sent[0][0]] * 2
    assert room.line.sent[0][1].tobytes() == room.line.sent[1][1].tobytes()
    one.poll()
    assert len(room.line.sent) == 2
    room.post(other, others)  # whose first word to the new coordinator this is
    one.poll()
    assert one.is_settled(0, 0)
    assert [share.island for share in records(room.store)[0].shares] == ["island-00", "island-01"]
    assert records(room.store)[0].tokens["expired"] == 0


def test_whoever_forgets_this_island_ten_times_in_a_row_is_given_up(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    line.verdict = Verdict("unknown")
    exchange = started(line)
    with pytest.raises(ClusterError, match="forgot this island ten times"):
        post(exchange, PLAN)
    assert len(line.sent) == 10


def test_a_bad_contribution_ends_its_plan_and_the_next_one_has_the_same_data(tmp_path: Path) -> None:
    room = Room(tmp_path)
    one, _ = room.exchanges
    plan = room.begin(one)
    room.post(one, plan, by=float("nan"))
    with pytest.raises(RoundAbandonedError):
        one.check(plan)
    one.abandon(plan)
    assert held_by(one) == ()
    again = room.begin(one)
    assert (again.round, again.ranges) == (plan.round, plan.ranges)
    one.check(again)
    room.post(one, again)
    assert room.coordinator.state.inbox[0, 0, "island-00"].contribution.lease_id == again.lease_id


def test_a_refusal_that_leaves_the_lease_ends_nothing_and_is_not_repeated(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    line.verdict = Verdict("rejected", "stale: fragment 0 has closed it")
    exchange = started(line)
    post(exchange, PLAN)
    exchange.check(PLAN)
    assert exchange.payload_of(PLAN, 0) is None
    line.news.append(News("rejoin"))
    for _ in range(3):
        exchange.poll()
    assert len(line.sent) == 1


def test_what_there_was_no_room_for_is_sent_again_until_there_is_and_no_more(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    line.verdict = Verdict("full", "100 of 100 bytes are taken")
    exchange = started(line)
    post(exchange, PLAN)
    exchange.poll()
    assert line.sent == [line.sent[0]] * 2
    assert held_by(exchange) == (PLAN,)
    line.verdict = Verdict("accepted")
    for _ in range(3):
        exchange.poll()
    assert line.sent == [line.sent[0]] * 3


# ---- plans ----


def hear_of(exchange: Exchange, line: Script, *plans: InnerPlan) -> None:
    for plan in plans:
        line.news.append(News("ok", plan=plan))
        exchange.poll()


def test_plans_are_given_in_the_order_in_which_they_came_each_once(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    exchange = started(line)
    assert exchange.next_plan() is None
    hear_of(exchange, line, plan("1.1", 0), plan("1.2", 1))
    assert line.held[-1] == "1.1"  # the newest that is known
    assert exchange.next_plan() == exchange.plan == plan("1.1", 0)
    hear_of(exchange, line, plan("1.2", 1))
    assert line.held[-1] == "1.2"
    assert exchange.next_plan() == exchange.plan == plan("1.2", 1)
    assert exchange.next_plan() is None


def test_a_plan_for_a_round_that_was_planned_already_replaces_what_was_planned(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    exchange = started(line)
    hear_of(exchange, line, plan("1.1", 4), plan("1.2", 5))
    begun = exchange.next_plan()
    assert begun == plan("1.1", 4)
    assert held_by(exchange) == (plan("1.1", 4), plan("1.2", 5))
    exchange.check(begun)
    hear_of(exchange, line, plan("1.3", 4))
    with pytest.raises(RoundAbandonedError):
        exchange.check(begun)
    assert held_by(exchange) == (plan("1.3", 4),)
    exchange.abandon(begun)
    assert exchange.next_plan() == plan("1.3", 4)
    exchange.check(plan("1.3", 4))
    assert exchange.next_plan() is None


def test_a_later_plan_leaves_the_work_in_hand_alone(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    exchange = started(line)
    hear_of(exchange, line, plan("1.1", 4))
    first = exchange.next_plan()
    hear_of(exchange, line, plan("1.2", 5))
    assert first is not None
    exchange.check(first)


def test_a_run_that_is_over_and_a_lost_name_end_the_work(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    exchange = started(line)
    line.news.extend([News("fenced", reason="island-00 is held by another process"), News("over")])
    with pytest.raises(FencedError, match="held by another process"):
        exchange.poll()
    exchange.poll()
    with pytest.raises(RunOverError):
        exchange.check(PLAN)


def test_whoever_has_left_says_no_hello_however_it_is_asked(tmp_path: Path) -> None:
    line = Script(begin_of(tmp_path)[0])
    exchange = started(line)
    num_hellos = len(line.hellos)
    exchange.stop()
    line.news.append(News("rejoin"))
    exchange.poll()
    assert len(line.hellos) == num_hellos


# ---- merging ----


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return begin_of(tmp_path, num_rounds=3)


def parameters_after(played: Played, num_records: int) -> Tensor:
    replica = new_replica(JOB)
    state, found = played
    replica.load_(0, 0, torch.from_numpy(state.parameters[0].copy()), [torch.from_numpy(b) for b in state.buffers[0]])
    for _, payload in found[:num_records]:
        replica.apply(0, torch.from_numpy(payload.copy()))
    return replica.parameters(0)


def test_what_is_aimed_at_is_merged_though_later_outer_steps_have_come(played: Played) -> None:
    line = Script(played[0])
    exchange = started(line)
    assert torch.equal(exchange.fetch(0), parameters_after(played, 0))
    exchange.aim(0, 0)
    line.news.append(News("ok", tuple(played[1])))
    exchange.poll()
    assert exchange.index == 3
    assert exchange.is_settled(0, 0)
    assert not exchange.is_settled(0, 1)  # received, not yet replayed
    assert (exchange.has_closed(0, 2), exchange.has_closed(0, 3)) == (True, False)
    for round, version in ((0, 1), (1, 2), (None, 3)):
        exchange.aim(0, round)
        assert exchange.arrived() == [0]
        assert torch.equal(exchange.fetch(0), parameters_after(played, version))
        assert exchange.base_versions == [version]
        assert exchange.arrived() == []


def test_without_an_aim_the_newest_outer_step_is_at_hand_and_nothing_is_fetched_by_itself(played: Played) -> None:
    line = Script(played[0])
    exchange = started(line)
    exchange.fetch(0)
    line.news.append(News("ok", tuple(played[1])))
    exchange.poll()
    assert torch.equal(exchange.base[0], parameters_after(played, 0))
    assert torch.equal(exchange.fetch(0), parameters_after(played, 3))


def test_where_nobody_goes_in_step_there_is_nothing_to_aim_at(played: Played) -> None:
    line = Script(played[0])
    exchange = started(line, closes="quorum", overlap=2)
    exchange.aim(0, 0)
    line.news.append(News("ok", tuple(played[1])))
    exchange.poll()
    assert not exchange.has_closed(0, 0)
    assert torch.equal(exchange.fetch(0), parameters_after(played, 3))


def test_where_nobody_goes_in_step_only_the_own_commit_settles_a_contribution(played: Played) -> None:
    snapshot, found = played
    line = Script(snapshot)
    exchange = started(line, closes="arrival")
    exchange.fetch(0)
    post(exchange, PLAN)
    line.news.extend(News("ok", (item,)) for item in found[:2])
    exchange.poll()
    exchange.poll()
    assert exchange.payload_of(PLAN, 0) is not None
    assert not exchange.is_settled(0, 0)
    (record, payload), own = found[2], replace(found[2][0].shares[0], island="island-00", round=0)
    line.news.append(News("ok", ((replace(record, shares=(own,)), payload),)))
    exchange.poll()
    assert exchange.is_settled(0, 0)
    assert exchange.payload_of(PLAN, 0) is None


OF_AN_EARLIER_LIFE = [
    Verdict("committed"),
    Verdict("rejected", "conflict: another payload with this key is committed"),
    Verdict("rejected", "stale: a contribution to round 2 is committed, this one is for round 1"),
]


@pytest.mark.parametrize("verdict", OF_AN_EARLIER_LIFE, ids=lambda verdict: verdict.reason[:8] or verdict.status)
def test_what_an_earlier_life_contributed_before_the_snapshot_is_not_waited_for(
    played: Played, verdict: Verdict
) -> None:
    line = Script(played[0])
    exchange = started(line, closes="quorum", quorum=2)
    exchange.fetch(0)
    line.verdict = verdict
    post(exchange, PLAN)
    exchange.check(PLAN)
    assert not exchange.is_settled(0, 0)
    line.news.append(News("ok", tuple(played[1])))  # it might have been among these, which are on their way
    exchange.poll()
    assert not exchange.is_settled(0, 0)
    exchange.poll()
    assert exchange.is_settled(0, 0)
    assert (exchange.has_closed(0, 0), exchange.has_closed(0, 1)) == (True, False)
    assert held_by(exchange) == ()
    exchange.bell.wait(0.0)
    rings = exchange.bell.num_rings
    exchange.poll()
    assert (len(line.sent), exchange.bell.num_rings) == (1, rings)


def test_what_is_refused_with_its_plan_is_trained_and_sent_again(played: Played) -> None:
    line = Script(played[0])
    exchange = started(line, closes="quorum", quorum=2)
    exchange.fetch(0)
    line.verdict, line.order = Verdict("rejected", "values: the norm of the outer gradient is nan"), "abandon"
    post(exchange, PLAN)
    with pytest.raises(RoundAbandonedError):
        exchange.check(PLAN)
    exchange.abandon(PLAN)
    exchange.poll()
    assert not exchange.has_closed(0, 0)


def test_what_a_coordinator_refused_that_then_died_is_judged_by_the_next_one(played: Played) -> None:
    """Whether the plan was void by then, the next one cannot know: it is told of the plan as of work in hand."""
    line = Script(played[0])
    exchange = started(line, closes="quorum", quorum=2)
    exchange.fetch(0)
    line.verdict, line.order = Verdict("rejected", "values: the norm of the outer gradient is nan"), "rejoin"
    post(exchange, PLAN)
    line.news.append(News("rejoin"))
    exchange.poll()
    assert line.hellos[-1].held == (PLAN,)
    line.order = "abandon"
    exchange.poll()
    assert len(line.sent) == 2
    with pytest.raises(RoundAbandonedError):
        exchange.check(PLAN)


@pytest.mark.parametrize(("anchor", "version"), [("base", 0), ("present", 3)])
def test_an_outer_gradient_is_measured_from_its_anchor(played: Played, anchor: str, version: int) -> None:
    line = Script(played[0])
    exchange = started(line, closes="quorum", overlap=2, anchor=anchor)
    exchange.fetch(0)
    line.news.append(News("ok", tuple(played[1])))
    exchange.poll()
    values = parameters_after(played, 0) + 0.25
    post(exchange, PLAN, values)
    assert line.sent[0].base_version == version
    assert torch.equal(values_in(line.payloads[0], values.numel()), parameters_after(played, version) - values)


# ---- error feedback ----


def test_what_a_codec_loses_is_sent_with_the_next_round_and_is_safe_before_anything_is_sent(played: Played) -> None:
    line = Script(played[0])
    exchange = started(line, uplink="int4", error_feedback=0.5)
    base = exchange.fetch(0).clone()
    told: list[tuple[int, int, int, Tensor]] = []
    exchange.on_encoded = lambda plan, p: told.append((plan.round, p, len(line.sent), exchange.residuals[p].clone()))
    generator = torch.Generator().manual_seed(1)
    codec, expected = get_codec("int4"), torch.zeros_like(base)
    for round in range(2):
        values = base + 0.01 * torch.randn(base.shape, generator=generator)
        post(exchange, plan(f"1.{round}", round), values)
        payload = torch.empty(codec.num_bytes(base.numel()), dtype=torch.uint8)
        encode_outer_gradient_(base, values, codec, payload, expected, 0.5)
        assert line.payloads[round].tobytes() == payload.numpy().tobytes()
        assert told[round][:3] == (round, 0, round)
        assert torch.equal(told[round][3], expected)
    assert expected.abs().max() > 0


# ---- with threads ----


@pytest.fixture
def threads() -> Iterator[Callable[[Exchange], Exchange]]:
    running: list[Exchange] = []

    def run(exchange: Exchange) -> Exchange:
        exchange.start_threads(1.0)
        running.append(exchange)
        return exchange

    yield run
    for exchange in running:
        exchange.stop()
    for thread in [thread for exchange in running for thread in exchange._threads.all]:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


Start = Callable[[Exchange], Exchange]


def settle(exchange: Exchange, round: int) -> None:
    """As a training thread waits."""
    for _ in range(1000):
        if exchange.is_settled(0, round):
            return
        exchange.check()
        exchange.wait(PATIENCE_S)
    raise AssertionError("told a thousand times, and never settled")


def test_rounds_go_by_with_threads_and_over_a_restart_of_the_coordinator(tmp_path: Path, threads: Start) -> None:
    room = Room(tmp_path)
    for exchange in room.exchanges:
        threads(exchange)
    for round in range(3):
        plans = [room.begin(exchange) for exchange in room.exchanges]
        room.post(room.exchanges[0], plans[0])
        wait_for(lambda number=round: len(room.line.sent) > number)
        if round == 1:
            wait_for(lambda: room.coordinator.state.inbox != {})
            room.restart_coordinator()
        room.post(room.exchanges[1], plans[1])
        for exchange in room.exchanges:
            exchange.plan = None
            settle(exchange, round)
            exchange.fetch(0)
        assert [len(record.shares) for record in records(room.store)] == [2] * (round + 1)
    wait_for(lambda: all(exchange.over for exchange in room.exchanges))
    final = restored(room.store, room.job).parameters(0)
    assert all(torch.equal(exchange.base[0], final) for exchange in room.exchanges)
    tokens = records(room.store)[-1].tokens
    assert tokens["committed"] == 3 * 2 * 64


def test_rounds_go_by_with_threads_though_there_is_room_for_hardly_anything(tmp_path: Path, threads: Start) -> None:
    """One island sends its next round before the other has sent this one, as it may with a whole round of overlap."""
    room = Room(tmp_path, overlap=2, max_inbox_bytes=0)
    ahead, behind = room.exchanges
    for exchange in room.exchanges:
        threads(exchange)
    for round in range(2):
        room.post(ahead, room.begin(ahead))
        wait_for(lambda number=round: len(room.line.sent) > number)
    assert "contribution to fragment 0, round 2, waits: 4,864 of 0 bytes" in str(room.coordinator.report.own_events)
    for _ in range(2):
        room.post(behind, room.begin(behind))
    wait_for(lambda: room.coordinator.state.index == 2)
    assert [[share.round for share in record.shares] for record in records(room.store)] == [[0, 0], [1, 1]]


class Gate:
    """Holds the sending thread where a contribution is encoded, and not yet sent."""

    def __init__(self, exchange: Exchange):
        self.reached, self.open = threading.Event(), threading.Event()
        exchange.on_encoded = self._hold

    def _hold(self, plan: InnerPlan, fragment: int) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE_S)


def test_a_base_is_not_overwritten_before_what_is_measured_from_it_is_encoded(tmp_path: Path, threads: Start) -> None:
    room = Room(tmp_path, num_islands=1, num_fragments=2)
    (exchange,) = room.exchanges
    plan = room.begin(exchange)
    gate = Gate(threads(exchange))
    room.post(exchange, plan, 0)
    assert gate.reached.wait(PATIENCE_S)
    assert not exchange.is_encoded(0)
    assert exchange.is_encoded(1)
    assert exchange.payload_of(plan, 0) is None
    assert not exchange.is_settled(0, 0)
    assert exchange.arrived() == []
    assert room.line.sent == []
    gate.open.set()
    wait_for(lambda: exchange.is_encoded(0))
    settle(exchange, 0)
    assert len(room.line.sent) == 1


def test_posting_does_not_wait_for_what_is_being_sent(tmp_path: Path, threads: Start) -> None:
    room = Room(tmp_path, num_islands=1, num_fragments=2)
    (exchange,) = room.exchanges
    plan = room.begin(exchange)
    gate = Gate(threads(exchange))
    room.post(exchange, plan, 0)
    room.post(exchange, plan, 1, by=0.02)
    assert not exchange.is_encoded(1)
    gate.open.set()
    settle(exchange, 0)
    wait_for(lambda: len(records(room.store)) == 2)
    assert [header.fragment for header, _ in room.line.sent] == [0, 1]


def test_an_island_that_is_told_to_go_sends_what_is_posted_before(tmp_path: Path, threads: Start) -> None:
    room = Room(tmp_path, num_islands=1)
    (exchange,) = room.exchanges
    plan = room.begin(exchange)
    gate = Gate(threads(exchange))
    room.post(exchange, plan)
    assert gate.reached.wait(PATIENCE_S)
    gate.open.set()
    exchange.stop(PATIENCE_S)
    assert [header.round for header, _ in room.line.sent] == [0]


def test_a_plan_abandoned_while_it_is_encoded_is_not_sent_and_is_waited_for(tmp_path: Path, threads: Start) -> None:
    """Its base, values and residual are in use until then."""
    room = Room(tmp_path, num_islands=1)
    (exchange,) = room.exchanges
    plan = room.begin(exchange)
    gate = Gate(threads(exchange))
    room.post(exchange, plan)
    assert gate.reached.wait(PATIENCE_S)
    exchange.void(plan.lease_id)
    exchange.abandon(plan)
    assert not exchange.is_encoded(0)
    assert held_by(exchange) == ()
    gate.open.set()
    wait_for(lambda: exchange.is_encoded(0))
    assert room.line.sent == []


@pytest.mark.parametrize("error", [DeadlineError("silent for 600 s"), RuntimeError("a broken line")])
def test_an_error_of_the_sending_thread_reaches_the_training_thread(
    tmp_path: Path, threads: Start, error: Exception
) -> None:
    room = Room(tmp_path)
    exchange = threads(room.exchanges[0])
    plan = room.begin(exchange)
    room.line.error = error
    room.post(exchange, plan)
    with pytest.raises(type(error), match=str(error)):
        settle(exchange, 0)
    with pytest.raises(type(error), match=str(error)):
        exchange.next_plan()


def test_an_error_of_the_listening_thread_reaches_the_training_thread(tmp_path: Path, threads: Start) -> None:
    line = Script(begin_of(tmp_path)[0])
    exchange = started(line)
    line.news.append(News("fenced", reason="island-00 is held by another process"))
    threads(exchange)
    with pytest.raises(FencedError, match="held by another process"):
        settle(exchange, 0)


def test_waiting_ends_at_once_where_something_was_heard_since_and_shows_while_it_lasts(
    tmp_path: Path, threads: Start
) -> None:
    line = Script(begin_of(tmp_path)[0])
    exchange = threads(started(line))
    exchange.void("0.0")
    exchange.wait(PATIENCE_S)
    shown: list[bool] = []

    def tell() -> None:
        wait_for(lambda: exchange.is_waiting)
        shown.append(exchange.is_waiting)
        exchange.void("0.1")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    exchange.wait(PATIENCE_S)
    teller.join(PATIENCE_S)
    assert shown == [True]
    assert not exchange.is_waiting
