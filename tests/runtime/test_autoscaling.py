"""A cluster that begins with a head alone, and Ray's own autoscaler, whose machines are processes of this one."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from diloco_ray.document import replica_of
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from tests.conftest import Pace
from tests.nodes import head_node
from tests.processes import num_alive, run_folder, training, write_recipe

pytestmark = pytest.mark.ray

NOTHING_TO_RUN = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "initialization_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
SCALES = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def grows_to(num_nodes: int, labels: dict[str, str], port: int, folder: Path) -> str:
    """The autoscaler's file: a head without CPUs, and up to so many nodes with these labels, of one CPU each."""
    island = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "labels": labels, "max_workers": num_nodes}
    path = folder / "autoscaler.yaml"
    body = {
        "cluster_name": "autoscaled",
        "max_workers": num_nodes,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "island": {"node_config": {}, "min_workers": 0, **island},
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 5,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{name: [] for name in NOTHING_TO_RUN},
    }
    path.write_text(yaml.safe_dump(body))
    return str(path)


def test_a_cluster_grows_to_the_least_islands_and_then_to_as_many_more_as_it_may(
    paced: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pace: Pace
) -> None:
    """One node can be had for each of two islands, and none for the third, without which the run goes on."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    recipe = {
        **paced,
        "islands": [1, 3],
        "rounds": 30,
        "inner": {**paced["inner"], "steps_per_round": 20},
        "sync": {"heartbeat_every_s": 0.5, "heartbeat_timeout_s": 60},
        "evaluation": {**paced["evaluation"], "every_rounds": 30},
        "cluster": {"island_resources": {"CPU": 1}, "label_selector": {"role": "island"}},
    }
    pace.slow_down(0.05)
    port = 25000 + os.getpid() % 5000
    scaling = grows_to(2, {"role": "island"}, port, tmp_path)
    with head_node(port, "--num-cpus=0", f"--autoscaling-config={scaling}", **SCALES) as head:
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        with training(write_recipe(tmp_path, recipe), run_folder(recipe)) as train:
            train.wait_until(lambda s: num_alive(s) == 2 and s["contributions"]["applied"] == 2)
            pace.let_go()
            output = train.wait_for_end()
    assert "the cluster can place 0 of at least 1 islands" in output
    report = verify(RunStore(str(run_folder(recipe))), replica_of)
    assert report.problems == ()
    assert report.num_outer_steps == 30
