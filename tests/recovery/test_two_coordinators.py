"""Two coordinators of one run, for real: exactly one writes, the other stops and says why, the log stays whole."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.processes import assert_whole, run_folder, training, uninterrupted, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]
FENCED = 6


@pytest.mark.parametrize("frozen", [False, True], ids=["alive", "frozen"])
def test_of_two_commands_on_one_run_the_older_is_fenced_and_says_so(
    tiny: dict[str, Any], tmp_path: Path, frozen: bool
) -> None:
    """Frozen: the older coordinator is stopped in mid-run and goes on when the newer one has taken outer steps."""
    recipe = {**tiny, "islands": 2, "rounds": 6, "inner": {**tiny["inner"], "steps_per_round": 700}}
    expected = uninterrupted(recipe)
    folder = run_folder(recipe)
    (tmp_path / "older").mkdir()
    with training(write_recipe(tmp_path / "older", recipe), folder) as older:
        status = older.wait_until(lambda s: s["outer_steps"] == 1)
        if frozen:
            os.kill(status["coordinator"]["pid"], signal.SIGSTOP)
        with training(write_recipe(tmp_path, recipe), folder) as newer:
            newer.wait_until(lambda s: s["coordinator"]["fence_epoch"] == 2 and s["outer_steps"] >= 3)
            if frozen:
                os.kill(status["coordinator"]["pid"], signal.SIGCONT)
            output = older.wait_for_end(FENCED)
            newer.wait_for_end()
    assert "a newer coordinator (fence epoch 2) writes this run; this one has 1" in output
    assert f"where: {folder}" in output
    assert "what to do: let the newer one go on" in output
    assert_whole(folder, expected)
