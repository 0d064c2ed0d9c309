"""One run, and an island ended at each moment of its round: nothing that was accepted is lost, and the bits are those
of an undisturbed run. Real processes; the coordinator is held still where a moment is too short to be met."""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.events import of_kind, read_events
from tests.conftest import Pace
from tests.processes import Train, assert_whole, run_folder, training, uninterrupted, write_recipe

pytestmark = pytest.mark.ray
FAST, SLOW = "island-00", "island-01"


@contextmanager
def held_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
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

    def when_done(self) -> dict[str, Any]:
        """The fast island, waiting for the slow ones, which have yet some way to go."""

        def done(status: dict[str, Any]) -> bool:
            fast, slow = self.island(FAST, status), self.island(SLOW, status)
            both = fast["state"] == slow["state"] == "alive" and fast["round"] == slow["round"]
            return both and fast["step"] == fast["steps"] and 0 < slow["step"] < 0.7 * slow["steps"]

        return self.island(FAST, self.train.wait_until(done))

    def when_back(self, *islands: dict[str, Any]) -> None:
        for island in islands:
            self.train.wait_until(lambda s, i=island: self.island(i["name"], s)["incarnation"] == i["incarnation"] + 1)


def test_an_island_ended_at_any_moment_of_its_round_comes_back_and_the_bits_are_the_same(
    paced: dict[str, Any], tmp_path: Path, pace: Pace
) -> None:
    recipe = {
        **paced,
        "rounds": 10,
        "inner": {**paced["inner"], "steps_per_round": 100},
        "sync": {"heartbeat_every_s": 0.1, "heartbeat_timeout_s": 60},
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
        island = story.when_done()
        os.kill(island["pid"], signal.SIGKILL)
        story.when_back(island)
        # Before it fetched the new model: still, while the others end the round.
        island = story.when_done()
        with held_still(island["pid"]):
            round = island["round"]
            train.wait_until(lambda s: s["outer_steps"] >= round)
            os.kill(island["pid"], signal.SIGKILL)
        story.when_back(island)
        # While it sends: the coordinator is still, so nobody takes in what the island has to send.
        island = story.when(FAST, 0.2, 0.95)
        coordinator = train.wait_until(lambda s: True)["coordinator"]["pid"]
        with held_still(coordinator):
            saved = folder / "islands" / FAST / f"{island['round']:08d}.json"  # before it begins to send
            train.wait_until(lambda s: saved.exists())
            os.kill(island["pid"], signal.SIGKILL)
        story.when_back(island)
        pace.let_go()
        train.wait_for_end()
    assert_whole(folder, expected)
    texts = [event["text"] for event in of_kind(read_events(RunStore(str(folder))), "decision")]
    assert sorted(text for text in texts if " left: preempted" in text) == [
        f"island-{n:02d} left: preempted" for n in range(3)
    ]
    assert not any("silent" in text for text in texts)
