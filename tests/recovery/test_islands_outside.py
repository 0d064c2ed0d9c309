"""Islands that are Ray clusters of their own and share with the coordinator nothing but a bucket.

Real processes, a real S3 protocol, as many local Rays as there are commands.
"""

import os
import re
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.api import create_token, revoke_tokens
from diloco_ray.document import replica_of
from diloco_ray.log.run_log import RunLog, numbered
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.observe.events import of_kind, read_events
from diloco_ray.observe.status import read_status
from tests.conftest import Pace
from tests.nodes import another_node, head_node
from tests.processes import CLI, Command, assert_whole, ranks_beside, uninterrupted, wait_for, write_recipe

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
SECRET = "a secret of these tests, long enough"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILOCO_RAY_SECRET", SECRET)


class Bucket:
    """A run that lives in a bucket, its coordinator's command and its islands'."""

    def __init__(self, body: dict[str, Any], folder: Path):
        self.url = f"{body['storage']['path']}/{body['name']}"
        self.store = RunStore(self.url)
        self._recipe, self._folder = write_recipe(folder, body), folder
        self._commands: list[Command] = []

    def coordinator(self, *options: str) -> Command:
        return self._start([*CLI, "train", str(self._recipe), *options], "coordinator")

    def island(self, name: str, **environment: str) -> Command:
        """Of a home of its own: what it saves is on no other island's machine. environment: more of it."""
        wait_for(lambda: self.store.exists("run.json"), "the run has begun", self._commands[-1])
        home = self._folder / name
        home.mkdir(exist_ok=True)
        token = create_token(self.url, name)
        command = [sys.executable, str(ROOT / "jobs" / "island.py"), self.url, "--name", name]
        return self._start(command, name, DILOCO_RAY_TOKEN=token, HOME=str(home), **environment)

    def _start(self, arguments: list[str], name: str, **environment: str) -> Command:
        self._commands.append(Command(arguments, self._folder / f"{name}.log", **environment))
        return self._commands[-1]

    def wait_for_outer_steps(self, least: int) -> None:
        is_there = f"{least} outer steps"
        wait_for(lambda: max(numbered(self.store, "log"), default=0) >= least, is_there, self._commands[0])

    def decisions(self) -> list[str]:
        return [event["text"] for event in of_kind(read_events(self.store), "decision")]

    def stop(self) -> None:
        for command in reversed(self._commands):
            command.stop()


@contextmanager
def bucket(body: dict[str, Any], folder: Path) -> Iterator[Bucket]:
    run = Bucket(body, folder)
    try:
        yield run
    finally:
        run.stop()


@pytest.fixture
def body(paced: dict[str, Any], s3_bucket: str) -> dict[str, Any]:
    return {
        **paced,
        "islands": 2,
        "rounds": 5,
        "inner": {**paced["inner"], "steps_per_round": 100},
        "sync": {"poll_s": 0.3, "heartbeat_every_s": 0.5, "heartbeat_timeout_s": 120},
        "storage": {"path": f"{s3_bucket}/{uuid.uuid4().hex}", "snapshot_every_rounds": 2},
    }


