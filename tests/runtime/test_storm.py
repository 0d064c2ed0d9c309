"""A storm, on paper: its schedule, what counts as noticed and as over, and sequences that were committed twice."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diloco_ray.cli import main
from diloco_ray.config import RunConfig
from diloco_ray.coordination.messages import DataRange, Share
from diloco_ray.errors import ConfigError, StoreError
from diloco_ray.log.record import Record
from diloco_ray.runtime import chaos
from diloco_ray.runtime.chaos import num_doubled, run_chaos, tokens_per_s, tokens_per_s_between
from diloco_ray.runtime.storm import FROZEN_RAYLETS, SHARES, Fault, Planned, Storm, schedule, start_of
from tests.processes import write_recipe


def test_a_storm_has_as_many_faults_as_its_rate_says_and_is_the_same_for_the_same_seed() -> None:
    planned = schedule(600, 15, seed=1)
    assert len(planned) == 150
    assert planned == schedule(600, 15, seed=1) != schedule(600, 15, seed=2)
    assert [fault.at_s for fault in planned] == sorted(fault.at_s for fault in planned)
    assert 0 <= planned[0].at_s < 6 < 894 <= planned[-1].at_s < 900
    assert {fault.kind for fault in planned} == set(SHARES)


def test_frozen_raylets_are_planned_only_where_they_can_be_and_lost_nodes_where_there_is_time_to_get_over_them() -> (
    None
):
    planned, without = schedule(600, 15, seed=1), schedule(600, 15, seed=1, without=FROZEN_RAYLETS)
    changed = [(was.kind, now.kind) for was, now in zip(planned, without) if was != now]
    assert {was for was, _ in changed} == set(FROZEN_RAYLETS)
    assert {now for _, now in changed} == {"kill"}
    assert [(fault.at_s, fault.victim) for fault in planned] == [(fault.at_s, fault.victim) for fault in without]
    assert any(fault.kind == "node" for fault in planned)
    nodes = [fault.at_s for seed in range(100) for fault in schedule(600, 3, seed) if fault.kind == "node"]
    assert nodes
    assert max(nodes) <= 90


def status(state: str = "alive", process: str = "a", last_seen_s: float = 0.2, **run: Any) -> dict[str, Any]:
    island = {"name": "island-00", "state": state, "process": process, "last_seen_s": last_seen_s}
    return {"islands": [island], "coordinator": {"fence_epoch": 1}, "outer_steps": 7, **run}


def times_of(kind: str, *seen: tuple[float, dict[str, Any]], ends_s: float = 10.0) -> tuple[float | None, float | None]:
    island, before = ("", 1) if kind == "coordinator" else ("island-00", "a")
    fault = Fault(kind, island, 1, before, at_s=10.0, ends_s=ends_s, outer_steps=7)
    for seen_s, document in seen:
        fault.observe(document, seen_s)
    return fault.detected_s, fault.recovered_s


@pytest.mark.parametrize(
    ("kind", "seen", "ends_s", "noticed_s", "over_s"),
    [
        ("kill", [(11, status()), (12, status("lost")), (15, status(process="b"))], 10, 12, 15),
        ("kill", [(11, status()), (15, status(process="b"))], 10, 15, 15),
        ("kill", [(11, status(islands=[])), (15, status(process="b"))], 10, 11, 15),
        ("freeze", [(11, status(last_seen_s=1.5)), (13, status())], 12, None, 13),
        ("hang", [(15, status("lost")), (21, status(process="b"))], 30, 15, 21),
        ("hang", [(15, status("lost")), (29, status("lost")), (31, status())], 30, 15, 31),
        ("raylet", [(12, status(last_seen_s=0.1)), (15, status(last_seen_s=1.0)), (16, status())], 15, None, 16),
        ("node", [(35, status("lost")), (52, status()), (55, status(process="b"))], 50, 35, 55),
        ("node", [(52, status()), (59, status()), (61, status())], 50, None, 61),
        ("preempt", [(11, status("left")), (12, status("left"))], 10, 11, None),
    ],
)
def test_an_island_is_over_it_when_it_is_alive_again(
    kind: str, seen: list[Any], ends_s: float, noticed_s: float | None, over_s: float | None
) -> None:
    assert times_of(kind, *seen, ends_s=ends_s) == (noticed_s, over_s)


def test_the_coordinator_is_over_it_when_its_next_life_has_taken_an_outer_step() -> None:
    after = {"fence_epoch": 2}
    lives = [(11, status()), (14, status(coordinator=after)), (16, status(coordinator=after, outer_steps=8))]
    assert times_of("coordinator", *lives) == (14, 16)


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that stand for islands."""
    running = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield running
    for process in running:
        process.kill()
        process.wait()


