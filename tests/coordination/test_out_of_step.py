"""Situations where islands do not go in step: outer steps by quorum and by arrival, and what a contribution weighs."""

from dataclasses import replace

import pytest
from toy_world import RULES, TOKENS_PER_SEQUENCE, World, at_work

from diloco_ray.coordination.messages import Inspected, Verdict
from diloco_ray.coordination.rounds import next_look_s

LEASE = RULES.sequences_per_round * TOKENS_PER_SEQUENCE


def by_quorum(*names: str, **changes: object) -> World:
    """A launch interval of 0 unless the test is about it."""
    settings = {"closes": "quorum", "quorum": 1, "max_islands": len(names), "overlap": 1, "launch_interval_s": 0.0}
    return at_work(*names, **{**settings, **changes})


def by_arrival(*names: str, **changes: object) -> World:
    return at_work(*names, **{"closes": "arrival", "max_islands": len(names), **changes})


def at_pace(world: World, step_s: float = 1.0, **speeds: float) -> World:
    """Each island has told how long a step of its takes, and what it told it with is committed."""
    for name in world.islands:
        world.islands[name].step_s = speeds.get(name, step_s)
    world.work()
    if world.state.inbox:
        world.look()
    assert not world.state.inbox
    return world


# ---- quorum ----


def test_a_step_is_taken_when_the_quorum_is_in_and_the_late_enter_the_next():
    world = by_quorum("a", "b", "c", quorum=2)
    world.work("a")
    assert world.state.index == 0
    world.work("b")
    assert world.shares() == [("a", 0), ("b", 0)]
    assert world.log[0].reason == "2 of 3 in"
    assert world.work("c") == [Verdict("accepted")]
    assert world.state.index == 1
    world.work("a")
    assert world.shares() == [("a", 1), ("c", 0)]
    assert [share.base_version for share in world.log[1].shares] == [1, 0]
    assert world.log[1].tokens["expired"] == 0


def test_an_island_goes_on_though_the_others_are_not_in():
    world = by_quorum("a", "b", quorum=2)
    for _ in range(3):
        assert world.work("a") == [Verdict("accepted")]
    assert world.state.index == 0
    world.work("b")
    assert world.shares() == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert world.state.settled == {(0, "a"): (2, "a/2/0"), (0, "b"): (0, "b/0/0")}


def test_one_island_however_often_it_contributes_is_no_quorum_of_two():
    world = by_quorum("a", "b", "c", quorum=2)
    for _ in range(4):
        world.work("a")
        world.pass_time(5.0)
    assert world.state.index == 0


def test_a_quorum_of_more_than_are_left_is_all_that_are_left():
    world = by_quorum("a", "b", "c", quorum=3, min_islands=1)
    world.work("a", "b")
    assert world.state.index == 0
    world.lose("c")
    assert world.shares() == [("a", 0), ("b", 0)]


@pytest.mark.parametrize("ahead", [1, 2])
def test_islands_at_different_places_of_their_rounds_do_not_wait_for_each_other_for_ever(ahead: int):
    """Without overlap each waits for its step, and a quorum of all would be at no fragment. They come together."""
    world = by_quorum("a", "b", quorum=2, overlap=0, num_fragments=3, min_islands=1)
    world.lose("b")
    for fragment in range(ahead):
        world.send("a", fragment)
        world.islands["a"].sent += 1
    world.join("b")
    world.work("a")
    assert (world.state.index, set(world.state.inbox)) == (ahead, {(ahead, 0, "a")})
    world.work("b")
    steps = [(step.fragment, [share.island for share in step.shares]) for step in world.log[ahead:]]
    assert steps == [*((fragment, ["b"]) for fragment in range(ahead)), (ahead, ["a", "b"])]
    assert world.log[ahead].reason == "1 of 2 in; the others wait for steps of other fragments"
    assert world.log[-1].reason == "all 2 live islands in"


def test_an_island_whose_earlier_life_contributed_waits_for_that_step_and_the_others_come_to_it():
    """What it sends under its own lease is in already: it stands still all the same."""
    world = by_quorum("a", "b", "c", quorum=3, overlap=0, num_fragments=3, min_islands=1)
    world.lose("b", "c")
    world.send("a", 0)
    world.islands["a"].sent += 1
    world.join("b", "c")
    world.send("a", 1)
    world.lose("a")
    world.join("a")
    world.work("b", "c")
    assert (world.state.index, set(world.state.inbox)) == (1, {(1, 0, "a"), (0, 0, "b"), (0, 0, "c")})
    world.work("a", "b", "c")
    steps = [(step.fragment, [share.island for share in step.shares]) for step in world.log[1:3]]
    assert steps == [(0, ["b", "c"]), (1, ["a", "b", "c"])]


