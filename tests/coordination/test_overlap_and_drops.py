"""Situations of islands that go in step with more than the work of one round: overlap, dropped contributions, and
rounds in which not all take part."""

from dataclasses import replace

import pytest
from toy_world import RULES, TOKENS_PER_SEQUENCE, World, at_work

from diloco_ray.coordination.experiments import is_dropped, islands_by_round
from diloco_ray.coordination.messages import Lost, Verdict
from diloco_ray.coordination.rounds import next_look_s
from diloco_ray.ids import island_name

H = RULES.inner_steps_per_round
LEASE = RULES.sequences_per_round * TOKENS_PER_SEQUENCE


# ---- overlap ----


@pytest.mark.parametrize("overlap", [1, H])
def test_with_overlap_an_island_holds_its_work_and_the_next(overlap: int):
    world = at_work("a", "b", overlap=overlap)
    assert {name: world.rounds(name) for name in "ab"} == {"a": [0, 1], "b": [0, 1]}
    assert [world.plan("a", number).first_inner_step for number in (0, 1)] == [0, H]
    world.work("a")
    assert world.rounds("a") == [0, 1, 2]
    assert world.rounds("b") == [0, 1]


def test_without_overlap_an_island_holds_its_work_only():
    world = at_work("a", "b")
    assert world.rounds("a") == [0]
    world.work("a")
    assert world.rounds("a") == [0]


def test_the_last_round_has_no_next():
    world = at_work("a", "b", overlap=H, num_rounds=2)
    assert world.rounds("a") == [0, 1]
    world.work("a")
    assert world.rounds("a") == [0, 1]
    world.work()
    world.work()
    assert world.state.phase == "succeeded"
    assert world.at_work == ()
    assert world.state.ledger.account()["outstanding"] == 0


def test_with_a_whole_round_of_overlap_islands_contribute_one_round_ahead_of_the_outer_steps():
    world = at_work("a", "b", overlap=H)
    world.work("a")
    assert world.work("a") == [Verdict("accepted")]
    assert world.state.round == 0
    assert world.work("a") == []  # its second is not to be merged before its first is
    world.work("b")
    assert world.state.round == 1
    world.work("b")
    assert world.state.round == 2
    assert [world.shares(index) for index in range(2)] == [[("a", 0), ("b", 0)], [("a", 1), ("b", 1)]]
    assert [share.base_version for share in world.log[1].shares] == [0, 0]


def test_with_less_overlap_than_a_round_an_island_merges_before_it_contributes_again():
    world = at_work("a", "b", overlap=1)
    world.work("a")
    assert world.work("a") == []
    world.work("b")
    assert world.work("a") == [Verdict("accepted")]
    assert [share.base_version for share in world.log[0].shares] == [0, 0]


@pytest.mark.parametrize(
    ("overlap", "lag", "reason"),
    [
        (0, 1, "stale: based on version 1, round 3 begins at 2"),
        (1, 1, "stale: based on version 1, round 3 begins at 2"),
        (H, 1, ""),
        (H, 2, "stale: based on version 0, round 3 begins at 1"),
    ],
)
def test_staleness_of_one_is_for_whole_rounds_of_overlap_and_of_two_for_nobody(overlap: int, lag: int, reason: str):
    world = at_work("a", "b", overlap=overlap)
    world.work()
    world.work()
    world.fetch_plan()
    c = replace(world.islands["a"].contribution(0), base_version=2 - lag)
    assert c.round == world.state.round == 2
    verdict = world.submit(c)
    assert (verdict.status, verdict.reason) == ("rejected" if reason else "accepted", reason)
    assert world.state.members["a"].strikes == 0


@pytest.mark.parametrize("overlap", [1, H])
def test_a_joiner_starts_with_the_next_round_though_the_others_hold_work_for_it_already(overlap: int):
    world = at_work("a", "b", overlap=overlap)
    world.join("c")
    assert world.at_work == ("a", "b")
    world.work("a", "b")
    assert world.state.round == 1
    assert world.rounds("c") == [1, 2]
    world.work("a", "b", "c")
    assert world.shares() == [("a", 1), ("b", 1), ("c", 1)]


