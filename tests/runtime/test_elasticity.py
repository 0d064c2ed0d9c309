"""Islands follow the cluster: too few places, more nodes, fewer nodes. Real nodes of one local Ray cluster."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray._private.state import actors as all_actors
from ray.cluster_utils import Cluster

from diloco_ray.api import DiLoCoTrainer
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.errors import ClusterError
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from tests.processes import run_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
NODE = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with room for two islands of one CPU each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Watched:
    """fit() in a thread, seen through its own watcher."""

    def __init__(self, config: RunConfig):
        self.status: dict[str, Any] = {}
        self.texts: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, args=(config,), daemon=True)
        self._thread.start()

    def _fit(self, config: RunConfig) -> None:
        try:
            DiLoCoTrainer(config).fit(watch=self._watch)
        except BaseException as error:
            self.error = error

    def _watch(self, status: Any, events: list[dict[str, Any]]) -> None:
        self.status = dict(status) or self.status
        self.texts += [event["text"] for event in events if event["event"] == "decision"]

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> None:
        until = time.monotonic() + 120
        while not (self.status and condition(self.status)):
            assert self.error is None, self.error
            assert time.monotonic() < until, f"{what}: {self.status}"
            time.sleep(0.05)

    def join(self) -> None:
        self._thread.join(timeout=200)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error


def num_alive(status: dict[str, Any]) -> int:
    return sum(island["state"] == "alive" for island in status["islands"])


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


def test_islands_join_as_nodes_come_and_the_others_go_on_as_nodes_go(cluster: Cluster, tiny: dict[str, Any]) -> None:
    body = {
        **tiny,
        "islands": [2, 4],
        "rounds": 40,
        "inner": {**tiny["inner"], "steps_per_round": 150},
        "sync": {"heartbeat_every_s": 0.5, "heartbeat_timeout_s": 10},
        "cluster": {"island_resources": {"CPU": 1}},
    }
    watched = Watched(RunConfig.from_dict(body))
    watched.wait_until(lambda s: s["rounds"] >= 1, "two islands train")
    assert num_alive(watched.status) == 2
    node = cluster.add_node(**{key: value for key, value in NODE.items() if key != "include_dashboard"})
    watched.wait_until(lambda s: s["contributions"]["applied"] == 4, "four islands train")
    cluster.remove_node(node, allow_graceful=False)
    watched.wait_until(lambda s: num_alive(s) == 2 and s["contributions"]["applied"] == 2, "two are left and go on")
    watched.join()
    report = verify(RunStore(str(run_folder(body))), replica_of)
    assert report.problems == ()
    assert report.num_outer_steps == 40


def test_islands_go_only_to_nodes_with_the_labels_that_the_recipe_names(cluster: Cluster, tiny: dict[str, Any]) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=NODE["object_store_memory"], labels={"zone": "eu-2"})
    labels = {"island_resources": {"CPU": 1}, "label_selector": {"zone": "eu-2"}, "placement_timeout_s": 1}
    none_such = {**tiny, "name": "nowhere", "islands": 2, "cluster": {**labels, "label_selector": {"zone": "us-1"}}}
    with pytest.raises(ClusterError, match="zone"):
        Watched(RunConfig.from_dict(none_such)).join()
    watched = Watched(RunConfig.from_dict({**tiny, "islands": 2, "cluster": labels}))
    watched.wait_until(lambda s: num_alive(s) == 2, "both islands are placed")
    nodes = {a["NodeID"]: a["Labels"].get("zone") for a in ray.nodes()}
    islands = [a for a in all_actors().values() if a["ActorClassName"] == "IslandActor" and a["State"] == "ALIVE"]
    assert [nodes[island["Address"]["NodeID"]] for island in islands] == ["eu-2", "eu-2"]
    watched.join()
