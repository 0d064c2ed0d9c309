"""The head node of the cluster is lost while a run is on it: the same command goes on, on another one."""

import os
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.errors import DeadlineError
from tests.conftest import Pace
from tests.nodes import head_node
from tests.processes import assert_whole, digests, run_folder, training, uninterrupted, write_recipe

pytestmark = pytest.mark.ray


def test_the_same_command_goes_on_when_the_head_node_was_lost(
    paced: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pace: Pace
) -> None:
    recipe = {
        **paced,
        "islands": 2,
        "inner": {**paced["inner"], "steps_per_round": 100},
        "sync": {"heartbeat_every_s": 0.5, "heartbeat_timeout_s": 30, "coordinator_timeout_s": 8},
    }
    expected, folder, path = uninterrupted(recipe), run_folder(recipe), write_recipe(tmp_path, recipe)
    pace.slow_down(0.03)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    port = 20000 + os.getpid() % 5000
    with head_node(port) as head:
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        with training(path, folder) as train:
            train.wait_until(lambda s: s["outer_steps"] >= 1)
            head.is_lost()
            pace.let_go()
            output = train.wait_for_end(DeadlineError.exit_code)
    assert "the coordinator did not answer for 8 s" in output
    assert "give the same command again: it goes on from the last committed record" in output
    assert 1 <= len(digests(folder)) - 1 < 4
    with head_node(port + 5000) as another:
        monkeypatch.setenv("RAY_ADDRESS", another.address)
        with training(path, folder) as train:
            assert "goes on from outer step" in train.wait_for_end()
    assert_whole(folder, expected)
