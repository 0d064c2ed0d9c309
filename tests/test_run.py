"""A run's folder: begun, taken up again, refused; nothing is spent on what cannot be meant."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diloco_ray import api
from diloco_ray.cli import app
from diloco_ray.config import RunConfig
from diloco_ray.errors import ConfigError, CorruptionError, DataError, RunMismatchError, StoreError
from diloco_ray.ids import canonical_json
from diloco_ray.log.record import seal, unseal
from diloco_ray.log.run_log import RunLog, record_path
from diloco_ray.observe.status import STATUS
from diloco_ray.run import open_run, read_run
from diloco_ray.simulation.in_process import begin, make_island, train_in_process
from diloco_ray.transport.in_memory import InMemoryTransport
from diloco_ray.transport.letters import NOTICE, Notice
from tests.processes import digests, run_folder, write_recipe


def opened(body: dict[str, Any], *overrides: str) -> Any:
    return open_run(RunConfig.from_dict(body, overrides))


def test_opening_a_run_twice_finds_the_same_run(tiny: dict[str, Any]) -> None:
    assert opened(tiny).run_id == opened(tiny).run_id


def test_a_changed_recipe_is_refused_with_each_changed_field(tiny: dict[str, Any]) -> None:
    opened(tiny)
    with pytest.raises(RunMismatchError) as caught:
        opened(tiny, "outer.learning_rate=0.1", "inner.steps_per_round=7")
    assert "outer.learning_rate: 0.7 -> 0.1" in str(caught.value)
    assert "inner.steps_per_round: 6 -> 7" in str(caught.value)


def test_a_run_that_has_not_trained_may_be_deleted_for_another_recipe(tiny: dict[str, Any]) -> None:
    opened(tiny)
    with pytest.raises(RunMismatchError) as caught:
        opened(tiny, "seed=8")
    assert caught.value.remedy.endswith("or delete the folder, since no outer step has been taken yet")
    train_in_process(opened(tiny))
    with pytest.raises(RunMismatchError) as caught:
        opened(tiny, "seed=8")
    assert "delete" not in caught.value.remedy


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("model.config.hidden_size=16", "model.config.hidden_size: 32 -> 16"),
        ("data.tokenizer=train:300", "data.tokenizer: 'bytes' -> 'train:300'"),
        ("data.sequence_length=16", "data.sequence_length: 32 -> 16"),
        ("inner.steps_per_round=7", "inner.steps_per_round: 6 -> 7"),
        ("inner.precision=bfloat16", "inner.precision: 'float32' -> 'bfloat16'"),
        ("sync.uplink=float32", "sync.uplink: 'int8' -> 'float32'"),
        ("seed=8", "seed: 7 -> 8"),
    ],
)
def test_another_model_tokenizer_length_number_of_steps_or_type_is_named_with_both_values(
    tiny: dict[str, Any], field: str, found: str
) -> None:
    opened(tiny)
    before = (run_folder(tiny) / "run.json").read_bytes()
    with pytest.raises(RunMismatchError) as caught:
        opened(tiny, field)
    assert found in caught.value.what
    assert (run_folder(tiny) / "run.json").read_bytes() == before


def test_a_run_that_spends_a_range_of_tokens_twice_is_caught_with_both_records(tiny: dict[str, Any]) -> None:
    """Made by hand: the last record spends what the first one has spent, and is sealed like any other."""
    run = opened(tiny)
    train_in_process(run)
    assert CliRunner().invoke(app, ["verify", run.store.url]).exit_code == 0
    first, *_, last = RunLog.open(run.store).records[1:]
    shares = (replace(last.shares[0], spent=first.shares[0].spent), *last.shares[1:])
    run.store.write(record_path(last.index), replace(last, shares=shares).to_bytes())
    told = CliRunner().invoke(app, ["verify", run.store.url])
    assert told.exit_code == CorruptionError.exit_code
    spent = first.shares[0].spent[0]
    [found] = [line for line in told.output.splitlines() if "overlap" in line]
    assert found.startswith(
        f"problem: {run.store.url_of(record_path(last.index))}: sequences {spent.start}..{spent.stop} "
    )
    assert found.endswith(f"overlap {spent.start}..{spent.stop} of record {first.index}")


def test_changed_text_under_the_same_path_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"Line {n} of a text that is long enough to be learnt from." for n in range(2000)))
    body = {**tiny, "data": {**tiny["data"], "corpus": str(own), "prepared": str(tmp_path / "one")}}
    opened(body)
    own.write_text("\n".join(f"Line {n} of quite another text, with other words in it." for n in range(2000)))
    with pytest.raises(RunMismatchError, match="data"):
        opened(body, f"data.prepared={tmp_path / 'two'}")


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tiny: dict[str, Any]) -> None:
    folder = run_folder(tiny)
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RunMismatchError, match=r"thesis\.txt"):
        opened(tiny)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_damaged_run_json_is_named(tiny: dict[str, Any]) -> None:
    opened(tiny)
    path = run_folder(tiny) / "run.json"
    path.write_bytes(path.read_bytes().replace(b'"seed":7', b'"seed":8'))
    with pytest.raises(CorruptionError, match=r"run\.json"):
        opened(tiny)


@pytest.mark.parametrize("found", [0, 2, None])
def test_a_run_of_another_format_is_refused_before_it_is_used(tiny: dict[str, Any], found: int | None) -> None:
    run = opened(tiny)
    document = {**unseal(run.store.read("run.json"), ""), "format": found, "config": {"of another": "version"}}
    run.store.write("run.json", seal(document))
    for read in (lambda: opened(tiny), lambda: read_run(run.store.url)):
        with pytest.raises(RunMismatchError, match=f"written in format {found}, this version reads 1") as caught:
            read()
        assert caught.value.where.endswith("run.json")


def test_a_shard_that_is_damaged_under_a_run_ends_it_by_name_and_restored_lets_it_go_on(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    body = {**tiny, "data": {**tiny["data"], "prepared": str(tmp_path / "shards")}}
    train_in_process(opened(body, "rounds=1"))
    [shard] = (tmp_path / "shards").glob("train-*")
    sound = shard.read_bytes()
    for damaged in (sound[:-1], bytes([sound[0] ^ 1]) + sound[1:], None):
        shard.unlink()
        if damaged is not None:
            shard.write_bytes(damaged)
        with pytest.raises(CorruptionError) as caught:
            train_in_process(opened(body))
        assert shard.name in caught.value.what + caught.value.where
        shard.write_bytes(sound)
    assert train_in_process(opened(body)).state.index == 4


def test_a_missing_dataset_is_refused_before_a_run_is_begun(tiny: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="nowhere"):
        opened({**tiny, "data": {**tiny["data"], "corpus": "nowhere/at.txt"}})
    assert not (run_folder(tiny) / "run.json").exists()


def test_an_empty_dataset_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError):
        opened({**tiny, "data": {**tiny["data"], "corpus": str(tmp_path / "empty.txt")}})


def test_too_little_text_for_one_batch_is_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="batch"):
        opened(tiny, "inner.batch_size=100000")


def test_text_without_a_validation_sequence_is_refused(tiny: dict[str, Any]) -> None:
    longer = ("data.sequence_length=20000", "model.config.max_position_embeddings=20000", "inner.batch_size=1")
    with pytest.raises(DataError, match="validation"):
        opened(tiny, *longer)


def test_shards_of_another_tokenizer_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    opened(tiny, f"data.prepared={tmp_path / 'shards'}")
    with pytest.raises(DataError, match="tokenizer"):
        opened(tiny, f"data.prepared={tmp_path / 'shards'}", "data.tokenizer=train:300", "name=other")


def test_a_model_that_cannot_be_built_is_refused_before_a_run_is_begun(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="hidden_sise"):
        opened(tiny, "model.config.hidden_sise=3")
    assert not (run_folder(tiny) / "run.json").exists()


@pytest.mark.parametrize("partition", ["sequential", "strided", "balanced"])
def test_fragments_that_would_be_empty_are_refused_before_data_is_prepared(
    tiny: dict[str, Any], partition: str
) -> None:
    with pytest.raises(ConfigError, match=r"sync\.fragments=1000") as caught:
        opened(tiny, "sync.fragments=1000", f"sync.partition={partition}")
    assert caught.value.remedy.startswith("sync.fragments: choose 1 to 11")
    assert not (run_folder(tiny).parent / "data").exists()


def test_an_inner_optimizer_that_torch_lacks_is_refused_before_a_run_is_begun(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("torch.optim.Muon")
    with pytest.raises(ConfigError, match="has no Muon"):
        opened(tiny, "inner.optimizer=muon")
    assert not (run_folder(tiny) / "run.json").exists()


def test_a_storage_path_that_cannot_be_written_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        opened({**tiny, "storage": {"path": str(tmp_path / "file")}})


def test_no_run_is_found_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunMismatchError, match="no run at"):
        read_run(str(tmp_path))


@pytest.mark.parametrize("command", ["status", "verify", "export", "sample", "evaluate"])
def test_a_recipe_in_the_place_of_a_run_is_told_from_it(tiny: dict[str, Any], tmp_path: Path, command: str) -> None:
    recipe = write_recipe(tmp_path, tiny)
    options = ["--to", str(tmp_path / "exported")] if command == "export" else []
    told = CliRunner().invoke(app, [command, str(recipe), *options]).exception
    assert isinstance(told, RunMismatchError)
    assert told.what == f"{recipe} is a recipe, and the folder of a run is wanted here"
    assert str(run_folder(tiny)) in told.remedy


def test_a_run_begun_and_interrupted_before_its_first_record_is_made_whole(tiny: dict[str, Any]) -> None:
    opened(tiny)
    folder = run_folder(tiny)
    before = (folder / "log" / "00000000.json").read_bytes()
    os.remove(folder / "log" / "00000000.json")
    os.remove(folder / "snapshots" / "00000000" / "manifest.json")
    opened(tiny)
    assert (folder / "log" / "00000000.json").read_bytes() == before


def test_a_finished_run_goes_on_when_it_is_given_more_rounds(tiny: dict[str, Any]) -> None:
    first = train_in_process(opened(tiny))
    again = train_in_process(opened(tiny))
    longer = train_in_process(opened(tiny, "rounds=6"))
    assert (first.state.index, again.state.index, longer.state.index) == (4, 4, 6)


def test_relative_paths_spaces_and_missing_folders_work_as_people_expect(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = opened(tiny, "storage.path=my runs/of today", "rounds=1")
    train_in_process(run)
    assert (tmp_path / "my runs" / "of today" / "tiny" / "log" / "00000001.json").exists()
    assert json.loads((tmp_path / "my runs/of today/tiny/run.json").read_text())["prepared"].startswith(str(tmp_path))


def test_a_snapshot_that_the_log_has_not_reached_is_passed_over(tiny: dict[str, Any]) -> None:
    """As in a folder that was copied while its run went on."""
    train_in_process(opened(tiny))
    folder = run_folder(tiny)
    record = (folder / "log" / "00000004.json").read_bytes()
    os.remove(folder / "log" / "00000004.json")
    again = train_in_process(opened(tiny))
    assert again.state.phase == "succeeded"
    assert digests(folder)[-1] in record.decode()


def test_a_finished_run_without_its_last_snapshot_can_be_opened_again(tiny: dict[str, Any]) -> None:
    train_in_process(opened(tiny))
    shutil.rmtree(run_folder(tiny) / "snapshots" / "00000004")
    assert train_in_process(opened(tiny)).state.index == 4


def test_a_folder_moved_with_its_data_is_still_a_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    train_in_process(opened(tiny))
    before = api.evaluate(str(run_folder(tiny)))
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    moved = {**tiny, "storage": {**tiny["storage"], "path": str(tmp_path / "elsewhere")}}
    assert api.evaluate(str(run_folder(moved))) == before
    assert train_in_process(opened(moved, "rounds=5")).state.index == 5


def test_damaged_events_are_no_reason_to_stop_a_run(tiny: dict[str, Any]) -> None:
    train_in_process(opened(tiny))
    path = next((run_folder(tiny) / "events").glob("*.jsonl"))
    path.write_bytes(b'{"event": "round"}\n\xff{]\n' + path.read_bytes()[:-20])
    assert train_in_process(opened(tiny, "rounds=5")).state.index == 5


def test_a_run_whose_folder_is_deleted_under_it_stops_instead_of_training_on(tiny: dict[str, Any]) -> None:
    coordinator = begin(opened(tiny))
    *others, last = [make_island(opened(tiny), InMemoryTransport(coordinator), number) for number in range(3)]
    for island in (*others, last):
        island.start()
    for island in others:
        assert next(moment for moment in island.live() if moment == "wait")
    shutil.rmtree(run_folder(tiny) / "fences")
    with pytest.raises(StoreError, match="fence"):
        list(last.live())
    assert len(digests(run_folder(tiny))) == 1


def test_a_fence_is_above_those_of_the_log_even_if_the_fences_were_deleted(tiny: dict[str, Any]) -> None:
    train_in_process(opened(tiny))
    for _ in range(2):
        train_in_process(opened(tiny))
    longer = train_in_process(opened(tiny, "rounds=5"))
    shutil.rmtree(run_folder(tiny) / "fences")
    again = train_in_process(opened(tiny, "rounds=6"))
    assert again.fence_epoch > longer.fence_epoch
    assert again.state.index == 6


def test_a_run_that_is_over_is_taken_up_once_more_where_islands_from_outside_have_not_heard_of_it(
    tiny: dict[str, Any],
) -> None:
    """The coordinator died between its last record and its last word."""
    run = opened(tiny, "cluster.external_islands=1")
    train_in_process(run)
    over = {"state": "succeeded", "outer_steps": 4, "rounds": 4, "validation": {"last": {"outer_step": 4}}}
    run.store.write(STATUS, canonical_json(over))
    for state, found in (("running", None), ("succeeded", over)):
        run.store.write(NOTICE, canonical_json(asdict(Notice(1, state, "", {}, ""))))
        assert api.finished_status(run) == found
