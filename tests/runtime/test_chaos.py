"""A storm for real, a short one: `diloco-ray chaos` strikes the processes of a run, and proves what came of it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.runtime.storm import SHARES
from tests.processes import CLI, write_recipe

pytestmark = pytest.mark.ray


def test_a_run_gets_over_a_storm_and_the_command_proves_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    """With seed 67 a kill, a preemption and a death of the coordinator, two or three seconds after one another."""
    recipe = {
        **tiny,
        "islands": 2,
        "inner": {**tiny["inner"], "steps_per_round": 60, "threads": 1},
        "sync": {"heartbeat_every_s": 0.5, "heartbeat_timeout_s": 8, "grace_s": 60},
        "evaluation": {**tiny["evaluation"], "every_rounds": 100},
        "cluster": {**tiny["cluster"], "max_island_failures": 100},
    }
    report = tmp_path / "reports" / "storm.json"
    storm = ["--kills-per-hour", "1800", "--minutes", "0.1", "--seed", "67", "--json", str(report)]
    command = [*CLI, "chaos", str(write_recipe(tmp_path, recipe)), *storm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["ok"]
    assert found["invariants"] == dict.fromkeys(found["invariants"], True)
    assert len(found["invariants"]) == 8
    assert {kind: one["hit"] for kind, one in found["faults"]["by_kind"].items()} == {
        **dict.fromkeys(SHARES, 0),
        **dict.fromkeys(("kill", "preempt", "coordinator"), 1),
    }
    proof = found["verify"]
    assert (proof["problems"], proof["records_lost"], proof["sequences_committed_twice"]) == ([], 0, 0)
    tokens = found["tokens"]
    assert tokens["committed"] == found["rounds"] * 2 * 60 * 4 * 32
    assert "BROKEN" not in done.stdout
    assert done.stdout.count("held: ") == 8
