"""What a coordinator with a real store does with contributions that are wrong, late, or sent twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diloco_ray.coordination.messages import Contribution, InnerPlan, Verdict
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.protocol import Beat
from tests.small_run import Life, SmallIsland, begun, join_all, records, restored, small_job

Sent = tuple[Contribution, np.ndarray]


class Room:
    """A coordinator and two islands that have committed one round, so that there is a norm to compare with."""

    def __init__(self, folder: Path, job: CoordinatorJob | None = None):
        self.job = job or small_job(num_islands=2)
        self.store = begun(RunStore(str(folder / "run")), self.job)
        self.life = Life(self.store, self.job)
        self.good, self.bad = SmallIsland(0, self.job), SmallIsland(1, self.job)
        join_all(self.life.coordinator, [self.good, self.bad])
        self.one_round()

    def one_round(self) -> None:
        for island in (self.good, self.bad):
            assert self.send_honestly(island).status == "accepted"

    def send_honestly(self, island: SmallIsland) -> Verdict:
        return self.life.submit(*island.contribution(self.life.plan_of(island)))


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def with_nan(island: SmallIsland, plan: InnerPlan) -> Sent:
    values = island.values(plan.round, 0)
    values[7] = torch.nan
    return island.contribution(plan, values)


def with_infinity(island: SmallIsland, plan: InnerPlan) -> Sent:
    values = island.values(plan.round, 0)
    values[-1] = -torch.inf
    return island.contribution(plan, values)


def truncated(island: SmallIsland, plan: InnerPlan) -> Sent:
    header, payload = island.contribution(plan)
    return header, payload[:-4]


def announced_too_short(island: SmallIsland, plan: InnerPlan) -> Sent:
    return island.contribution(plan, island.values(plan.round, 0)[:-1])


def of_another_codec(island: SmallIsland, plan: InnerPlan) -> Sent:
    return island.contribution(plan, codec="int4")


def in_another_type(island: SmallIsland, plan: InnerPlan) -> Sent:
    header, payload = island.contribution(plan)
    return header, payload.view(np.int8)


def in_another_shape(island: SmallIsland, plan: InnerPlan) -> Sent:
    header, payload = island.contribution(plan)
    return header, payload.reshape(-1, 2)


def with_a_flipped_bit(island: SmallIsland, plan: InnerPlan) -> Sent:
    header, payload = island.contribution(plan)
    payload = payload.copy()
    payload[100] ^= 1
    return header, payload


def with_a_huge_norm(island: SmallIsland, plan: InnerPlan) -> Sent:
    return island.contribution(plan, island.values(plan.round, 0) * 1e6)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_nan, "values: the norm of the outer gradient is nan"),
        (with_infinity, "values: the norm of the outer gradient is inf"),
        (truncated, "form: uint8 (4860,), announced were 4864 bytes"),
        (announced_too_short, "schema: 4860 bytes of float32 where 4864 bytes of float32 belong"),
        (of_another_codec, "schema: 4864 bytes of int4 where 4864 bytes of float32 belong"),
        (in_another_shape, "form: uint8 (2432, 2), announced were 4864 bytes"),
        (in_another_type, "form: int8 (4864,), announced were 4864 bytes"),
        (with_a_flipped_bit, "digest: the payload is not what its header says"),
        (with_a_huge_norm, "norm: "),
    ],
)
def test_a_bad_payload_is_refused_with_its_reason_and_the_run_goes_on(
    room: Room, spoil: Callable[[SmallIsland, InnerPlan], Sent], reason: str
) -> None:
    life, bad = room.life, room.bad
    plan = life.plan_of(bad)
    verdict = life.submit(*spoil(bad, plan))
    assert verdict.status == "rejected"
    assert verdict.reason.startswith(reason)
    assert f"{bad.name}: contribution rejected (strike 1): {reason}" in life.notes()
    assert life.coordinator.state.ledger.account()["rejected"] == 64

    again = life.plan_of(bad)
    assert again.ranges == plan.ranges
    assert again.lease_id != plan.lease_id
    room.one_round()
    assert [len(record.shares) for record in records(room.store)] == [2, 2]
    assert bool(restored(room.store, room.job).parameters(0).isfinite().all())


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"run_id": "another"}, "foreign: run another contributed to run 555"),
        ({"protocol_version": 99}, "protocol: version 99 offered, 1 spoken"),
        ({"fragment": 1}, "schema: fragment 1 of 1"),
        ({"incarnation": 7}, "fenced: incarnation 7 of island-01 is not the current one"),
        ({"base_version": 5}, "stale: based on version 5, fragment 0 is at 1"),
        ({"base_version": 0}, "stale: based on version 0, round 2 begins at 1"),
        ({"base_version": -1}, "stale: based on version -1, fragment 0 is at 1"),
        ({"round": 2}, "stale: based on version 1, round 3 begins at 2"),
        ({"round": -1}, "stale: a contribution to round 1 is committed, this one is for round 0"),
        ({"lease_id": "9.9"}, "lease: 9.9 is not held by island-01"),
    ],
)
def test_what_is_not_awaited_is_refused_without_a_strike(room: Room, lie: dict[str, object], reason: str) -> None:
    life, bad = room.life, room.bad
    header, payload = bad.contribution(life.plan_of(bad))
    verdict = life.submit(replace(header, **lie), payload)  # type: ignore[arg-type]
    assert verdict.status == "rejected"
    assert verdict.reason.startswith(reason)
    assert life.coordinator.state.members[bad.name].strikes == 0
    assert life.coordinator._payloads == {}
    room.one_round()
    assert len(records(room.store)) == 2


def test_three_bad_payloads_in_a_row_bar_the_island_and_the_others_go_on(room: Room) -> None:
    life, bad = room.life, room.bad
    for _ in range(3):
        assert life.submit(*with_nan(bad, life.plan_of(bad))).status == "rejected"
    assert life.coordinator.state.members[bad.name].standing == "quarantined"
    assert "quarantined" in bad.join(life.coordinator)
    assert room.send_honestly(room.good).status == "accepted"
    assert [len(record.shares) for record in records(room.store)] == [2, 1]


def test_the_same_contribution_sent_again_gets_the_same_verdict_and_counts_once(room: Room) -> None:
    life = room.life
    sent = room.bad.contribution(life.plan_of(room.bad))
    assert life.submit(*sent) == life.submit(*sent) == Verdict("accepted")
    assert room.send_honestly(room.good).status == "accepted"
    for _ in range(100):
        assert life.submit(*sent) == Verdict("committed")
    assert [share.island for share in records(room.store)[1].shares] == [room.good.name, room.bad.name]
    assert life.coordinator._payloads == {}


def test_another_payload_under_the_same_key_is_a_conflict_and_the_first_one_counts(room: Room) -> None:
    life, bad = room.life, room.bad
    plan = life.plan_of(bad)
    first, payload = bad.contribution(plan)
    assert life.submit(first, payload).status == "accepted"
    other = bad.contribution(plan, bad.values(plan.round, 0) * 1.5)
    assert life.submit(*other).reason == "conflict: another payload with this key is accepted"
    room.send_honestly(room.good)
    assert life.submit(*other).reason == "conflict: another payload with this key is committed"
    assert records(room.store)[1].shares[1].payload_sha256 == first.payload_sha256


def test_a_contribution_is_copied_before_it_is_accepted(room: Room) -> None:
    """What came may lie in memory that its island changes or takes with it."""
    life = room.life
    header, payload = room.bad.contribution(life.plan_of(room.bad))
    assert life.submit(header, payload).status == "accepted"
    payload[:] = 255
    room.send_honestly(room.good)
    assert records(room.store)[1].shares[1].payload_sha256 == header.payload_sha256
    assert bool(restored(room.store, room.job).parameters(0).isfinite().all())


def overtaken(folder: Path, **fields: object) -> tuple[Room, InnerPlan, int]:
    """The bad island's plan and its base, from which the fragment has moved on by two outer steps of the good one."""
    room = Room(folder, small_job(num_islands=2, num_rounds=9, max_staleness=1, launch_interval_s=0.0, **fields))
    coordinator = room.life.coordinator
    plan, base = room.life.plan_of(room.bad), coordinator.state.versions[0]
    for _ in range(2):
        sent = room.good.contribution(room.life.plan_of(room.good), base_version=coordinator.state.versions[0])
        assert room.life.submit(*sent).status == "accepted"
        coordinator.tick()
        room.life.settle()
    assert coordinator.state.versions[0] == base + 2
    return room, plan, base


