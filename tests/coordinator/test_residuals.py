"""The downlink's residuals: there before their record is, and after a restart those of the newest records."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.coordinator.residuals import FOLDER, Residuals
from diloco_ray.errors import CorruptionError, StoreError
from diloco_ray.log.record import Record
from diloco_ray.log.run_store import RunStore
from tests.small_run import Life, SmallIsland, begun, files, join_all, records, small_job

JOB = replace(small_job(num_islands=2, num_fragments=2, num_rounds=4), downlink_error_feedback=True)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return begun(RunStore(str(tmp_path / "run")), JOB)


def record(store: RunStore, index: int, fragment: int) -> Record:
    """One with this place in the log."""
    return replace(init_of(store), index=index, kind="outer_step", fragment=fragment, payload_sha256=f"{index}" * 64)


def init_of(store: RunStore) -> Record:
    return Record.from_bytes(store.read("log/00000000.json"), "")


def saved(store: RunStore, *steps: tuple[int, int]) -> list[Record]:
    """Residuals of records (index, fragment), each as high as its index."""
    residuals, found = Residuals(store, JOB.layout, []), []
    for index, fragment in steps:
        found.append(record(store, index, fragment))
        residuals.of(fragment).fill_(float(index))
        residuals.save(fragment, index, found[-1].payload_sha256)
    return found


def levels(residuals: Residuals) -> list[float]:
    found = [residuals.of(fragment.index) for fragment in JOB.layout.fragments]
    assert [tensor.numel() for tensor in found] == [fragment.num_values for fragment in JOB.layout.fragments]
    assert all(bool((tensor == tensor[0]).all()) for tensor in found)
    return [float(tensor[0]) for tensor in found]


def test_before_a_fragments_first_step_there_is_none(store: RunStore) -> None:
    assert levels(Residuals(store, JOB.layout, [])) == [0.0, 0.0]
    assert levels(Residuals(store, JOB.layout, saved(store, (1, 0)))) == [1.0, 0.0]


def test_a_new_life_has_those_of_each_fragments_newest_record(store: RunStore) -> None:
    log = saved(store, (1, 0), (2, 1), (3, 0), (4, 0))
    assert levels(Residuals(store, JOB.layout, log)) == [4.0, 2.0]


def test_one_that_was_saved_and_whose_record_was_not_committed_is_passed_over(store: RunStore) -> None:
    log = saved(store, (1, 0), (2, 1), (3, 0))
    assert levels(Residuals(store, JOB.layout, log[:2])) == [1.0, 2.0]


def test_a_new_life_goes_on_saving_and_deletes_what_it_took_over(store: RunStore) -> None:
    log = saved(store, (1, 0))
    residuals = Residuals(store, JOB.layout, log)
    for index in (2, 3):
        residuals.save(0, index, "f" * 64)
    assert {name.split("-")[1].split(".")[0] for name in store.list(FOLDER)} == {"00000002", "00000003"}


def test_however_often_a_life_ends_nothing_is_left_but_what_a_record_needs_or_may_need(store: RunStore) -> None:
    log: list[Record] = []
    for index in range(1, 6):  # each in a life of its own, which ends before a second try at the next one is committed
        residuals = Residuals(store, JOB.layout, log)
        log.append(record(store, index, 0))
        residuals.save(0, index, log[-1].payload_sha256)
        residuals.save(0, index + 1, "f" * 64)
    Residuals(store, JOB.layout, log)
    assert {name[:25] for name in store.list(FOLDER)} == {
        f"000-00000005-{log[-1].payload_sha256[:12]}",
        "000-00000006-" + "f" * 12,
    }
    assert len(store.list(FOLDER)) == 2 * 2


def test_of_each_fragment_two_are_kept_and_no_file_of_older_ones_is_left(store: RunStore) -> None:
    saved(store, (1, 0), (2, 1), (3, 0), (4, 1), (5, 0), (7, 0))
    names = store.list(FOLDER)
    assert {name[:12] for name in names} == {"000-00000005", "000-00000007", "001-00000002", "001-00000004"}
    assert len(names) == 2 * 4


@pytest.mark.parametrize("name", [".DS_Store", "notes.txt", "a-b", "000-00000001-{sha} (copy).json", "000-{sha}.json"])
def test_a_file_that_no_coordinator_wrote_is_left_alone_and_stops_none(store: RunStore, name: str) -> None:
    path = f"{FOLDER}/{name.format(sha='a' * 12)}"
    log = saved(store, (1, 0), (2, 1))
    store.write(path, b"")
    residuals = Residuals(store, JOB.layout, log)
    assert levels(residuals) == [1.0, 2.0]
    residuals.save(0, 3, "f" * 64)
    assert store.exists(path)


def test_one_of_another_step_or_damaged_or_missing_is_named(store: RunStore) -> None:
    log = saved(store, (1, 0))
    other = replace(log[0], payload_sha256="a" * 64)
    with pytest.raises(StoreError, match="does not exist") as caught:
        Residuals(store, JOB.layout, [other])
    assert caught.value.where == store.url_of("residuals/000-00000001-aaaaaaaaaaaa.json")
    (tensors,) = [name for name in store.list(FOLDER) if name.endswith(".safetensors")]
    store.write(f"{FOLDER}/{tensors}", b"not tensors")
    with pytest.raises(CorruptionError, match="sha256"):
        Residuals(store, JOB.layout, log)
    store.delete(f"{FOLDER}/{tensors}")
    with pytest.raises(StoreError, match="000-00000001"):
        Residuals(store, JOB.layout, log)


# ---- in a coordinator ----


def one_round(life: Life, islands: list[SmallIsland]) -> None:
    plans = {island.name: life.plan_of(island) for island in islands}
    for fragment in JOB.layout.fragments:
        for island in islands:
            sent = island.contribution(plans[island.name], fragment=fragment.index)
            assert life.submit(*sent).status == "accepted"


def run_of(store: RunStore, job: CoordinatorJob, restart_after: int | None = None) -> list[Record]:
    """Four rounds; after so many the coordinator is restarted, and the islands with it."""
    life, round = None, 0
    while round < 4:
        if life is None:
            life, islands = Life(store, job), [SmallIsland(0, job), SmallIsland(1, job)]
            join_all(life.coordinator, islands)
        one_round(life, islands)
        round += 1
        life = None if round == restart_after else life
    return records(store)


def digests(log: list[Record]) -> list[tuple[str, str]]:
    return [(record.parameters_digest, record.payload_sha256) for record in log]


def test_a_restarted_coordinator_goes_on_with_the_same_bits(store: RunStore, tmp_path: Path) -> None:
    expected = digests(run_of(begun(RunStore(str(tmp_path / "whole")), JOB), JOB))
    assert len(expected) == 8
    assert digests(run_of(store, JOB, restart_after=2)) == expected
    plain = replace(JOB, downlink_error_feedback=False)
    without = digests(run_of(begun(RunStore(str(tmp_path / "plain")), plain), plain))
    assert without[:2] == expected[:2]  # nothing is left out yet
    assert all(a != b for a, b in zip(without[2:], expected[2:]))


@pytest.mark.parametrize("num_jobs", [3, 4])
def test_a_crash_before_or_after_a_record_is_committed_leaves_the_residual_that_belongs(
    store: RunStore, tmp_path: Path, num_jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is saved and not committed is computed again from the residual before it."""
    expected = digests(run_of(begun(RunStore(str(tmp_path / "whole")), JOB), JOB))
    first = Life(store, JOB)
    islands = [SmallIsland(0, JOB), SmallIsland(1, JOB)]
    join_all(first.coordinator, islands)
    one_round(first, islands)
    plans = {island.name: first.plan_of(island) for island in islands}
    for island in islands:
        first.coordinator.submit(*island.contribution(plans[island.name]))
    for _ in islands:
        first.coordinator.receive(first.run_job())
    if num_jobs == 3:
        monkeypatch.setattr(first.coordinator._log, "append", crash)
        with pytest.raises(RuntimeError, match="power"):
            first.run_job()
        monkeypatch.undo()
    else:
        first.run_job()
    assert any(name.startswith("residuals/000-00000003") for name in files(store))
    assert len(records(store)) == num_jobs - 1

    second = Life(store, JOB)
    for island in islands:
        assert island.join(second.coordinator, plans[island.name]) == ""
    for fragment in JOB.layout.fragments:
        for island in islands:
            second.submit(*island.contribution(plans[island.name], fragment=fragment.index))
    for _ in range(2):
        one_round(second, islands)
    assert digests(records(store)) == expected


