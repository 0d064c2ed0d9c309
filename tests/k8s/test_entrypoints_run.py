"""The commands in the manifests, run as they are written there: real processes, local Rays, a real S3 protocol."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from diloco_ray.api import create_token
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from tests.k8s.manifests import ROOT, entrypoints
from tests.processes import Command, wait_for
from tests.recovery.test_head_node import head_node

pytestmark = pytest.mark.ray
COMMANDS = entrypoints()


def words(overlay: str, bucket: str = "BUCKET") -> list[str]:
    """`python` is this one; BUCKET is what a user fills in."""
    assert COMMANDS[overlay][0] == "python"
    return [sys.executable, *(word.replace("BUCKET", bucket) for word in COMMANDS[overlay][1:])]


@pytest.fixture
def bucket(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("DILOCO_RAY_SECRET", "a secret of these tests, long enough")
    monkeypatch.chdir(ROOT)
    fsspec.filesystem("s3").mkdir("try")
    yield "try"
    fsspec.filesystem("s3").rm("try", recursive=True)


def test_the_coordinator_and_the_island_of_the_local_overlays_train_the_quickstart_to_its_end(
    bucket: str, tmp_path: Path
) -> None:
    store = RunStore(f"s3://{bucket}/runs/quickstart")
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


def test_the_command_of_the_single_cluster_places_its_islands_on_the_nodes_with_their_label(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    store = RunStore(f"s3://{bucket}/runs/quickstart")
    with head_node(30000 + os.getpid() % 2000, "--num-cpus=4", "--labels=role=island") as head:
        train = Command(words("single-cluster", bucket), tmp_path / "train.log", RAY_ADDRESS=head.address)
        try:
            wait_for(lambda: store.exists("log/00000001.json"), "an outer step", train)
        finally:
            train.stop()
