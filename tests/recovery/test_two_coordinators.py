"""Two coordinators of one run, for real: exactly one writes, the other stops and says why, the log stays whole."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Pace
from tests.processes import Train, assert_whole, epochs, run_folder, training, uninterrupted, write_recipe

pytestmark = pytest.mark.ray
FENCED = 6


def test_the_same_command_again_fences_the_older_one_whether_that_is_alive_or_frozen(
    paced: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    """Three commands on one run. The first waits for its island, which stands still, when the second comes; the
    second's coordinator stands still while the third one ends the run."""
    recipe = {**paced, "islands": 1, "rounds": 10, "inner": {**paced["inner"], "steps_per_round": 100}}
    expected, folder = uninterrupted(recipe), run_folder(recipe)
    pace.slow_down(0.02)
    paths = [tmp_path / name for name in ("first", "second", "third")]
    for path in paths:
        path.mkdir()
    with training(write_recipe(paths[0], recipe), folder) as first:
        status = first.wait_until(lambda s: s["outer_steps"] >= 1)
        os.kill(status["islands"][0]["pid"], signal.SIGSTOP)
        with training(write_recipe(paths[1], recipe), folder) as second:
            status = second.wait_until(lambda s: s["coordinator"]["fence_epoch"] == 2 and epochs(folder)[-1] == 2)
            assert re.search(
                r"another coordinator \(life 1\) wrote this run \d+ s ago; taking it over", second.output()
            )
            os.kill(status["coordinator"]["pid"], signal.SIGSTOP)
            assert_fenced(first, folder, epoch=1)
            pace.let_go()
            with training(write_recipe(paths[2], recipe), folder) as third:
                third.wait_for_end()
                os.kill(status["coordinator"]["pid"], signal.SIGCONT)
                assert_fenced(second, folder, epoch=2)
    assert_whole(folder, expected)
    assert epochs(folder) == sorted(epochs(folder))
    assert set(epochs(folder)) == {0, 1, 2, 3}


def assert_fenced(train: Train, folder: Path, epoch: int) -> None:
    """It stopped with its exit code, and said what, where and what to do."""
    output = train.wait_for_end(FENCED)
    assert f"a newer coordinator (fence epoch {epoch + 1}) writes this run; this one has {epoch}" in output
    assert output.count("a newer coordinator") == 1
    assert f"where: {folder}" in output
    assert "what to do: let the newer one go on" in output