def crash(*arguments: object) -> None:
    raise RuntimeError("the power went")


def test_the_payload_and_the_residual_after_it_are_what_was_to_be_sent(store: RunStore) -> None:
    """Q(g + e) + e' = g + e: what the log holds and what is kept back are all that there was."""
    life = Life(store, JOB)
    islands = [SmallIsland(0, JOB), SmallIsland(1, JOB)]
    join_all(life.coordinator, islands)
    kept = [torch.zeros(fragment.num_values) for fragment in JOB.layout.fragments]
    for round in range(3):
        one_round(life, islands)
        residuals = life.coordinator._residuals
        assert residuals is not None
        for fragment in JOB.layout.fragments:
            p = fragment.index
            mean = torch.stack([island.values(round, p) for island in islands]).mean(0)
            step = records(store)[2 * round + p]
            payload = torch.frombuffer(bytearray(store.read(step.payload)), dtype=torch.uint8)
            decoded = torch.empty(fragment.num_values)
            life.coordinator._replica.downlink.decode_(payload, 0, fragment.num_values, decoded)
            torch.testing.assert_close(decoded + residuals.of(p), mean + kept[p], rtol=0.0, atol=1e-8)
            kept[p] = residuals.of(p).clone()
            assert kept[p].abs().max() > 0
