"""The head node of the cluster is lost while a run is on it: the same command goes on, on another one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.errors import DeadlineError
from tests.conftest import Pace
from tests.processes import assert_whole, digests, run_folder, training, uninterrupted, write_recipe

pytestmark = pytest.mark.ray


class HeadNode:
    """`ray start --head` on a port of its own, with all that it has started."""

    def __init__(self, port: int, folder: Path, more: Sequence[str]):
        self.address = f"127.0.0.1:{port}"
        options = [f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}", "--include-dashboard=false", *more]
        ray = str(Path(sys.executable).with_name("ray"))
        self._process = subprocess.Popen(
            [ray, "start", "--head", "--block", "--disable-usage-stats", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        assert any("Ray runtime started" in line for line in self._process.stdout)

    def processes(self) -> set[int]:
        """Its own and all below it."""
        parents = dict[int, int]()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(") ")[2].split()[1])
        found = {self._process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found

    def is_lost(self) -> None:
        """All at once, as when a machine is switched off."""
        if self._process.poll() is not None:
            return
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def head_node(port: int, *options: str) -> Iterator[HeadNode]:
    folder = Path(f"/tmp/dr{port}")  # short, because sockets' paths must be
    head = HeadNode(port, folder, options)
    try:
        yield head
    finally:
        head.is_lost()
        shutil.rmtree(folder, ignore_errors=True)


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
