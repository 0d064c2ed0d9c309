"""Islands follow the cluster: too few places, more nodes, fewer nodes. Real nodes of one local Ray cluster."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.state import actors as all_actors
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.common_pb2 import LabelSelector
from ray.experimental.internal_kv import internal_kv_get_gcs_client as gcs  # another would outlive its cluster: exit 1
from ray.util.placement_group import placement_group_table

from diloco_ray import api
from diloco_ray.config import ClusterSettings, RunConfig
from diloco_ray.document import replica_of
from diloco_ray.errors import ClusterError
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.run import open_run
from diloco_ray.runtime import driver
from diloco_ray.runtime.cluster import wait_for_places
from diloco_ray.runtime.coordinator_actor import CoordinatorActor
from diloco_ray.simulation.in_process import begin
from diloco_ray.transport.tokens import create_token
from tests.conftest import Pace
from tests.mail import SECRET, office_open
from tests.processes import Watched, epochs, num_alive, run_folder

pytestmark = pytest.mark.ray
NODE = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}


NOTICES_A_FROZEN_NODE = {  # within a quarter of a minute; Ray's own settings take a whole one
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with room for two islands of one CPU each; with Ray's token, as `ray.init` has it: a process whose Ray
    asked for a token once turns away a cluster that has none."""
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled(create_token_if_missing=True)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": NOTICES_A_FROZEN_NODE})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        Watched.stop_all()
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Cluster, **more: Any) -> Any:
    """With room for two islands more."""
    return cluster.add_node(**{key: value for key, value in NODE.items() if key != "include_dashboard"}, **more)


def test_more_islands_than_the_cluster_can_place_are_waited_for_and_then_refused(
    cluster: Cluster, tiny: dict[str, Any]
) -> None:
    body = {**tiny, "islands": 5, "cluster": {"island_resources": {"CPU": 1}, "placement_timeout_s": 1}}
    watched = Watched(RunConfig.from_dict(body))
    with pytest.raises(ClusterError) as caught:
        watched.join()
    assert "can place 2 of at least 5 islands" in str(caught.value)
    assert "CPU: 5 needed, 2 in the cluster" in str(caught.value)
    assert any("waiting up to 1 s" in text for text in watched.texts)


class Demand:
    """What Ray's autoscaler would be asked for, if there were one, while islands are waited for."""

    def of_groups(self) -> list[list[tuple[dict[str, float], dict[str, str]]]]:
        """Resources and labels of each bundle of each placement group that has no place."""
        asked = get_cluster_resource_state(gcs()).pending_gang_resource_requests
        return [
            [
                (
                    dict(bundle.resources_bundle),
                    {term.label_key: ",".join(term.label_values) for term in labels.label_constraints},
                )
                for bundle in group.bundle_selectors[0].resource_requests
                for labels in bundle.label_selectors[:1] or [LabelSelector()]
            ]
            for group in asked
        ]

    def wait_for(self, groups: list[list[tuple[dict[str, float], dict[str, str]]]]) -> None:
        until_s = time.monotonic() + 120
        while (asked := sorted(self.of_groups(), key=lambda group: group[0][1]["site"])) != groups:
            assert time.monotonic() < until_s, asked
            time.sleep(0.1)


def test_islands_that_are_waited_for_are_demand_for_an_autoscaler_and_afterwards_it_is_gone(cluster: Cluster) -> None:
    """Each by itself, all ranks of an island together, and with the labels of its own nodes."""
    demand, told = Demand(), list[str]()
    settings = ClusterSettings.model_validate(
        {"island_resources": {"CPU": 1, "seat": 1, "GPU": 0}, "label_selector": {"site": "{island}"}}
    )
    names = ["island-00", "island-01"]
    groups = [[({"CPU": 1.0, "seat": 1.0}, {"site": name})] * 2 for name in names]

    def wait() -> None:
        wait_for_places(settings, names, 2, told.append, least=1, within_s=300, where="here", more="more", less="less")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    demand.wait_for(groups)
    add_node(cluster, resources={"seat": 2}, labels={"site": "island-01"})
    waiting.join(300)
    assert not waiting.is_alive()
    demand.wait_for([])
    assert len(told) == 1
    assert [group["state"] for group in placement_group_table().values()] == ["REMOVED"] * 2
    with pytest.raises(ClusterError, match="after 1 s"):
        wait_for_places(settings, names, 2, told.append, least=2, within_s=1, where="here", more="more", less="less")
    demand.wait_for([])


@pytest.mark.parametrize(("of_recipe_s", "wait_s"), [(300, 1), (1, 4)])
def test_an_island_waits_for_room_on_its_own_cluster_as_long_as_its_command_says(
    of_recipe_s: float, wait_s: float, cluster: Cluster, tiny: dict[str, Any]
) -> None:
    """The recipe's time-out is for nodes of the coordinator's cluster."""
    away = {"external_islands": 3, "placement_timeout_s": of_recipe_s}
    run, told = open_run(RunConfig.from_dict({**tiny, "sync": {"poll_s": 0.1}, "cluster": away})), list[str]()
    token = create_token(run.store, run.run_id, SECRET, "eu-1")
    coordinator = office_open(run.store, begin(run), run.coordinator_job(), run.config.model_dump(mode="json"))
    with coordinator, pytest.raises(ClusterError) as caught:
        api.join(run.store.url, token.text, resources={"CPU": 64}, wait_s=wait_s, tell=told.append)
    shortage = "the cluster can place 0 of at least 1 islands (CPU: 64 needed, 2 in the cluster)"
    assert told == [f"{shortage}; waiting up to {wait_s} s"]
    assert caught.value.what == f"{shortage} after {wait_s} s"
    assert "--wait-s" in caught.value.remedy


