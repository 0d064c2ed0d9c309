"""Situations of a run, each told by its name, played through the reducer in a toy world."""

from dataclasses import replace

import pytest
from toy_world import RULES, TOKENS_PER_SEQUENCE, World, at_work

from diloco_ray.coordination.messages import Committed, Inspected, Joined, Lost, Submitted, Tick, Verdict
from diloco_ray.coordination.state import RunState, plan_for

# ---- opening ----


def test_a_round_opens_when_all_that_are_expected_have_joined():
    world = World()
    world.start_coordinator("a", "b", "c")
    world.join("a", "b")
    assert world.at_work == ()
    world.join("c")
    assert world.at_work == ("a", "b", "c")


def test_a_round_opens_without_an_expected_island_whose_time_to_join_ran_out():
    world = World()
    world.start_coordinator("a", "b", "c", within_s=20.0)
    world.join("a", "b")
    world.pass_time(25.0)
    assert world.at_work == ("a", "b")
    assert world.standing("c") == "absent"


def test_plans_lease_data_in_island_order_whatever_the_order_of_joining():
    one, other = World(), World()
    for world, names in ((one, "abc"), (other, "cab")):
        world.start_coordinator("a", "b", "c")
        world.join(*names)
    assert {n: one.ranges(n) for n in "abc"} == {n: other.ranges(n) for n in "abc"}


def test_an_island_that_joins_in_an_open_round_starts_with_the_next():
    world = at_work("a", "b")
    world.join("c")
    assert world.at_work == ("a", "b")
    world.work("a", "b")
    assert world.state.round == 1
    assert world.at_work == ("a", "b", "c")


def test_an_island_that_joins_in_a_round_with_too_few_starts_at_once():
    world = at_work("a", "b")
    world.lose("b")
    world.join("c")
    assert world.at_work == ("a", "c")
    world.work()
    assert world.state.round == 1


def test_a_hello_that_is_said_twice_changes_nothing():
    world = at_work("a", "b")
    plan = world.plan("a")
    process = world.islands["a"].process
    world.receive(Joined(0.0, "a", process, 0, 1, "node"))  # the answer to the first got lost
    world.receive(Joined(0.0, "a", process, 1, 1, "node"))
    assert plan_for(world.state, "a", 1, "") == plan
    assert world.work() == [Verdict("accepted"), Verdict("accepted")]


# ---- closing ----


def test_a_round_closes_when_all_live_islands_are_in():
    world = at_work("a", "b", "c")
    world.work("a", "b")
    assert world.state.round == 0
    world.work("c")
    assert world.state.round == 1
    assert world.log[0].reason == "all 3 live islands in"
    assert [share.island for share in world.log[0].shares] == ["a", "b", "c"]
    assert (world.closed[0].alive, world.closed[0].contributed, world.closed[0].applied) == (3, 3, 3)


def test_a_round_closes_without_an_island_that_is_lost():
    world = at_work("a", "b", "c")
    world.work("a", "b")
    world.lose("c")
    assert world.state.round == 1
    assert [share.island for share in world.log[0].shares] == ["a", "b"]


def test_what_a_lost_island_had_contributed_stays_in():
    world = at_work("a", "b", "c")
    world.work("c")
    world.lose("c")
    world.work("a", "b")
    assert [share.island for share in world.log[0].shares] == ["a", "b", "c"]


def test_a_lost_islands_ranges_come_back_to_it_first():
    world = at_work("a", "b", "c")
    held = world.ranges("c")
    world.lose("c")
    world.join("c")
    assert world.at_work == ("a", "b")
    world.work()
    assert world.ranges("c") == held
    world.lose("a", "b", "c")
    world.join("c", "b")
    assert world.ranges("c") == held


def test_grace_closes_a_round_without_the_straggler_whose_lease_expires_and_whose_late_contribution_is_stale():
    world = at_work("a", "b", "slow")
    late = world.islands["slow"].contribution(0)
    held = world.ranges("slow")
    world.work("a", "b")
    world.pass_time(9.0)
    assert world.state.round == 0
    world.pass_time(1.0)
    assert world.state.round == 1
    assert world.log[0].reason == "2 of 3 in; slow overran 10 s"
    assert world.log[0].tokens["expired"] == 4 * TOKENS_PER_SEQUENCE
    assert world.submit(late).reason == "stale: for round 1, fragment 0 has closed it"
    assert world.ranges("slow") == held


