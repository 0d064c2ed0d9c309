"""An island whose work has become void begins again from what its round begins with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diloco_ray.config import RunConfig
from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.island.checkpoint import IslandCheckpoints
from diloco_ray.island.inner_optimizer import InnerOptimizer
from diloco_ray.log.run_log import RunLog
from diloco_ray.run import open_run
from diloco_ray.simulation.beginning import prepared_data
from diloco_ray.simulation.in_process import train_in_process
from diloco_ray.simulation.scenario import Named, Scenario
from diloco_ray.simulation.simulate import Teller
from diloco_ray.transport.protocol import Bytes


@pytest.mark.parametrize("overlap", [5, 6])
def test_an_island_struck_while_a_round_before_is_open_begins_with_its_outer_steps(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, overlap: int
) -> None:
    """It is ahead: the round before waits for a slower island when its payload for this one arrives torn."""
    submit, torn = Coordinator.submit, list[Contribution]()

    def tear_one(coordinator: Coordinator, contribution: Contribution, payload: Bytes) -> Verdict:
        if contribution.key == (0, 1, "island-00") and not torn:
            torn.append(contribution)
            payload = np.zeros_like(payload)
        return submit(coordinator, contribution, payload)

    monkeypatch.setattr(Coordinator, "submit", tear_one)
    sync = {"fragments": 2, "overlap": overlap}
    run = open_run(RunConfig.from_dict({**tiny, "sync": sync, "experiment": {"speeds": [1.0, 0.25, 0.25]}}))
    coordinator = train_in_process(run)
    assert coordinator.state.phase == "succeeded"
    records = RunLog.open(run.store).records[1:]
    assert len(torn) == 1
    assert sum(record.tokens["rejected"] for record in records[-1:]) > 0
    assert [len(record.shares) for record in records] == [3] * len(records)
    oldest = 1 if overlap == 6 else 0
    assert {s.round - s.base_version for record in records for s in record.shares} <= {0, oldest}


@pytest.mark.parametrize("sync", [{"preset": "delayed"}, {"preset": "eager"}, {"preset": "decoupled", "fragments": 3}])
def test_an_island_that_dies_with_two_rounds_done_and_none_of_them_sent_has_the_state_that_the_first_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: dict[str, Any]
) -> None:
    """Nothing that it says arrives from the third round on; it trains the fourth before it has to wait."""
    asked: list[tuple[int, int | None]] = []
    load_ = IslandCheckpoints.load_

    def load_and_tell_(
        checkpoints: IslandCheckpoints, round: int, optimizer: InnerOptimizer
    ) -> tuple[int, int | None] | None:
        found = load_(checkpoints, round, optimizer)
        asked.append((round, found[0] if found else None))
        return found

    monkeypatch.setattr(IslandCheckpoints, "load_", load_and_tell_)
    prepared_data(tmp_path)
    body = {
        "recipe": {"islands": 2, "rounds": 8, "inner": {"checkpoint_every_rounds": 1}, "sync": sync},
        "network": {"loss": 0.0, "late": 0.0},
        "faults": [{"mute": "island-00", "at_s": 8.5, "for_s": 15}, {"kill": "island-00", "at_s": 16}],
    }
    story = Teller(tmp_path).tell(Named("mute", Scenario.model_validate(body)), 0)
    assert (story.problem, asked) == ("", [(0, None), (0, None), (2, 2)])