def elastic(paced: dict[str, Any], least: int) -> dict[str, Any]:
    """Up to four islands, for rounds of a second as long as `pace` holds them back."""
    return {
        **paced,
        "islands": [least, 4],
        "rounds": 100,
        "inner": {**paced["inner"], "steps_per_round": 20},
        "sync": {"heartbeat_every_s": 0.5, "heartbeat_timeout_s": 60},
        "evaluation": {**paced["evaluation"], "every_rounds": 100},
        "storage": {**paced["storage"], "snapshot_every_rounds": 50},
        "cluster": {"island_resources": {"CPU": 1}},
    }


def test_islands_join_as_nodes_come_and_the_others_go_on_as_nodes_go(
    pace: Pace, cluster: Cluster, paced: dict[str, Any]
) -> None:
    body = elastic(paced, least=2)
    pace.slow_down(0.05)
    watched = Watched(RunConfig.from_dict(body))
    status = watched.wait_until(lambda s: s["rounds"] >= 1, "two islands train")
    assert num_alive(status) == 2
    node = add_node(cluster)
    watched.wait_until(lambda s: s["contributions"]["applied"] == 4, "four islands train")
    cluster.remove_node(node, allow_graceful=False)
    watched.wait_until(lambda s: num_alive(s) == 2 and s["contributions"]["applied"] == 2, "two are left and go on")
    pace.let_go()
    watched.join()
    report = verify(RunStore(str(run_folder(body))), replica_of)
    assert report.problems == ()
    assert report.num_outer_steps == 100


def test_the_islands_of_a_node_that_is_drained_give_their_work_back_and_leave(
    pace: Pace, cluster: Cluster, paced: dict[str, Any]
) -> None:
    node = add_node(cluster)
    body = elastic(paced, least=1)
    pace.slow_down(0.05)
    watched = Watched(RunConfig.from_dict(body))
    watched.wait_until(lambda s: s["contributions"]["applied"] == 4, "four islands train")
    gcs().drain_node(node.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", 0)
    watched.wait_until(lambda s: num_alive(s) == 2, "two have left")
    assert sum("left: preempted" in text for text in watched.texts) == 2
    assert not any("silent" in text for text in watched.texts)
    pace.let_go()
    watched.join()
    assert verify(RunStore(str(run_folder(body))), replica_of).problems == ()


def test_a_coordinator_on_a_frozen_node_is_fenced_when_ray_has_started_it_elsewhere(
    pace: Pace, cluster: Cluster, paced: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen node's processes live on, cut off from Ray: two coordinators on one run store."""
    first = add_node(cluster, resources={"seat": 1})

    class Seated:
        @staticmethod
        def options(**options: Any) -> Any:
            return CoordinatorActor.options(**options, resources={"seat": 1})

    monkeypatch.setattr(driver, "CoordinatorActor", Seated)
    body = elastic(paced, least=1)
    pace.slow_down(0.05)
    watched = Watched(RunConfig.from_dict(body))
    before = watched.wait_until(lambda s: s["outer_steps"] >= 1, "it trains")
    (raylet,) = first.all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGSTOP)
    try:
        add_node(cluster, resources={"seat": 1})
        watched.wait_until(lambda s: s["coordinator"]["fence_epoch"] >= 2, "another coordinator takes over")
        watched.wait_until(lambda s: epochs(run_folder(body))[-1] >= 2, "it writes")
        os.kill(before["coordinator"]["pid"], 0)  # and the one before it is still there
    finally:
        os.kill(raylet.process.pid, signal.SIGCONT)
    pace.let_go()
    watched.join()
    report = verify(RunStore(str(run_folder(body))), replica_of)
    assert report.problems == ()
    assert report.num_outer_steps == 100


def test_islands_go_only_to_nodes_with_the_labels_that_the_recipe_names_and_each_to_its_own(
    pace: Pace, cluster: Cluster, paced: dict[str, Any]
) -> None:
    for name in ("island-00", "island-01"):
        add_node(cluster, labels={"zone": "eu-2", "site": name})
    selector = {"zone": "eu-2", "site": "{island}"}
    labels = {"island_resources": {"CPU": 1}, "label_selector": selector, "placement_timeout_s": 1}
    for missing, body in {
        "zone": {**paced, "islands": 2, "cluster": {**labels, "label_selector": {"zone": "us-1"}}},
        "no node for island-02": {**paced, "islands": 3, "cluster": labels},
    }.items():
        with pytest.raises(ClusterError, match=missing):
            Watched(RunConfig.from_dict({**body, "name": "nowhere"})).join()
    pace.slow_down(0.05)
    watched = Watched(RunConfig.from_dict({**paced, "islands": 2, "rounds": 100, "cluster": labels}))
    status = watched.wait_until(lambda s: num_alive(s) == 2, "both islands are placed")
    sites = {node["NodeID"]: node["Labels"].get("site") for node in ray.nodes()}
    islands = [actor for actor in all_actors().values() if actor["ActorClassName"] == "IslandActor"]
    at = {island["Pid"]: sites[island["Address"]["NodeID"]] for island in islands}
    assert {island["name"]: at[island["pid"]] for island in status["islands"]} == {
        "island-00": "island-00",
        "island-01": "island-01",
    }
    pace.let_go()
    watched.join()