def test_who_is_on_its_way_to_a_quorum_is_waited_for_though_the_others_are_at_different_places():
    world = by_quorum("a", "b", "c", quorum=3, overlap=0, num_fragments=2, min_islands=1)
    world.lose("b", "c")
    world.send("a", 0)
    world.islands["a"].sent += 1
    world.join("b", "c")
    world.work("a", "b")
    assert world.state.index == 1
    world.work("c")
    assert (world.log[-1].fragment, world.shares()) == (0, [("b", 0), ("c", 0)])
    world.work("b", "c")
    assert (world.log[-1].fragment, world.shares()) == (1, [("a", 0), ("b", 0), ("c", 0)])
    assert world.log[-1].reason == "all 3 live islands in"


def test_what_a_lost_island_had_contributed_enters_the_next_step():
    world = by_quorum("a", "b", "c", quorum=2)
    world.work("a")
    world.lose("a")
    world.work("b")
    assert world.shares() == [("a", 0), ("b", 0)]


def test_once_the_quorum_is_in_late_ones_are_waited_for_no_longer_than_the_overlap_hides():
    world = at_pace(by_quorum("a", "b", overlap=2, grace_share=0.5, inner_steps_per_round=10, grace_s=100.0), 4.0)
    steps, began_s = world.state.index, world.now_s
    world.work("a")
    grace_s = world.state.pace.grace_s(2, 0.5, 100.0)
    assert 0.0 < grace_s <= 0.5 * 2 * 4.0
    assert next_look_s(world.state) == began_s + grace_s
    world.pass_time(grace_s - 0.01)
    assert world.state.index == steps
    world.pass_time(0.01)
    assert world.state.index == steps + 1
    assert world.shares() == [("a", 1)]


def test_grace_is_never_longer_than_the_recipe_allows():
    world = at_pace(by_quorum("a", "b", overlap=2, inner_steps_per_round=10, grace_s=0.25), 4.0)
    world.work("a")
    assert next_look_s(world.state) == world.now_s + 0.25


def test_when_every_island_is_in_nobody_waits_for_the_grace_window():
    world = at_pace(by_quorum("a", "b", overlap=2, inner_steps_per_round=10), 4.0)
    steps = world.state.index
    world.work("a")
    assert world.state.index == steps
    world.work("b")
    assert world.state.index == steps + 1
    assert world.log[-1].reason == "all 2 live islands in"


def test_a_contribution_that_is_being_inspected_when_the_grace_window_ends_is_waited_for():
    world = by_quorum("a", "b", "c", quorum=1)
    world.held = True
    world.send("a")
    world.send("b")
    world.run_job()
    assert not world.state.stepping
    world.run_job()
    assert world.state.stepping == {0: ((0, 0, "a"), (0, 0, "b"))}


def test_the_wait_for_a_quorum_ends_with_the_quorum_not_with_the_last_that_a_step_takes_in():
    world = by_quorum("a", "b", "c", quorum=2, launch_interval_s=50.0)
    world.work("a", "b")
    assert world.state.pace.quorum_s == 0.0
    world.work("c")
    world.pass_time(20.0)
    world.work("a")
    world.pass_time(20.0)
    world.work("b")
    world.pass_time(10.0)
    assert world.shares() == [("a", 1), ("b", 1), ("c", 0)]
    assert world.state.pace.quorum_s == pytest.approx(0.3 * 20.0)


def test_steps_of_one_fragment_keep_their_interval():
    world = by_quorum("a", "b", launch_interval_s=30.0)
    world.work("a", "b")
    assert world.shares() == [("a", 0)]
    assert next_look_s(world.state) == 30.0
    world.work("a", "b")
    world.pass_time(29.0)
    assert world.state.index == 1
    world.look()
    assert world.shares() == [("a", 1), ("b", 0), ("b", 1)]


