"""Coordinator lives: what a second one finds, what the first one may no longer do, and what a restart must not lose."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from diloco_ray.coordination.messages import Committed, DataRange, InnerPlan, Verdict
from diloco_ray.coordinator import coordinator
from diloco_ray.errors import FencedError, OvertakenError, StoreError
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import list_snapshots
from diloco_ray.log.verify import verify
from diloco_ray.simulation.storage import IOCall, TappedStore
from diloco_ray.transport.protocol import Beat
from tests.small_run import Life, SmallIsland, begun, files, join_all, new_replica, records, restored, small_job

JOB = small_job(num_islands=2)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return begun(RunStore(str(tmp_path / "run")), JOB)


def two_islands(life: Life) -> list[SmallIsland]:
    islands = [SmallIsland(0, JOB), SmallIsland(1, JOB)]
    join_all(life.coordinator, islands)
    return islands


def one_round(life: Life, islands: list[SmallIsland]) -> None:
    for island in islands:
        assert life.submit(*island.contribution(life.plan_of(island))).status == "accepted"


def whole_run(store: RunStore) -> list[str]:
    """The digests of a run that nothing happened to."""
    life = Life(store, JOB)
    islands = two_islands(life)
    for _ in range(JOB.rules.num_rounds):
        one_round(life, islands)
    assert life.coordinator.state.phase == "succeeded"
    return [record.parameters_digest for record in records(store)]


def reference(tmp_path: Path) -> list[str]:
    return whole_run(begun(RunStore(str(tmp_path / "reference")), JOB))


def assert_nothing_lost_nothing_twice(store: RunStore, expected: list[str]) -> None:
    log = records(store)
    assert [record.parameters_digest for record in log] == expected
    assert [record.version for record in log] == [1, 2, 3]
    spent = [piece for record in log for share in record.shares for piece in share.spent]
    sequences = [(p.epoch, number) for p in spent for number in range(p.start, p.stop)]
    assert len(sequences) == len(set(sequences)) == 3 * 2 * 4
    tokens = log[-1].tokens
    assert tokens["committed"] == 3 * 2 * 64
    fates = sum(tokens[fate] for fate in ("committed", "rejected", "expired", "rewound", "outstanding"))
    assert tokens["leased"] == fates


def test_that_there_are_old_records_is_told_without_a_look_at_the_store(store: RunStore) -> None:
    """It may be a bucket, and who tells is the loop that hears heartbeats."""
    first = Life(store, JOB)
    one_round(first, two_islands(first))
    second = Life(store, JOB).coordinator
    shutil.rmtree(Path(store.url) / "payloads")
    tidings = second.news("", 0, 0, "")
    assert tidings is not None
    assert tidings.records
    assert second.feed.recent_after(0) == ()
    with pytest.raises(StoreError):
        second.records_after(0)


def test_a_joiner_is_not_sent_to_the_beginning_because_the_run_prunes_meanwhile(tmp_path: Path) -> None:
    job = small_job(num_islands=1, num_rounds=20, snapshot_every_rounds=1)
    is_overtaken = False

    def overtake(call: IOCall) -> None:
        nonlocal is_overtaken
        if reading and not is_overtaken and call.path.endswith("fragment-000.safetensors"):
            is_overtaken = True
            for _ in range(5):
                one_round(life, [island])

    reading: list[bool] = []
    store = begun(TappedStore(str(tmp_path / "run"), overtake), job)
    life, island = Life(store, job), SmallIsland(0, job)
    join_all(life.coordinator, [island])
    for _ in range(5):
        one_round(life, [island])
    reading.append(True)
    assert life.coordinator.snapshot().index == 10
    assert list_snapshots(store) == [0, 8, 9, 10]
    is_overtaken = False
    assert life.coordinator.snapshot(first=True).index == 0


FOLDERS = ("", "log", "payloads", "fences", "events", "residuals", "snapshots", "snapshots/00000002", "mail", "tokens")
FOREIGN = (
    ".DS_Store",
    "Thumbs.db",
    "notes.json",
    "00000001 (1).json",
    "000001-0000 (1).jsonl",
    "x.jsonl/x",
    "@eaDir/x",
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_folders_that_no_run_writes_stop_no_coordinator(folder: str, tmp_path: Path) -> None:
    job = replace(small_job(num_islands=1, num_rounds=7, snapshot_every_rounds=1), downlink_error_feedback=True)
    job = replace(job, keep_snapshots=1)
    store = begun(RunStore(str(tmp_path / "run")), job)
    life, island = Life(store, job), SmallIsland(0, job)
    join_all(life.coordinator, [island])
    for _ in range(2):
        one_round(life, [island])
    for name in FOREIGN:
        store.write(f"{folder}/{name}".strip("/"), b'\x00{"event": "evaluation"}\n{"event": "evaluation"}\n')
    one_round(life, [island])
    life, island = Life(store, job), SmallIsland(0, job)
    join_all(life.coordinator, [island])
    assert life.coordinator.measured() == set()
    for _ in range(4):
        one_round(life, [island])
    assert life.coordinator.state.phase == "succeeded", life.coordinator.state.reason
    assert list_snapshots(store) == [0, 7]
    if folder != "snapshots/00000002":  # which was pruned with all that was in it
        assert set(FOREIGN) <= {path.removeprefix(f"{folder}/") for path in every_file(tmp_path / "run")}


def test_a_coordinator_that_begins_sweeps_what_those_before_it_left(tmp_path: Path) -> None:
    store = begun(RunStore(str(tmp_path / "run")), JOB)
    left = tmp_path / "run/log/.tmp-left"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    Life(store, JOB)
    assert not left.exists()


def every_file(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_a_second_coordinator_fences_the_first_which_writes_nothing_more(store: RunStore, tmp_path: Path) -> None:
    expected = reference(tmp_path)
    first = Life(store, JOB)
    islands = two_islands(first)
    one_round(first, islands)
    second = Life(store, JOB)
    assert second.coordinator.fence_epoch == first.coordinator.fence_epoch + 1

    for island in islands:
        first.coordinator.submit(*island.contribution(first.plan_of(island)))
    for _ in islands:
        first.coordinator.receive(first.run_job())  # the inspections; the outer step is next
    before = files(store)
    with pytest.raises(FencedError, match="fence epoch 2"):
        first.run_job()
    assert files(store) == before
    assert first.coordinator.state.index == 1

    for island in islands:
        assert island.join(second.coordinator) == ""
    for _ in range(2):
        one_round(second, islands)
    assert_nothing_lost_nothing_twice(store, expected)
    assert [record.fence_epoch for record in records(store)] == [1, 2, 2]


def test_a_fenced_coordinator_tells_nobody_that_the_run_is_over(store: RunStore) -> None:
    """Islands that hear it would leave its successor."""
    first = Life(store, JOB)
    islands = two_islands(first)
    island = islands[0]
    item = island.contribution(first.plan_of(island))
    Life(store, JOB)
    first.coordinator.fail(FencedError("fence epoch 2 is taken"))
    assert first.coordinator.state.phase == "failed"
    assert first.coordinator.news(island.name, island.incarnation, 0, "") is None
    assert first.coordinator.submit(*item).status == "unknown"


def about_to_step(store: RunStore) -> Life:
    """All contributions of a round are accepted; the outer step is the next job."""
    life = Life(store, JOB)
    islands = two_islands(life)
    for island in islands:
        life.coordinator.submit(*island.contribution(life.plan_of(island)))
    for _ in islands:
        life.coordinator.receive(life.run_job())
    return life


def test_a_coordinator_that_lost_the_race_for_a_record_stops_even_if_it_saw_no_newer_fence(store: RunStore) -> None:
    """The create of the record decides, not the look at the fences."""
    first = about_to_step(store)
    second = Life(store, JOB)
    one_round(second, two_islands(second))
    store.delete("fences/00000002.json")
    before = files(store)
    with pytest.raises(FencedError, match="record 1 was committed by the coordinator of fence epoch 2"):
        first.run_job()
    assert {name: data for name, data in files(store).items() if name in before} == before
    assert len(records(store)) == 1


QUORUM = small_job(
    num_islands=2,
    num_fragments=2,
    num_rounds=1,
    snapshot_every_rounds=1,
    closes="quorum",
    quorum=1,
    overlap=2,
    launch_interval_s=0.0,
    grace_share=0.0,
)


def two_steps_in_the_queue(store: RunStore) -> Life:
    """Of two fragments: the first ends the only round, the second is of the work after it."""
    life = Life(store, QUORUM)
    first, second = SmallIsland(0, QUORUM), SmallIsland(1, QUORUM)
    join_all(life.coordinator, [first, second])

    def send(island: SmallIsland, round: int, fragment: int) -> None:
        state = life.coordinator.state
        plan = next(plan for plan in state.plans[island.name] if plan.round == round)
        item = island.contribution(plan, fragment=fragment, base_version=state.versions[fragment])
        life.coordinator.submit(*item)

    for island, fragment in ((first, 0), (second, 0), (second, 1)):
        send(island, 0, fragment)
        life.settle()
    send(first, 0, 1)
    send(second, 1, 0)
    for _ in range(2):
        life.coordinator.receive(life.run_job())  # the inspections
    return life


class Trouble:
    """Of a storage that cannot list the fences for a moment."""

    begins = False

    def __call__(self, call: IOCall) -> None:
        if self.begins and (call.act, call.path) == ("list", "fences"):
            raise OSError("503 Slow Down")


def test_after_a_step_whose_commit_failed_no_other_is_taken_nor_a_snapshot_of_its_replica(tmp_path: Path) -> None:
    """The next jobs may be on their way before anybody hears of the error."""
    tapped = TappedStore(str(tmp_path / "run"), no_fence_is_found := Trouble())
    life = two_steps_in_the_queue(begun(tapped, QUORUM))
    before = files(tapped)
    no_fence_is_found.begins = True
    with pytest.raises(StoreError):
        life.run_job()
    no_fence_is_found.begins = False
    assert [life.run_job() for _ in range(len(life.jobs))] == [None]
    assert files(tapped) == before


def test_the_record_that_ends_the_run_is_the_last_one(tmp_path: Path) -> None:
    store = begun(RunStore(str(tmp_path / "run")), QUORUM)
    life = two_steps_in_the_queue(store)
    life.settle()
    state = life.coordinator.state
    assert state.phase == "succeeded"
    assert state.index == len(records(store)) == 4


def test_a_record_that_only_islands_know_of_is_looked_for_though_no_step_is_due(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator of before commits it after its successor's look at the log: who has it works on what comes next."""
    first, second = about_to_step(store), Life(store, JOB)
    second.coordinator.news("", 0, 1, "")  # by somebody who cannot know
    assert second.run_job() is None
    monkeypatch.setattr(coordinator, "LOOK_EVERY_S", math.inf)
    store.delete("fences/00000002.json")  # as if the first had looked before
    first.coordinator.receive(first.run_job())
    assert len(records(store)) == 1
    for after in (0, 1, 1):
        second.coordinator.news("", 0, after, "")
    assert not second.jobs, "it has just looked"
    monkeypatch.setattr(coordinator, "LOOK_EVERY_S", -1.0)
    second.coordinator.news("", 0, 1, "")
    with pytest.raises(OvertakenError, match="record 1 was committed by the coordinator of fence epoch 1"):
        second.run_job()