def test_grace_runs_from_the_quorum():
    world = at_work("a", "b", "c", "d", quorum=3)
    world.work("a", "b")
    world.pass_time(100.0)
    assert world.state.round == 0
    world.work("c")
    world.pass_time(9.0)
    assert world.state.round == 0
    world.pass_time(2.0)
    assert world.state.round == 1


def test_grace_that_a_struck_contribution_had_started_starts_again():
    world = at_work("a", "b", "c", num_fragments=2)
    world.send("a", 0)
    world.send("b", 0)
    world.pass_time(8.0)
    world.send("b", 1, "nan")
    world.fetch_plan("b")
    world.send("b", 0)
    world.pass_time(5.0)
    assert world.state.versions == (0, 0)
    world.pass_time(5.0)
    assert world.state.versions == (1, 0)


def test_an_island_that_hangs_for_ever_is_replaced_by_one_that_is_idle():
    world = at_work("a", "hung")
    world.join("c")
    world.work("a")
    world.pass_time(100.0)
    assert world.at_work == ("a", "hung")
    world.hello("c")
    world.pass_time(1.0)
    assert world.at_work == ("a", "c", "hung")
    world.work("c")
    world.pass_time(11.0)
    assert [share.island for share in world.log[0].shares] == ["a", "c"]


def test_a_silent_island_is_lost_and_its_work_resumed_when_it_is_heard_again():
    world = at_work("a", "b", "c")
    world.pass_time(35.0, beating=["a", "b"])
    assert world.standing("c") == "lost"
    assert world.at_work == ("a", "b")
    held = world.islands["c"].held
    assert held
    world.beat("c")
    assert world.state.plans["c"] == held
    world.work()
    assert [share.island for share in world.log[0].shares] == ["a", "b", "c"]


def test_the_run_ends_after_its_last_round_with_a_snapshot():
    world = at_work("a", "b", num_rounds=2)
    world.work()
    world.work()
    assert world.end is not None
    assert (world.end.state, world.end.reason) == ("succeeded", "2 rounds done")
    assert [close.snapshot for close in world.closed] == [False, True]
    assert world.at_work == ()


# ---- contributions ----


def test_a_duplicate_gets_the_same_answer_before_and_after_the_commit():
    world = at_work("a", "b")
    mine = world.islands["a"].contribution(0)
    assert world.submit(mine) == Verdict("accepted")
    assert world.submit(mine) == Verdict("accepted")
    world.work("b")
    assert world.submit(mine) == Verdict("committed")
    assert len(world.log) == 1


def test_a_duplicate_that_comes_while_the_first_is_inspected_waits_with_it():
    world = at_work("a", "b")
    world.held = True
    mine = world.islands["a"].contribution(0)
    assert world.submit(mine) == Verdict("pending")
    assert world.submit(mine) == Verdict("pending")
    assert len(world.jobs) == 1


def test_another_payload_with_the_same_key_is_a_conflict():
    world = at_work("a", "b")
    mine = world.islands["a"].contribution(0)
    world.submit(mine)
    assert world.submit(replace(mine, payload_sha256="other")).reason.startswith("conflict")
    world.work("b")
    assert world.submit(replace(mine, payload_sha256="other")).reason.startswith("conflict")
    assert world.log[0].shares[0].payload_sha256 == mine.payload_sha256


def test_a_second_look_at_an_accepted_contribution_cannot_take_it_back():
    world = at_work("a", "b")
    mine = world.islands["a"].contribution(0)
    world.submit(mine)
    world.receive(Inspected(0.0, mine, 1.0, "digest: the second copy was torn"))
    assert world.verdicts[mine.key, mine.payload_sha256] == Verdict("accepted")
    world.work("b")
    world.receive(Inspected(0.0, mine, 1.0))
    assert world.verdicts[mine.key, mine.payload_sha256] == Verdict("committed")


