"""A command that is told to end, by whomever, says so and ends with 130; what is committed stays."""

import os
import pty
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.document import replica_of
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from tests.conftest import Pace
from tests.processes import CLI, DEADLINE_S, Command, run_folder, training, wait_for, write_recipe

pytestmark = pytest.mark.ray
INTERRUPTED = 130
SAID = "interrupted; the same command goes on from the last committed outer step"


def test_sigterm_in_mid_run_is_an_interruption_and_keeps_what_is_committed(
    paced: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    """What systemd, Slurm, `docker stop` and `ray job stop` send."""
    pace.slow_down(0.05)
    recipe, folder = {**paced, "islands": 1, "rounds": 100}, run_folder(paced)
    with training(write_recipe(tmp_path, recipe), folder) as train:
        train.wait_until(lambda status: status["outer_steps"] >= 1)
        train.interrupt(signal.SIGTERM)
        output = train.wait_for_end(INTERRUPTED)
    assert SAID in output
    assert "*** SIGTERM" not in output
    report = verify(RunStore(str(folder)), replica_of)
    assert report.problems == ()
    assert report.num_outer_steps >= 1


def test_sigterm_while_islands_are_waited_for_is_one_too(
    paced: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DILOCO_RAY_SECRET", "a secret of these tests, long enough")
    command = [*CLI, "train", str(write_recipe(tmp_path, paced)), "--islands", "external"]
    train = Command(command, tmp_path / "train.log")
    try:
        wait_for(lambda: "waiting up to" in train.output(), "it waits", train)
        assert f"diloco-ray token create {run_folder(paced)} --name NAME" in train.output()
        train.interrupt(signal.SIGTERM)
        assert SAID in train.wait_for_end(INTERRUPTED)
    finally:
        train.stop()


def test_a_closed_terminal_ends_a_run_as_ctrl_c_does(paced: dict[str, Any], tmp_path: Path, pace: Pace) -> None:
    pace.slow_down(0.05)
    recipe = write_recipe(tmp_path, {**paced, "islands": 1, "rounds": 100})
    ours, theirs = pty.openpty()
    train = subprocess.Popen(
        [*CLI, "train", str(recipe)], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        seen = b""
        while b"round 1/100 |" not in seen:
            assert select.select([ours], [], [], DEADLINE_S)[0], seen
            seen += os.read(ours, 4096)
        os.close(ours)
        os.killpg(train.pid, signal.SIGHUP)  # its Ray hears of it too
        assert train.wait(DEADLINE_S) == INTERRUPTED
    finally:
        train.kill()
    assert verify(RunStore(str(run_folder(paced))), replica_of).problems == ()
