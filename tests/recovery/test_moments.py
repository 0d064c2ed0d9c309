"""One run, and an island ended at each moment of its round: nothing that was accepted is lost, and the bits are those
of an undisturbed run. Real processes; others are held still where a moment is too short to be met, and the records say
whose work counted."""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.events import of_kind, read_events
from tests.conftest import Pace
from tests.processes import Train, assert_whole, run_folder, training, uninterrupted, write_recipe
from tests.ray_store import PAYLOAD_BYTES, stored_bytes, wait_for_store

pytestmark = pytest.mark.ray
FAST, SLOW = "island-00", "island-01"


@pytest.fixture
def own_ray(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the command to train on, so that the test can look into its object store."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
    finally:
        ray.shutdown()


@contextmanager
def held_still(*pids: int) -> Iterator[None]:
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # where it was killed meanwhile
                os.kill(pid, signal.SIGCONT)


class Story:
    """A run of which one island is always done long before the others."""

    def __init__(self, train: Train):
        self.train = train

    def island(self, name: str, status: dict[str, Any] | None = None) -> dict[str, Any]:
        status = status or self.train.status()
        assert status is not None
        return next((i for i in status["islands"] if i["name"] == name), {"state": "absent", "incarnation": 0})

    def when(self, name: str, least: float, most: float, seen_s: float = 0.5) -> dict[str, Any]:
        """The island, once it is known to be within these parts of its round's steps."""

        def there(status: dict[str, Any]) -> bool:
            i = self.island(name, status)
            return i["state"] == "alive" and least < i["step"] / i["steps"] <= most and i["last_seen_s"] < seen_s

        return self.island(name, self.train.wait_until(there))

    @contextmanager
    def while_it_sends(self) -> Iterator[tuple[dict[str, Any], int]]:
        """The fast island, whose contribution alone lies in Ray's object store; and the coordinator's pid. All but this
        island stand still: nobody takes the contribution in, and the round stays open.
        """
        while True:
            wait_for_store("nothing is on its way", most=0)
            island = self.when(FAST, 0.2, 0.6)
            status = self.train.wait_until(lambda s: s["coordinator"]["pid"] > 0)
            names, coordinator = [i["name"] for i in status["islands"]], status["coordinator"]["pid"]
            with held_still(coordinator, *(i["pid"] for i in status["islands"] if i["name"] != FAST)):
                if stored_bytes() or any(self.saved(name, island["round"]).exists() for name in names):
                    continue  # one may have begun to send before we looked: in another round, then
                wait_for_store("its contribution is on its way", least=PAYLOAD_BYTES)
                yield island, coordinator
                return

    @contextmanager
    def when_accepted(self) -> Iterator[dict[str, Any]]:
        """The fast island, whose contribution is accepted. The others stand still: its round stays open."""
        with self.while_it_sends() as (island, coordinator):
            os.kill(coordinator, signal.SIGCONT)
            wait_for_store("it has its answer, and Ray no use for what it sent", most=0)
            yield island

    def saved(self, name: str, round: int) -> Path:
        """What an island writes when its inner loop is done, before it begins to send."""
        return self.train.folder / "islands" / name / f"{round:08d}.json"

    def when_back(self, *islands: dict[str, Any]) -> None:
        for island in islands:
            self.train.wait_until(lambda s, i=island: self.island(i["name"], s)["incarnation"] == i["incarnation"] + 1)


def test_an_island_ended_at_any_moment_of_its_round_comes_back_and_the_bits_are_the_same(
    paced: dict[str, Any], tmp_path: Path, pace: Pace, own_ray: None
) -> None:
    recipe = {
        **paced,
        "rounds": 10,
        "model": {"factory": "tests.model.paced_module:build_wide"},
        "inner": {**paced["inner"], "steps_per_round": 100},
        "sync": {"heartbeat_every_s": 0.1, "heartbeat_timeout_s": 60, "uplink": "float32"},
        "experiment": {"speeds": [1.0, 0.4, 0.4]},
    }
    expected = uninterrupted(recipe)
    pace.slow_down(0.02)
    folder = run_folder(recipe)
    with training(write_recipe(tmp_path, recipe), folder) as train:
        story = Story(train)
        # With notice, one after the other: the work in hand is given back at once.
        preempted = []
        for name in (SLOW, "island-02", FAST):
            preempted.append(story.when(name, 0.0, 0.8))
            os.kill(preempted[-1]["pid"], signal.SIGTERM)
        story.when_back(*preempted)
        # In the inner loop.
        island = story.when(SLOW, 0.1, 0.8)
        os.kill(island["pid"], signal.SIGKILL)
        story.when_back(island)
        # After its contribution was accepted, before the outer step.
        with story.when_accepted() as accepted:
            os.kill(accepted["pid"], signal.SIGKILL)
        story.when_back(accepted)
        # Before it fetched the new model: still, while the others end the round.
        with contextlib.ExitStack() as still:
            with story.when_accepted() as behind:
                still.enter_context(held_still(behind["pid"]))
            train.wait_until(lambda s: s["outer_steps"] >= behind["round"])
            os.kill(behind["pid"], signal.SIGKILL)
        story.when_back(behind)
        # While it sends: what is on its way is lost with it.
        with story.while_it_sends() as (sending, _):
            os.kill(sending["pid"], signal.SIGKILL)
            wait_for_store("Ray has dropped what the dead process had put there", most=0)
        story.when_back(sending)
        pace.let_go()
        train.wait_for_end()
    assert_whole(folder, expected)
    # Whose contribution counts: that of the killed process where it was accepted, else that of the next one.
    shares = {(r.round, s.island): s.incarnation for r in RunLog.open(RunStore(str(folder))).records for s in r.shares}
    lives_later = [shares[i["round"], i["name"]] - i["incarnation"] for i in (accepted, behind, sending)]
    assert lives_later == [0, 0, 1]
    texts = [event["text"] for event in of_kind(read_events(RunStore(str(folder))), "decision")]
    assert sorted(text for text in texts if " left: preempted" in text) == [
        f"island-{n:02d} left: preempted" for n in range(3)
    ]
    assert not any("silent" in text for text in texts)