def test_a_contribution_whose_island_is_lost_while_it_is_inspected_may_be_sent_again():
    world = at_work("a", "b")
    world.held = True
    mine = world.islands["a"].contribution(0)
    world.submit(mine)
    world.receive(Lost(0.0, "a", "", "silent"))
    world.run_job()
    assert world.verdicts[mine.key, mine.payload_sha256] == Verdict("unknown")
    world.hello("a")
    assert world.submit(mine) == Verdict("pending")
    world.run_job()
    assert world.verdicts[mine.key, mine.payload_sha256] == Verdict("accepted")


def test_a_zombie_incarnation_is_fenced():
    world = at_work("a", "b")
    zombie = world.islands["a"]
    late = zombie.contribution(0)
    world.join("a")
    assert world.islands["a"].incarnation == 2
    assert world.submit(late).reason == "fenced: incarnation 1 of a is not the current one"
    world.receive(Joined(0.0, "a", zombie.process, zombie.incarnation, 1, "node", zombie.held))
    assert world.state.members["a"].process == world.islands["a"].process


def test_the_death_of_an_older_process_does_not_touch_its_successor():
    world = at_work("a", "b")
    old = world.islands["a"].process
    world.join("a")
    world.receive(Lost(0.0, "a", old, "killed"))
    assert world.standing("a") == "alive"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": "other"}, "foreign"),
        ({"protocol_version": 99}, "protocol"),
        ({"fragment": 1}, "schema: fragment 1 of 1"),
        ({"fragment": -1}, "schema: fragment -1 of 1"),
        ({"base_version": 1}, "stale: based on version 1, fragment 0 is at 0"),
        ({"base_version": -1}, "stale: based on version -1, fragment 0 is at 0"),
        ({"round": 1}, "stale: based on version 0, round 2 begins at 1"),
        ({"round": -1}, "schema: round 0"),
        ({"round": -1, "payload_sha256": ""}, "schema: round 0"),
        ({"lease_id": "2.2"}, "lease: 2.2 is not held by a"),
        ({"codec": "float32"}, "schema: 100 bytes of float32 where 100 bytes of int8 belong"),
        ({"payload_bytes": 10**12}, "schema: 1000000000000 bytes"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_with_its_reason(changes: dict[str, object], reason: str):
    world = at_work("a", "b")
    verdict = world.submit(replace(world.islands["a"].contribution(0), **changes))
    assert verdict.status == "rejected"
    assert verdict.reason.startswith(reason)
    assert world.state.inbox == {}


def test_a_contribution_to_a_run_that_is_over_is_refused():
    world = at_work("a", "b", num_rounds=1)
    late = replace(world.islands["a"].contribution(0), round=1)
    world.work()
    assert world.submit(late).reason == "over: the run has succeeded"


def test_a_bad_payload_costs_the_island_its_work_and_it_gets_the_same_data_again():
    world = at_work("a", "b")
    held = world.ranges("a")
    assert world.send("a", payload="nan").reason == "values: not finite"
    assert world.ranges("a") == held
    assert world.state.ledger.account()["rejected"] == 4 * TOKENS_PER_SEQUENCE
    assert world.work() == [Verdict("accepted"), Verdict("accepted")]
    assert world.state.members["a"].strikes == 0


@pytest.mark.parametrize("codec", ["int8", "float32"])
def test_three_strikes_quarantine_an_island_and_the_others_go_on(codec: str):
    world = at_work("a", "b", "bad")
    for attempt in range(3):
        island = world.islands["bad"]
        world.fetch_plan("bad")
        verdict = world.submit(replace(island.contribution(0, f"nan {attempt}"), codec=codec))
        assert verdict.status == "rejected"
    assert world.standing("bad") == "quarantined"
    world.join("bad")
    assert world.islands["bad"].fenced
    world.work("a", "b")
    assert world.state.round == 1


def test_a_run_that_quarantine_leaves_with_too_few_islands_fails_at_once_and_says_why():
    world = at_work("a", "b", "bad", min_islands=3, max_islands=3)
    for attempt in range(3):
        world.fetch_plan("bad")
        world.submit(world.islands["bad"].contribution(0, f"nan {attempt}"))
    assert world.state.phase == "failed"
    assert "at least 3 of 3: bad is quarantined after 3 bad payloads in a row: values" in world.state.reason


def test_a_reason_names_only_the_beginning_of_what_was_sent():
    world = at_work("a", "b")
    for long in ({"run_id": "x" * 10**6}, {"codec": "y" * 10**6}):
        assert len(world.submit(replace(world.islands["a"].contribution(0), **long)).reason) == 500


def test_a_norm_far_above_the_median_is_refused():
    world = at_work("a", "b", "c")
    world.send("a", payload="norm 1.0")
    world.send("b", payload="norm 3.0")
    assert world.send("c", payload="norm 201.0").reason == "norm: 201 is more than 100 x the running median 2"
    world.fetch_plan("c")
    assert world.send("c", payload="norm 199.0") == Verdict("accepted")
    assert world.state.norms == {0: (1.0, 3.0, 199.0)}


def test_a_first_norm_is_measured_by_what_inner_steps_can_do():
    world = at_work("a", "b", "c", longest=(5.0,))
    reason = world.send("a", payload="norm 5.1").reason
    assert reason == "norm: 5.1 is more than 5, which 2 inner steps do not exceed"
    world.fetch_plan("a")
    assert world.send("a", payload="norm 5.0") == Verdict("accepted")


def test_after_a_first_norm_that_is_far_too_small_honest_ones_are_accepted():
    """Nothing but the first one is there to compare them with; nobody is to be struck for its fault."""
    world = at_work("a", "b", "c", longest=(5.0,))
    for island, norm in (("a", 1e-9), ("b", 1.0), ("c", 4.0)):
        assert world.send(island, payload=f"norm {norm}") == Verdict("accepted")


def test_once_enough_is_committed_the_median_alone_decides():
    world = at_work("a", "b", longest=(5000.0,))
    world.state = replace(world.state, norms={0: (4.0,) * 7})
    assert world.send("a", payload="norm 401.0") == Verdict("accepted")
    world = at_work("a", "b", longest=(5000.0,))
    world.state = replace(world.state, norms={0: (4.0,) * 8})
    assert world.send("a", payload="norm 401.0").reason == "norm: 401 is more than 100 x the running median 4"


def test_a_norm_that_is_usual_is_accepted_though_no_inner_steps_could_make_it():
    """With error feedback, what was left out of some rounds may come in one."""
    world = at_work("a", "b", longest=(5.0,))
    world.state = replace(world.state, norms={0: (4.0, 4.0)})
    assert world.send("a", payload="norm 300.0") == Verdict("accepted")
    reason = world.send("b", payload="norm 1e6").reason
    assert reason == "norm: 1e+06 is more than 100 x the running median 4 and than 5, which 2 inner steps do not exceed"


@pytest.mark.parametrize("norm", ["nan", "inf"])
def test_a_norm_that_is_no_number_is_refused(norm: str):
    world = at_work("a", "b")
    assert world.send("a", payload=f"norm {norm}").reason == f"values: the norm of the outer gradient is {norm}"


def test_weights_come_from_the_lease():
    world = at_work("a", "b", weighting="tokens")
    world.work()
    assert [share.weight for share in world.log[0].shares] == [4.0 * TOKENS_PER_SEQUENCE] * 2


def test_a_commit_that_is_told_twice_counts_once():
    world = at_work("a", "b")
    world.work()
    state = world.state
    world.receive(Committed(0.0, 0, 1, 1))
    assert world.state == state


# ---- waiting ----


def test_a_run_that_gathers_says_how_many_are_there_by_now():
    world = World()
    world.start_coordinator("a", "b", "c")
    world.pass_time(25.0)
    assert world.state.phase == "gathering"
    assert world.state.reason == "0 of at least 2 islands alive; waiting up to 100 s"
    world.join("b")
    assert world.state.reason == "1 of at least 2 islands alive; waiting up to 100 s"
    world.join("c")
    assert (world.state.phase, world.state.reason) == ("training", "")


def test_a_run_with_too_few_islands_waits_and_goes_on_when_they_are_back():
    world = at_work("a", "b")
    world.lose("b")
    assert (world.state.phase, world.state.reason) == ("waiting", "1 of at least 2 islands alive; waiting up to 100 s")
    world.pass_time(90.0)
    world.join("b")
    assert (world.state.phase, world.state.reason) == ("training", "")
    world.work()
    assert world.state.round == 1


def test_a_run_that_waits_too_long_fails_and_says_who_is_missing():
    world = World()
    world.start_coordinator("a", "b", "c")
    world.join("a", "b")
    world.pass_time(25.0)
    world.lose("b")
    world.pass_time(110.0)
    assert world.end is not None
    assert world.end.state == "failed"
    assert world.end.reason == (
        "1 of at least 2 islands alive after 100 s; missing: b (lost: killed), c (absent: did not join in time)"
    )


def test_nothing_is_decided_any_more_when_the_run_has_failed():
    world = at_work("a", "b")
    world.held = True
    world.send("a", payload="nan")
    world.vanish("b")
    world.pass_time(140.0)
    state = world.state
    assert state.phase == "failed"
    world.run_jobs()
    world.receive(Tick(1000.0))
    assert world.state == state


def test_a_run_that_nobody_joins_fails():
    world = World()
    for now_s in (0.0, 101.0):
        world.receive(Tick(now_s))
    assert world.end is not None
    assert world.end.reason.endswith("missing: none ever joined")


def test_all_islands_lost_and_back_resume_the_round_with_their_own_data():
    world = at_work("a", "b", "c")
    held = {name: world.ranges(name) for name in "abc"}
    world.lose("a", "b", "c")
    world.join("c", "b", "a")
    assert world.at_work == ("b", "c")
    world.work()
    assert {share.island: share.spent for share in world.log[0].shares} == {name: held[name] for name in "bc"}


# ---- coordinator restarts ----


def test_after_a_coordinator_restart_survivors_rejoin_and_their_work_is_adopted():
    world = at_work("a", "b")
    world.work()
    world.fetch_plan()
    plans = dict(world.state.plans)
    world.restart_coordinator()
    assert world.at_work == ()
    world.beat()
    assert dict(world.state.plans) == plans
    assert world.work() == [Verdict("accepted"), Verdict("accepted")]
    assert world.state.round == 2


def test_a_survivor_of_the_first_round_keeps_its_incarnation_and_its_work():
    world = at_work("a", "b")
    world.join("a")
    world.work("b")
    world.lose("b")
    world.join("b")
    world.fetch_plan()
    held = world.islands["a"].held
    assert held
    world.restart_coordinator()
    world.beat()
    assert world.state.members["a"].incarnation == 2
    assert world.state.plans["a"] == held


def test_a_survivor_whose_contribution_is_unknown_says_hello_and_sends_it_again():
    world = at_work("a", "b")
    world.work()
    world.fetch_plan()
    world.restart_coordinator()
    assert world.send("a") == Verdict("unknown")
    assert world.work() == [Verdict("accepted"), Verdict("accepted")]
    assert world.state.round == 2


def test_a_survivor_whose_data_was_taken_gets_a_new_plan():
    world = at_work("a", "b", "c")
    world.work()
    world.fetch_plan()
    held = world.islands["c"].plan
    assert held is not None
    world.start_coordinator("a", "b", "d")
    world.join("a", "b", "d")
    assert world.ranges("d") == held.ranges
    assert world.send("c") == Verdict("unknown")
    world.hello("c")
    assert "c: work on round 2 is void; it gets a new plan" in world.notes
    assert world.send("c").reason.startswith("lease")
    world.work("a", "b", "d")
    assert world.at_work == ("a", "b", "c", "d")


def test_no_round_closes_before_the_survivors_are_back_or_overdue():
    world = at_work("a", "b", "c", grace_s=60.0)
    world.work()
    world.fetch_plan()
    world.restart_coordinator(within_s=20.0)
    world.beat("a", "b")
    world.work("a", "b")
    world.vanish("c")
    world.pass_time(15.0)
    assert world.state.round == 1
    world.pass_time(10.0)
    assert world.state.round == 2


def test_work_taken_up_while_the_outer_step_is_taken_gives_its_data_back_with_the_round():
    world = at_work("a", "b", "late")
    held = world.ranges("late")
    world.work("a", "b")
    world.held = True
    world.pass_time(10.0, beating=["a", "b"])
    assert world.state.stepping == {0: ((0, 0, "a"), (0, 0, "b"))}
    world.receive(Lost(world.now_s, "late", "", "partition"))
    world.hello("late")
    assert world.ranges("late") == held
    world.run_jobs()
    assert world.state.round == 1
    assert world.ranges("late") == held


@pytest.mark.parametrize(
    "changes",
    [{"round": -1}, {"round": 1}, {"inner_steps": 9}, {"silent_steps": 2}, {"silent_steps": -2}, {"ranges": ()}],
)
def test_held_work_that_does_not_fit_the_open_round_is_void(changes: dict[str, object]):
    world = at_work("a", "b")
    held = world.islands["a"].plan
    assert held is not None
    world.islands["a"].plans = [replace(held, **changes)]
    world.restart_coordinator()
    world.hello("a")
    assert world.at_work == ()


def test_work_held_by_one_island_is_not_adopted_for_another():
    world = at_work("a", "b")
    held = world.islands["a"].plan
    world.restart_coordinator()
    world.receive(Joined(0.0, "b", "process-9", 1, 1, "node", (held,)))
    assert world.at_work == ()
    world.receive(Joined(0.0, "a", world.islands["a"].process, 1, 1, "node", (held,)))
    assert world.state.plans["a"] == (held,)


def test_recovery_from_the_log_equals_the_live_state():
    world = at_work("a", "b", "c", num_fragments=2, num_rounds=30)
    for round in range(7):
        if round == 2:
            world.lose("b")
        if round == 4:
            world.join("b")
            world.send("b", 0, "nan") if world.islands["b"].plan else None
        world.work()
    live, recovered = world.state, world.recovered()
    for same in ("index", "round", "versions", "settled", "norms"):
        assert getattr(live, same) == getattr(recovered, same), same
    assert_same_fates(world.state, recovered)
    assert {n: m.incarnation for n, m in recovered.members.items()} == {"a": 1, "b": 2, "c": 1}


def assert_same_fates(live: RunState, recovered: RunState) -> None:
    """But for leases given since the last record, which a new coordinator cannot know of."""
    live_account, account = live.ledger.account(), recovered.ledger.account()
    assert account["committed"] == live_account["committed"]
    assert account["rejected"] == live_account["rejected"]
    assert account["outstanding"] == 0
    assert account["leased"] <= live_account["leased"]


def test_a_run_that_had_succeeded_is_recovered_as_succeeded():
    world = at_work("a", "b", num_rounds=1)
    world.work()
    world.restart_coordinator()
    assert (world.state.phase, world.state.reason) == ("succeeded", "1 rounds done")


# ---- several fragments ----


def test_with_three_fragments_a_round_is_whole_when_each_has_stepped_and_data_is_spent_with_the_last():
    world = at_work("a", "b", num_fragments=3)
    for fragment in range(3):
        assert world.state.round == 0
        for name in "ab":
            assert world.send(name, fragment) == Verdict("accepted")
    assert world.state.versions == (1, 1, 1)
    assert [step.fragment for step in world.log] == [0, 1, 2]
    assert [bool(step.shares[0].spent) for step in world.log] == [False, False, True]


def test_with_three_fragments_each_takes_the_contributions_that_came_in_time():
    world = at_work("a", "b", "c", num_fragments=3)
    world.work("a", "b")
    world.send("c", 0)
    assert world.state.versions == (1, 0, 0)
    world.pass_time(10.0)
    assert world.state.versions == (1, 1, 1)
    assert [len(step.shares) for step in world.log] == [3, 2, 2]
    assert world.log[-1].tokens["expired"] == 4 * TOKENS_PER_SEQUENCE


def test_an_island_lost_between_two_fragments_stays_in_the_first_and_gives_its_data_back():
    world = at_work("a", "b", "c", num_fragments=3)
    world.send("c", 0)
    world.lose("c")
    world.work("a", "b")
    assert [len(step.shares) for step in world.log] == [3, 2, 2]
    assert world.state.round == 1


def test_the_fragment_that_spends_the_data_closes_last():
    world = at_work("a", "b", "c", num_fragments=2)
    world.work("a", "b")
    world.held = True
    world.send("c", 0)
    world.pass_time(12.0)
    assert not world.state.stepping
    world.run_jobs()
    assert [step.fragment for step in world.log] == [0, 1]


def test_a_fragment_that_has_stepped_takes_no_contribution_to_the_next_round_before_there_is_work_for_it():
    world = at_work("a", "b", num_fragments=2)
    world.send("a", 0)
    world.send("b", 0)
    early = replace(world.islands["a"].contribution(0), round=1, base_version=1)
    assert world.submit(early).reason == "lease: 2.1 is not held by a"


def test_after_a_restart_between_two_fragments_what_is_not_committed_is_sent_again():
    world = at_work("a", "b", num_fragments=2)
    world.send("a", 0)
    world.islands["a"].sent = 1
    held = world.islands["a"].held
    world.restart_coordinator()
    assert world.state.inbox == {}
    world.beat()
    assert list(world.state.inbox) == [(0, 0, "a")]
    assert world.state.plans["a"] == held
    assert world.work("a") == [Verdict("accepted")]
    assert world.work("b") == [Verdict("accepted")] * 2
    assert [len(step.shares) for step in world.log] == [2, 2]
    assert world.state.round == 1


def test_fragments_of_one_round_may_come_in_any_order():
    world = at_work("a", "b", num_fragments=2)
    assert world.send("a", 1) == Verdict("accepted")
    assert world.send("b", 1) == Verdict("accepted")
    assert world.state.versions == (0, 0)
    assert world.send("a", 0) == Verdict("accepted")
    assert world.send("b", 0) == Verdict("accepted")
    assert [step.fragment for step in world.log] == [0, 1]


def test_an_island_lost_before_a_fragment_that_its_last_one_overtook_is_no_longer_waited_for():
    world = at_work("a", "b", num_fragments=2)
    world.send("a", 1)
    world.lose("a")
    assert world.state.inbox == {}
    world.join("c")
    assert world.at_work == ("b", "c")
    world.work()
    assert world.state.round == 1


def test_after_a_restart_between_two_records_the_rest_of_the_round_is_done():
    world = at_work("a", "b", num_fragments=2)
    world.send("a", 0)
    world.send("b", 0)
    assert world.state.versions == (1, 0)
    for name in "ab":
        world.islands[name].sent = 1
    world.restart_coordinator()
    world.beat()
    world.work()
    assert world.state.versions == (1, 1)


# ---- data ----


def test_a_lease_wraps_into_the_next_epoch_and_every_epoch_is_complete():
    world = World(RULES, shard_sizes=(10,))
    world.start_coordinator("a", "b")
    world.join("a", "b")
    for _ in range(5):
        world.work()
    spent = sorted(
        (r.epoch, s) for step in world.log for share in step.shares for r in share.spent for s in range(r.start, r.stop)
    )
    assert spent == [(epoch, sequence) for epoch in range(4) for sequence in range(10)]


def test_data_returned_by_the_lost_is_leased_before_new_data():
    world = at_work("a", "b", "c")
    lost = world.ranges("c")
    world.lose("c")
    world.work()
    assert lost == world.ranges("a")


def test_the_token_account_adds_up_over_every_fate():
    world = at_work("a", "b", "c")
    world.send("a", payload="nan")
    world.lose("c")
    world.work()
    lease = 4 * TOKENS_PER_SEQUENCE
    account = {"leased": 4, "committed": 2, "rejected": 1, "expired": 1, "rewound": 0, "outstanding": 0}
    assert world.log[0].tokens == {fate: count * lease for fate, count in account.items()}


def test_events_about_what_nobody_knows_change_nothing():
    world = at_work("a", "b")
    stranger = replace(world.islands["a"].contribution(0), island="nobody", incarnation=7)
    state = world.state
    assert world.submit(stranger) == Verdict("unknown")
    world.receive(Submitted(0.0, replace(stranger, run_id="other")))
    world.receive(Inspected(0.0, stranger, 1.0))
    world.receive(Lost(0.0, "nobody", "", ""))
    world.receive(Committed(0.0, 5, 5, 5))
    assert world.state == state
