"""Real processes, really killed: the run ends with the bits of an uninterrupted one."""

import os
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Pace
from tests.processes import Train, assert_whole, digests, run_folder, training, uninterrupted, write_recipe

pytestmark = pytest.mark.ray


@pytest.fixture
def recipe(paced: dict[str, Any]) -> dict[str, Any]:
    body = deepcopy(paced)
    body["rounds"] = 5
    body["inner"] |= {"steps_per_round": 100}
    body["sync"] = {"heartbeat_every_s": 0.1, "heartbeat_timeout_s": 60}
    return body


def in_the_middle(train: Train, round: int) -> dict[str, Any]:
    """The status with an island in the first half of this round."""

    def is_there(island: dict[str, Any]) -> bool:
        return island["state"] == "alive" and island["round"] == round and 0 < island["step"] < 0.5 * island["steps"]

    return train.wait_until(lambda s: any(is_there(island) for island in s["islands"]))


def test_a_killed_coordinator_comes_back_and_the_run_goes_on_by_itself(
    recipe: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    expected = uninterrupted(recipe)
    pace.slow_down(0.05)
    with training(write_recipe(tmp_path, recipe), run_folder(recipe)) as train:
        status = in_the_middle(train, 2)
        os.kill(status["coordinator"]["pid"], signal.SIGKILL)
        after = train.wait_until(lambda s: s["coordinator"]["fence_epoch"] == 2)
        assert after["coordinator"]["pid"] != status["coordinator"]["pid"]
        pace.let_go()
        train.wait_for_end()
        last = train.status()
    assert last is not None
    assert {island["incarnation"] for island in last["islands"]} == {1}
    assert_whole(run_folder(recipe), expected)


def test_the_same_command_goes_on_after_everything_was_killed(
    recipe: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    expected = uninterrupted(recipe)
    pace.slow_down(0.05)
    path = write_recipe(tmp_path, recipe)
    with training(path, run_folder(recipe)) as train:
        in_the_middle(train, 2)
        train.kill()
    assert len(digests(run_folder(recipe))) < len(expected)
    with training(path, run_folder(recipe)) as train:
        train.wait_until(lambda s: s["coordinator"]["fence_epoch"] == 2)  # nothing of the first command lives
        pace.let_go()
        output = train.wait_for_end()
    assert "goes on from outer step" in output
    assert_whole(run_folder(recipe), expected)
