"""Verify: a sound run passes, and no damage to any of its files goes unnamed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_run import ISLANDS, RUN_ID, ToyRun, all_files, new_replica

from diloco_ray.coordination.messages import DataRange
from diloco_ray.log.record import Record, model_digest, seal, unseal
from diloco_ray.log.run_log import record_path
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import manifest_path, prune_snapshots, save_snapshot
from diloco_ray.log.verify import verify

NUM_STEPS = 7


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ToyRun:
    """Seven outer steps with snapshots at 0, 3 and 6; tests copy it."""
    store = RunStore(str(tmp_path_factory.mktemp("sound")))
    return ToyRun(store).start().take_steps(NUM_STEPS, snapshot_every=3)


@pytest.fixture
def run(sound: ToyRun, tmp_path: Path) -> ToyRun:
    shutil.copytree(sound.store.url, tmp_path / "run")
    store = RunStore(str(tmp_path / "run"))
    copy = ToyRun(store)
    copy.log, copy.replica, copy.fence_epoch = sound.log, sound.replica, sound.fence_epoch
    return copy


def rewrite(run: ToyRun, index: int, change: Callable[[Record], Record]) -> None:
    """Changes one record and mends the chain after it: what only a careful forger or a bug would write."""
    records = run.log.records[:index]
    for record in [change(run.log.records[index]), *run.log.records[index + 1 :]]:
        records.append(replace(record, parent=records[-1].digest()))
        run.store.write(record_path(record.index), records[-1].to_bytes())
    for snapshot in (3, 6):
        body = unseal(run.store.read(manifest_path(snapshot)), "")
        run.store.write(manifest_path(snapshot), seal({**body, "record": records[snapshot].digest()}))


def final_digest_of(run: ToyRun) -> str:
    return model_digest([run.replica.digest(p) for p in range(2)]).parameters


def test_a_sound_run_passes(store: RunStore):
    run = ToyRun(store).start().take_steps(NUM_STEPS, snapshot_every=3)
    seen: list[tuple[int, int]] = []
    report = verify(store, new_replica, lambda done, of: seen.append((done, of)))
    assert report.problems == ()
    assert report.ok
    assert report.run_id == RUN_ID
    assert (report.num_records, report.num_outer_steps, report.num_snapshots) == (8, 7, 3)
    assert (report.first_replayed, report.last_index) == (1, 7)
    assert report.digest == final_digest_of(run)
    assert report.tokens == run.log.tail.tokens
    assert seen == [(n, 8) for n in range(1, 9)]


def test_a_run_of_one_fragment_ends_in_its_last_records_digest(tmp_path: Path):
    run = ToyRun(RunStore(str(tmp_path)), num_fragments=1).start().take_steps(3)
    report = verify(run.store, new_replica)
    assert report.ok
    assert report.digest == run.log.tail.parameters_digest


def test_a_run_that_has_only_begun_passes(tmp_path: Path):
    report = verify(ToyRun(RunStore(str(tmp_path))).start().store, new_replica)
    assert report.ok
    assert (report.num_outer_steps, report.first_replayed, report.last_index) == (0, 0, 0)


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_of_any_file_is_found_and_named(sound: ToyRun, data: st.DataObject):
    store = sound.store
    path = data.draw(st.sampled_from(all_files(store)))
    good = store.read(path)
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    store.write(path, bad)
    try:
        report = verify(store, new_replica)
    finally:
        store.write(path, good)
    assert not report.ok
    assert any(problem.startswith(store.url_of(path)) for problem in report.problems), report.problems


@pytest.mark.parametrize("data", [b"", b"{", None], ids=["empty", "truncated", "missing"])
def test_empty_truncated_and_missing_files_are_named(run: ToyRun, data: bytes | None):
    store = run.store
    unseen: list[str] = []
    for path in all_files(store):
        good = store.read(path)
        store.delete(path)
        if data is not None:
            store.write(path, data)
        report = verify(store, new_replica)
        store.write(path, good)
        if not any(problem.startswith(store.url_of(path)) for problem in report.problems):
            unseen.append(path)
    allowed = []
    if data is None:  # the end of the log, a pruned snapshot: what is not there and need not be
        allowed = ["fences/00000001.json", record_path(NUM_STEPS), manifest_path(3), manifest_path(6)]
    assert unseen == allowed


def test_a_missing_only_fence_is_found_in_the_records(run: ToyRun):
    run.store.delete("fences/00000001.json")
    assert "fence epoch 1 has no file" in verify(run.store, new_replica).problems[0]


def test_several_damages_are_all_named_and_replay_goes_on_after_them(run: ToyRun):
    damaged = [record_path(1), run.log.records[2].payload, run.log.records[4].payload]
    for path in damaged:
        run.store.write(path, b"\0" * 50)
    report = verify(run.store, new_replica)
    assert len(report.problems) == 3
    for path in damaged:
        assert any(problem.startswith(run.store.url_of(path)) for problem in report.problems)
    assert report.first_replayed == 7
    assert report.digest == final_digest_of(run)


def test_pruned_payloads_are_no_damage(run: ToyRun):
    for record in run.log.records[1:4]:
        run.store.delete(record.payload)
    report = verify(run.store, new_replica)
    assert report.ok
    assert report.first_replayed == 4
    assert report.digest == final_digest_of(run)


def test_a_payload_lost_elsewhere_is_damage(run: ToyRun):
    run.store.delete(run.log.records[1].payload)
    run.store.delete(run.log.records[2].payload)
    report = verify(run.store, new_replica)
    assert [run.store.url_of(run.log.records[n].payload) in report.problems[n - 1] for n in (1, 2)] == [True, True]


def test_pruned_snapshots_are_no_damage(run: ToyRun):
    prune_snapshots(run.store, 0)
    assert verify(run.store, new_replica).ok


def test_without_run_json_everything_else_is_still_checked(run: ToyRun):
    paths = ["run.json", "snapshots/00000003/fragment-001.safetensors", run.log.records[5].payload, record_path(6)]
    for path in paths:
        run.store.write(path, b"\0" * 50)
    report = verify(run.store, new_replica)
    for path in paths:
        assert any(problem.startswith(run.store.url_of(path)) for problem in report.problems)
    assert report.run_id == RUN_ID
    assert report.digest == ""


def test_a_run_json_that_makes_no_replica_is_a_problem(run: ToyRun):
    body = unseal(run.store.read("run.json"), "")
    del body["outer"]
    run.store.write("run.json", seal(body))
    assert "no replica can be built" in verify(run.store, new_replica).problems[0]


def test_a_snapshot_that_differs_from_the_replay_is_found(run: ToyRun):
    """Its own digests are right; it is just not what the log says."""
    record = run.log.records[6]
    save_snapshot(run.store, 6, run.replica, record.digest())  # the replica stands at 7
    (problem,) = verify(run.store, new_replica).problems
    assert problem.startswith(run.store.url_of(manifest_path(6)))


def test_a_snapshot_past_the_end_of_the_log_is_found(run: ToyRun):
    save_snapshot(run.store, 99, run.replica, "0" * 64)
    assert "the log ends before it" in verify(run.store, new_replica).problems[0]


def share_changed(record: Record, **change: object) -> Record:
    return replace(record, shares=(replace(record.shares[0], **change), *record.shares[1:]))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda r: replace(r, parameters_digest="0" * 32), "replaying record 4 gave"),
        (lambda r: replace(r, tokens={**r.tokens, "expired": 8}), "tokens leased are not"),
        (lambda r: replace(r, tokens={**r.tokens, "leased": 200, "committed": 200}), "the shares so far add up to 128"),
        (lambda r: replace(r, tokens={}), "tokens has"),
        (lambda r: share_changed(r, spent=(DataRange(0, 0, 3, 5),)), "overlap 0..4 of record 2"),
        (lambda r: share_changed(r, spent=(DataRange(0, 0, 14, 13),)), "spent sequences 14..13"),
        (
            lambda r: share_changed(r, round=0),
            "island-00 in its round 1 on version 1 of fragment 1: committed before in record 2",
        ),
        (lambda r: share_changed(r, base_version=2), "from a base that was still to come"),
        (lambda r: share_changed(r, island="zz"), "not in island order"),
        (lambda r: replace(r, run_id="other"), "run_id is 'other'"),
        (lambda r: replace(r, version=3), "version is 3, not 2"),
        (lambda r: replace(r, fence_epoch=2), "fence epoch 2 has no file"),
        (lambda r: replace(r, fence_epoch=0), "fence epoch falls"),
        (lambda r: replace(r, codec="float32"), "encoded as float32"),
        (lambda r: replace(r, fragment=9), "fragment 9"),
        (lambda r: replace(r, payload="../../etc/passwd"), "passwd' is not a path inside the run store"),
        (lambda r: replace(r, index=5), "it is record 5"),
    ],
)
def test_what_a_sealed_record_says_is_checked(run: ToyRun, change: Callable[[Record], Record], found: str):
    if found == "it is record 5":
        run.store.write(record_path(4), run.store.read(record_path(5)))
    else:
        rewrite(run, 4, change)
    problems = verify(run.store, new_replica).problems
    named = run.store.url if "passwd" in found else run.store.url_of(record_path(4))
    assert any(found in problem and problem.startswith(named) for problem in problems), problems


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(1, 8)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_data_is_called_spent_twice_exactly_when_it_is(
    sound: ToyRun, tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, int, int]]
):
    store = RunStore(str(tmp_path_factory.mktemp("spent")))
    share = replace(sound.log.records[2].shares[0], round=0, tokens=0, spent=())
    record, parent = sound.log.records[0], ""
    for index, (shard, start, length) in enumerate([(0, 0, 0), *pieces]):
        if index:
            spent = (DataRange(shard, 0, start, start + length),)
            record = replace(record, index=index, parent=parent, shares=(replace(share, round=index, spent=spent),))
        store.write(record_path(index), record.to_bytes())
        parent = record.digest()
    used = [(shard, n) for shard, start, length in pieces for n in range(start, start + length)]
    found = any("overlap" in problem for problem in verify(store, new_replica).problems)
    assert found == (len(used) != len(set(used)))


def test_a_model_that_is_not_finite_is_found(tmp_path: Path):
    run = ToyRun(RunStore(str(tmp_path)), num_fragments=1, uplink="float32").start()
    run.replica.parameters(0)[3] = float("nan")
    run.snapshot()
    digest = run.replica.digest(0)
    init = replace(run.log.tail, parameters_digest=digest.parameters)
    run.store.write(record_path(0), init.to_bytes())
    save_snapshot(run.store, 0, run.replica, init.digest())
    (problem,) = verify(run.store, new_replica).problems
    assert problem == f"{run.store.url_of(record_path(0))}: the parameters after it are not finite"


def test_a_fence_of_another_run_is_found(run: ToyRun):
    run.store.write("fences/00000002.json", seal({"epoch": 2, "run_id": "other", "holder": ""}))
    (problem,) = verify(run.store, new_replica).problems
    assert "of run other" in problem


def test_the_toy_run_has_every_kind_of_file(sound: ToyRun):
    files = all_files(sound.store)
    assert len(files) == 1 + 1 + 8 + 7 + 3 * 3
    assert len(ISLANDS) == 2
