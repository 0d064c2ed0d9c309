"""A whole run, islands and coordinator in one process, is cut before every job of the coordinator and taken up again.

Jobs are all that a coordinator does to payloads, model and files, so these are the points at which a kill can differ.
"""

import os
from collections import deque
from typing import Any

import pytest

from diloco_ray.config import RunConfig
from diloco_ray.coordinator.coordinator import Coordinator, Job
from diloco_ray.document import replica_of
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.snapshot import list_snapshots
from diloco_ray.log.verify import verify
from diloco_ray.observe.events import of_kind, read_events
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import make_island, train_in_process
from diloco_ray.transport.in_memory import InMemoryTransport


class CrashError(Exception):
    pass


def recipe(tiny: dict[str, Any], name: str, **sync: Any) -> RunConfig:
    body = {**tiny, "name": name, "islands": 2, "rounds": 2, "sync": sync}
    body["inner"] = {**tiny["inner"], "steps_per_round": 2}
    body["storage"] = {**tiny["storage"], "snapshot_every_rounds": 1}
    return RunConfig.from_dict(body)


def train_until(run: Run, num_jobs: int) -> int:
    """Trains until so many jobs are done, and dies before the last one is heard of; or to the end. Returns how many."""
    queue: deque[Job] = deque()
    done = 0

    def later(job: Job) -> None:
        nonlocal done
        queue.append(job)
        if len(queue) == 1:
            while queue:
                event = queue[0]()
                done += 1
                if done == num_jobs:
                    raise CrashError
                coordinator.receive(event)
                queue.popleft()

    coordinator = Coordinator(run.store, run.coordinator_job(), later=later, holder="test", pid=os.getpid())
    transport = InMemoryTransport(coordinator)
    islands = [make_island(run, transport, number) for number in range(run.config.max_islands)]
    lives = [island.live() for island in islands]
    try:
        for island in islands:
            island.start()
        while coordinator.state.phase != "succeeded":
            for life in lives:
                next(life, None)
    except CrashError:
        return done
    return done


def digests(run: Run) -> list[tuple[str, str]]:
    return [(record.parameters_digest, record.optimizer_digest) for record in RunLog.open(run.store).records]


def decisions(run: Run) -> str:
    return "\n".join(event["text"] for event in of_kind(read_events(run.store), "decision"))


def tokens_balance(run: Run) -> bool:
    tokens = RunLog.open(run.store).tail.tokens
    return tokens["leased"] == sum(tokens[fate] for fate in tokens if fate != "leased")


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_run_cut_at_any_job_and_taken_up_again_is_whole(tiny: dict[str, Any], fragments: int) -> None:
    """And has the bits of an uninterrupted one, unless the cut fell between two fragments of one round.

    Then the islands, whose work is gone, repeat the round from a base of which one fragment has moved already.
    """
    sync: dict[str, Any] = {"fragments": fragments, "offsets": "together"}
    whole = open_run(recipe(tiny, "whole", **sync))
    num_jobs = train_until(whole, 10**6)
    expected = digests(whole)
    assert num_jobs > 8
    for num_done in range(1, num_jobs):
        run = open_run(recipe(tiny, f"cut-{num_done}", **sync))
        assert train_until(run, num_done) == num_done
        before = digests(run)
        between_fragments = (len(before) - 1) % fragments != 0
        train_in_process(run)
        assert verify(run.store, replica_of).problems == ()
        assert tokens_balance(run)
        assert len(digests(run)) == len(expected)
        assert digests(run)[: len(before)] == before
        assert "rejected" not in decisions(run)
        if not between_fragments:
            assert digests(run) == expected, f"cut after {num_done} of {num_jobs} jobs"


OTHERS: list[dict[str, Any]] = [
    {"preset": "streaming", "fragments": 2, "overlap": 1},
    {"preset": "delayed"},
    {"preset": "eager", "fragments": 2},
    {"preset": "async"},
    {"preset": "decoupled", "fragments": 3},
    {"uplink": "topk", "error_feedback": 0.95, "downlink": "int4", "downlink_error_feedback": True},
]


@pytest.mark.parametrize("sync", OTHERS, ids=lambda sync: sync.get("preset", "error feedback"))
def test_a_run_of_any_preset_cut_at_every_other_job_and_taken_up_again_is_whole(
    tiny: dict[str, Any], sync: dict[str, Any]
) -> None:
    """Where training goes on while fragments travel, what an island had not yet sent is gone with it, and only then."""
    whole = open_run(recipe(tiny, "whole", **sync))
    num_jobs = train_until(whole, 10**6)
    for num_done in range(1, num_jobs, 2):
        run = open_run(recipe(tiny, f"cut-{num_done}", **sync))
        assert train_until(run, num_done) == num_done
        before = digests(run)
        train_in_process(run)
        assert verify(run.store, replica_of).problems == ()
        assert tokens_balance(run)
        refused = [line for line in decisions(run).splitlines() if "rejected" in line]
        if run.config.sync.closes == "quorum":  # a round is repeated of which a fragment is committed: not once more
            refused = [line for line in refused if not line.endswith("another payload with this key is committed")]
        assert refused == []
        assert RunLog.open(run.store).tail.tokens["rejected"] == 0
        assert digests(run)[: len(before)] == before
        tail, end = RunLog.open(run.store).tail, RunLog.open(whole.store).tail
        assert tail.round == end.round == 2
        if run.config.sync.closes == "all":
            assert (tail.index, tail.tokens["committed"]) == (end.index, end.tokens["committed"])
        if run.config.sync.overlap == 0 and run.config.sync.closes == "all":
            assert digests(run) == digests(whole), f"cut after {num_done} of {num_jobs} jobs"


def test_a_run_with_muon_is_taken_up_again_with_the_same_bits(tiny: dict[str, Any]) -> None:
    body = {**tiny, "islands": 2, "rounds": 4, "inner": {**tiny["inner"], "optimizer": "muon", "steps_per_round": 3}}
    whole = open_run(RunConfig.from_dict({**body, "name": "whole"}))
    train_in_process(whole)
    cut = open_run(RunConfig.from_dict({**body, "name": "cut"}))
    train_until(cut, 11)
    assert 2 < len(digests(cut)) < 5
    train_in_process(cut)
    assert digests(cut) == digests(whole)


def test_a_run_cut_many_records_after_its_last_snapshot_is_taken_up_again(tiny: dict[str, Any]) -> None:
    """A follower that comes late is given old records one by one."""
    body = {**tiny, "islands": 2, "rounds": 6, "inner": {**tiny["inner"], "steps_per_round": 1}}
    body["storage"] = {**tiny["storage"], "snapshot_every_rounds": 100}
    whole = open_run(RunConfig.from_dict({**body, "name": "whole"}))
    train_in_process(whole)
    cut = open_run(RunConfig.from_dict({**body, "name": "cut"}))
    train_until(cut, 18)
    assert len(digests(cut)) >= 5
    assert list_snapshots(cut.store) == [0]
    train_in_process(cut)
    assert digests(cut) == digests(whole)
