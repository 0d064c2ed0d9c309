"""A run in virtual time: who is slow takes long, who waits loses, and equal decisions give equal bits."""

from typing import Any

import pytest

from diloco_ray.config import RunConfig
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.document import replica_of
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.verify import verify
from diloco_ray.observe.events import of_kind
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import make_island, train_in_process

STEP_TOKENS = 4 * 32  # of the tiny recipe: a batch of 4 sequences
SPEEDS = [1.0, 1.0, 0.25]


def trained(tiny: dict[str, Any], name: str, **sections: Any) -> tuple[Run, Coordinator]:
    body = {**tiny, "name": name}
    for section, value in sections.items():
        body[section] = {**body.get(section, {}), **value} if isinstance(value, dict) else value
    run = open_run(RunConfig.from_dict(body))
    coordinator = train_in_process(run)
    assert coordinator.state.phase == "succeeded"
    return run, coordinator


def seconds_of(coordinator: Coordinator) -> float:
    """Virtual, from the beginning to the last outer step."""
    return coordinator._now_s()


def committed(coordinator: Coordinator) -> int:
    return coordinator.state.ledger.account()["committed"]


def records(run: Run) -> list[Record]:
    return RunLog.open(run.store).records[1:]


def made_of(run: Run) -> list[list[tuple[str, int]]]:
    return [[(share.island, share.round) for share in record.shares] for record in records(run)]


def digests(run: Run) -> list[str]:
    return [record.parameters_digest for record in records(run)]


@pytest.mark.parametrize("speed", [0.25, 0.5])
def test_an_inner_step_takes_a_second_and_an_island_of_a_quarters_speed_four(
    tiny: dict[str, Any], speed: float
) -> None:
    full, at_full = trained(tiny, "full", islands=1)
    slow, at_speed = trained(tiny, "slow", islands=1, experiment={"speeds": [speed]})
    assert seconds_of(at_full) == 4 * 6
    assert seconds_of(at_speed) == 4 * 6 / speed
    assert digests(slow) == digests(full)
    for coordinator, each in ((at_full, 6.0), (at_speed, 6.0 / speed)):
        rounds = of_kind(coordinator.report.own_events, "round")
        assert [event["seconds"] for event in rounds] == [each] * 4
        assert [event["inner_s"] for event in rounds] == [each] * 4
        assert [event["sync_wait_s"] for event in rounds] == [0.0] * 4


def test_islands_at_work_at_the_same_time_take_no_longer_than_one(tiny: dict[str, Any]) -> None:
    _, coordinator = trained(tiny, "three")
    assert seconds_of(coordinator) == 4 * 6
    assert committed(coordinator) == 3 * 4 * 6 * STEP_TOKENS


def test_islands_that_go_in_step_wait_for_the_slowest_and_say_how_long(tiny: dict[str, Any]) -> None:
    even, _ = trained(tiny, "even")
    uneven, coordinator = trained(tiny, "uneven", experiment={"speeds": SPEEDS})
    assert seconds_of(coordinator) == 4 * 6 / 0.25
    assert digests(uneven) == digests(even)
    event = of_kind(coordinator.report.own_events, "round")[-1]
    assert event["inner_s"] == 6 + 6 + 24
    assert event["sync_wait_s"] == 18 + 18


def test_decoupled_trains_as_fast_as_its_islands_can_and_diloco_as_fast_as_the_slowest(tiny: dict[str, Any]) -> None:
    """Goodput, the point of Decoupled DiLoCo (arXiv 2604.21428): committed tokens per second, of what could be."""
    could_be = sum(SPEEDS) * STEP_TOKENS
    rates: dict[str, float] = {}
    for preset, sync, rounds in (("diloco", {}, 12), ("decoupled", {"fragments": 4}, 40)):
        sections = {"sync": {"preset": preset, **sync}, "experiment": {"speeds": SPEEDS}, "rounds": rounds}
        run, coordinator = trained(tiny, preset, **sections, evaluation={"every_rounds": rounds})
        assert verify(run.store, replica_of).problems == ()
        rates[preset] = committed(coordinator) / seconds_of(coordinator)
        by_island = dict.fromkeys(("island-00", "island-01", "island-02"), 0)
        for record in records(run):
            for share in record.shares:
                by_island[share.island] += share.tokens
        if preset == "decoupled":
            fast, _, slow = by_island.values()
            assert 3.5 < fast / slow < 4.5
    assert rates["decoupled"] == pytest.approx(could_be, rel=0.05)
    assert rates["diloco"] == pytest.approx(len(SPEEDS) * min(SPEEDS) * STEP_TOKENS)
    assert rates["decoupled"] > 2.5 * rates["diloco"]


