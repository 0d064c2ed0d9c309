"""Real processes, really killed: the run ends with the bits of an uninterrupted one."""

import os
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Train, assert_whole, digests, run_folder, training, uninterrupted, write_recipe

pytestmark = pytest.mark.ray


@pytest.fixture
def recipe(tiny: dict[str, Any]) -> dict[str, Any]:
    """Rounds of a second or two: longer than what is seen of them is old."""
    body = deepcopy(tiny)
    body["rounds"] = 5
    body["inner"] |= {"steps_per_round": 700, "batch_size": 4}
    body["sync"] = {"heartbeat_every_s": 0.1, "heartbeat_timeout_s": 30}
    return body


def is_in_the_middle(island: dict[str, Any], round: int) -> bool:
    return island["state"] == "alive" and island["round"] == round and 0 < island["step"] < 0.3 * island["steps"]


def in_the_middle(train: Train, round: int) -> dict[str, Any]:
    """Waits for an island in the first third of this round."""
    status = train.wait_until(lambda s: any(is_in_the_middle(island, round) for island in s["islands"]))
    return next(island for island in status["islands"] if is_in_the_middle(island, round))


def test_a_killed_coordinator_comes_back_and_the_run_goes_on_by_itself(recipe: dict[str, Any], tmp_path: Path) -> None:
    expected = uninterrupted(recipe)
    with training(write_recipe(tmp_path, recipe), run_folder(recipe)) as train:
        in_the_middle(train, 2)
        status = train.status()
        assert status is not None
        os.kill(status["coordinator"]["pid"], signal.SIGKILL)
        after = train.wait_until(lambda s: s["coordinator"]["fence_epoch"] == 2)
        assert after["coordinator"]["pid"] != status["coordinator"]["pid"]
        train.wait_for_end()
        last = train.status()
    assert last is not None
    assert {island["incarnation"] for island in last["islands"]} == {1}
    assert_whole(run_folder(recipe), expected)


def test_the_same_command_goes_on_after_everything_was_killed(recipe: dict[str, Any], tmp_path: Path) -> None:
    expected = uninterrupted(recipe)
    path = write_recipe(tmp_path, recipe)
    with training(path, run_folder(recipe)) as train:
        in_the_middle(train, 2)
        train.kill()
    assert len(digests(run_folder(recipe))) < len(expected)
    with training(path, run_folder(recipe)) as train:
        output = train.wait_for_end()
    assert "goes on from outer step" in output
    assert_whole(run_folder(recipe), expected)