def test_a_straggler_loses_the_round_and_keeps_the_next():
    world = at_work("a", "b", "slow", overlap=1)
    held = world.ranges("slow", 0)
    following = world.plan("slow", 1)
    world.work("a", "b")
    world.pass_time(10.0)
    assert world.log[0].reason == "2 of 3 in; slow overran 10 s"
    assert world.log[0].tokens["expired"] == LEASE
    assert world.plan("slow") == following
    assert world.ranges("slow", 1) == held
    world.work("a", "b", "slow")
    assert world.shares() == [("a", 1), ("b", 1), ("slow", 1)]


def test_a_bad_payload_voids_both_plans_in_hand_and_the_same_data_is_given_again():
    world = at_work("a", "b", overlap=H)
    held = [world.ranges("a", 0), world.ranges("a", 1)]
    assert world.send("a", payload="nan").status == "rejected"
    assert world.state.ledger.account()["rejected"] == 2 * LEASE
    assert world.rounds("a") == [0, 1]
    assert [world.ranges("a", 0), world.ranges("a", 1)] == held
    world.work()
    assert world.shares() == [("a", 0), ("b", 0)]


def test_a_bad_payload_for_the_next_round_leaves_the_contribution_to_this_one():
    world = at_work("a", "b", overlap=H)
    world.work("a")
    world.fetch_plan("a")
    assert world.send("a", payload="nan").status == "rejected"
    assert world.rounds("a") == [0, 1, 2]
    world.work("b")
    assert world.shares() == [("a", 0), ("b", 0)]


def test_a_lost_island_loses_both_plans_but_not_what_it_had_contributed():
    world = at_work("a", "b", "c", overlap=H)
    world.work("c")
    world.lose("c")
    assert world.rounds("c") == [0]
    assert world.state.ledger.account()["expired"] == 2 * LEASE
    world.work("a", "b")
    assert world.shares() == [("a", 0), ("b", 0), ("c", 0)]
    world.work("a", "b")
    assert world.shares() == [("a", 1), ("b", 1)]


def test_an_early_contribution_of_an_island_that_is_lost_then_is_for_its_round():
    world = at_work("a", "b", "c", overlap=H)
    world.work("c")
    world.work("c")
    world.lose("c")
    assert sorted(world.state.inbox) == [(0, 0, "c"), (0, 1, "c")]
    world.work("a", "b")
    world.work("a", "b")
    assert world.shares() == [("a", 1), ("b", 1), ("c", 1)]


def test_after_a_restart_all_work_in_hand_is_taken_up_and_sent_again():
    world = at_work("a", "b", overlap=H)
    world.work("a")
    world.work("a")
    world.fetch_plan()
    held = {name: world.islands[name].held for name in "ab"}
    assert [plan.round for plan in held["a"]] == [0, 1, 2, 3]
    world.restart_coordinator()
    assert world.state.inbox == {}
    world.beat()
    assert dict(world.state.plans) == held
    assert sorted(world.state.inbox) == [(0, 0, "a"), (0, 1, "a")]
    world.work("b")
    world.work("b")
    assert world.state.round == 2


def test_after_a_restart_the_next_work_alone_is_void():
    """Its island lost the round before it to others: it would be waited for in a round that it does not do."""
    world = at_work("a", "b", overlap=1)
    world.islands["a"].plans = world.islands["a"].plans[1:]
    world.restart_coordinator()
    world.hello("a")
    assert world.at_work == ()
    *_, why, now = world.notes
    assert why == "a: work on round 2 is void; it gets a new plan"
    assert now == "1 of at least 2 islands alive; waiting up to 100 s"
    world.hello("b")
    assert world.rounds("a") == [0, 1]
    world.fetch_plan()
    world.work()
    assert world.state.round == 1


def test_what_overtakes_an_islands_earlier_contribution_goes_with_it():
    world = at_work("a", "b", overlap=H)
    early = replace(world.islands["a"].contribution(0), round=1, lease_id=world.plan("a", 1).lease_id)
    early = replace(early, payload_sha256="early")
    assert world.submit(early) == Verdict("accepted")
    world.lose("a")
    assert world.state.inbox == {}
    assert world.state.ledger.account()["expired"] == 3 * LEASE
    world.join("a")
    world.work()
    world.work()
    assert world.state.round == 2


def test_fragments_of_the_next_round_come_before_this_one_is_whole():
    world = at_work("a", "b", num_fragments=2, overlap=H)
    world.work("a")
    world.work("a")
    assert sorted(world.state.inbox) == [(0, 0, "a"), (0, 1, "a"), (1, 0, "a")]
    world.send("b", 0)
    world.islands["b"].sent = 1
    assert world.state.versions == (1, 0)
    world.work("a")
    assert sorted(world.state.inbox) == [(0, 1, "a"), (1, 0, "a"), (1, 1, "a")]
    world.work("b")
    assert world.state.versions == (1, 1)
    world.work("b")
    assert world.state.versions == (2, 2)