def test_the_interval_is_a_round_of_the_fastest_island_where_the_recipe_gives_none():
    world = at_pace(by_quorum("a", "b", launch_interval_s=None), 7.0, a=3.0)
    steps, launched_s = world.state.index, world.state.pace.launched_s[0]
    world.work("a", "b")
    assert next_look_s(world.state) == pytest.approx(launched_s + 2 * 3.0)
    assert world.state.index == steps
    world.look()
    assert world.state.index == steps + 1


def test_the_interval_has_room_for_all_that_an_island_does_in_a_round():
    """Where steps take less than sending and merging, each island's contribution would be a step of its own."""
    world = by_quorum("a", "b", launch_interval_s=None)
    world.islands["a"].other_s = world.islands["b"].other_s = 10.0
    world = at_pace(world, 7.0, a=3.0)
    launched_s = world.state.pace.launched_s[0]
    world.work("a", "b")
    assert next_look_s(world.state) == pytest.approx(launched_s + 2 * 3.0 + 10.0)


def test_fragments_have_intervals_and_quorums_of_their_own():
    world = by_quorum("a", "b", num_fragments=2, quorum=2)
    world.fetch_plan()
    world.send("a", 0)
    world.islands["a"].sent = 1
    world.send("b", 0)
    world.islands["b"].sent = 1
    assert world.state.versions == (1, 0)
    world.work("a")
    world.send("a", 0) if world.islands["a"].plan else None
    assert world.state.versions == (1, 0)
    world.work("b")
    assert world.state.versions == (1, 1)
    assert [bool(step.shares[0].spent) for step in world.log] == [False, True]


def test_a_lease_is_spent_with_the_fragment_that_closes_it_and_what_comes_for_it_later_is_refused():
    world = by_quorum("a", "b", num_fragments=2)
    late = world.islands["a"].contribution(0)
    assert world.send("a", 1) == Verdict("accepted")
    assert world.state.versions == (0, 1)
    assert world.submit(late).reason == f"lease: {late.lease_id} is not held by a"


def test_the_run_ends_when_as_much_is_trained_on_as_all_islands_do_in_its_rounds():
    world = by_quorum("fast", "slow", num_rounds=3, quorum=1)
    for lease in range(1, 6):
        world.work("fast")
        assert world.state.round == world.log[-1].round == lease // 2
        assert world.end is None
    assert [close.round for close in world.closed] == [1, 2]
    world.work("slow")
    assert world.end is not None
    assert (world.end.state, world.end.reason) == ("succeeded", "3 rounds done")
    assert [(close.round, close.snapshot) for close in world.closed] == [(1, False), (2, False), (3, True)]
    assert world.log[-1].tokens["committed"] == 3 * 2 * LEASE


def test_a_step_that_goes_past_the_last_round_ends_the_run_at_its_last_round():
    world = by_quorum("a", "b", num_rounds=1, quorum=2)
    for _ in range(4):
        world.work("a")
    world.work("b")
    assert world.log[-1].tokens["committed"] == 5 * LEASE
    assert (world.log[-1].round, world.state.round) == (1, 1)
    assert world.state.reason == world.recovered().reason == "1 rounds done"


def test_a_round_is_closed_with_the_islands_that_contributed_to_it():
    world = by_quorum("a", "b", quorum=2)
    world.work("a", "a")
    world.work("b")
    assert [(c.round, c.alive, c.contributed, c.applied) for c in world.closed] == [(1, 2, 2, 2)]


def test_islands_begin_when_the_least_are_there_and_a_joiner_begins_at_once():
    world = World(replace(RULES, closes="quorum", quorum=1))
    world.join("a")
    assert world.at_work == ()
    world.join("b")
    assert world.at_work == ("a", "b")
    world.join("c")
    assert world.at_work == ("a", "b", "c")


# ---- arrival ----


def test_every_arrival_is_a_step_of_its_own():
    world = by_arrival("a", "b")
    world.work("a", "b", "a")
    assert [world.shares(index) for index in range(3)] == [[("a", 0)], [("b", 0)], [("a", 1)]]
    assert [step.reason for step in world.log] == ["a is in", "b is in", "a is in"]
    assert [step.shares[0].base_version for step in world.log] == [0, 0, 2]
    assert next_look_s(world.state) is None


