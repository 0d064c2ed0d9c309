"""A wrong address of a cluster is refused before Ray tries it for minutes; what fits into one is counted."""

import contextlib
import socket
import time

import pytest
import ray

from diloco_ray.config import ClusterSettings
from diloco_ray.errors import ClusterError
from diloco_ray.runtime import cluster
from diloco_ray.runtime.cluster import connected, placeable, wait_for_places


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_listens_is_named_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        wrong = address.format(free.getsockname()[1])
    with pytest.raises(ClusterError, match="no Ray cluster answers") as caught, connected(wrong):
        pass
    assert caught.value.where == wrong


@pytest.mark.ray
def test_a_ray_that_this_process_has_started_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    many = ClusterSettings(island_resources={"CPU": 64})  # type: ignore[call-arg]
    began_s = time.monotonic()
    none = pytest.raises(ClusterError, match="this Ray, started here, gets no others")
    with connected(None, num_cpus=1), none as caught:
        wait_for_places(many, ["island-00"], 1, print, least=1, within_s=300.0, where="here", more="more", less="less")
    assert time.monotonic() - began_s < 150.0
    assert caught.value.remedy == "less, or name a cluster that has more in RAY_ADDRESS", "nothing else can help here"


def test_ranks_of_an_island_may_lie_on_several_nodes_with_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": (3, 2), "b": (8,)}
    nodes = [
        {"Alive": True, "Labels": {"zone": zone}, "Resources": {"GPU": float(num)}}
        for zone, nums in sizes.items()
        for num in nums
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 13.0})
    everywhere = ClusterSettings(island_resources={"GPU": 1})  # type: ignore[call-arg]
    names = [f"island-0{number}" for number in range(4)]
    assert placeable(everywhere, names, 4) == names[:3]
    assert placeable(everywhere, names, 1) == names
    near = everywhere.model_copy(update={"label_selector": {"zone": "a"}})
    assert placeable(near, names, 4) == names[:1]
    assert placeable(near, names, 6) == []
    told: list[str] = []
    monkeypatch.setattr(cluster, "_asked_for", lambda *_: contextlib.nullcontext())  # there is no Ray to be asked
    with pytest.raises(ClusterError) as caught:
        wait_for_places(near, names, 4, told.append, least=2, within_s=0.0, where="here", more="more", less="less")
    text = "the cluster can place 1 of at least 2 islands of 4 ranks on nodes labelled {'zone': 'a'}"
    text += " (GPU: 8 needed, 13 in the cluster)"
    assert caught.value.what == f"{text} after 0 s"
    assert told == [f"{text}; waiting up to 0 s"]