@pytest.mark.parametrize(
    "fields", [{"closes": "arrival"}, {"closes": "quorum", "quorum": 1, "overlap": 1, "grace_share": 0.0}]
)
def test_work_from_a_base_that_is_too_old_is_given_up_and_its_data_leased_again(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    """Or its island would wait for an outer step that never comes."""
    room, plan, base = overtaken(tmp_path, **fields)
    life, bad = room.life, room.bad
    verdict = life.submit(*bad.contribution(plan, base_version=base))
    assert verdict == Verdict("rejected", "stale: its base is 2 outer steps old, of 1")
    assert life.coordinator.beat(Beat(bad.name, bad.incarnation, plan.lease_id)) == "abandon"
    assert life.coordinator.state.members[bad.name].strikes == 0
    again = life.plan_of(bad)
    assert (again.round, again.ranges) == (plan.round, plan.ranges)
    assert life.submit(*bad.contribution(again, base_version=base + 1)).status == "accepted"


def test_what_is_said_in_the_name_of_an_island_does_not_end_its_work(tmp_path: Path) -> None:
    """By an older process of it, in another run, of a fragment that there is not."""
    room, plan, base = overtaken(tmp_path, closes="arrival")
    header, payload = room.bad.contribution(plan, base_version=base)
    for lie in ({"incarnation": 0}, {"run_id": "another"}, {"fragment": 1}, {"fragment": -1}):
        assert room.life.submit(replace(header, **lie), payload).status == "rejected"  # type: ignore[arg-type]
        assert room.life.plan_of(room.bad) == plan


def test_who_was_never_heard_of_is_asked_to_say_hello(room: Room) -> None:
    stranger = SmallIsland(2, room.job)
    stranger.incarnation = 1
    assert room.life.submit(*stranger.contribution(room.life.plan_of(room.bad))) == Verdict("unknown")


def test_after_the_end_what_is_late_is_refused_and_what_was_committed_is_known(tmp_path: Path) -> None:
    room = Room(tmp_path, small_job(num_islands=2, num_rounds=2))
    plan = room.life.plan_of(room.bad)
    committed = room.bad.contribution(plan)
    room.one_round()
    assert room.life.coordinator.state.phase == "succeeded"
    assert room.life.submit(*committed) == Verdict("committed")
    late = room.bad.contribution(plan, round=7)
    assert room.life.submit(*late) == Verdict("rejected", "over: the run has succeeded")
    assert room.life.coordinator._payloads == {}
