"""The simulator finds what it is for: each of these bugs, planted in the product, breaks an invariant, and which."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination import admission, reducer, rounds
from diloco_ray.coordination.data_ledger import DataLedger
from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.coordination.state import Accepted, RunState
from diloco_ray.coordinator import coordinator as coordinator_module
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.payloads import Payload, Payloads
from diloco_ray.errors import StoreError
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog
from diloco_ray.simulation.beginning import prepared_data
from diloco_ray.simulation.scenario import Named, Scenario
from diloco_ray.simulation.simulate import Teller
from diloco_ray.transport.follower import Follower

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def teller(tmp_path_factory: pytest.TempPathFactory) -> Teller:
    folder = tmp_path_factory.mktemp("stories")
    prepared_data(folder)
    return Teller(Path(folder))


def accept_without_a_copy(patch: Patch) -> None:
    patch.setattr(np, "array", lambda data, *rest, array=np.array: data if _is_in(Payload) else array(data, *rest))


def _is_in(kind: type) -> bool:
    import sys

    return isinstance(sys._getframe(2).f_locals.get("self"), kind)


def keep_what_is_committed(patch: Patch) -> None:
    """What was taken in stays in the inbox, to be taken in again."""
    committed = rounds.committed

    def planted(state: RunState, event: Any) -> Any:
        after, commands = committed(state, event)
        taken = {key: state.inbox[key] for key in state.stepping.get(event.fragment, ())}
        return replace(after, inbox={**after.inbox, **taken}), commands

    patch.setattr("diloco_ray.coordination.reducer.committed", planted)


def sum_in_arrival_order(patch: Patch) -> None:
    accepted = RunState.accepted

    def planted(self: RunState, fragment: int) -> Any:
        return dict(sorted(accepted(self, fragment).items(), key=lambda item: item[1].accepted_s))

    patch.setattr(RunState, "accepted", planted)


def add_in_arrival_order(patch: Patch) -> None:
    """The record says island order, the sum is another one."""
    outer_step = Replica.outer_step

    def planted(self: Replica, fragment: int, payloads: Any, weights: Any, *rest: Any) -> Any:
        return outer_step(self, fragment, payloads[::-1], weights[::-1], *rest)

    def only_the_coordinators(self: Replica, *arguments: Any) -> Any:
        return (planted if _is_in(Coordinator) else outer_step)(self, *arguments)

    patch.setattr(Replica, "outer_step", only_the_coordinators)


def skip_the_fence_check(patch: Patch) -> None:
    patch.setattr(coordinator_module, "check_fence", lambda store, epoch: None)


def drop_a_lease(patch: Patch) -> None:
    settle = DataLedger.settle

    def planted(self: DataLedger, lease_id: str, fate: str) -> DataLedger:
        after = settle(self, lease_id, fate)
        return replace(after, returned=self.returned) if fate == "expired" else after

    patch.setattr(DataLedger, "settle", planted)


def accept_a_stale_base(patch: Patch) -> None:
    patch.setattr(admission, "_time_problem", lambda *arguments: "")


def announce_before_the_commit(patch: Patch) -> None:
    """Each record is written when the next one is."""
    append, waiting = RunLog.append, dict[int, tuple[Record, bytes]]()

    def planted(self: RunLog, record: Record, payload: bytes = b"") -> None:
        written = self.store.create
        late = waiting.pop(id(self), None)
        if late:
            written(f"log/{late[0].index:08d}.json", late[0].to_bytes())
        waiting[id(self)] = (record, payload)
        self.store.create = lambda path, data: None  # type: ignore[method-assign]
        try:
            append(self, record, payload)
        finally:
            del self.store.create

    patch.setattr(RunLog, "append", planted)


def decay_momentum_without_contributions(patch: Patch) -> None:
    """A round whose islands are all lost still decays the momentum, on the coordinator."""
    receive = Coordinator.receive

    def planted(self: Coordinator, event: Any) -> None:
        had_islands = hasattr(self, "state") and bool(self.state.alive)
        receive(self, event)
        if had_islands and not self.state.alive and not self.state.inbox:
            for fragment in range(self.state.rules.num_fragments):
                for buffer in self._replica.buffers(fragment):
                    buffer.mul_(0.9)

    patch.setattr(Coordinator, "receive", planted)


def throw_away_what_a_lost_island_had_done(patch: Patch) -> None:
    revoke = reducer.revoke

    def planted(state: RunState, island: str, fate: str) -> RunState:
        return revoke(state, island, fate, all_of_it=bool(state.plans.get(island)))

    patch.setattr(reducer, "revoke", planted)


def let_an_islands_replica_go_wrong(patch: Patch) -> None:
    """Now and then, before it replays a record."""
    replay, turns = Follower.replay, count()

    def planted(self: Follower, fragment: int, version: int | None = None) -> None:
        if self._waiting[fragment] and next(turns) % 7 == 3:
            self.replica.parameters(fragment)[0] += 1.0
        replay(self, fragment, version)

    patch.setattr(Follower, "replay", planted)


def end_the_coordinator_for_no_reason(patch: Patch) -> None:
    take, turns = Coordinator._take_outer_step, count()

    def planted(self: Coordinator, step: Any) -> Any:
        if next(turns) % 4 == 2:
            raise StoreError("nothing happened to the storage")
        return take(self, step)

    patch.setattr(Coordinator, "_take_outer_step", planted)


def accept_an_older_base_than_the_rounds(patch: Patch) -> None:
    problem = admission._time_problem

    def planted(state: RunState, c: Contribution, plan: Any) -> str:
        found = problem(state, c, plan)
        return "" if found.startswith("based on version") else found

    patch.setattr(admission, "_time_problem", planted)


def bear_one_outer_step_too_many(patch: Patch) -> None:
    problem = admission._time_problem

    def planted(state: RunState, c: Contribution, plan: Any) -> str:
        patient = replace(state.rules, max_staleness=state.rules.max_staleness + 1)
        return problem(replace(state, rules=patient), c, plan)

    patch.setattr(admission, "_time_problem", planted)


def accept_any_norm(patch: Patch) -> None:
    patch.setattr(reducer, "judge_norm", lambda state, held, norm: Verdict("accepted"))


def weigh_by_the_tokens_that_an_island_claims(patch: Patch) -> None:
    weight = rounds._weight

    def planted(state: RunState, item: Accepted) -> float:
        return item.contribution.metrics.get("tokens", 0.0) or weight(state, item)

    patch.setattr(rounds, "_weight", planted)


def weigh_by_the_steps_that_an_island_claims(patch: Patch) -> None:
    weight = rounds._weight

    def planted(state: RunState, item: Accepted) -> float:
        return weight(state, item) * item.contribution.inner_steps / item.inner_steps

    patch.setattr(rounds, "_weight", planted)


def keep_the_lease_of_who_leaves(patch: Patch) -> None:
    revoke = reducer.revoke

    def planted(state: RunState, island: str, fate: str) -> RunState:
        after = revoke(state, island, fate)
        return replace(after, ledger=state.ledger) if state.members[island].standing == "left" else after

    patch.setattr(reducer, "revoke", planted)


def lose_the_rest_of_an_epoch(patch: Patch) -> None:
    """Where what a restarted coordinator hears of lies in the next epoch."""
    move = DataLedger._move_cursor

    def planted(self: DataLedger, shard: int, epoch: int, position: int) -> DataLedger:
        lost = range(self.cursor(shard)[0], epoch)
        after = move(self, shard, epoch, position)
        return replace(after, returned=tuple(item for item in after.returned if item[0].epoch not in lost))

    patch.setattr(DataLedger, "_move_cursor", planted)


def apply_a_commit_that_is_found_again_twice(patch: Patch) -> None:
    take, check, found = Coordinator._take_outer_step, RunLog._check_own_retry, list[str]()

    def checked(self: RunLog, path: str, data: bytes, fence_epoch: int) -> None:
        check(self, path, data, fence_epoch)
        found.append(path)

    def planted(self: Coordinator, step: Any) -> Any:
        event = take(self, step)
        if found and event:
            found.clear()
            self._replica.apply(step.fragment, torch.from_numpy(self._computed[event.index][1]))
        return event

    patch.setattr(RunLog, "_check_own_retry", checked)
    patch.setattr(Coordinator, "_take_outer_step", planted)


def take_an_older_coordinators_commit_for_its_own(patch: Patch) -> None:
    give_way = RunLog._give_way

    def planted(self: RunLog, path: str, stored: bytes, fence_epoch: int) -> None:
        if Record.from_bytes(stored, path).fence_epoch > fence_epoch:
            give_way(self, path, stored, fence_epoch)

    patch.setattr(RunLog, "_give_way", planted)


def keep_what_comes_again_in_place_of_the_copy(patch: Patch) -> None:
    patch.setattr(Payloads, "hold_the_copy", lambda self, name: None)


STEADY: dict[str, Any] = {"network": {"loss": 0.0, "doubled": 0.0, "late": 0.0}}
DECOUPLED = {"preset": "decoupled", "fragments": 3}
KILLS = {"chance": {"faults": [2, 4], "kinds": ["kill"], "until_s": 12}}
TWO = {
    "faults": [{"freeze": "coordinator", "at_s": 5.0, "for_s": 8.0}, {"usurp": "coordinator", "at_s": 6.0}],
    "chance": {"faults": [2, 3], "kinds": ["usurp"], "until_s": 15},
}
LAGGARD = {
    "recipe": {"sync": {"preset": "async", "max_staleness": 1}},
    "faults": [{"slow": "island-02", "at_s": 0.0, "factor": 4.0, "for_s": 5000.0}],
}
NOBODY = {**STEADY, "faults": [{"leave": f"island-{number:02d}", "at_s": 8.0, "for_s": 60.0} for number in range(3)]}
LOST = {
    **STEADY,
    "recipe": {"islands": 3, "sync": {"grace_s": 200.0}},
    "faults": [
        {"slow": "island-02", "at_s": 0.0, "factor": 4.0, "for_s": 5000.0},
        *({"kill": "island-00", "at_s": at_s} for at_s in (9.0, 22.0, 36.0)),
    ],
}
OVERTAKEN = {  # stopped between its last look at the fence and its commit
    "faults": [
        {"freeze": "coordinator", "point": "before create log/*", "for_s": 3.0},
        {"usurp": "coordinator", "point": "before create log/*"},
    ]
}
ONE_LEAVES = {**STEADY, "faults": [{"leave": "island-01", "at_s": 4.0, "for_s": 60.0}]}
FEW_DATA = {  # fifteen sequences
    "recipe": {"data": {"sequence_length": 400}},
    "faults": [{"kill": "coordinator", "at_s": at_s} for at_s in (4.0, 9.0, 14.0, 19.0)],
}
COMMITTED_AGAIN = {**STEADY, "faults": [{"repeat": "storage", "point": "after create log/*", "skip": 1}]}
SENT_AGAIN = {
    "recipe": {"sync": DECOUPLED},
    "faults": [{"sluggish": "storage", "at_s": 2.0, "for_s": 100.0}],
    "chance": {"faults": [4, 8], "kinds": ["cut", "mute", "deafen"], "until_s": 60},
}


def tampered(how: str, **recipe: Any) -> dict[str, Any]:
    faults = [{"bad_payload": "island-01", "at_s": at_s, "how": how} for at_s in (4.0, 9.0, 14.0)]
    return {**STEADY, "recipe": recipe, "faults": faults}


BUGS: list[tuple[Callable[[Patch], None], dict[str, Any], str, int]] = [
    (accept_without_a_copy, STEADY, "I6", 3),
    (keep_what_is_committed, {"recipe": {"sync": DECOUPLED}}, "I2", 5),
    (sum_in_arrival_order, STEADY, "I6", 5),
    (add_in_arrival_order, {**STEADY, "recipe": {"sync": {"downlink": "float32"}}}, "I6", 5),
    (skip_the_fence_check, TWO, "I5", 40),
    (drop_a_lease, KILLS, "I9", 10),
    (accept_a_stale_base, LAGGARD, "I12", 5),
    (announce_before_the_commit, STEADY, "I1", 3),
    (decay_momentum_without_contributions, NOBODY, "I6", 3),
    (throw_away_what_a_lost_island_had_done, LOST, "I3", 6),
    (let_an_islands_replica_go_wrong, STEADY, "I7", 3),
    (end_the_coordinator_for_no_reason, STEADY, "I16", 3),
    (accept_an_older_base_than_the_rounds, tampered("stale"), "I12", 3),
    (bear_one_outer_step_too_many, LAGGARD, "I12", 5),
    (accept_any_norm, tampered("huge"), "I10", 3),
    (weigh_by_the_tokens_that_an_island_claims, STEADY, "I6", 1),
    (weigh_by_the_tokens_that_an_island_claims, tampered("inflated", sync={"weighting": "tokens"}), "I6", 3),
    (weigh_by_the_steps_that_an_island_claims, tampered("inflated", sync={"weighting": "examples"}), "I6", 3),
    (weigh_by_the_steps_that_an_island_claims, tampered("inflated", sync=DECOUPLED), "I6", 3),
    (keep_the_lease_of_who_leaves, ONE_LEAVES, "I8", 3),
    (lose_the_rest_of_an_epoch, FEW_DATA, "I9", 5),
    (apply_a_commit_that_is_found_again_twice, COMMITTED_AGAIN, "I6", 3),
    (take_an_older_coordinators_commit_for_its_own, OVERTAKEN, "I9", 8),
    (keep_what_comes_again_in_place_of_the_copy, SENT_AGAIN, "I6", 6),
]


@pytest.mark.parametrize(("plant", "body", "invariant", "seeds"), BUGS, ids=[bug[0].__name__ for bug in BUGS])
def test_a_planted_bug_breaks_its_invariant(
    teller: Teller,
    plant: Callable[[Patch], None],
    body: dict[str, Any],
    invariant: str,
    seeds: int,
    monkeypatch: Patch,
) -> None:
    named = Named("planted", Scenario.model_validate(body))
    sound = teller.tell(named, 0)
    assert sound.problem == "", "without the bug it holds"
    plant(monkeypatch)
    found = next((story for seed in range(seeds) if (story := teller.tell(named, seed)).problem), None)
    assert found, f"{seeds} stories, and nobody noticed"
    assert found.problem.startswith(invariant), found.problem