# ---- dropped contributions ----


def dropping(*islands: int, rounds: range, among: int = 3, **changes: object) -> World:
    """A world in which chance drops just these islands in just these rounds."""
    cells = [(i, r) for i in range(among) for r in range(5)]
    wanted = {(i, r) for i in islands for r in rounds}
    cells.sort(key=lambda cell: cell not in wanted)
    probability = len(wanted) / len(cells)
    for seed in range(100_000):
        rules = replace(RULES, max_islands=among, drop_probability=probability, drop_seed=seed, num_rounds=6, **changes)
        if all(is_dropped(rules, island_name(i), r) == ((i, r) in wanted) for i, r in cells):
            world = World(rules)
            everyone = [island_name(number) for number in range(among)]
            world.start_coordinator(*everyone)
            world.join(*everyone)
            world.fetch_plan()
            return world
    raise AssertionError("no seed drops that")


def test_an_island_whose_contributions_are_dropped_has_a_plan_of_several_rounds():
    world = dropping(1, rounds=range(2))
    plan = world.plan("island-01")
    assert (plan.first_round, plan.round, plan.silent_steps, plan.inner_steps) == (0, 2, 2 * H, 3 * H)
    assert sum(r.num_sequences for r in plan.ranges) == 3 * RULES.sequences_per_round
    assert world.plan("island-00").silent_steps == 0


def test_nobody_waits_for_the_silent_who_contribute_then_from_where_they_began():
    world = dropping(1, rounds=range(2))
    for round in range(2):
        world.work("island-00", "island-02")
        assert world.log[round].reason == "all 2 live islands in"
        assert world.shares() == [("island-00", round), ("island-02", round)]
    world.work("island-00", "island-02")
    assert world.state.round == 2
    assert world.work("island-01") == [Verdict("accepted")]
    assert [(share.island, share.base_version, share.tokens) for share in world.log[2].shares] == [
        ("island-00", 2, LEASE),
        ("island-01", 0, 3 * LEASE),
        ("island-02", 2, LEASE),
    ]
    assert [close.alive for close in world.closed] == [3, 3, 3]


def test_the_silent_count_towards_the_least_of_islands():
    world = dropping(1, 2, rounds=range(1), min_islands=3, quorum=3)
    world.work("island-00")
    assert world.shares() == [("island-00", 0)]


def test_the_silent_count_towards_the_quorum_from_which_grace_runs():
    world = dropping(1, rounds=range(1), min_islands=1, quorum=3, grace_s=10.0)
    world.work("island-00")
    assert next_look_s(world.state) is None
    world.lose("island-02")
    assert world.state.round == 1
    world = dropping(1, rounds=range(1), min_islands=1, quorum=2, grace_s=10.0)
    world.work("island-00")
    assert next_look_s(world.state) == 10.0
    world.look()
    assert world.log[0].reason == "1 of 2 in; island-02 overran 10 s"


def test_a_contribution_that_comes_though_it_is_dropped_is_refused():
    world = dropping(1, rounds=range(1))
    c = replace(world.islands["island-01"].contribution(0), round=0)
    assert world.submit(c).reason.startswith("lease")


def test_when_all_who_would_speak_are_lost_one_of_the_silent_speaks_after_all():
    world = dropping(1, 2, rounds=range(2), min_islands=1, quorum=1)
    silent = world.plan("island-01")
    world.lose("island-00")
    assert [(plan.first_round, plan.round) for plan in world.state.plans["island-01"]] == [(0, 0)]
    assert world.plan("island-01").ranges == (replace(silent.ranges[0], stop=silent.ranges[0].start + 4),)
    assert world.plan("island-02").silent_steps == 2 * H
    assert world.work("island-01") == [Verdict("accepted")]
    assert world.shares() == [("island-01", 0)]
    assert (world.plan("island-01").first_round, world.plan("island-01").round) == (1, 1)