def test_by_speed_a_slow_island_takes_fewer_steps_in_the_same_time(tiny: dict[str, Any]) -> None:
    """DyLU (arXiv 2401.09135): floor(v / v_max H), known from the first contribution on."""
    run, _ = trained(tiny, "async", rounds=8, sync={"preset": "async"}, experiment={"speeds": SPEEDS})
    steps = {name: [] for name in ("island-00", "island-01", "island-02")}
    for record in records(run):
        (share,) = record.shares
        steps[share.island].append(share.tokens // STEP_TOKENS)
    assert set(steps["island-00"]) == set(steps["island-01"]) == {6}
    assert steps["island-02"][0] == 6  # before its speed was known
    assert set(steps["island-02"][1:]) == {1}


def test_a_grace_window_ends_in_virtual_time(tiny: dict[str, Any]) -> None:
    """Two of three are a quorum; the third, ten times slower, is given 5 s and expires."""
    sync = {"quorum": 2, "grace_s": 5.0, "heartbeat_timeout_s": 600.0}
    run, coordinator = trained(tiny, "grace", islands=[2, 3], sync=sync, experiment={"speeds": [1.0, 1.0, 0.1]})
    assert [len(record.shares) for record in records(run)] == [2] * 4
    assert coordinator.state.ledger.account()["expired"] > 0
    assert 4 * 11 <= seconds_of(coordinator) < 4 * 11 + 10


@pytest.mark.parametrize("preset", ["delayed", "decoupled"])
def test_a_run_with_hardly_any_room_for_contributions_gets_on(tiny: dict[str, Any], preset: str) -> None:
    """Where islands go in step, every step is made of the same contributions as with room for all."""
    sync = {"preset": preset, "fragments": 2, "quorum": 3}
    roomy, _ = trained(tiny, "roomy", sync=sync, experiment={"speeds": SPEEDS})
    tight, coordinator = trained(tiny, "tight", sync={**sync, "max_inbox_bytes": 0}, experiment={"speeds": SPEEDS})
    decisions = [event["text"] for event in of_kind(coordinator.report.own_events, "decision")]
    assert any("waits until fragment" in text for text in decisions)
    assert verify(tight.store, replica_of).problems == ()
    if preset == "delayed":
        assert made_of(tight) == made_of(roomy)


@pytest.mark.parametrize("preset", ["diloco", "decoupled", "async"])
def test_an_islands_clock_decides_nothing_but_what_it_says_of_its_speed(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """One is an hour ahead, one an hour behind: every record is made of the same, bit for bit."""
    sync = {"preset": preset, **({"fragments": 2} if preset == "decoupled" else {})}
    right, _ = trained(tiny, "right", sync=sync, experiment={"speeds": SPEEDS})
    hours = iter((1.0, -1.0, 0.0))

    def make_skewed(run: Run, transport: Any, number: int, clock: Any) -> Any:
        skew_s = 3600.0 * next(hours)
        return make_island(run, transport, number, lambda: clock() + skew_s)  # type: ignore[arg-type]

    monkeypatch.setattr("diloco_ray.simulation.in_process.make_island", make_skewed)
    skewed, _ = trained(tiny, "skewed", sync=sync, experiment={"speeds": SPEEDS})
    assert list(hours) == []
    assert made_of(skewed) == made_of(right)
    assert digests(skewed) == digests(right)
