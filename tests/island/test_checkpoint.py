"""An island's own checkpoints: the three that can be needed are there, whatever else lies in the folder."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from diloco_ray.island.checkpoint import IslandCheckpoints
from diloco_ray.island.inner_optimizer import InnerOptimizer, build_inner_optimizer, state_tensors
from diloco_ray.island.settings import InnerSettings
from diloco_ray.log.run_store import RunStore

INNER = InnerSettings(learning_rate=0.1)


def optimizer_after(num_steps: int) -> InnerOptimizer:
    """Its state says how many steps it took."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = build_inner_optimizer(INNER, {"weight": parameter})
    for step in range(num_steps):
        parameter.grad = torch.full((4,), 1.0 + step)
        optimizer.step()
    return optimizer


def steps_of(optimizer: InnerOptimizer) -> int:
    tensors = state_tensors(optimizer)
    return int(tensors["0.step"].item()) if tensors else 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "island-00"


@pytest.fixture
def checkpoints(folder: Path) -> IslandCheckpoints:
    return IslandCheckpoints(RunStore(str(folder)), "this-run")


def other_run(folder: Path) -> IslandCheckpoints:
    return IslandCheckpoints(RunStore(str(folder)), "another-run")


def loaded(checkpoints: IslandCheckpoints, round: int) -> tuple[tuple[int, int | None] | None, int]:
    """What load_ says, and the steps that the optimizer then has."""
    optimizer = optimizer_after(0)
    found = checkpoints.load_(round, optimizer)
    return found, steps_of(optimizer)


def tensor_file(folder: Path, round: int) -> Path:
    (path,) = folder.glob(f"{round:08d}-*.safetensors")
    return path


def test_an_island_that_begins_sweeps_what_a_killed_one_left(folder: Path) -> None:
    folder.mkdir()
    (folder / ".tmp-left").write_bytes(b"half")
    os.utime(folder / ".tmp-left", (0, 0))
    IslandCheckpoints(RunStore(str(folder)), "this-run")
    assert list(folder.iterdir()) == []


def test_what_was_saved_is_loaded_with_its_own_steps(checkpoints: IslandCheckpoints) -> None:
    checkpoints.save(3, optimizer_after(5), own_steps=12)
    assert loaded(checkpoints, 3) == ((3, 12), 5)


def test_an_empty_folder_has_nothing_to_load(checkpoints: IslandCheckpoints) -> None:
    assert checkpoints.rounds() == []
    assert loaded(checkpoints, 3) == (None, 0)


def test_the_newest_three_are_kept_and_no_file_of_older_ones_is_left(
    checkpoints: IslandCheckpoints, folder: Path
) -> None:
    for round in range(1, 6):
        checkpoints.save(round, optimizer_after(round), None)
        assert checkpoints.rounds() == list(range(max(1, round - 2), round + 1))
    assert {path.name[:8] for path in folder.iterdir()} == {"00000003", "00000004", "00000005"}
    assert len(list(folder.iterdir())) == 6


def test_a_deleted_checkpoint_leaves_no_file(checkpoints: IslandCheckpoints, folder: Path) -> None:
    checkpoints.save(1, optimizer_after(1), None)
    checkpoints.delete(1)
    checkpoints.delete(1)
    assert list(folder.iterdir()) == []


def test_a_round_that_is_repeated_replaces_its_checkpoint(checkpoints: IslandCheckpoints, folder: Path) -> None:
    checkpoints.save(1, optimizer_after(1), None)
    checkpoints.save(1, optimizer_after(7), 7)
    assert loaded(checkpoints, 1) == ((1, 7), 7)
    assert len(list(folder.iterdir())) == 2


def test_a_later_one_is_not_loaded_for_an_earlier_round(checkpoints: IslandCheckpoints) -> None:
    """The island was one round ahead of what the coordinator had committed."""
    checkpoints.save(4, optimizer_after(4), None)
    checkpoints.save(5, optimizer_after(5), None)
    assert loaded(checkpoints, 4) == ((4, None), 4)


def test_one_of_another_run_is_ignored(checkpoints: IslandCheckpoints, folder: Path) -> None:
    other_run(folder).save(2, optimizer_after(9), None)
    assert loaded(checkpoints, 2) == (None, 0)
    checkpoints.save(1, optimizer_after(1), None)
    assert loaded(checkpoints, 2) == ((1, None), 1)


def test_files_that_no_island_wrote_count_for_nothing(checkpoints: IslandCheckpoints, folder: Path) -> None:
    for round in (1, 2, 3):
        checkpoints.save(round, optimizer_after(round), None)
    for name in (".DS_Store", "2.json", "\N{SUPERSCRIPT TWO}.json", "00000002 (1).json", "residuals-2.json"):
        (folder / name).write_bytes(b"x")
    checkpoints.save(4, optimizer_after(4), None)
    assert checkpoints.rounds() == [2, 3, 4]
    assert loaded(checkpoints, 2) == ((2, None), 2)
    checkpoints.load_residuals_(2, [torch.ones(3)])


