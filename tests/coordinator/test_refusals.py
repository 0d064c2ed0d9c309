"""What a coordinator with a real store does with contributions that are wrong, late, or sent twice."""

import gzip
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diloco_ray.coordination.messages import Contribution, InnerPlan, Verdict
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.ids import canonical_json, sha256_hex
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.protocol import Beat
from tests.memory import measured
from tests.small_run import METRICS, SHAPES, Life, SmallIsland, begun, join_all, records, restored, small_job

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


# ---- the table: every kind of bad contribution, what is said to it, and whether it is a strike ----


class Code:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def sent(room: Room, **fields: object) -> Sent:
    """What the bad island would honestly send, but for these fields of the header."""
    header, payload = room.bad.contribution(room.life.plan_of(room.bad))
    return replace(header, **fields), payload  # type: ignore[arg-type]


def of_values(room: Room, change: Callable[[torch.Tensor], torch.Tensor]) -> Sent:
    plan = room.life.plan_of(room.bad)
    return room.bad.contribution(plan, change(room.bad.values(plan.round, 0)))


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values.index_fill(0, torch.tensor([7]), value)


def of_payload(room: Room, change: Callable[[np.ndarray], np.ndarray]) -> Sent:
    """A header that tells of another payload than what comes with it."""
    header, payload = sent(room)
    return header, change(payload.copy())


def flip_a_bit(payload: np.ndarray) -> np.ndarray:
    payload[100] ^= 1
    return payload


def pickled(room: Room, size: int | None = None) -> Sent:
    """A header that is right about it: the size, if one is given, and the digest."""
    data = pickle.dumps(Code(f"{room.store.url}/pwned"))
    payload = np.frombuffer(data.ljust(size or 0, b"~"), np.uint8)
    return sent(room, payload_sha256=sha256_hex(payload.data), payload_bytes=payload.size)[0], payload


def zipped(room: Room, num_zeros: int, size: int = 0) -> Sent:
    """As above, of so many zeros."""
    payload = np.frombuffer(gzip.compress(bytes(num_zeros)).ljust(size, b"~"), np.uint8)
    return sent(room, payload_sha256=sha256_hex(payload.data), payload_bytes=payload.size)[0], payload


@dataclass(frozen=True)
class Row:
    make: Callable[[Room], Sent]
    reason: str  # how it begins; "": it is accepted, and counts once with the weight of its lease
    is_strike: bool = False


