"""The coordinator's actor on its own loop, without Ray around it: what may go wrong beside the run does not end it."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.status import STATUS
from diloco_ray.runtime import coordinator_actor
from tests.small_run import METRICS, SmallIsland, begun, small_job

JOB = small_job(num_islands=2, num_rounds=4)
Actor: Callable[..., Any] = coordinator_actor.CoordinatorActor.__ray_metadata__.modified_class


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "here")
    monkeypatch.setattr(coordinator_actor, "TICK_S", 0.01)
    return begun(RunStore(str(tmp_path / "run")), JOB)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():
            await asyncio.sleep(0.01)


async def one_round(actor: Any, islands: list[SmallIsland], **metrics: float) -> None:
    state = actor._coordinator.state
    for island in islands:
        plan = state.open_plans(island.name)[0]
        verdict = await actor.submit(*island.contribution(plan, metrics={**METRICS, **metrics}))
        assert verdict.status == "accepted"
    await until(lambda: actor._coordinator.state.round == state.round + 1)


async def joined(actor: Any) -> list[SmallIsland]:
    islands = [SmallIsland(0, JOB), SmallIsland(1, JOB)]
    for island in islands:
        island.incarnation = (await actor.join(island.hello())).incarnation
    return islands


def status_on_disk(store: RunStore) -> dict[str, Any]:
    return json.loads(store.read(STATUS)) if store.exists(STATUS) else {}


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(story())  # type: ignore[arg-type]


def test_a_status_that_cannot_be_written_ends_no_run_and_is_told_once(store: RunStore) -> None:
    async def story() -> None:
        actor = Actor(store.url, JOB)
        report, asked = actor._coordinator.report, list[int]()
        whole = report.status

        def damaged(state: Any) -> dict[str, Any]:
            asked.append(state.round)
            if len(asked) % 2:
                raise OverflowError("cannot convert float infinity to integer")
            return {**whole(state), "rounds": math.inf}

        report.status = damaged
        islands = await joined(actor)
        await until(lambda: len(asked) >= 6)
        await one_round(actor, islands)
        await until(lambda: asked[-6:].count(1) == 6)
        assert actor._coordinator.error is None
        told = [event["text"] for event in report.own_events if STATUS in event.get("text", "")]
        assert told == [f"{STATUS} cannot be written: OverflowError: cannot convert float infinity to integer"]
        report.status = whole
        await until(lambda: status_on_disk(store).get("rounds") == 1)
        report.status = lambda state: {"rounds": math.nan}
        await actor.finish()

    run(story)


def test_numbers_without_end_that_an_island_tells_end_neither_this_life_nor_the_next(store: RunStore) -> None:
    """Each of them is finite, their sums are not."""

    async def story() -> None:
        for num_rounds in (2, 4):
            actor = Actor(store.url, JOB)
            islands = await joined(actor)
            for _ in range(2):
                await one_round(actor, islands, inner_seconds=1e308, tokens=1e308)
            await until(lambda wanted=num_rounds: status_on_disk(store).get("rounds") == wanted)
            assert actor._coordinator.error is None
            await actor.finish()
        assert actor._coordinator.state.phase == "succeeded"

    run(story)
