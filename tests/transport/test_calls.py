"""What every carrier that makes calls does with a coordinator that answers, and has no verdict yet."""

from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import DeadlineError
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.calls import CallingTransport
from diloco_ray.transport.protocol import Bytes
from tests.small_run import Life, SmallIsland, begun, join_all, small_job


class Patient(CallingTransport):
    """Each call takes 50 s of a clock of its own."""

    def __init__(self, verdicts: Iterable[Verdict], deadline_s: float):
        self._verdicts, self._deadline_s, self.num_calls = iter(verdicts), deadline_s, 0

    def _call(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        assert method == "submit"
        self.num_calls += 1
        return next(self._verdicts)

    def _now_s(self) -> float:
        return 50.0 * self.num_calls


@pytest.fixture
def item(tmp_path: Path) -> tuple[Contribution, Bytes]:
    """Header and payload, as an island sends them."""
    job = small_job(num_islands=1)
    life, island = Life(begun(RunStore(str(tmp_path / "run")), job), job), SmallIsland(0, job)
    join_all(life.coordinator, [island])
    return island.contribution(life.plan_of(island))


def test_a_contribution_is_sent_again_while_it_is_inspected(
    item: tuple[Contribution, Bytes],
) -> None:
    line = Patient([Verdict("pending")] * 3 + [Verdict("accepted")], deadline_s=600.0)
    assert line.submit(*item) == Verdict("accepted")
    assert line.num_calls == 4


def test_a_verdict_that_never_comes_is_waited_for_until_the_deadline(item: tuple[Contribution, Bytes]) -> None:
    line = Patient(repeat(Verdict("pending")), deadline_s=600.0)
    with pytest.raises(DeadlineError, match="no verdict on a contribution for 600 s"):
        line.submit(*item)
    assert line.num_calls == 13