@pytest.mark.parametrize("work_survives", [True, False], ids=["islands live", "islands start anew"])
def test_a_crash_between_commit_and_announcement_loses_nothing_and_repeats_nothing(
    store: RunStore, tmp_path: Path, work_survives: bool
) -> None:
    expected = reference(tmp_path)
    first = Life(store, JOB)
    islands = two_islands(first)
    held = {island.name: first.plan_of(island) for island in islands}
    sent = {island.name: island.contribution(first.plan_of(island)) for island in islands}
    for island in islands:
        first.coordinator.submit(*sent[island.name])
    for _ in islands:
        first.coordinator.receive(first.run_job())
    committed = first.run_job()  # and nobody hears of it
    assert isinstance(committed, Committed)
    assert first.coordinator.state.index == 0

    second = Life(store, JOB)
    assert second.coordinator.state.index == 1
    assert second.coordinator.state.round == 1
    if work_survives:
        for island in islands:
            assert second.coordinator.beat(Beat(island.name, island.incarnation)) == "rejoin"
            assert island.join(second.coordinator, held[island.name]) == ""
            assert island.incarnation == 1
            assert second.submit(*sent[island.name]) == Verdict("committed")
    else:
        islands = two_islands(second)
        assert [island.incarnation for island in islands] == [2, 2]
    for _ in range(2):
        one_round(second, islands)
    assert_nothing_lost_nothing_twice(store, expected)


