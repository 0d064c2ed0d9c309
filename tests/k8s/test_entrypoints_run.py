"""The commands in the manifests, run as they are written there: real processes, local Rays, a real S3 protocol."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diloco_ray.api import create_token
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.observe.status import STATUS, read_status
from tests.k8s.manifests import ROOT, entrypoints
from tests.nodes import Node, another_node, head_node
from tests.processes import Command, wait_for

pytestmark = pytest.mark.ray
COMMANDS = entrypoints()
BUCKET = "try"  # the name that the local overlays have
RUN_HERE = ("local-coordinator", "local-island", "coordinator", "gpu", "single-cluster")
PORT = 30000 + os.getpid() % 2000


def words(overlay: str) -> list[str]:
    """`python` is this one; BUCKET is what a user fills in."""
    assert COMMANDS[overlay][0] == "python"
    return [sys.executable, *(word.replace("BUCKET", BUCKET) for word in COMMANDS[overlay][1:])]


def test_the_command_of_every_overlay_is_run_here() -> None:
    run_here = [words(overlay) for overlay in RUN_HERE]
    assert [overlay for overlay in COMMANDS if words(overlay) not in run_here] == []


@pytest.fixture
def store(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    """That of the quickstart's run."""
    monkeypatch.setenv("DILOCO_RAY_SECRET", "a secret of these tests, long enough")
    monkeypatch.chdir(ROOT)
    fsspec.filesystem("s3").mkdir(BUCKET)
    yield RunStore(f"s3://{BUCKET}/runs/quickstart")
    fsspec.filesystem("s3").rm(BUCKET, recursive=True)


def test_the_coordinator_and_the_island_of_the_local_overlays_train_the_quickstart_to_its_end(
    store: RunStore, tmp_path: Path
) -> None:
    coordinator = Command(words("local-coordinator"), tmp_path / "coordinator.log")
    try:
        wait_for(lambda: store.exists("run.json"), "the run has begun", coordinator)
        token = create_token(store.url, "eu-1")
        island = Command(words("local-island"), tmp_path / "island.log", DILOCO_RAY_TOKEN=token, HOME=str(tmp_path))
        try:
            coordinator.wait_for_end()
            assert "the run is over" in island.wait_for_end()
        finally:
            island.stop()
    finally:
        coordinator.stop()
    report = verify(store, replica_of)
    assert report.problems == ()
    assert report.num_outer_steps == RunConfig.from_yaml(ROOT / "jobs" / "quickstart.yaml").rounds


def test_the_coordinator_takes_outer_steps_with_the_island_that_asks_for_a_gpu(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the GPU only Ray knows; where torch has none, the CPU trains."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with head_node(PORT, "--num-cpus=4", "--num-gpus=1") as head:
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        coordinator = Command(words("coordinator"), tmp_path / "coordinator.log")
        try:
            wait_for(lambda: store.exists("run.json"), "the run has begun", coordinator)
            token = create_token(store.url, "eu-1")
            island = Command(words("gpu"), tmp_path / "island.log", DILOCO_RAY_TOKEN=token)
            try:
                wait_for(lambda: store.exists("log/00000001.json"), "an outer step", island)
            finally:
                island.stop()
            assert not coordinator.has_ended()
        finally:
            coordinator.stop()
    assert verify(store, replica_of).problems == ()


def test_the_command_of_the_single_cluster_places_each_island_on_the_node_with_its_label_and_begins_with_those(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its CPUs each node has room for four."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        head_node(PORT + 2000, "--num-cpus=0") as head,
        another_node(head, "--num-cpus=2", "--labels=site=island-01") as second,
        another_node(head, "--num-cpus=2", "--labels=site=island-00") as first,
    ):
        train = Command(words("single-cluster"), tmp_path / "train.log", RAY_ADDRESS=head.address)
        try:
            wait_for(lambda: store.exists("log/00000001.json"), "an outer step", train)
            wait_for(lambda: len(islands_of(store)) >= 2, "two islands", train)
            assert islands_of(store) == {"island-00": only(islands_on(first)), "island-01": only(islands_on(second))}
            assert islands_on(head) == []
        finally:
            train.stop()


def islands_of(store: RunStore) -> dict[str, int]:
    """The process of each island that trains."""
    if not store.exists(STATUS):
        return {}
    islands: list[dict[str, Any]] = read_status(store)["islands"]
    return {island["name"]: island["pid"] for island in islands if island["state"] == "alive"}


def islands_on(node: Node) -> list[int]:
    """Processes of this node that Ray calls islands."""
    lines = {pid: Path(f"/proc/{pid}/cmdline") for pid in node.processes()}
    return [pid for pid, line in lines.items() if line.exists() and line.read_bytes().startswith(b"ray::Island")]


def only(pids: list[int]) -> int:
    (pid,) = pids
    return pid