def test_what_arrives_while_a_step_is_taken_is_stepped_earliest_first():
    world = by_arrival("a", "b", "c")
    world.held = True
    late = {name: world.islands[name].contribution(0) for name in "abc"}
    for name in "cba":
        world.send(name)
    for now_s, name in enumerate("cba"):
        world.receive(Inspected(float(now_s), late[name], 1.0))
    world.jobs = type(world.jobs)(job for job in world.jobs if job in world.taken)
    world.run_jobs()
    assert [world.shares(index) for index in range(3)] == [[("c", 0)], [("b", 0)], [("a", 0)]]


def test_arrivals_of_the_same_moment_are_stepped_in_island_order():
    world = by_arrival("a", "b", "c")
    world.held = True
    for name in "cba":
        world.send(name)
    world.run_jobs()
    assert [world.shares(index) for index in range(3)] == [[("c", 0)], [("a", 0)], [("b", 0)]]


def test_a_lone_island_gets_on_though_a_run_begins_with_more():
    world = by_arrival("a", "b", num_rounds=2)
    world.vanish("b")
    for _ in range(4):
        assert world.work("a") == [Verdict("accepted")]
    assert world.state.phase == "succeeded"


def test_inner_steps_go_by_speed():
    world = by_arrival("fast", "slow", steps_by_speed=True, inner_steps_per_round=8)
    at_pace(world, fast=1.0, slow=2.5)
    world.work()
    assert {name: world.plan(name).inner_steps for name in ("fast", "slow")} == {"fast": 8, "slow": 3}
    assert sum(r.num_sequences for r in world.ranges("slow")) == 3 * RULES.sequences_per_inner_step
    world.lose("fast")
    world.work("slow")
    assert world.plan("slow").inner_steps == 8


def test_first_inner_steps_go_on_where_the_islands_mean_is():
    world = by_arrival("a", "b")
    assert world.plan("a").first_inner_step == 0
    world.work("a", "a", "a", "b")
    assert world.plan("a").first_inner_step == 2 * 2 // 2 + 2  # two leases were committed, one was in hand
    assert world.plan("b").first_inner_step == 3 * 2 // 2 + 2


# ---- staleness ----


def test_a_contribution_may_lag_as_far_as_the_recipe_allows():
    world = by_arrival("a", "slow", max_staleness=2)
    world.work("a", "a")
    assert world.work("slow") == [Verdict("accepted")]
    assert world.log[-1].shares[0].base_version == world.log[-1].base_version - 2


@pytest.mark.parametrize("overlap", [0, 2])
def test_an_island_that_lags_too_far_begins_afresh_with_its_data(overlap: int):
    world = by_arrival("a", "slow", max_staleness=2, overlap=overlap)
    held = world.ranges("slow")
    world.work("a", "a", "a")
    late = world.islands["slow"].contribution(0)
    assert world.send("slow").reason == "stale: its base is 3 outer steps old, of 2"
    assert world.standing("slow") == "alive"
    assert world.state.members["slow"].strikes == 0
    assert world.state.ledger.account()["expired"] == (2 if overlap else 1) * LEASE
    assert world.ranges("slow") == held
    assert world.plan("slow").round == 0
    assert world.plan("slow").lease_id != late.lease_id
    assert world.submit(late).reason.startswith("stale")
    assert world.state.ledger.account()["expired"] == (2 if overlap else 1) * LEASE
    assert world.work("slow") == [Verdict("accepted")]
    assert world.shares() == [("slow", 0)]


@pytest.mark.parametrize(
    "lie", [{"run_id": "other"}, {"protocol_version": 99}, {"incarnation": 0}, {"lease_id": "9.9"}]
)
def test_what_is_not_of_the_work_in_hand_does_not_end_it(lie: dict[str, object]):
    world = by_arrival("a", "slow", max_staleness=2)
    plan = world.plan("slow")
    world.work("a", "a", "a")
    assert world.submit(replace(world.islands["slow"].contribution(0), **lie)).status == "rejected"
    assert world.plan("slow") == plan


# ---- strikes and losses with work in hand ----


def test_a_bad_payload_voids_both_plans_in_hand():
    world = by_quorum("a", "b", quorum=2)
    held = [world.ranges("a", 0), world.ranges("a", 1)]
    assert world.send("a", payload="nan").reason == "values: not finite"
    assert world.state.ledger.account()["rejected"] == 2 * LEASE
    assert [world.ranges("a", 0), world.ranges("a", 1)] == held
    assert world.rounds("a") == [0, 1]
    assert world.work("a") == [Verdict("accepted")]


