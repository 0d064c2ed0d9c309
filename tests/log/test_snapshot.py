"""Snapshots and checkpoints: whole or absent, checked byte for byte, and equal to the replay."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run_log import Killed, dying_store
from toy_run import ToyRun, bits, new_replica

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import partition
from diloco_ray.algorithm.outer_optimizer import SGD
from diloco_ray.algorithm.replica import Replica
from diloco_ray.errors import ConfigError, CorruptionError, RunMismatchError, StoreError
from diloco_ray.log.record import seal, unseal
from diloco_ray.log.run_log import RunLog, record_path
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import (
    LISTINGS,
    list_snapshots,
    load_newest,
    load_snapshot,
    load_tensors,
    manifest_path,
    newest_snapshot_at_or_before,
    prune_snapshots,
    restore,
    save_snapshot,
    save_tensors,
)
from diloco_ray.simulation.storage import IOCall, TappedStore


@pytest.fixture
def run(tmp_path: Path) -> ToyRun:
    """Eight outer steps with snapshots at 0, 3 and 6."""
    return ToyRun(RunStore(str(tmp_path / "run"))).start().take_steps(8, snapshot_every=3)


def fresh(run: ToyRun) -> Replica:
    return new_replica(unseal(run.store.read("run.json"), ""))


def test_a_snapshot_holds_the_replica_bit_for_bit(store: RunStore):
    run = ToyRun(store).start().take_steps(5)
    run.snapshot()
    replica = fresh(run)
    assert load_snapshot(store, 5, replica) == run.log.tail.digest()
    assert bits(replica) == run.bits()
    assert list_snapshots(store) == [0, 5]


def test_an_optimizer_without_buffers_is_saved_too(tmp_path: Path):
    store, layout = RunStore(str(tmp_path)), partition({"w": (3, 3)})
    one, other = (Replica(layout, SGD(), get_codec("float32")) for _ in range(2))
    one.load_from_({"w": torch.arange(9.0).view(3, 3)})
    save_snapshot(store, 0, one, "digest")
    load_snapshot(store, 0, other)
    assert bits(one) == bits(other)


def test_restore_at_any_index_gives_what_the_replica_was_then(tmp_path: Path):
    run = ToyRun(RunStore(str(tmp_path))).start()
    history = [run.bits()]
    for _ in range(8):
        run.take_steps(1, snapshot_every=3)
        history.append(run.bits())
    for index, expected in enumerate(history):
        replica = fresh(run)
        assert restore(run.store, RunLog.open(run.store), replica, at=index) == index
        assert bits(replica) == expected


def test_restore_beyond_the_log_names_its_end(run: ToyRun):
    with pytest.raises(ConfigError, match="no record 9") as caught:
        restore(run.store, run.log, fresh(run), at=9)
    assert caught.value.remedy == "choose 0 to 8"


@pytest.mark.parametrize("file", ["manifest.json", "fragment-001.safetensors"])
@pytest.mark.parametrize("act", ["flip", "remove", "empty"])
def test_restore_passes_over_a_damaged_snapshot(run: ToyRun, file: str, act: str):
    path = f"snapshots/00000006/{file}"
    data = bytearray(run.store.read(path))
    data[len(data) // 2] ^= 1
    match act:
        case "flip":
            run.store.write(path, data)
        case "empty":
            run.store.write(path, b"")
        case _:
            run.store.delete(path)
    replica = fresh(run)
    assert restore(run.store, run.log, replica) == 8
    assert bits(replica) == run.bits()


def test_restore_passes_over_a_snapshot_of_another_branch(run: ToyRun):
    save_snapshot(run.store, 7, run.replica, "0" * 64)
    replica = fresh(run)
    restore(run.store, run.log, replica)
    assert bits(replica) == run.bits()


def test_without_any_sound_snapshot_the_newest_ones_damage_is_named(run: ToyRun):
    for index in (0, 3, 6):
        run.store.write(f"snapshots/{index:08d}/fragment-000.safetensors", b"x")
    with pytest.raises(CorruptionError, match="sha256") as caught:
        restore(run.store, run.log, fresh(run))
    assert caught.value.where.endswith("snapshots/00000006/fragment-000.safetensors")


def test_a_damaged_payload_stops_the_replay_by_name(run: ToyRun):
    record = run.log.records[8]
    run.store.write(record.payload, b"\0" * 10)
    with pytest.raises(CorruptionError) as caught:
        restore(run.store, run.log, fresh(run))
    assert caught.value.where == run.store.url_of(record.payload)


def test_a_record_whose_digest_is_not_reached_stops_the_replay(run: ToyRun):
    run.log.records[8] = replace(run.log.records[8], parameters_digest="0" * 32)
    with pytest.raises(CorruptionError, match="gave") as caught:
        restore(run.store, run.log, fresh(run))
    assert caught.value.where == run.store.url_of(record_path(8))


def test_a_snapshot_of_another_model_or_optimizer_is_refused(run: ToyRun):
    layout = fresh(run).layout
    with pytest.raises(RunMismatchError, match="other tensors"):
        load_snapshot(run.store, 6, Replica(partition({"w": (2, 2)}), SGD(), get_codec("int8")))
    with pytest.raises(RunMismatchError, match="the optimizer needs parameters"):
        load_snapshot(run.store, 6, Replica(layout, SGD(), get_codec("int8")))


def test_tensors_that_are_not_those_of_the_manifest_are_found(run: ToyRun):
    """Even when every file's own digest is right."""
    body = unseal(run.store.read(manifest_path(6)), "")
    body["digests"][1]["optimizer"] = "0" * 32
    run.store.write(manifest_path(6), seal(body))
    with pytest.raises(CorruptionError) as caught:
        load_snapshot(run.store, 6, fresh(run))
    assert caught.value.where.endswith("00000006/fragment-001.safetensors")