def test_two_clusters_and_a_bucket_end_a_run_with_the_bits_of_one_process_though_one_cluster_is_lost(
    body: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    """The island comes back by the same command, with its optimizer's state and the data that it had."""
    expected = uninterrupted({**body, "storage": {"path": str(tmp_path / "runs"), "snapshot_every_rounds": 2}})
    pace.slow_down(0.03)
    with bucket(body, tmp_path) as run:
        coordinator = run.coordinator("--islands", "external")
        stays, goes = run.island("island-00"), run.island("island-01")
        run.wait_for_outer_steps(2)
        goes.kill()
        pace.let_go()
        back = run.island("island-01")
        coordinator.wait_for_end()
        assert "the run is over" in stays.wait_for_end()
        assert "the run is over" in back.wait_for_end()
        assert_whole(run.url, expected)
        assert sum(" joined" in text for text in run.decisions()) == 3
        left = [path for name in ("island-00", "island-01") for path in run.store.list(f"mail/{name}")]
        assert len(left) <= 3, "but for what was written when nobody read any more"


def test_islands_of_the_coordinators_cluster_and_from_outside_train_together_over_a_restart_of_the_coordinator(
    body: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    body["cluster"] = {"island_resources": {"CPU": 1}, "external_islands": 1}
    pace.slow_down(0.03)
    with bucket(body, tmp_path) as run:
        first = run.coordinator()
        outside = run.island("eu-1")
        run.wait_for_outer_steps(2)
        first.kill()
        pace.let_go()
        assert "goes on from outer step" in run.coordinator().wait_for_end()
        outside.wait_for_end()
        report = verify(run.store, replica_of)
        assert report.problems == ()
        assert report.num_outer_steps == 5
        shares = [{share.island for share in record.shares} for record in RunLog.open(run.store).records[1:]]
        assert shares == [{"eu-1", "island-00"}] * 5
        assert [share.incarnation for share in RunLog.open(run.store).tail.shares if share.island == "eu-1"] == [1]


def test_an_island_whose_token_is_revoked_is_told_so_and_ends(body: dict[str, Any], tmp_path: Path, pace: Pace) -> None:
    body |= {"islands": [1, 2], "rounds": 1000}
    pace.slow_down(0.03)
    with bucket(body, tmp_path) as run:
        run.coordinator("--islands", "external")
        outside = run.island("eu-1")
        run.wait_for_outer_steps(1)
        assert revoke_tokens(run.url, "eu-1") == 1
        output = outside.wait_for_end(7)
        assert "the coordinator refuses this island: token: it has been revoked" in output
        assert SECRET not in output


def test_an_island_that_hangs_is_replaced_by_its_own_command(body: dict[str, Any], tmp_path: Path, pace: Pace) -> None:
    body |= {"islands": 1}
    body["sync"]["heartbeat_timeout_s"] = 5
    pace.slow_down(0.03)
    with bucket(body, tmp_path) as run:
        coordinator, island = run.coordinator("--islands", "external"), run.island("eu-1")
        run.wait_for_outer_steps(1)
        os.kill(pid_of(coordinator, incarnation=1), signal.SIGSTOP)
        wait_for(lambda: "it is started again" in island.output(), "it is replaced", island)
        pace.let_go()
        coordinator.wait_for_end()
        island.wait_for_end()
        assert any("eu-1 lost: silent for" in text for text in run.decisions())
        assert verify(run.store, replica_of).problems == ()


def pid_of(coordinator: Command, incarnation: int) -> int:
    """Of eu-1's process, which is waited for."""
    joined = re.compile(rf"eu-1 joined \(incarnation {incarnation}, pid (\d+) on")
    wait_for(lambda: bool(joined.search(coordinator.output())), f"incarnation {incarnation}", coordinator)
    return int(joined.findall(coordinator.output())[0])


def test_an_island_of_two_ranks_gives_its_work_back_when_it_is_interrupted_and_comes_back_when_it_loses_a_rank(
    body: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    body |= {"islands": 1, "cluster": {"island_resources": {"CPU": 0.5}}}
    body["inner"] |= {"ranks": 2}
    pace.slow_down(0.03)
    with bucket(body, tmp_path) as run:
        coordinator = run.coordinator("--islands", "external")
        first = run.island("eu-1")
        run.wait_for_outer_steps(1)
        first.interrupt()
        output = first.wait_for_end(130)
        assert "eu-1 has left: the coordinator has its work" in output
        assert "interrupted; the same command joins again" in output
        again = run.island("eu-1")
        leads = pid_of(coordinator, incarnation=2)
        wait_for(lambda: len(ranks_beside(leads)) == 1, "both ranks are there", again)
        os.kill(ranks_beside(leads)[0], signal.SIGKILL)
        wait_for(lambda: "rank 1 died" in again.output(), "the loss is told", again)
        pace.let_go()
        coordinator.wait_for_end()
        assert "it is started again" in again.wait_for_end()
        assert "eu-1 left: preempted" in run.decisions()
        assert verify(run.store, replica_of).problems == ()


def test_an_island_on_another_node_than_its_command_gives_its_work_back_when_its_job_is_stopped(
    body: dict[str, Any], tmp_path: Path, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Kubernetes, where the head has no CPUs. Nobody waits for its silence: that would be two minutes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    body |= {"islands": 1}
    pace.slow_down(0.03)
    port = 20000 + os.getpid() % 5000
    with head_node(port, "--num-cpus=0") as head, another_node(head, "--num-cpus=1"), bucket(body, tmp_path) as run:
        coordinator = run.coordinator("--islands", "external")
        first = run.island("eu-1", RAY_ADDRESS=head.address)
        run.wait_for_outer_steps(1)
        first.interrupt(signal.SIGTERM)
        assert "interrupted" in first.wait_for_end(130)
        wait_for(lambda: "eu-1 left: preempted" in coordinator.output(), "it has left", coordinator)
        wait_for(lambda: has_no_lease(run.store, "eu-1", "left"), "its lease is back", coordinator)
        again = run.island("eu-1", RAY_ADDRESS=head.address)
        pace.let_go()
        coordinator.wait_for_end()
        assert "the run is over" in again.wait_for_end()
        assert not any("silent" in text for text in run.decisions())
        assert verify(run.store, replica_of).problems == ()


def has_no_lease(store: RunStore, island: str, state: str) -> bool:
    """By a status that has this island in this state."""
    status = read_status(store)
    states = {island["name"]: island["state"] for island in status["islands"]}
    return states.get(island) == state and status["tokens"]["outstanding"] == 0