def test_a_bad_payload_leaves_what_was_accepted_before():
    world = by_quorum("a", "b", quorum=2)
    world.work("a")
    world.fetch_plan("a")
    assert world.rounds("a") == [0, 1, 2]
    assert world.send("a", payload="nan").status == "rejected"
    assert world.rounds("a") == [0, 1, 2]
    assert world.state.ledger.account()["rejected"] == 2 * LEASE
    world.work("b")
    assert world.shares() == [("a", 0), ("b", 0)]


def test_a_lost_island_comes_back_to_the_rounds_it_had_not_contributed_to():
    world = by_quorum("a", "b", "c", quorum=3)
    world.work("a")
    held = [world.ranges("a", 1), world.ranges("a", 2)]
    world.lose("a")
    assert world.rounds("a") == [0]
    world.join("a")
    assert world.rounds("a") == [0, 1, 2]
    assert [world.ranges("a", 1), world.ranges("a", 2)] == held
    world.work("b", "c", "a")
    assert world.shares() == [("a", 0), ("b", 0), ("c", 0)]


# ---- coordinator restarts ----


def test_after_a_restart_each_goes_on_in_rounds_of_its_own():
    """The run has rounds by tokens; an island's own count may be ahead of it or behind."""
    world = by_quorum("fast", "slow", num_rounds=100)
    for _ in range(7):
        world.work("fast")
    world.work("slow")
    world.fetch_plan()
    held = {name: world.islands[name].held for name in world.islands}
    assert [plan.round for plan in held["fast"]] == [7, 8]
    assert [plan.round for plan in held["slow"]] == [1, 2]
    assert world.state.round == 4
    world.restart_coordinator()
    world.beat()
    assert {name: world.state.plans[name] for name in held} == held
    assert world.work() == [Verdict("accepted")] * 2


def test_after_a_restart_what_was_accepted_is_sent_again_and_committed_once():
    world = by_quorum("a", "b", quorum=2)
    world.work("a", "a")
    assert sorted(world.state.inbox) == [(0, 0, "a"), (0, 1, "a")]
    world.restart_coordinator()
    world.beat()
    assert sorted(world.state.inbox) == [(0, 0, "a"), (0, 1, "a")]
    assert world.rounds("a") == [0, 1, 2, 3]
    world.work("b")
    assert world.shares() == [("a", 0), ("a", 1), ("b", 0)]


def test_after_a_restart_a_new_process_goes_on_after_its_last_committed_round():
    world = by_arrival("a", "b")
    world.work("a", "a", "b")
    world.lose("a")
    world.restart_coordinator()
    world.join("a")
    world.beat("b")
    assert world.rounds("a") == [2]
    assert world.rounds("b") == [1]


def test_work_in_hand_that_does_not_follow_what_is_committed_is_void():
    world = by_arrival("a", "b")
    world.work("a")
    world.fetch_plan("a")
    (held,) = world.islands["a"].held
    for changes in ({"round": 0}, {"round": 2}, {"round": 10**12}, {"inner_steps": 9}, {"silent_steps": 2}):
        world.islands["a"].plans = [replace(held, **changes)]
        world.start_coordinator("a", "b")
        world.hello("a")
        assert world.at_work == (), changes
        *_, why, now = world.notes
        assert why == f"a: work on round {world.islands['a'].held[0].round + 1} is void; it gets a new plan"
        assert now == "1 of at least 2 islands alive; waiting up to 100 s"


@pytest.mark.parametrize("closes", ["quorum", "arrival"])
def test_recovery_from_the_log_equals_the_live_state(closes: str):
    fragments = 2 if closes == "quorum" else 1
    world = at_work(
        "a", "b", "c", closes=closes, quorum=1, num_fragments=fragments, launch_interval_s=0.0, num_rounds=5
    )
    for turn in ("abc", "ab", "aa", "cab", "b"):
        world.work(*turn)
    live, recovered = world.state, world.recovered()
    for same in ("index", "round", "versions", "settled", "norms"):
        assert getattr(live, same) == getattr(recovered, same), same
    assert recovered.ledger.account()["committed"] == live.ledger.account()["committed"]
    assert {name: recovered.num_plans[name] for name in "abc"} == {
        name: live.settled[fragments - 1, name][0] + 1 for name in "abc"
    }


