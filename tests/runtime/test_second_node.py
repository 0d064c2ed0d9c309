"""A storm that freezes the raylet of a second node, for less and for longer than Ray waits for it. Real processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from diloco_ray.config import RunConfig
from diloco_ray.run import open_run
from diloco_ray.runtime.chaos import two_nodes
from diloco_ray.runtime.driver import train_on_ray
from diloco_ray.runtime.storm import PLACE, Planned, Storm
from tests.conftest import Pace, Show
from tests.processes import assert_whole, run_folder, uninterrupted

pytestmark = pytest.mark.ray


def test_islands_outlive_a_raylet_that_is_frozen_for_a_while_and_are_replaced_where_ray_gives_it_up(
    paced: dict[str, Any], pace: Pace, show: Show
) -> None:
    recipe = {
        **paced,
        "islands": 2,
        "rounds": 100,
        "model": {"factory": "tests.model.paced_module:build_wide"},
        "sync": {"heartbeat_every_s": 0.5, "heartbeat_timeout_s": 60, "uplink": "float32"},
        "cluster": {"island_resources": {"CPU": 0.25, PLACE: 1}, "max_island_failures": 10},
    }
    expected, run = uninterrupted(recipe), open_run(RunConfig.from_dict(recipe))
    pace.slow_down(0.1)
    with two_nodes(recipe["cluster"]["island_resources"], 2) as node:
        storm = Storm([Planned(0.0, "raylet", 0.0), Planned(10.0, "node", 0.0)], 60.0, print, node)
        is_slow = True

        def watch(status: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
            nonlocal is_slow
            if status:
                storm.see(status)
            if is_slow and len(storm.faults) == 2 and all(fault.recovered_s for fault in storm.faults):
                is_slow = False
                pace.let_go()

        try:
            status = train_on_ray(run, watch)
        finally:
            storm.stop()
    assert status["state"] == "succeeded"
    assert_whole(run_folder(recipe), expected)
    borne, lost = storm.faults
    show(f"over a frozen raylet: {borne}\nover a lost node: {lost}")
    assert borne.pid == lost.pid, "it has outlived the first"
    (island,) = (island for island in status["islands"] if island["name"] == lost.island)
    assert island["process"] != lost.before
    assert lost.recovered_s is not None
    assert lost.recovered_s > lost.ends_s
    assert storm.zombies == []