def of_two(sleepers: list[subprocess.Popen[bytes]]) -> dict[str, Any]:
    islands = [
        {"name": f"island-{n:02d}", "state": "alive", "process": str(n), "pid": process.pid, "last_seen_s": 0.1}
        for n, process in enumerate(sleepers)
    ]
    return status(islands=islands, rounds=1)


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def state_of(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0]


def test_a_storm_strikes_processes_lets_go_of_them_and_counts_what_hit_nothing(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    told: list[str] = []
    planned = [Planned(0.0, "freeze", 0.9), Planned(0.1, "kill", 0.0), Planned(0.2, "kill", 0.0)]
    storm = Storm(planned, heartbeat_timeout_s=400.0, tell=told.append)
    storm.see({**of_two(sleepers), "rounds": 0})
    assert not told
    storm.see(of_two(sleepers))
    assert sleepers[0].wait(30) == -signal.SIGKILL
    wait_for(lambda: storm.missed)  # what is frozen is not struck again, and the other is gone
    assert state_of(sleepers[1]) == "T"
    assert [(fault.kind, fault.island) for fault in storm.faults] == [("freeze", "island-01"), ("kill", "island-00")]
    assert set(storm.missed) == {"kill"}
    storm.stop()
    wait_for(lambda: state_of(sleepers[1]) == "S")
    assert told[:2] == [
        f"fault 1: freeze of island-01 (pid {sleepers[1].pid})",
        f"fault 2: kill of island-00 (pid {sleepers[0].pid})",
    ]


def test_a_frozen_raylet_is_woken_and_a_node_that_is_lost_is_tended(sleepers: list[subprocess.Popen[bytes]]) -> None:
    """One sleeper stands for the raylet of the other."""
    island, raylet = sleepers
    tended = list[bool]()
    node: Any = SimpleNamespace(raylet_of={island.pid: raylet.pid}.get, tend=lambda: tended.append(True))
    storm = Storm([Planned(0.0, "raylet", 0.9), Planned(0.1, "node", 0.0)], 400.0, lambda text: None, node)
    storm.see(of_two([island]))
    wait_for(lambda: storm.missed)  # what is frozen is not frozen again
    assert (state_of(island), state_of(raylet)) == ("S", "T")
    assert [(fault.kind, fault.pid) for fault in storm.faults] == [("raylet", island.pid)]
    assert tended
    storm.stop()
    wait_for(lambda: state_of(raylet) == "S")


def test_a_zombie_is_the_very_process_that_hung(sleepers: list[Any]) -> None:
    """Not one that was given its number since, nor one that holds an island's name."""
    pid, began = sleepers[0].pid, start_of(sleepers[0].pid)
    storm = Storm([], 4.0, lambda text: None)
    for at, found in ((began, [pid]), (f"{int(began) - 1}", [])):
        storm.faults = [Fault("hang", "island-00", pid, "", at_s=1.0, ends_s=2.0, outer_steps=0, began=at)]
        assert storm.zombies == found
    storm.faults = [Fault("hang", "island-00", pid, "", at_s=1.0, ends_s=2.0, outer_steps=0, began=began)]
    storm.see(of_two(sleepers))
    assert storm.zombies == []
    storm.stop()


def test_sequences_that_two_leases_spent_are_counted() -> None:
    def record(*pieces: DataRange) -> Record:
        share = Share("island-00", 1, 0, 0, 1.0, 0, pieces, "", 0, 0.0)
        return Record(1, "", "", 1, "outer_step", 0, 1, 1, "", "", "", (share,), "", "", {})

    once = [record(DataRange(0, 0, 0, 4)), record(DataRange(0, 0, 4, 8)), record(DataRange(0, 1, 0, 4))]
    assert num_doubled(once) == 0
    assert num_doubled([*once, record(DataRange(0, 0, 2, 5), DataRange(1, 0, 0, 9))]) == 3


def test_a_storm_that_ends_in_a_stall_is_not_held_to_be_shorter() -> None:
    """100 tokens in ten seconds, then none for fifty: what was committed is shared out over all the time."""
    committed = [(1000.0, 500), (1010.0, 600), (1060.0, 700)]
    assert tokens_per_s(committed) == pytest.approx(200 / 60)
    assert tokens_per_s(committed, within_s=10.0) == pytest.approx(10.0)
    assert tokens_per_s(committed, within_s=35.0) == pytest.approx(150 / 35)
    assert tokens_per_s(committed, within_s=100.0) == pytest.approx(200 / 60)
    assert tokens_per_s(committed[:1]) == 0.0


def test_a_storm_for_islands_of_several_ranks_or_from_outside_is_refused_before_anything_is_trained(
    tiny: dict[str, Any],
) -> None:
    for overrides in (["inner.ranks=2"], ["cluster.external_islands=1"]):
        config = RunConfig.from_dict(tiny, overrides)
        with pytest.raises(ConfigError, match=r"set inner\.ranks=1 and cluster\.external_islands=0"):
            run_chaos(config, 60.0, 1.0, 0, print)


@pytest.mark.parametrize(("per_hour", "minutes"), [(1.0, 15.0), (60.0, 0.1), (60.0, 0.5), (600.0, math.inf)])
def test_a_storm_without_a_fault_is_refused_before_ray_is_started(
    per_hour: float, minutes: float, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be said to have been withstood."""
    monkeypatch.setattr(chaos, "connected", started)
    with pytest.raises(ConfigError, match=r"that is no storm\n.+\n.+one fault takes --minutes "):
        run_chaos(RunConfig.from_dict(tiny), per_hour, minutes, 0, print)
    with pytest.raises(AssertionError, match="Ray was started"):  # where one fault is planned
        run_chaos(RunConfig.from_dict(tiny), 4.0, 15.0, 0, print)


def started(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("Ray was started")


@pytest.fixture
def stormed(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command's exit code, in this process."""
    recipe = write_recipe(tmp_path, tiny)

    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["diloco-ray", "chaos", str(recipe), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


def test_a_report_that_cannot_be_written_is_refused_before_ray_is_started(
    stormed: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chaos, "connected", started)
    (tmp_path / "a file").touch()
    to = tmp_path / "a file" / "storm.json"
    assert stormed("--json", str(to)) == ConfigError.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: {to} cannot be written: Not a directory\n  where: --json" in printed.err
    to = tmp_path / "new" / "storm.json"
    assert stormed("--kills-per-hour", "1", "--json", str(to)) == ConfigError.exit_code
    assert "that is no storm" in capsys.readouterr().err
    assert not to.exists()


def of_no_faults(*arguments: Any) -> dict[str, Any]:
    """A report such as a storm gives."""
    nothing = {"hit": 0, "missed": 0, "detection_s": None, "recovery_s": None, "not_recovered": 0}
    return {
        "ok": True,
        "invariants": {"the run succeeded": True},
        "seconds": 60.0,
        "faults": {"hit": 0, "missed": 0, "by_kind": dict.fromkeys(SHARES, nothing)},
        "outer_steps": 4,
        "contributions": {"alive": {"mean": 3.0, "least": 3}},
        "goodput": {
            "calm_tokens_per_s": 2.0,
            "storm_tokens_per_s": 1.0,
            "between_faults_tokens_per_s": None,
            "ratio": 0.5,
            "ratio_to_between_faults": None,
        },
        "loss": {"calm": 2.0, "storm": 2.0, "difference": 0.0},
        "tokens": {"leased": 8, "committed": 8},
        "verify": {"problems": []},
    }


def test_the_report_is_printed_and_then_written(
    stormed: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that it is known though its folder has gone meanwhile. Without a storm, which `test_chaos` has."""
    to = tmp_path / "new" / "storm.json"
    monkeypatch.setattr(chaos, "run_chaos", of_no_faults)
    assert stormed("--json", str(to)) == 0
    assert json.loads(to.read_text()) == of_no_faults()
    told = capsys.readouterr().out
    assert "held: the run succeeded" in told
    monkeypatch.setattr(chaos, "run_chaos", lambda *arguments: shutil.rmtree(to.parent) or of_no_faults())
    assert stormed("--json", str(to)) == StoreError.exit_code
    printed = capsys.readouterr()
    assert printed.out == told
    assert f"error: {to} cannot be written: No such file or directory" in printed.err


def test_the_pace_between_faults_leaves_out_what_a_fault_touched_and_the_round_after() -> None:
    """Rounds of ten seconds and 100 tokens; those from 20 s to 50 s are half as good."""
    committed = [(1000.0 + 10 * i, 100 * i - 50 * min(3, max(0, i - 2))) for i in range(9)]
    fault = Fault("kill", "island-00", 1, "", at_s=25.0, ends_s=25.0, outer_steps=2, recovered_s=38.0)
    assert tokens_per_s_between(committed, []) == pytest.approx(550 / 70)
    assert tokens_per_s_between(committed, [fault]) == pytest.approx(10.0)
    fault.recovered_s = None  # never: only what was before it counts
    assert tokens_per_s_between(committed, [fault]) == pytest.approx(10.0)
    fault.at_s = 0.0
    assert tokens_per_s_between(committed, [fault]) is None