def test_newest_snapshot_at_or_before(run: ToyRun):
    assert [newest_snapshot_at_or_before(run.store, index) for index in (0, 2, 3, 5, 6, 99)] == [0, 0, 3, 3, 6, 6]
    assert newest_snapshot_at_or_before(run.store, -1) is None


@pytest.mark.parametrize(("keep", "left"), [(0, [0]), (1, [0, 6]), (2, [0, 3, 6]), (9, [0, 3, 6])])
def test_pruning_keeps_the_newest_and_the_first(run: ToyRun, keep: int, left: list[int]):
    prune_snapshots(run.store, keep)
    assert list_snapshots(run.store) == left
    assert run.store.list("snapshots") == [f"{index:08d}" for index in left]
    assert restore(run.store, run.log, fresh(run)) == 8


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_while_pruning_leaves_only_whole_snapshots(tmp_path: Path, when: str):
    for dies_at in range(1, 20):
        store = RunStore(str(tmp_path / str(dies_at)))
        run = ToyRun(store).start().take_steps(4, snapshot_every=1)
        try:
            prune_snapshots(dying_store(store.url, dies_at, when), 1)
        except Killed:
            for index in list_snapshots(store):
                load_snapshot(store, index, fresh(run))
            prune_snapshots(store, 1)
        assert store.list("snapshots") == ["00000000", "00000004"]
        if dies_at > 12:
            return


def test_a_snapshot_being_written_is_not_pruned(run: ToyRun):
    run.store.write("snapshots/00000008/fragment-000.safetensors", b"on its way")
    run.store.write("snapshots/00000004/fragment-000.safetensors", b"left by a crash")
    prune_snapshots(run.store, 9)
    assert run.store.list("snapshots") == ["00000000", "00000003", "00000006", "00000008"]


@pytest.mark.parametrize(("num_overtaken", "loaded"), [(1, 15), (2, 24), (30, 0)])
def test_a_reader_whose_snapshots_are_pruned_goes_on_with_newer_ones_and_not_without_end(
    run: ToyRun, num_overtaken: int, loaded: int
):
    """As long as one fragment is on its way the run takes nine steps, and keeps three snapshots."""
    read: list[str] = []

    def overtake(call: IOCall) -> None:
        if (call.act, call.moment) == ("read", "before") and call.path.endswith("fragment-000.safetensors"):
            read.append(call.path)
            if len(read) <= num_overtaken and "00000000" not in call.path:
                run.take_steps(9, snapshot_every=3)
                prune_snapshots(run.store, 3)

    slow, replica = TappedStore(run.store.url, overtake), fresh(run)
    index = load_newest(slow, lambda: list_snapshots(slow), replica, lambda index: run.log.records[index].digest())
    assert index == loaded
    assert len(read) <= LISTINGS + 1
    expected = fresh(run)
    restore(run.store, run.log, expected, at=index)
    assert bits(replica) == bits(expected)


# ---- checkpoints ----

TENSORS = {
    "step": torch.tensor(3),
    "m": torch.randn(4, 5),
    "half": torch.randn(7).bfloat16(),
    "mask": torch.tensor([True, False]),
}


def test_a_checkpoint_comes_back(store: RunStore):
    save_tensors(store, "islands/eu-1/checkpoint", TENSORS, {"inner_step": 7, "rng": [1, 2]})
    save_tensors(store, "top", {"view": torch.arange(10).view(2, 5).T, "same": TENSORS["m"]}, {})
    tensors, meta = load_tensors(store, "islands/eu-1/checkpoint")
    assert meta == {"inner_step": 7, "rng": [1, 2]}
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert torch.equal(load_tensors(store, "top")[0]["view"], torch.arange(10).view(2, 5).T)


def test_slices_of_one_storage_can_be_saved(tmp_path: Path):
    store, flat = RunStore(str(tmp_path)), torch.arange(10.0)
    save_tensors(store, "c", {"a": flat[:4], "b": flat[4:]}, {})
    assert torch.equal(load_tensors(store, "c")[0]["b"], flat[4:])


def test_a_newer_checkpoint_replaces_the_older_and_no_neighbour(store: RunStore):
    save_tensors(store, "c/one", {"x": torch.zeros(2)}, {})
    save_tensors(store, "c/one-two", {"x": torch.zeros(2)}, {})
    save_tensors(store, "c/one", {"x": torch.ones(2)}, {})
    assert torch.equal(load_tensors(store, "c/one")[0]["x"], torch.ones(2))
    assert torch.equal(load_tensors(store, "c/one-two")[0]["x"], torch.zeros(2))
    assert len(store.list("c")) == 4


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_kill_while_saving_leaves_the_old_checkpoint_or_the_new(tmp_path: Path, dies_at: int, when: str):
    store = RunStore(str(tmp_path))
    save_tensors(store, "c", {"x": torch.zeros(2)}, {"step": 1})
    with pytest.raises(Killed):
        save_tensors(dying_store(store.url, dies_at, when), "c", {"x": torch.ones(2)}, {"step": 2})
    tensors, meta = load_tensors(store, "c")
    assert tensors["x"][0] == meta["step"] - 1


def test_damage_to_a_checkpoint_is_named(tmp_path: Path):
    store = RunStore(str(tmp_path))
    save_tensors(store, "c", {"x": torch.zeros(2)}, {})
    for name in store.list():
        good = store.read(name)
        bad = bytearray(good)
        bad[-2] ^= 4
        store.write(name, bad)
        with pytest.raises(CorruptionError) as caught:
            load_tensors(store, "c")
        assert caught.value.where == store.url_of(name)
        store.write(name, good)
    with pytest.raises(StoreError, match="does not exist"):
        load_tensors(store, "absent")
