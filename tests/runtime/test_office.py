"""The office beside a coordinator's loop: whoever ends the coordinator first lets it say how the run ended."""

import asyncio
from pathlib import Path
from typing import Any

from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.log.run_store import RunStore
from diloco_ray.runtime.office import Mail, OfficeThread
from diloco_ray.transport.letters import MAIL, Token
from diloco_ray.transport.run_store import read_notice
from diloco_ray.transport.tokens import create_token
from tests.mail import SECRET, line_of
from tests.small_run import Life, SmallIsland, begun, join_all, small_job

JOB = small_job(num_islands=1, num_rounds=1)
HOURS_S = 10_000.0  # between two looks: nothing is told but by the last turn


class Actor:
    """The doors that an actor has, as coroutines."""

    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator

    def __getattr__(self, name: str) -> Any:
        async def door(*arguments: Any) -> Any:
            return getattr(self._coordinator, name)(*arguments)

        return door


def ended_run(store: RunStore) -> Life:
    life, island = Life(store, JOB), SmallIsland(0, JOB)
    join_all(life.coordinator, [island])
    assert life.submit(*island.contribution(life.plan_of(island))).status == "accepted"
    assert life.coordinator.state.phase == "succeeded"
    return life


async def open_and_close(store: RunStore, coordinator: Coordinator) -> None:
    office = OfficeThread(store, JOB, Mail(SECRET, HOURS_S, {}), coordinator, Actor(coordinator))
    await asyncio.get_running_loop().run_in_executor(None, office.close)


def test_islands_hear_of_the_end_though_the_coordinator_goes_at_once(tmp_path: Path) -> None:
    store = begun(RunStore(str(tmp_path / "run")), JOB)
    life = ended_run(store)
    asyncio.run(open_and_close(store, life.coordinator))
    notice = read_notice(store)
    assert notice is not None
    assert notice.state == "succeeded"
    token: Token = create_token(store, JOB.rules.run_id, SECRET, "island-00")
    news = line_of(store, JOB, token, deadline_s=5.0).follow("island-00", 1, 1, 0.0)
    assert news.standing == "over"
    assert not store.list(f"{MAIL}/island-00")