def test_one_of_the_silent_speaks_though_it_has_contributed_to_a_later_round_already():
    world = dropping(1, 2, rounds=range(2), min_islands=1, quorum=1)
    assert world.work("island-01") == [Verdict("accepted")]
    assert world.work("island-02") == [Verdict("accepted")]
    world.lose("island-00")
    assert sorted(world.state.inbox) == [(0, 2, "island-02")]
    assert world.state.ledger.account()["expired"] == 4 * LEASE
    world.work("island-01")
    world.work("island-01")
    world.work("island-01")
    assert [world.shares(index) for index in range(3)] == [
        [("island-01", 0)],
        [("island-01", 1)],
        [("island-01", 2), ("island-02", 2)],
    ]


def test_a_round_in_which_the_only_speaker_is_lost_and_back_goes_on():
    world = dropping(1, 2, rounds=range(2), min_islands=2, quorum=2)
    world.lose("island-00", "island-01")
    world.join("island-00", "island-01")
    world.fetch_plan()
    for _ in range(4):
        world.work()
    assert world.state.round >= 1


def test_after_a_restart_a_plan_of_several_rounds_is_taken_up_in_its_midst():
    world = dropping(1, rounds=range(2))
    world.work("island-00", "island-02")
    world.fetch_plan()
    plan = world.plan("island-01")
    world.start_coordinator(*world.islands)
    world.beat()
    assert world.state.round == 1
    assert world.plan("island-01") == plan
    world.work("island-00", "island-02")
    world.work()
    assert world.log[-1].shares[1].tokens == 3 * LEASE


def test_a_silent_island_that_is_lost_repeats_its_rounds_from_the_open_one():
    world = dropping(1, rounds=range(2))
    ranges = world.ranges("island-01")
    world.work("island-00", "island-02")
    world.lose("island-01")
    world.join("island-01")
    world.work("island-00", "island-02")
    assert world.state.round == 2
    assert world.plan("island-01").round == 2
    assert world.plan("island-01").silent_steps == 0
    assert world.ranges("island-01") == (replace(ranges[0], stop=ranges[0].start + 4),)


def test_an_island_that_says_hello_with_work_that_was_replaced_hears_of_the_new():
    world = dropping(1, 2, rounds=range(2), min_islands=1, quorum=1, overlap=H)
    old = world.islands["island-01"].held
    assert [plan.round for plan in old] == [2, 3]
    world.lose("island-00")
    given = world.state.plans["island-01"]
    assert [plan.round for plan in given] == [0, 2]
    world.hello("island-01")
    assert world.state.plans["island-01"] == given
    world.fetch_plan("island-01")
    assert world.islands["island-01"].held == given
    world.work("island-01")
    assert world.shares() == [("island-01", 0)]


def test_with_overlap_the_next_plan_follows_on_the_silent_rounds():
    world = dropping(1, rounds=range(2), overlap=H)
    assert [(plan.first_round, plan.round) for plan in world.state.plans["island-01"]] == [(0, 2), (3, 3)]
    assert [plan.first_inner_step for plan in world.state.plans["island-01"]] == [0, 3 * H]
    for _ in range(6):
        world.work()
    assert world.state.phase == "succeeded"


RULES_OF_FOUR = replace(RULES, max_islands=4, num_rounds=50)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.99])
def test_chance_drops_about_its_share_but_never_all_and_never_by_the_order_of_asking(probability: float):
    rules = replace(RULES_OF_FOUR, drop_probability=probability, drop_seed=3)
    names = [island_name(number) for number in range(4)]
    drops = [[is_dropped(rules, name, round) for name in names] for round in range(500)]
    assert not any(all(row) for row in drops)
    share = sum(map(sum, drops)) / 2000
    assert share == pytest.approx(min(probability, 0.75), abs=0.05)
    assert drops == [[is_dropped(rules, name, round) for name in names] for round in range(500)]
    other = replace(rules, drop_seed=4)
    assert drops != [[is_dropped(other, name, round) for name in names] for round in range(500)]


def test_nothing_is_dropped_unless_the_recipe_says_so():
    assert not any(is_dropped(RULES_OF_FOUR, island_name(0), round) for round in range(100))


def test_the_last_round_is_never_dropped():
    for seed in range(30):
        world = World(replace(RULES, num_rounds=3, max_islands=2, drop_probability=0.9, drop_seed=seed))
        names = [island_name(number) for number in range(2)]
        world.start_coordinator(*names)
        world.join(*names)
        for _ in range(3):
            world.work()
        assert world.state.phase == "succeeded"
        assert world.shares() == [(name, 2) for name in names]
        assert world.state.ledger.account()["expired"] == 0
        assert world.state.ledger.account()["committed"] == 3 * 2 * LEASE


# ---- how many take part, by round ----