@pytest.mark.parametrize("num_jobs", range(9))
def test_a_crash_before_any_job_ends_with_the_bits_of_an_uninterrupted_run(
    store: RunStore, tmp_path: Path, num_jobs: int
) -> None:
    """Jobs are all that a coordinator does to files; islands lose their accepted work and do it again."""
    expected = reference(tmp_path)
    first = Life(store, JOB)
    islands = two_islands(first)
    left = num_jobs
    while left and first.coordinator.state.round < 2:
        for island in islands:
            if first.coordinator.state.plans.get(island.name):
                first.coordinator.submit(*island.contribution(first.plan_of(island)))
        while first.jobs and left:
            first.coordinator.receive(first.run_job())
            left -= 1
    second = Life(store, JOB)
    islands = two_islands(second)
    while second.coordinator.state.phase != "succeeded":
        one_round(second, islands)
    assert_nothing_lost_nothing_twice(store, expected)


def test_the_work_in_hand_is_taken_up_again_when_only_the_coordinator_was_restarted(store: RunStore) -> None:
    first = Life(store, JOB)
    islands = two_islands(first)
    one_round(first, islands)
    held = {island.name: first.plan_of(island) for island in islands}
    second = Life(store, JOB)
    for island in islands:
        assert island.join(second.coordinator, held[island.name]) == ""
    assert second.coordinator.state.plans == {name: (plan,) for name, plan in held.items()}
    one_round(second, islands)
    tokens = records(store)[1].tokens
    assert (tokens["leased"], tokens["committed"], tokens["expired"]) == (4 * 64, 4 * 64, 0)


