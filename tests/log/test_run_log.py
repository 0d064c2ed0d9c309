"""The chain: what is committed stays, whoever loses a commit stops, and every crash leaves a state to go on from."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from toy_run import RUN_ID, ToyRun, bits, new_replica

from diloco_ray.errors import CorruptionError, FencedError, StoreError
from diloco_ray.log.record import seal, unseal
from diloco_ray.log.run_log import RunLog, check_fence, fence_path, read_ahead, record_path, take_fence
from diloco_ray.log.run_store import Bytes, RunStore
from diloco_ray.log.snapshot import restore
from diloco_ray.log.verify import verify
from diloco_ray.simulation.storage import IOCall, TappedStore


def test_an_opened_log_is_the_one_that_was_written(store: RunStore):
    run = ToyRun(store).start().take_steps(5)
    log = RunLog.open(store)
    assert log.records == run.log.records
    assert log.tail_digest == run.log.tail.digest()
    assert log.tail.index == 5
    assert [record.index for record, _ in log.steps(2, 5)] == [2, 3, 4]
    assert [payload for _, payload in log.steps(1, 6)] == [log.payload(record) for record in log.records[1:]]
    assert store.list("log") == [f"{index:08d}.json" for index in range(6)]


def test_an_empty_store_is_an_empty_log(tmp_path: Path):
    log = RunLog.open(RunStore(str(tmp_path)))
    assert log.records == []
    assert log.tail_digest == ""
    with pytest.raises(StoreError, match="no record yet"):
        _ = log.tail


def test_two_runs_of_the_same_seeds_differ_only_in_their_run_id(tmp_path: Path):
    first = ToyRun(RunStore(str(tmp_path / "a"))).start().take_steps(3)
    second = ToyRun(RunStore(str(tmp_path / "b"))).start().take_steps(3)
    assert [r.to_bytes() for r in first.log.records] == [r.to_bytes() for r in second.log.records]
    third = ToyRun(RunStore(str(tmp_path / "c"))).start(run_id="1" * 32).take_steps(3)
    assert [replace(r, run_id="", parent="") for r in third.log.records] == [
        replace(r, run_id="", parent="") for r in first.log.records
    ]


def test_the_coordinator_that_loses_a_commit_is_fenced(store: RunStore):
    old = ToyRun(store).start().take_steps(2)
    new = ToyRun(store)
    new.log, new.fence_epoch = RunLog.open(store), take_fence(store, RUN_ID, "new")
    new.replica = new_replica(unseal(store.read("run.json"), ""))
    restore(store, new.log, new.replica)
    late = old.next_step()
    new.take_steps(1)
    with pytest.raises(FencedError, match="fence epoch 2") as caught:
        old.log.append(*late)
    assert caught.value.where == store.url_of(record_path(3))
    assert old.log.tail.index == 2
    new.take_steps(1)
    assert [record.fence_epoch for record in RunLog.open(store).records] == [1, 1, 1, 2, 2]
    assert verify(store, new_replica).ok


def test_the_same_commit_again_is_no_conflict(store: RunStore):
    run = ToyRun(store).start()
    record, payload = run.next_step()
    elsewhere = RunLog.open(store)
    run.log.append(record, payload)
    elsewhere.append(record, payload)
    assert elsewhere.records == run.log.records


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"index": 7}, "index is 7, not 2"),
        ({"parent": "f" * 64}, "parent"),
        ({"run_id": "other"}, "run_id is 'other'"),
        ({"version": 3}, "version is 3, not 1"),
        ({"fence_epoch": 0}, "fence epoch falls from 1 to 0"),
        ({"kind": "init"}, "kind"),
        ({"payload": "payloads/elsewhere.bin"}, "payload"),
        ({"payload_sha256": "f" * 64}, "payload"),
    ],
)
def test_a_record_that_does_not_continue_the_log_is_not_written(tmp_path: Path, change: dict[str, object], named: str):
    run = ToyRun(RunStore(str(tmp_path))).start().take_steps(1)
    record, payload = run.next_step()
    with pytest.raises(ValueError, match=named):
        run.log.append(replace(record, **change), payload)
    assert not run.store.exists(record_path(2))
    run.log.append(record, payload)


def test_a_missing_record_is_named(tmp_path: Path):
    run = ToyRun(RunStore(str(tmp_path))).start().take_steps(4)
    run.store.delete(record_path(2))
    with pytest.raises(StoreError) as caught:
        RunLog.open(run.store)
    assert caught.value.where.endswith("log/00000002.json")


def test_a_record_with_another_parent_is_named(tmp_path: Path):
    run = ToyRun(RunStore(str(tmp_path))).start().take_steps(4)
    run.store.write(record_path(2), replace(run.log.records[2], round=9).to_bytes())
    with pytest.raises(CorruptionError, match="parent") as caught:
        RunLog.open(run.store)
    assert caught.value.where.endswith("log/00000003.json")


def test_files_that_no_run_writes_are_ignored(tmp_path: Path):
    run = ToyRun(RunStore(str(tmp_path))).start().take_steps(2)
    run.store.write("log/notes.txt", b"hello")
    run.store.write("log/00000003.json.bak", b"{}")
    run.store.write("payloads/00000009-abc.bin", b"")
    assert RunLog.open(run.store).tail.index == 2


def test_fence_epochs_go_up_one_by_one(store: RunStore):
    assert [take_fence(store, RUN_ID, f"life {n}") for n in range(3)] == [1, 2, 3]
    body = unseal(store.read("fences/00000003.json"), "")
    assert body == {"epoch": 3, "run_id": RUN_ID, "holder": "life 2"}


def test_a_fence_that_somebody_else_put_far_off_stops_no_coordinator(store: RunStore):
    """Its successor's name has nine digits, and is looked for all the same."""
    store.write("fences/99999999.json", b"{}")
    epoch = take_fence(store, RUN_ID, "")
    assert epoch == 100_000_000
    check_fence(store, epoch)
    assert take_fence(store, RUN_ID, "") == 100_000_001
    with pytest.raises(FencedError):
        check_fence(store, epoch)


