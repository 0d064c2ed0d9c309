"""Islands that go wrong: one that stands still is replaced, what is not finite is refused, what is raised is heard.

Real processes.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from diloco_ray.api import DiLoCoTrainer
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.errors import ClusterError
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from tests.processes import Watched, run_folder
from tests.recovery.bad_models import VICTIM

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for all of them."""
    folder = tmp_path_factory.mktemp("victim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VICTIM, str(folder / "pid"))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            yield
        finally:
            Watched.stop_all()
            ray.shutdown()


def with_factory(tiny: dict[str, Any], factory: str, **fields: Any) -> dict[str, Any]:
    return {**tiny, "model": {"factory": factory}, **fields}


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_island_that_stands_still_is_given_up_and_replaced_and_its_process_ends(tiny: dict[str, Any]) -> None:
    body = with_factory(tiny, "tests.model.plain_module:build", islands=2, rounds=20, name="still")
    body["inner"] = {**tiny["inner"], "steps_per_round": 500}
    body["sync"] = {"heartbeat_every_s": 0.5, "heartbeat_timeout_s": 5.0}  # a busy machine starves nobody that long
    watched = Watched(RunConfig.from_dict(body))
    frozen = watched.wait_until(lambda s: s["contributions"]["applied"] == 2, "both train")["islands"][0]
    os.kill(frozen["pid"], signal.SIGSTOP)
    try:
        watched.wait_until(lambda s: s["islands"][0]["state"] == "lost", "it is given up")
        watched.wait_until(lambda s: s["islands"][0]["incarnation"] == 2, "it is replaced")
    finally:
        with contextlib.suppress(ProcessLookupError):  # Ray may have ended it already, still as it was
            os.kill(frozen["pid"], signal.SIGCONT)
    until = time.monotonic() + 60
    while is_there(frozen["pid"]):
        assert time.monotonic() < until, "the zombie lives"
        time.sleep(0.05)
    watched.join()
    assert [island["incarnation"] for island in watched.status["islands"]] == [2, 1]
    assert verify(RunStore(str(run_folder(body))), replica_of).problems == ()


def test_an_island_whose_updates_are_not_finite_is_quarantined_and_stays_away_and_the_others_go_on(
    tiny: dict[str, Any],
) -> None:
    told: list[str] = []

    def watch(status: Any, events: list[dict[str, Any]]) -> None:
        told.extend(event["text"] for event in events if event["event"] == "decision")

    body = with_factory(tiny, "tests.recovery.bad_models:poisoned", islands=[1, 2], rounds=20)
    body["inner"] = {**tiny["inner"], "steps_per_round": 600}
    body["cluster"] = {**tiny["cluster"], "max_island_failures": 2}
    result = DiLoCoTrainer(body).fit(watch=watch)
    assert result.metrics["state"] == "succeeded"
    strikes = [text for text in told if "(strike" in text]
    assert [text.split(": ")[1] for text in strikes] == [f"contribution rejected (strike {n})" for n in (1, 2, 3)]
    assert all("the norm of the outer gradient is nan" in text for text in strikes)
    (quarantined,) = [island for island in result.metrics["islands"] if island["state"] == "quarantined"]
    assert strikes[0].startswith(quarantined["name"])
    assert result.metrics["tokens"]["rejected"] == 3 * 600 * body["inner"]["batch_size"] * 32
    assert verify(RunStore(str(run_folder(body))), replica_of).problems == ()


def test_what_an_island_raises_reaches_the_driver_with_the_islands_name(tiny: dict[str, Any], tmp_path: Path) -> None:
    body = with_factory(tiny, "tests.recovery.bad_models:greedy", name="greedy", islands=2)
    body["cluster"] = {**tiny["cluster"], "max_island_failures": 0}
    with pytest.raises(ClusterError, match=r"island-0\d failed 1 times, last: RuntimeError: .*can't allocate memory"):
        DiLoCoTrainer(body).fit(watch=lambda status, events: None)
