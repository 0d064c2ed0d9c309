"""Storage that fails, and files that are damaged: a clear end or a continuation, and nothing is lost."""

import errno
from collections import Counter
from collections.abc import Callable

import pytest

from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.errors import CorruptionError, DiLoCoError, RunMismatchError, StoreError
from diloco_ray.log.verify import verify
from diloco_ray.simulation.storage import IOCall
from tests.recovery.situation import KEEPS_RESIDUALS, SHORT, Files, Situation, assert_whole, digests, records_of

FULL = OSError(errno.ENOSPC, "no space left on device")
FORBIDDEN = PermissionError("403 Forbidden")
BUSY = ConnectionError("503 Slow Down")


class Fault:
    """Strikes at the n-th call, before or after it. A disk that is full refuses what is written, from then on."""

    def __init__(self, error: OSError, moment: str, at: int):
        self.num_calls, self._error, self._moment, self._at = 0, error, moment, at

    def __call__(self, call: IOCall) -> None:
        is_full = self._error is FULL
        if call.moment == self._moment and (not is_full or call.act in ("write", "create")):
            self.num_calls += 1
            if self.num_calls == self._at or (is_full and self.num_calls > self._at):
                raise self._error


def outcome(situation: Situation, config: RunConfig, fault: Fault, error: OSError) -> str:
    try:
        situation.trained(config, fault)
    except StoreError as found:
        is_told = str(error) in found.what and found.where.startswith(config.run_url) and found.remedy
        return "ended by name" if is_told else str(found)
    return "went on"


@pytest.mark.parametrize(
    ("error", "moment"),
    [(FULL, "before"), (FORBIDDEN, "before"), (BUSY, "after")],
    ids=["full at any write", "forbidden before any call", "busy after any call"],
)
def test_a_storage_that_fails_at_any_io_call_ends_the_run_by_name_and_the_same_command_goes_on(
    situation: Situation, error: OSError, moment: str
) -> None:
    """After a call: it was done, and its answer is lost."""
    whole = Fault(error, moment, at=10**6)
    expected = digests(records_of(situation.trained(situation.config(situation.folder(), SHORT), whole)))
    outcomes: Counter[str] = Counter()
    for at in range(1, whole.num_calls + 1):
        config = situation.config(situation.folder(), SHORT)
        outcomes[outcome(situation, config, Fault(error, moment, at), error)] += 1
        run = situation.trained(config)
        assert_whole(run, records_of(run), {})
        assert digests(records_of(run)) == expected
    print(f"\n{error}: {dict(outcomes)}")
    assert set(outcomes) <= {"ended by name", "went on"}
    assert outcomes["ended by name"] > 20


FOUR_ROUNDS = {**KEEPS_RESIDUALS, "rounds": 4}
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit flipped": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "missing": lambda data: None,
}


def left_by_a_kill(situation: Situation) -> Files:
    """Three records of four, a snapshot of the second, residuals and checkpoints."""
    return next(files for files in situation.recorded(FOUR_ROUNDS).contents if "log/00000003.json" in files)


def ends_the_run(path: str, damage: str) -> bool:
    """What a resume has to read: its document, the log, what follows the newest snapshot, and the residual."""
    if path == "log/00000003.json":
        return damage != "missing"  # without its last record a log is a shorter one
    return path.startswith(("run.json", "log/", "payloads/00000003", "residuals/000-00000003"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_at_rest_ends_the_run_by_name_or_costs_it_nothing(situation: Situation, damage: str) -> None:
    expected = digests(records_of(situation.taken_up(FOUR_ROUNDS)))
    files = left_by_a_kill(situation)
    for path, data in files.items():
        damaged = DAMAGES[damage](data)
        left = {name: data for name, data in {**files, path: damaged}.items() if data is not None}
        if ends_the_run(path, damage):
            with pytest.raises(DiLoCoError) as caught:
                situation.taken_up(FOUR_ROUNDS, left)
            error = caught.value
            assert isinstance(error, CorruptionError | StoreError | RunMismatchError)
            assert error.where.endswith(path) or path in error.what
            continue
        run = situation.taken_up(FOUR_ROUNDS, left)
        assert all(path in problem for problem in verify(run.store, replica_of).problems), path
        if "/islands/" not in path:  # another checkpoint is older: the run goes on from it, with other bits
            assert digests(records_of(run)) == expected, path
        assert records_of(run)[-1].round == 4
