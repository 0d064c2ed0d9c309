"""Verify: a sound run passes, and no damage to any of its files goes unnamed."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from toy_run import ISLANDS, RUN_ID, ToyRun, all_files, bits, new_replica
from typer.testing import CliRunner

from diloco_ray.cli import app
from diloco_ray.coordination.messages import DataRange
from diloco_ray.errors import StoreError
from diloco_ray.ids import sha256_hex
from diloco_ray.log.account import Account, Terms
from diloco_ray.log.record import Record, model_digest, seal, unseal
from diloco_ray.log.run_log import RunLog, fence_path, record_path
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import manifest_path, prune_snapshots, restore, save_snapshot
from diloco_ray.log.verify import verify

NUM_STEPS = 7
TOKENS_COUNT = {
    "config": {
        "data": {"sequence_length": 8},
        "inner": {"steps_per_round": 2, "batch_size": 2},
        "sync": {"closes": "quorum"},
    }
}


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


@pytest.mark.parametrize("lost", [(1, 2), (1, 2, 3), range(1, NUM_STEPS + 1)], ids=["two", "to_a_snapshot", "all"])
def test_every_missing_payload_is_damage_also_before_a_snapshot(run: ToyRun, lost: Sequence[int]):
    """A snapshot excuses nothing: no run prunes payloads, and `verify` replays the whole of it."""
    for index in lost:
        run.store.delete(run.log.records[index].payload)
    report = verify(run.store, new_replica)
    named = [problem.split(": ")[0] for problem in report.problems]
    assert named == [run.store.url_of(run.log.records[index].payload) for index in lost]
    assert report.first_replayed == (0 if len(lost) == NUM_STEPS else 4)


def test_pruned_snapshots_are_no_damage(run: ToyRun):
    prune_snapshots(run.store, 0)
    assert verify(run.store, new_replica).ok


def test_after_a_missing_record_replay_goes_on_from_the_next_snapshot_only(run: ToyRun):
    run.store.delete(record_path(4))
    report = verify(run.store, new_replica)
    (problem,) = report.problems
    assert problem.startswith(run.store.url_of(record_path(4)))
    assert report.digest == final_digest_of(run)


def test_the_command_prints_so_many_problems_and_says_how_many_more_there_are(run: ToyRun):
    for epoch in range(2, 102):
        run.store.write(fence_path(epoch), b"")
    result = CliRunner().invoke(app, ["verify", run.store.url])
    assert result.exit_code == 5
    *problems, last = result.output.splitlines()
    assert len(problems) == 50
    assert last.endswith("more; --json lists them all")


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


def test_tokens_that_fall_from_record_to_record_are_found(run: ToyRun):
    rewrite(run, 4, lambda r: tokens_changed(r, expired=16, leased=r.tokens["leased"] + 16))
    found = verify(run.store, new_replica).problems
    where = run.store.url_of(record_path(5))
    assert found == (f"{where}: tokens expired fall from 16 to 0", f"{where}: tokens leased fall from 144 to 128")


def test_data_in_a_share_of_another_fragment_than_the_last_is_found(run: ToyRun):
    rewrite(run, 3, lambda r: share_changed(r, tokens=32, spent=(DataRange(0, 0, 60, 64),)))
    assert any("spent data, but fragment 0 closes no round" in p for p in verify(run.store, new_replica).problems)


def test_a_damaged_record_costs_no_sound_one_its_numbers(run: ToyRun):
    run.store.write(record_path(4), b"")
    (problem,) = verify(run.store, new_replica).problems
    assert problem.startswith(run.store.url_of(record_path(4)))


@given(
    lives=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 9), st.lists(st.integers(1, 40), min_size=1, max_size=8)),
        min_size=1,
        max_size=4,
    ),
    forged=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_rounds_that_tokens_count_are_what_some_number_of_islands_makes_of_them(
    sound: ToyRun, lives: list[tuple[int, int, list[int]]], forged: int
):
    """A life has a number of islands and of rounds of its own, and ends when it reaches its rounds."""
    terms = Terms.of({**unseal(sound.store.read("run.json"), ""), **TOKENS_COUNT}, "")
    account, record, committed = Account(terms), sound.log.records[0], 0
    for epoch, (islands, num_rounds, contributed) in enumerate(lives, 1):
        for sequences in contributed:
            committed += 8 * sequences
            round = min(num_rounds, committed // (islands * 4 * 8))
            tokens = {**record.tokens, "committed": committed, "leased": committed}
            record = replace(sound.log.records[1], fence_epoch=epoch, round=round, tokens=tokens)
            assert [p for p in account.problems(record) if "round is" in p] == []
            if round == num_rounds:
                break
    most = committed // (4 * 8)
    forged_too_far = replace(record, round=most + forged, fence_epoch=9)
    assert any("round is" in problem for problem in account.problems(forged_too_far))


def test_a_round_that_falls_within_a_life_is_found_where_tokens_count_rounds(sound: ToyRun):
    account = Account(Terms.of({**unseal(sound.store.read("run.json"), ""), **TOKENS_COUNT}, ""))
    found: list[list[str]] = []
    for round, committed in ((1, 64), (2, 128), (1, 192), (3, 192)):
        tokens = {**sound.log.tail.tokens, "committed": committed, "leased": committed}
        record = replace(sound.log.records[1], round=round, tokens=tokens)
        found.append([problem for problem in account.problems(record) if "round is" in problem])
    assert [len(problems) for problems in found] == [0, 0, 1, 0]


def test_a_run_json_without_what_its_records_count_in_is_a_problem(run: ToyRun):
    body = unseal(run.store.read("run.json"), "")
    without_length = {**body["config"], "data": {}}
    for change in ({"shard_sizes": []}, {"shard_sizes": [0]}, {"shard_sizes": None}, {"config": without_length}):
        run.store.write("run.json", seal({**body, **change}))
        (problem,) = verify(run.store, new_replica).problems
        assert "run.json: not what its records count in" in problem


@pytest.mark.parametrize("change", ["versions", "digests", "tensor", "layout"])
def test_a_snapshot_that_is_too_short_is_named_and_passed_over(run: ToyRun, change: str):
    """Sealed again, so that only its meaning is wrong. A coordinator that begins takes the one before it."""
    path, file = manifest_path(6), "snapshots/00000006/fragment-000.safetensors"
    body = unseal(run.store.read(path), "")
    if change == "tensor":
        tensors = load(run.store.read(file))
        run.store.write(file, save({**tensors, "parameters": tensors["parameters"][:-1].clone()}))
        body["files"]["fragment-000.safetensors"] = sha256_hex(run.store.read(file))
    else:
        body[change] = {} if change == "layout" else body[change][:1]
    run.store.write(path, seal(body))
    (problem,) = verify(run.store, new_replica).problems
    assert problem.startswith(run.store.url_of(file if change == "tensor" else path))
    replica = new_replica(unseal(run.store.read("run.json"), ""))
    assert restore(run.store, RunLog.open(run.store), replica) == NUM_STEPS
    assert bits(replica) == run.bits()


def test_a_number_that_python_does_not_write_is_damage(run: ToyRun):
    """10^4300 - 1 is read and written; the round after it is neither."""
    run.store.write(record_path(7), share_changed(run.log.records[7], round=10**4300 - 1).to_bytes())
    (problem,) = verify(run.store, new_replica).problems
    assert problem == f"{run.store.url_of(record_path(7))}: not a sealed file: a number of 4300 digits"


@pytest.mark.parametrize("num_values", [-320, 10**15, 10**30])
def test_a_model_that_no_machine_holds_is_a_problem(run: ToyRun, num_values: int):
    body = unseal(run.store.read("run.json"), "")
    body["layout"] = {"fragments": [{"index": 0, "slots": [slot_of(num_values)]}]}
    run.store.write("run.json", seal(body))
    assert any("run.json: no replica can be built" in problem for problem in verify(run.store, new_replica).problems)


def slot_of(num_values: int) -> dict[str, Any]:
    return {"name": "embed", "shape": [num_values], "offset": 0, "num_values": num_values}


def test_files_of_numbers_far_off_are_named_once_and_cost_nothing(run: ToyRun):
    """Each of these was a hundred million looks at the store."""
    run.store.write("log/99999999.json", run.store.read(record_path(2)))
    run.store.write("fences/99999999.json", b"{}")
    report = verify(run.store, new_replica)
    fences, fence, gap, record = report.problems
    assert (
        fences == f"{run.store.url_of('fences/00000002.json')}: it is not there, nor is any of the next 99999996, "
        "though fences/99999999.json is"
    )
    assert fence.startswith(run.store.url_of("fences/99999999.json"))
    assert gap.startswith(run.store.url_of(record_path(8)))
    assert record == f"{run.store.url_of('log/99999999.json')}: it is record 2"
    assert (report.num_records, report.num_outer_steps, report.last_index) == (9, 7, 99999999)
    with pytest.raises(StoreError, match="does not exist"):
        RunLog.open(run.store)


def share_changed(record: Record, **change: object) -> Record:
    return replace(record, shares=(replace(record.shares[0], **change), *record.shares[1:]))


def spent_changed(record: Record, **change: int) -> Record:
    return share_changed(record, spent=(replace(record.shares[0].spent[0], **change),))


def tokens_changed(record: Record, **change: int) -> Record:
    return replace(record, tokens={**record.tokens, **change})


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
        (lambda r: tokens_changed(r, expired=-16, leased=r.tokens["leased"] - 16), "-16 tokens expired"),
        (lambda r: replace(r, round=3), "round is 3, but 2 are whole with it"),
        (lambda r: replace(r, round=0), "round is 0, but 2 are whole with it"),
        (lambda r: replace(r, shares=()), "an outer step that nobody has a share in"),
        (lambda r: replace(r, fence_epoch=-5), "fence epoch -5 is nobody's"),
        (lambda r: share_changed(r, round=2), "island-00 in its round 3 is in the step of round 2"),
        (lambda r: share_changed(r, weight=0.0), "island-00 has weight 0.0"),
        (lambda r: share_changed(r, weight=-1e308), "island-00 has weight -1e+308"),
        (lambda r: share_changed(r, norm=-1.0), "island-00 has norm -1.0"),
        (lambda r: share_changed(r, incarnation=0), "island-00 has incarnation 0"),
        (lambda r: share_changed(r, base_version=-1), "island-00 has base_version -1"),
        (lambda r: share_changed(r, tokens=-32), "island-00 has tokens -32"),
        (lambda r: share_changed(r, tokens=40), "island-00 has 40 tokens, but spent 4 sequences of 8"),
        (lambda r: share_changed(r, spent=()), "island-00 has 32 tokens, but spent 0 sequences of 8"),
        (lambda r: share_changed(r, spent=(), tokens=0), "spent no data, but fragment 1 closes a round"),
        (lambda r: spent_changed(r, shard=1), "of shard 1, but trains on the 100 of shard 0"),
        (lambda r: spent_changed(r, epoch=-3), "of epoch -3 of shard 0, but trains on"),
        (
            lambda r: spent_changed(r, start=98, stop=102),
            "spent sequences 98..102 of epoch 0 of shard 0, but trains on",
        ),
        (lambda r: spent_changed(r, epoch=3), "of epoch 3 of shard 0, which were not leased out yet"),
        (lambda r: spent_changed(r, epoch=10**12), f"of epoch {10**12} of shard 0, which were not leased out yet"),
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
