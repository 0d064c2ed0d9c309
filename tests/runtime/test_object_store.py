"""What a run takes of Ray's object store, references, actors and workers it gives back, however often its processes are
killed (I13). Real processes on a local Ray."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from diloco_ray.config import RunConfig
from tests.conftest import Pace, Show
from tests.processes import DEADLINE_S, Watched, assert_whole, run_folder, uninterrupted
from tests.ray_store import PAYLOAD_BYTES, SETTLES_WITHIN_S, Held

pytestmark = pytest.mark.ray


@pytest.fixture
def own_ray(pace: Pace) -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        Watched.stop_all()
        ray.shutdown()


def lowest(watched: Watched, num_rounds: int) -> Held:
    """Of everything the least that was held within these many rounds: what travels comes and goes."""
    gc.collect()  # the driver is in this process
    until_s, end = time.monotonic() + DEADLINE_S, watched.status["rounds"] + num_rounds
    seen = [Held.now()]
    while watched.status["rounds"] < end:
        assert time.monotonic() < until_s
        time.sleep(0.05)
        seen.append(Held.now())
    return Held(*map(min, zip(*seen)))


def kill_and_wait(watched: Watched, victim: str) -> None:
    """Until it is back, and outer steps are taken again."""
    before = watched.status

    def life(status: dict[str, Any]) -> int:
        named = {island["name"]: island["incarnation"] for island in status["islands"]}
        return named.get(victim, status["coordinator"]["fence_epoch"])

    pids = {"coordinator": before["coordinator"]["pid"], **{i["name"]: i["pid"] for i in before["islands"]}}
    os.kill(pids[victim], signal.SIGKILL)
    back = watched.wait_until(lambda s: life(s) > life(before), f"{victim} is back")
    watched.wait_until(lambda s: s["outer_steps"] > back["outer_steps"] + 1, "outer steps are taken")


def test_what_a_run_takes_of_rays_object_store_it_gives_back_however_often_its_processes_are_killed(
    paced: dict[str, Any], pace: Pace, own_ray: None, show: Show
) -> None:
    recipe = {
        **paced,
        "islands": 2,
        "rounds": 80,
        "model": {"factory": "tests.model.paced_module:build_wide"},
        "sync": {"heartbeat_every_s": 0.1, "heartbeat_timeout_s": 60, "uplink": "float32", "downlink": "float32"},
    }
    expected, before = uninterrupted(recipe), Held.now()
    pace.slow_down(0.1)
    watched = Watched(RunConfig.from_dict(recipe))
    watched.wait_until(lambda s: s["rounds"] >= 2, "it trains")
    early = lowest(watched, 6)
    for victim in ("island-00", "coordinator", "island-01", "coordinator", "coordinator"):
        kill_and_wait(watched, victim)
    late = lowest(watched, 6)
    pace.let_go()
    watched.join()
    assert_whole(run_folder(recipe), expected)
    until = time.monotonic() + SETTLES_WITHIN_S
    while (after := Held.now()) > before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.2)
    show(f"held before, early, late, after: {before} {early} {late} {after}")
    assert late.stored_bytes < early.stored_bytes + PAYLOAD_BYTES
    assert late.references < early.references + early.workers  # each may have a call under way
    assert (late.actors, late.workers) == (early.actors, early.workers) == (4, before.workers + 2)
    assert after[:4] == before[:4]
    assert after.workers <= before.workers  # Ray keeps some idle ones for the next