VALUES = "values: the norm of the outer gradient is"
TABLE: dict[str, Row] = {
    "not a number": Row(
        lambda r: of_values(r, with_one(math.nan)), "values: the norm of the outer gradient is nan", True
    ),
    "infinite": Row(lambda r: of_values(r, with_one(-math.inf)), f"{VALUES} inf", True),
    "huge": Row(lambda r: of_values(r, lambda values: values * 1e6), "norm: ", True),
    "all zero": Row(lambda r: of_values(r, torch.zeros_like), ""),
    "one value short": Row(
        lambda r: of_values(r, lambda values: values[:-1]),
        "schema: 4860 bytes of float32 where 4864 bytes of float32 belong",
        True,
    ),
    "without one tensor": Row(
        lambda r: of_values(r, lambda values: values[: -SHAPES["head"][0] * SHAPES["head"][1]]),
        "schema: 4160 bytes",
        True,
    ),
    "with a tensor more": Row(
        lambda r: of_values(r, lambda values: torch.cat([values, values[:176]])), "schema: 5568 bytes", True
    ),
    "a gigabyte": Row(lambda r: sent(r, payload_bytes=10**9), "schema: 1000000000 bytes of float32 where", True),
    "a terabyte": Row(lambda r: sent(r, payload_bytes=10**12), "schema: 1000000000000 bytes of float32 where", True),
    "less than nothing": Row(lambda r: sent(r, payload_bytes=-1), "schema: -1 bytes of float32 where 4864", True),
    "another codec": Row(lambda r: sent(r, codec="int4"), "schema: 4864 bytes of int4 where 4864 bytes of", True),
    "truncated": Row(lambda r: of_payload(r, lambda p: p[:-4]), "form: uint8 (4860,), announced were 4864 bytes", True),
    "empty": Row(lambda r: of_payload(r, lambda p: p[:0]), "form: uint8 (0,), announced were 4864 bytes", True),
    "longer than announced": Row(lambda r: of_payload(r, lambda p: np.tile(p, 1000)), "form: uint8 (4864000,)", True),
    "another shape": Row(
        lambda r: of_payload(r, lambda p: p.reshape(-1, 2)), "form: uint8 (2432, 2), announced were 4864 bytes", True
    ),
    "another type": Row(
        lambda r: of_payload(r, lambda p: p.view(np.int8)), "form: int8 (4864,), announced were 4864 bytes", True
    ),
    "a flipped bit": Row(lambda r: of_payload(r, flip_a_bit), "digest: the payload is not what its header says", True),
    "a pickle": Row(pickled, "schema: ", True),
    "a pickle of the right size": Row(lambda r: pickled(r, 4864), f"{VALUES} inf", True),
    "a zip bomb": Row(lambda r: zipped(r, 100_000_000), "schema: ", True),
    "a zip bomb of the right size": Row(lambda r: zipped(r, 4_500_000, 4864), f"{VALUES} ", True),
    "another run": Row(lambda r: sent(r, run_id="another"), "foreign: run another contributed to run 555"),
    "another protocol": Row(lambda r: sent(r, protocol_version=99), "protocol: version 99 offered, 1 spoken"),
    "a fragment that there is not": Row(lambda r: sent(r, fragment=1), "schema: fragment 1 of 1"),
    "an older process's": Row(
        lambda r: sent(r, incarnation=0), "fenced: incarnation 0 of island-01 is not the current one"
    ),
    "a process's to come": Row(
        lambda r: sent(r, incarnation=7), "fenced: incarnation 7 of island-01 is not the current one"
    ),
    "in another island's name": Row(lambda r: sent(r, island=r.good.name), "lease: 1.4 is not held by island-00"),
    "under another island's lease": Row(
        lambda r: sent(r, lease_id=r.life.plan_of(r.good).lease_id), "lease: 1.3 is not held by island-01"
    ),
    "under no lease": Row(lambda r: sent(r, lease_id="9.9"), "lease: 9.9 is not held by island-01"),
    "from a base to come": Row(lambda r: sent(r, base_version=5), "stale: based on version 5, fragment 0 is at 1"),
    "from an old base": Row(lambda r: sent(r, base_version=0), "stale: based on version 0, round 2 begins at 1"),
    "from before the beginning": Row(
        lambda r: sent(r, base_version=-1), "stale: based on version -1, fragment 0 is at 1"
    ),
    "for a round to come": Row(lambda r: sent(r, round=2), "stale: based on version 1, round 3 begins at 2"),
    "for an old round": Row(
        lambda r: sent(r, round=-1), "stale: a contribution to round 1 is committed, this one is for round 0"
    ),
    "other bytes for a committed round": Row(
        lambda r: sent(r, round=0), "conflict: another payload with this key is committed"
    ),
    "inflated steps and tokens": Row(
        lambda r: sent(r, inner_steps=10**9, metrics={**METRICS, "tokens": 1e18, "inner_seconds": 1e-18}), ""
    ),
    "metrics that are no numbers": Row(lambda r: sent(r, metrics=dict.fromkeys(METRICS, math.nan)), ""),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_bad_contribution_is_refused_with_its_reason_or_counts_once_and_the_run_goes_on(
    room: Room, name: str
) -> None:
    row, life, bad = TABLE[name], room.life, room.bad
    plan = life.plan_of(bad)
    header, payload = row.make(room)
    with measured() as cost:
        verdicts = [life.submit(header, payload)]
    cost.assert_at_most(200_000)
    account = life.coordinator.state.ledger.account()
    if row.reason:
        assert (verdicts[0].status, verdicts[0].reason[: len(row.reason)]) == ("rejected", row.reason)
        assert len(life.coordinator._payloads) == 0
        assert life.coordinator.state.members[bad.name].strikes == int(row.is_strike)
        assert account["rejected"] == (64 if row.is_strike else 0)
        again = life.plan_of(bad)
        assert again.ranges == plan.ranges
        assert (again.lease_id != plan.lease_id) == row.is_strike
        assert (f"{bad.name}: contribution rejected (strike 1): {row.reason}" in life.notes()) == row.is_strike
        room.one_round()
    else:
        verdicts += [life.submit(header, payload) for _ in range(99)]
        assert {verdict.status for verdict in verdicts} == {"accepted"}
        room.send_honestly(room.good)
        assert life.submit(header, payload) == Verdict("committed")
    newest = records(room.store)[-1]
    assert (newest.version, len(newest.shares)) == (2, 2)
    assert [(share.weight, share.tokens) for share in newest.shares] == [(1.0, 64)] * 2
    assert bool(restored(room.store, room.job).parameters(0).isfinite().all())
    assert not room.store.exists("pwned")
    json.loads(canonical_json(life.coordinator.report.status(life.coordinator.state)))
    room.one_round()
    assert life.coordinator.state.phase == "succeeded"


@pytest.mark.parametrize("make", [torch.empty, torch.zeros], ids=["untouched", "touched"])
def test_memory_of_the_claimed_size_would_be_noticed(
    room: Room, make: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were there a tensor of that size, which Python's own account of its memory does not have."""
    submit = Coordinator.submit

    def planted(self: Coordinator, contribution: Contribution, payload: np.ndarray) -> Verdict:
        make(contribution.payload_bytes, dtype=torch.uint8)
        return submit(self, contribution, payload)

    monkeypatch.setattr(Coordinator, "submit", planted)
    header, payload = sent(room, payload_bytes=10**9)
    with measured() as cost:
        room.life.submit(header, payload)
    assert cost.traced_bytes < 200_000
    assert cost.tensor_bytes == 10**9
    if make is torch.zeros and cost.resident_bytes is not None:
        assert cost.resident_bytes > 0.9 * 10**9
    with pytest.raises(AssertionError, match="it costs the memory that it claims"):
        cost.assert_at_most(200_000)


def test_three_bad_payloads_in_a_row_bar_the_island_and_the_others_go_on(room: Room) -> None:
    life, bad = room.life, room.bad
    for _ in range(3):
        assert life.submit(*of_values(room, with_one(math.nan))).status == "rejected"
    assert life.coordinator.state.members[bad.name].standing == "quarantined"
    why = f"{bad.name} is quarantined after 3 bad payloads in a row: values: "
    assert bad.join(life.coordinator).startswith(why)
    news = life.coordinator.news(bad.name, 1, 0, "")
    assert news is not None
    assert (news.standing, news.reason[: len(why)]) == ("fenced", why)
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
    assert len(life.coordinator._payloads) == 0


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


def test_what_is_sent_again_while_the_first_is_inspected_does_not_take_the_place_of_the_copy(room: Room) -> None:
    """The island was given up meanwhile, and came back with its work."""
    life, island = room.life, room.bad
    coordinator, plan = life.coordinator, life.plan_of(island)
    header, first = island.contribution(plan)
    coordinator.submit(header, first)
    coordinator.lost(island.name, island.process, "silent")
    coordinator.submit(*room.good.contribution(life.plan_of(room.good)))
    assert island.join(coordinator, plan) == ""
    second = first.copy()
    coordinator.submit(header, second)
    coordinator.receive(life.run_job())  # the first one's inspection
    assert coordinator.verdict_on(header).status == "accepted"
    second[:] = 255
    life.settle()
    assert [share.island for share in records(room.store)[1].shares] == ["island-00", "island-01"]
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
    assert room.life.coordinator.beat(Beat("island-07", 1)) == "go_on"  # `news` tells it, not the fence
    assert len(room.life.coordinator._payloads) == 0