def test_later_rounds_of_another_run_do_not_cost_this_run_its_own(checkpoints: IslandCheckpoints, folder: Path) -> None:
    for round in (8, 9):
        other_run(folder).save(round, optimizer_after(9), None)
    for round in (1, 2, 3, 4):
        checkpoints.save(round, optimizer_after(round), None)
    assert loaded(checkpoints, 4) == ((4, None), 4)
    assert loaded(checkpoints, 2) == ((2, None), 2)
    assert checkpoints.rounds() == [2, 3, 4, 8, 9]


@pytest.mark.parametrize("what", ["tensors", "name"])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_one_is_passed_over_for_an_older_one(
    checkpoints: IslandCheckpoints, folder: Path, what: str, how: str
) -> None:
    for round in (1, 2):
        checkpoints.save(round, optimizer_after(round), None)
    path = tensor_file(folder, 2) if what == "tensors" else folder / "00000002.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    match how:
        case "flipped":
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-5])
        case "empty":
            path.write_bytes(b"")
        case _:
            path.unlink()
    assert loaded(checkpoints, 2) == ((1, None), 1)


def test_where_all_are_damaged_the_optimizer_is_left_fresh(checkpoints: IslandCheckpoints, folder: Path) -> None:
    checkpoints.save(1, optimizer_after(1), None)
    tensor_file(folder, 1).write_bytes(b"not tensors")
    assert loaded(checkpoints, 1) == (None, 0)


def test_files_with_other_names_are_neither_read_nor_deleted(checkpoints: IslandCheckpoints, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("notes.json", "latest", "12.json.bak", "x.safetensors"):
        (folder / name).write_text("mine")
    for round in range(1, 5):
        checkpoints.save(round, optimizer_after(round), None)
    assert checkpoints.rounds() == [2, 3, 4]
    assert {"notes.json", "latest", "12.json.bak", "x.safetensors"} <= {path.name for path in folder.iterdir()}


def test_when_two_rounds_are_done_and_void_the_first_of_them_can_begin_again(checkpoints: IslandCheckpoints) -> None:
    """With overlap the next round is trained, and saved after, before it is known that this one counts."""
    for round in (5, 6, 7):
        checkpoints.save(round, optimizer_after(round), None)
        checkpoints.save_residuals(round, residuals(float(round), 0.0))
    assert loaded(checkpoints, 5) == ((5, None), 5)
    assert loaded_residuals(checkpoints, 5) == [5.0, 0.0]


# ---- what error feedback keeps back ----


def residuals(*values: float) -> list[torch.Tensor]:
    return [torch.full((size,), value) for size, value in zip((3, 5), values)]


def loaded_residuals(checkpoints: IslandCheckpoints, round: int) -> list[float]:
    found = residuals(9.0, 9.0)
    checkpoints.load_residuals_(round, found)
    assert all(bool((tensor == tensor[0]).all()) for tensor in found)
    return [float(tensor[0]) for tensor in found]


def test_residuals_are_those_of_the_round_or_the_newest_before_it(checkpoints: IslandCheckpoints) -> None:
    assert loaded_residuals(checkpoints, 4) == [0.0, 0.0]
    checkpoints.save_residuals(2, residuals(0.2, -0.2))
    checkpoints.save_residuals(3, residuals(0.5, -0.5))
    assert loaded_residuals(checkpoints, 3) == [0.5, -0.5]
    assert loaded_residuals(checkpoints, 2) == pytest.approx([0.2, -0.2])
    assert loaded_residuals(checkpoints, 7) == [0.5, -0.5]
    assert loaded_residuals(checkpoints, 1) == [0.0, 0.0]


def test_a_round_that_does_not_count_puts_back_what_it_took_out(checkpoints: IslandCheckpoints) -> None:
    checkpoints.save_residuals(2, residuals(0.25, 0.75))
    checkpoints.save_residuals(3, residuals(1.0, 1.0))
    checkpoints.delete(3)
    assert loaded_residuals(checkpoints, 3) == [0.25, 0.75]


def test_three_rounds_of_residuals_are_kept_whatever_rounds_are_left_out(
    checkpoints: IslandCheckpoints, folder: Path
) -> None:
    for round in (1, 2, 5, 9):
        checkpoints.save_residuals(round, residuals(float(round), 0.0))
        checkpoints.save(round, optimizer_after(round), None)
    assert {path.name[10:18] for path in folder.glob("residuals-*")} == {"00000002", "00000005", "00000009"}
    assert checkpoints.rounds() == [2, 5, 9]


def test_residuals_that_are_damaged_or_of_another_run_are_passed_over(
    checkpoints: IslandCheckpoints, folder: Path
) -> None:
    checkpoints.save_residuals(1, residuals(0.25, 0.75))
    other_run(folder).save_residuals(2, residuals(3.0, 3.0))
    assert loaded_residuals(checkpoints, 2) == [0.25, 0.75]
    (path,) = folder.glob("residuals-00000001-*.safetensors")
    path.write_bytes(b"not tensors")
    assert loaded_residuals(checkpoints, 2) == [0.0, 0.0]