def test_a_fence_with_no_number_above_it_is_named_before_anything_is_written(store: RunStore):
    store.write(fence_path(10**18 - 1), b"{}")
    with pytest.raises(CorruptionError, match="no number above it") as caught:
        take_fence(store, RUN_ID, "")
    assert caught.value.where == store.url_of(fence_path(10**18 - 1))
    assert len(store.list("fences")) == 1


def test_no_two_coordinators_share_an_epoch(store: RunStore):
    with ThreadPoolExecutor(6) as pool:
        epochs = list(pool.map(lambda n: take_fence(store, RUN_ID, str(n)), range(6)))
    assert sorted(epochs) == [1, 2, 3, 4, 5, 6]


# ---- kill between any two steps ----


class Killed(BaseException):
    """The process is gone."""


def dying_store(url: str, dies_at: int, when: str) -> RunStore:
    """Dies at its n-th change of the storage: before it, or after it but before the caller is told."""
    num_changes = 0

    def tap(call: IOCall) -> None:
        nonlocal num_changes
        num_changes += call.changes and call.moment == "before"
        if num_changes > dies_at or (num_changes == dies_at and call.changes and call.moment == when):
            raise Killed

    return TappedStore(url, tap)


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_crash_point_leaves_a_state_to_go_on_from(tmp_path: Path, when: str):
    """Kills the coordinator at each change of the storage in turn and compares with a run that was never killed."""
    whole = ToyRun(RunStore(str(tmp_path / "whole"))).start().take_steps(6, snapshot_every=2)
    for dies_at in range(1, 40):
        store = RunStore(str(tmp_path / f"run {dies_at}"))
        run = ToyRun(store).start()
        announced = 0
        run.store = run.log.store = dying_store(store.url, dies_at, when)
        try:
            for _ in range(6):
                run.take_steps(1, snapshot_every=2)
                announced = run.log.tail.index
        except Killed:
            pass
        else:
            break
        again = ToyRun(store)
        again.log, again.fence_epoch = RunLog.open(store), run.fence_epoch
        assert again.log.tail.index >= announced
        again.replica = new_replica(unseal(store.read("run.json"), ""))
        assert restore(store, again.log, again.replica) == again.log.tail.index
        again.take_steps(6 - again.log.tail.index, snapshot_every=2)
        assert again.bits() == whole.bits()
        assert [r.to_bytes() for r in again.log.records] == [r.to_bytes() for r in whole.log.records]
        assert verify(store, new_replica).ok
    else:
        pytest.fail("the run never got through")
    assert dies_at == 1 + 2 * 6 + 3 * 3, "2 changes for a commit, 3 for a snapshot of 2 fragments"


def test_a_thousand_records_open_in_order(tmp_path: Path):
    """Reading ahead must not mix them up, and the log holds records, not payloads."""
    run = ToyRun(RunStore(str(tmp_path)), num_fragments=1).start().take_steps(1)
    record = run.log.tail
    for index in range(2, 1000):
        record = replace(
            record,
            index=index,
            parent=record.digest(),
            version=index,
            payload=f"payloads/{index:08d}-{record.payload_sha256[:12]}.bin",
        )
        (tmp_path / record_path(index)).write_bytes(record.to_bytes())
    log = RunLog.open(run.store)
    assert [record.index for record in log.records] == list(range(1000))
    assert log.tail_digest == record.digest()


def test_the_bits_of_a_replayed_run(tmp_path: Path):
    run = ToyRun(RunStore(str(tmp_path))).start().take_steps(5)
    replica = new_replica(json.loads(run.store.read("run.json")))
    restore(run.store, RunLog.open(run.store), replica)
    assert bits(replica) == run.bits()
    assert seal(unseal(run.store.read("run.json"), "")) == run.store.read("run.json")


def test_giving_up_reading_ahead_does_not_wait_for_what_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The garbage collector gives it up where it likes, also in a thread that may not wait for another one."""
    slow, read = threading.Event(), RunStore.read

    def read_slowly(self: RunStore, path: str) -> Bytes:
        assert path == "0" or slow.wait(60)
        return read(self, path)

    store = RunStore(str(tmp_path))
    for number in range(5):
        store.write(str(number), b"x")
    monkeypatch.setattr(RunStore, "read", read_slowly)
    files = read_ahead(store, map(str, range(5)), 2)
    assert next(files) == b"x"
    giving_up = threading.Thread(target=files.close, daemon=True)
    giving_up.start()
    giving_up.join(20)
    waited = giving_up.is_alive()
    slow.set()
    assert not waited
