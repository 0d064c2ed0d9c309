"""A follower receives one log and replays it fragment by fragment, each as far as it is asked to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.errors import CorruptionError
from diloco_ray.log.record import Record
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import load_snapshot
from diloco_ray.transport.follower import Follower
from diloco_ray.transport.in_memory import InMemoryTransport
from diloco_ray.transport.protocol import Bytes, told
from tests.small_run import Life, SmallIsland, begun, join_all, new_replica, restored, small_job

JOB = small_job(num_islands=2, num_fragments=2, num_rounds=3, snapshot_every_rounds=3)
Log = list[tuple[Record, Bytes]]


class Room:
    """A run of three rounds, two fragments each: records 1 .. 6, of fragment 0, 1, 0, 1, 0, 1."""

    def __init__(self, folder: Path):
        self.store = begun(RunStore(str(folder / "run")), JOB)
        life = Life(self.store, JOB)
        self.early = follower_of(life.coordinator)
        islands = [SmallIsland(0, JOB), SmallIsland(1, JOB)]
        join_all(life.coordinator, islands)
        for _ in range(3):
            plans = {island.name: life.plan_of(island) for island in islands}
            for fragment in range(2):
                for island in islands:
                    sent = island.contribution(plans[island.name], fragment=fragment)
                    assert life.submit(*sent).status == "accepted"
        self.coordinator = life.coordinator
        news = told(life.coordinator, "", 0, 0, "")
        assert news is not None
        self.log: Log = list(news.records)
        assert [record.fragment for record, _ in self.log] == [0, 1, 0, 1, 0, 1]

    def parameters(self, fragment: int, version: int) -> torch.Tensor:
        """By replaying only this fragment's records."""
        replica = new_replica(JOB)
        state = beginning_of(self.store)
        own = [payload for record, payload in self.log if record.fragment == fragment]
        buffers = tuple(buffer.clone() for buffer in state.buffers(fragment))
        replica.load_(fragment, 0, state.parameters(fragment), buffers)
        for payload in own[:version]:
            replica.apply(fragment, torch.from_numpy(payload.copy()))
        return replica.parameters(fragment)


def follower_of(coordinator: Coordinator) -> Follower:
    follower = Follower(new_replica(JOB), InMemoryTransport(coordinator))
    follower.load_snapshot()
    return follower


def beginning_of(store: RunStore) -> Replica:
    replica = new_replica(JOB)
    load_snapshot(store, 0, replica)
    return replica


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def test_what_is_received_waits_until_it_is_replayed(room: Room) -> None:
    follower = room.early
    assert [record.index for record in follower.receive(room.log[:3])] == [1, 2, 3]
    assert follower.index == 3
    assert follower.replica.versions == [0, 0]
    assert [follower.received_version(p) for p in (0, 1)] == [2, 1]
    follower.replay(0)
    assert follower.replica.versions == [2, 0]
    assert [follower.received_version(p) for p in (0, 1)] == [2, 1]
    assert torch.equal(follower.replica.parameters(0), room.parameters(0, 2))
    assert torch.equal(follower.replica.parameters(1), room.parameters(1, 0))


def test_a_fragment_is_replayed_up_to_a_version_and_no_further(room: Room) -> None:
    follower = room.early
    follower.receive(room.log)
    for version in (1, 1, 0, 2, 9):
        reached = max(follower.replica.versions[1], min(version, 3))
        follower.replay(1, version)
        assert follower.replica.versions == [0, reached]
        assert torch.equal(follower.replica.parameters(1), room.parameters(1, reached))
    follower.replay(0)
    end = restored(room.store, JOB)
    assert [follower.replica.digest(p) for p in (0, 1)] == [end.digest(p) for p in (0, 1)]


def test_the_order_of_replay_between_fragments_does_not_matter(room: Room) -> None:
    other = Follower(new_replica(JOB), InMemoryTransport(room.coordinator))
    other.replica.load_(0, 0, room.parameters(0, 0), tuple(b.clone() for b in room.early.replica.buffers(0)))
    other.replica.load_(1, 0, room.parameters(1, 0), tuple(b.clone() for b in room.early.replica.buffers(1)))
    other.index = 0
    for record in room.early.receive(room.log):
        room.early.replay(record.fragment)
    other.receive(room.log)
    other.replay(1)
    other.replay(0)
    assert [room.early.replica.digest(p) for p in (0, 1)] == [other.replica.digest(p) for p in (0, 1)]


def test_records_had_before_are_passed_over_and_a_gap_is_refused(room: Room) -> None:
    follower = room.early
    follower.receive(room.log[:2])
    assert [record.index for record in follower.receive(room.log[:4])] == [3, 4]
    assert [follower.received_version(p) for p in (0, 1)] == [2, 2]
    with pytest.raises(CorruptionError, match="record 6 follows 4"):
        follower.receive(room.log[5:])
    assert follower.index == 4


def test_a_record_whose_digest_is_not_reached_stops_the_fragment_where_it_is_replayed(room: Room) -> None:
    follower = room.early
    (record, payload), rest = room.log[2], room.log[3:]
    lie = replace(record, parameters_digest="0" * 32)
    follower.receive([*room.log[:2], (lie, payload), *rest])
    follower.replay(1)  # another fragment's records are sound
    assert follower.replica.versions == [0, 3]
    with pytest.raises(CorruptionError, match="replaying record 3 gave"):
        follower.replay(0)


def test_a_snapshot_takes_the_place_of_what_waits(room: Room) -> None:
    follower = room.early
    follower.receive(room.log[:3])
    assert follower.load_snapshot().round == 3
    assert follower.index == 6
    assert [follower.received_version(p) for p in (0, 1)] == follower.replica.versions == [3, 3]
    follower.replay(0)
    end = restored(room.store, JOB)
    assert [follower.replica.digest(p) for p in (0, 1)] == [end.digest(p) for p in (0, 1)]