# ---- messages that overtake each other ----


def test_what_overtakes_an_islands_earlier_contribution_waits_for_it():
    world = by_arrival("a", "b", overlap=2)
    world.fetch_plan("a")
    first = world.islands["a"].contribution(0)
    world.islands["a"].plans = world.islands["a"].plans[1:]
    assert world.send("a") == Verdict("accepted")
    assert world.state.index == 0
    assert world.submit(first) == Verdict("accepted")
    assert [world.shares(index) for index in range(2)] == [[("a", 0)], [("a", 1)]]


def test_a_fragment_that_was_overtaken_does_not_make_its_successor_be_forgotten():
    world = by_quorum("a", "b", num_fragments=2)
    world.fetch_plan("a")
    earlier = world.islands["a"].contribution(0)
    later = replace(earlier, round=1, lease_id=world.plan("a", 1).lease_id, payload_sha256="later")
    world.held = True
    world.submit(later)
    world.run_job()
    assert world.state.stepping
    world.submit(earlier)
    world.held = False
    world.run_jobs()
    assert [world.shares(index) for index in range(2)] == [[("a", 1)], [("a", 0)]]
    assert world.submit(later) == Verdict("committed")
    assert world.recovered().settled == world.state.settled


# ---- weights ----


def test_weight_is_uniform_unless_the_recipe_says_otherwise():
    world = by_quorum("a", "b", quorum=2, steps_by_speed=True)
    world.work()
    assert [share.weight for share in world.log[0].shares] == [1.0, 1.0]


def weights(world: World, claimed: int, weighting: str) -> float:
    """Of an island that claims so many inner steps."""
    c = replace(world.islands["a"].contribution(0), inner_steps=claimed)
    world.submit(c)
    return world.log[-1].shares[0].weight


@pytest.mark.parametrize(
    ("claimed", "weight"), [(8, 1.0), (4, 0.5), (2, 0.25), (1, 0.125), (0, 0.125), (-5, 0.125), (10**9, 1.0)]
)
def test_tokens_squared_per_step_can_only_be_made_lighter_by_what_an_island_claims(claimed: int, weight: float):
    """Tokens times tokens a step: the lease's, for the share of its steps since the fragment was merged."""
    world = by_arrival("a", "b", weighting="tokens_squared_per_step", inner_steps_per_round=8)
    tokens = 8 * RULES.sequences_per_inner_step * TOKENS_PER_SEQUENCE
    assert weights(world, claimed, "") == pytest.approx(weight * tokens**2 / 8)


def test_tokens_squared_per_step_of_islands_that_take_fewer_steps_is_less():
    world = by_arrival(
        "fast", "slow", weighting="tokens_squared_per_step", steps_by_speed=True, inner_steps_per_round=8
    )
    at_pace(world, fast=1.0, slow=2.0)
    world.work()
    fast, slow = (world.log[index].shares[0].weight for index in (-2, -1))
    world.work()
    fast, slow = (world.log[index].shares[0].weight for index in (-2, -1))
    assert slow == pytest.approx(fast / 2)


def test_weight_by_tokens_is_the_leases_whatever_an_island_claims():
    world = by_arrival("a", "b", weighting="tokens")
    assert weights(world, 1, "") == LEASE


def test_weight_by_examples_is_the_size_of_the_islands_shard():
    world = World(replace(RULES, weighting="examples"), shard_sizes=(40, 24))
    world.start_coordinator("island-00", "island-01", "island-02")
    world.join("island-00", "island-01", "island-02")
    world.work()
    assert [share.weight for share in world.log[0].shares] == [40.0, 24.0, 40.0]


def test_when_the_inbox_is_full_each_island_has_one_contribution_in_and_the_quorum_is_reached():
    world = by_quorum("a", "b", quorum=2, max_inbox_bytes=0)
    assert world.work("a") == [Verdict("accepted")]
    for _ in range(2):  # what it had in hand
        assert [verdict.status for verdict in world.work("a")] == ["full"]
    assert world.work("a") == [], "an island whose contributions wait is given no more work"
    assert world.work("b") == [Verdict("accepted")]
    assert world.shares() == [("a", 0), ("b", 0)]
    world.work("b")
    world.fetch_plan("a")
    assert world.shares() == [("a", 1), ("b", 1)]
