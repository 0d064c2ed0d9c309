"""An island of two ranks on Ray Train: it trains, and a killed rank costs that island's open round alone."""

import os
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import restore
from diloco_ray.log.verify import verify
from diloco_ray.run import open_run, read_run
from diloco_ray.simulation.in_process import train_in_process
from tests.processes import Train, ranks_beside, run_folder, training, write_recipe

pytestmark = pytest.mark.ray


@pytest.fixture
def recipe(tiny: dict[str, Any]) -> dict[str, Any]:
    body = deepcopy(tiny)
    body |= {"islands": 2, "rounds": 3}
    body["inner"] |= {"ranks": 2, "parallel": "fsdp", "steps_per_round": 100, "optimizer": "sgd", "learning_rate": 0.1}
    body["sync"] = {"fragments": 2, "offsets": "together", "uplink": "int4", "downlink": "int4"}
    body["sync"]["heartbeat_every_s"] = 0.1
    body["experiment"] = {"speeds": [0.3, 0.3]}  # rounds that are longer than what is seen of them is old
    body["cluster"] = {"island_resources": {"CPU": 0.25}, "rank_timeout_s": 30}
    return body


def is_in_the_middle(island: dict[str, Any], round: int) -> bool:
    return island["state"] == "alive" and island["round"] == round and 0 < island["step"] < 0.7 * island["steps"]


def final_parameters(folder: Path, at: int | None = None) -> torch.Tensor:
    run = read_run(str(folder))
    replica = replica_of(run.document)
    restore(run.store, RunLog.open(run.store), replica, at)
    return torch.cat([replica.parameters(fragment.index) for fragment in run.layout.fragments])


def test_a_killed_rank_costs_its_islands_open_round_and_the_run_ends_as_one_process_islands_would(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    with training(write_recipe(tmp_path, recipe), run_folder(recipe)) as train:
        island, other = kill_a_rank(train)
        output = train.wait_for_end()
        last = train.status()
    assert last is not None
    assert {i["name"]: i["incarnation"] for i in last["islands"]} == {island: 2, other: 1}
    assert f"{island} lost: ClusterError: rank " in output
    folder = RunStore(str(run_folder(recipe)))
    assert verify(folder, replica_of).problems == ()
    records = RunLog.open(folder).records[1:]
    assert [len(record.shares) for record in records] == [2] * 6  # the round waited for it
    alone = {**recipe, "name": "alone", "inner": {**recipe["inner"], "ranks": 1}}
    train_in_process(open_run(RunConfig.from_dict(alone)))
    expected, began = final_parameters(run_folder(alone)), final_parameters(run_folder(alone), 0)
    moved = (expected - began).norm()
    assert (final_parameters(run_folder(recipe)) - expected).norm() < 0.02 * moved


def kill_a_rank(train: Train) -> tuple[str, str]:
    """SIGKILL to a rank that does not lead, in the second round; its island, and the other."""
    status = train.wait_until(lambda s: any(is_in_the_middle(island, 2) for island in s["islands"]))
    leaders = {island["pid"] for island in status["islands"]}
    ranks = [pid for pid in ranks_beside(status["islands"][0]["pid"]) if pid not in leaders]
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    after = train.wait_until(lambda s: any(i["incarnation"] == 2 for i in s["islands"]))
    (lost,) = [i["name"] for i in after["islands"] if i["incarnation"] == 2]
    (other,) = [i["name"] for i in after["islands"] if i["name"] != lost]
    return lost, other


def test_an_island_whose_lead_hangs_is_ended_and_its_placement_group_is_free_for_the_next(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Ray itself keeps the placement group of an actor that was killed: there is no room for a second one."""
    recipe |= {"islands": 1, "experiment": {"speeds": [0.3]}}
    recipe["cluster"] = {"island_resources": {"CPU": 0.375 * (os.cpu_count() or 1)}, "rank_timeout_s": 300}
    recipe["sync"]["heartbeat_timeout_s"] = 3
    with training(write_recipe(tmp_path, recipe), run_folder(recipe)) as train:
        status = train.wait_until(lambda s: any(is_in_the_middle(island, 2) for island in s["islands"]))
        os.kill(status["islands"][0]["pid"], signal.SIGSTOP)
        train.wait_until(lambda s: s["islands"][0]["incarnation"] == 2)
        assert "island-00 lost: silent for" in train.wait_for_end()
    assert verify(RunStore(str(run_folder(recipe))), replica_of).problems == ()