def test_a_forged_lease_costs_nobody_anything_and_the_next_coordinator_begins(store: RunStore) -> None:
    """The id of the lease that is given next, on data that is free."""
    life = Life(store, JOB)
    good, bad = SmallIsland(0, JOB), SmallIsland(1, JOB)
    join_all(life.coordinator, [good])
    epoch = life.coordinator.fence_epoch
    forged = InnerPlan(bad.name, 1, f"{epoch}.1", 0, 0, 2, 0, 0, 2, (DataRange(0, 0, 50, 54),))
    assert bad.join(life.coordinator, forged) == ""
    for _ in range(2):
        one_round(life, [good, bad])
    (problem,) = verify(store, lambda run: new_replica(JOB)).problems
    assert "run.json" in problem, "a small run has none"
    life = Life(store, JOB)
    join_all(life.coordinator, [good, bad])
    one_round(life, [good, bad])
    assert life.coordinator.state.phase == "succeeded"
    spent = sorted(piece for record in records(store) for share in record.shares for piece in share.spent)
    assert spent == [DataRange(0, 0, start, start + 4) for start in range(0, 24, 4)]


def test_a_failed_store_stops_the_coordinator_and_the_next_one_goes_on(store: RunStore, tmp_path: Path) -> None:
    expected = reference(tmp_path)
    first = Life(store, JOB)
    islands = two_islands(first)
    for island in islands:
        first.coordinator.submit(*island.contribution(first.plan_of(island)))
    for _ in islands:
        first.coordinator.receive(first.run_job())
    blocked = Path(store.url) / "payloads"
    blocked.write_text("a file where the folder must be")
    with pytest.raises(StoreError) as caught:
        first.run_job()
    first.coordinator.fail(caught.value)
    assert first.coordinator.state.phase == "failed"
    news = first.coordinator.news(islands[0].name, 1, 0, "")
    assert news is not None
    assert news.standing == "over"
    assert "cannot write" in news.reason

    blocked.unlink()
    second = Life(store, JOB)
    islands = two_islands(second)
    for _ in range(3):
        one_round(second, islands)
    assert_nothing_lost_nothing_twice(store, expected)


def test_the_coordinators_model_is_the_one_that_the_store_gives(store: RunStore) -> None:
    life = Life(store, JOB)
    islands = two_islands(life)
    for _ in range(2):
        one_round(life, islands)
        assert restored(store, JOB).digest(0) == life.coordinator._replica.digest(0)
        assert RunLog.open(store).tail.state_digest == life.coordinator._replica.digest(0)