def test_schedules_of_how_many_islands_train():
    assert islands_by_round("constant", 8, 4) == ()
    assert islands_by_round("doubling", 8, 4) == (4, 4, 8, 8)
    assert islands_by_round("halving", 8, 5) == (8, 8, 8, 4, 4)
    assert islands_by_round("ramp_up", 4, 8) == (1, 1, 2, 2, 3, 3, 4, 4)
    assert islands_by_round("ramp_down", 4, 8) == (4, 4, 3, 3, 2, 2, 1, 1)
    assert islands_by_round("doubling", 1, 3) == (1, 1, 1)
    assert min(islands_by_round("ramp_down", 3, 7)) == 1


def scheduled(schedule: str, num_rounds: int, **changes: object) -> World:
    return at_work(
        *"abcd",
        **{
            "max_islands": 4,
            "min_islands": 4,
            "quorum": 4,
            "num_rounds": num_rounds,
            "islands_by_round": islands_by_round(schedule, 4, num_rounds),
            **changes,
        },
    )


@pytest.mark.parametrize("min_islands", [1, 4])
@pytest.mark.parametrize("overlap", [0, 1, H])
@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        ("doubling", [2, 2, 4, 4]),
        ("halving", [4, 4, 2, 2]),
        ("ramp_up", [1, 2, 3, 4]),
        ("ramp_down", [4, 3, 2, 1]),
    ],
)
def test_in_each_round_as_many_train_as_the_schedule_says(
    schedule: str, counts: list[int], overlap: int, min_islands: int
):
    world = scheduled(schedule, 4, overlap=overlap, min_islands=min_islands)
    for _ in range(6):
        world.work()
    assert [world.shares(index) for index in range(4)] == [
        [(name, round) for name in "abcd"[:count]] for round, count in enumerate(counts)
    ]
    assert world.state.phase == "succeeded"
    assert world.state.ledger.account()["expired"] == 0


def test_an_island_takes_part_for_one_that_is_lost_and_not_beside_it():
    world = scheduled("doubling", 4, min_islands=2, quorum=2)
    assert world.at_work == ("a", "b")
    world.lose("a")
    assert world.at_work == ("b", "c")
    world.join("a")
    assert world.at_work == ("b", "c")
    world.work()
    assert world.shares() == [("b", 0), ("c", 0)]


def test_an_island_that_comes_back_when_its_place_is_taken_waits_for_a_later_round():
    world = scheduled("doubling", 4, min_islands=2, quorum=2)
    world.receive(Lost(0.0, "a", "", "partition"))
    assert world.at_work == ("b", "c")
    world.hello("a")
    assert world.at_work == ("b", "c")
    assert world.notes[-1] == "a: work on round 1 is void; it gets a new plan"
    for _ in range(2):
        world.work()
    assert world.state.round == 2
    assert world.at_work == ("a", "b", "c", "d")


def test_a_plan_says_how_many_contribute_with_it():
    world = scheduled("ramp_up", 4, overlap=H)
    assert [world.plan("a", number).num_islands for number in (0, 1)] == [1, 2]


# ---- a full inbox ----


def test_when_the_inbox_is_full_the_open_step_gets_what_it_needs_and_the_next_rounds_wait():
    world = at_work("a", "b", overlap=H, max_inbox_bytes=100)
    assert world.work("a") == [Verdict("accepted")]
    (verdict,) = world.work("a")
    lack = "100 of 100 bytes are taken; it waits until fragment 0 has had the outer step with this island's round 1"
    assert verdict == Verdict("full", lack)
    world.fetch_plan("a")  # it asks again, which is not news
    assert world.notes.count(f"a: contribution to fragment 0, round 2, waits: {lack}") == 1
    assert world.rounds("a") == [0, 1, 2], "what it holds besides it was given before"
    assert world.work("b") == [Verdict("accepted")]
    assert world.shares() == [("a", 0), ("b", 0)]
    world.fetch_plan("a")
    assert world.state.sent_back == frozenset()
    world.work("b")
    assert world.shares() == [("a", 1), ("b", 1)]


def test_a_bad_header_is_no_reason_to_wait_for_room():
    world = at_work("a", "b", overlap=H, max_inbox_bytes=100)
    world.work("a")
    world.fetch_plan("a")
    c = replace(world.islands["a"].contribution(0), payload_bytes=10**12)
    assert world.submit(c).reason.startswith("schema: 1000000000000 bytes")
