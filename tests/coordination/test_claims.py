"""What islands say they hold when they say hello: whatever it is, the data stays whole, and nobody else pays for it."""

from dataclasses import replace

import pytest
from toy_world import RULES, World, at_work

from diloco_ray.coordination.claims import MAX_HELD
from diloco_ray.coordination.messages import DataRange, InnerPlan, Joined, Verdict
from diloco_ray.coordination.reducer import MAX_TOLD

SEQUENCES = RULES.sequences_per_round


def claim(world: World, name: str, *plans: InnerPlan) -> None:
    """A hello of the living process, with all that it was given and these besides."""
    island = world.islands[name]
    mine = world.state.plans.get(name, ())
    world.claimed |= {(name, plan.lease_id) for plan in plans}
    world.receive(Joined(world.now_s, name, island.process, island.incarnation, 1, "node", (*mine, *plans)))


def forged(world: World, name: str, lease_id: str, **fields: object) -> InnerPlan:
    """The island's next work, on data that nobody has."""
    template, start = world.plan(name), world.state.ledger.cursor()[1] + SEQUENCES
    ranges = (DataRange(0, 0, start, start + SEQUENCES),)
    return replace(template, lease_id=lease_id, round=world.rounds(name)[-1] + 1, ranges=ranges, **fields)


def is_held(world: World, name: str, plan: InnerPlan) -> bool:
    return plan in world.state.plans[name]


def test_what_an_honest_island_could_hold_is_taken_up():
    world = at_work("a", "b")
    plan = forged(world, "a", "0.1")
    claim(world, "a", plan)
    assert is_held(world, "a", plan)


@pytest.mark.parametrize("number", [3, 4, 10**17])
def test_a_claim_to_a_lease_that_is_yet_to_be_given_does_not_cost_its_island_the_lease(number: int):
    world = at_work("a", "b")
    plan = forged(world, "b", f"{world.life}.{number}")
    claim(world, "b", plan)
    assert not is_held(world, "b", plan)
    for _ in range(3):
        assert world.work() == [Verdict("accepted"), Verdict("accepted")]
    assert world.state.ledger.account()["committed"] == world.state.ledger.account()["leased"] - 2 * 8 * SEQUENCES


@pytest.mark.parametrize(
    "lie",
    [
        {"inner_steps": 1, "ranges": (DataRange(0, 0, 40, 42),)},  # as much say, for half the work
        {"inner_steps": 4, "ranges": (DataRange(0, 0, 40, 48),)},
        {"inner_steps": 4, "silent_steps": 2, "ranges": (DataRange(0, 0, 40, 48),)},  # nobody drops contributions
        {"inner_steps": 0, "ranges": ()},
        {"round": 7},
        {"round": 10**17},
        {"island": "b"},
        {"incarnation": 2},
        {"incarnation": 0},
        {"ranges": (DataRange(0, 0, 0, 4),)},  # its own, once more
        {"ranges": (DataRange(0, 0, 4, 8),)},  # the other's
        {"ranges": (DataRange(0, 2, 0, 4),)},
        {"ranges": (DataRange(0, 0, 40, 10**17),)},
        {"ranges": (DataRange(1, 0, 40, 44),)},
    ],
)
@pytest.mark.parametrize("closes", ["all", "quorum"])
def test_a_claim_to_what_no_island_is_given_is_void(closes: str, lie: dict[str, object]):
    world = at_work("a", "b", closes=closes)
    plan = replace(forged(world, "a", "0.1"), **lie)
    claim(world, "a", plan)
    assert not is_held(world, "a", plan)
    assert "0.1" not in world.state.ledger.outstanding


def test_silent_steps_are_those_that_chance_gave():
    world = at_work("a", "b", drop_probability=0.5)
    plan = forged(world, "a", "0.1")
    held = replace(plan, round=plan.round + 40, inner_steps=41 * 2, silent_steps=40 * 2)
    claim(world, "a", replace(held, ranges=(DataRange(0, 1, 0, 64), DataRange(0, 2, 0, 64), DataRange(0, 3, 0, 36))))
    assert "0.1" not in world.state.ledger.outstanding


@pytest.mark.parametrize("whose", ["a", "late"])
def test_a_lease_that_ended_with_an_outer_step_under_way_is_nobody_elses(whose: str):
    """The round that closes ends the leases of its plans by their ids: what another held under one of them would go
    back to be leased again, and be committed as well."""
    world = at_work("a", "b", "late")
    world.held = True
    lease_id = world.plan(whose).lease_id
    for name in "ab":
        world.send(name)
        world.run_jobs()
    world.look()
    assert world.state.stepping
    assert lease_id not in world.state.ledger.outstanding
    plan = forged(world, "b", lease_id)
    claim(world, "b", plan)
    assert not is_held(world, "b", plan)


def test_a_claim_to_the_lease_of_a_lost_island_does_not_take_what_was_accepted_from_it():
    """Its fragment goes with its lease, if that is voided."""
    world = at_work("a", "b", "c", num_fragments=2)
    assert world.send("a") == Verdict("accepted")
    (key,) = world.state.inbox
    lease_id = world.plan("a").lease_id
    world.lose("a")
    plan = forged(world, "b", lease_id)
    claim(world, "b", plan)
    assert not is_held(world, "b", plan)
    world.send("b", 0, "nan")
    assert key in world.state.inbox


def test_of_two_that_claim_one_lease_the_first_has_it():
    world = at_work("a", "b")
    first, second = forged(world, "a", "0.1"), forged(world, "b", "0.1")
    claim(world, "a", first)
    claim(world, "b", second)
    assert is_held(world, "a", first)
    assert not is_held(world, "b", second)


def test_rounds_that_wait_for_a_quorum_are_all_taken_up_after_a_restart():
    world = at_work("a", "b", closes="quorum", overlap=1, max_inbox_bytes=2**31)
    for _ in range(40):
        world.work("a")
    world.fetch_plan("a")
    held = world.islands["a"].held
    assert len(held) == 42
    world.restart_coordinator()
    world.beat()
    assert world.state.plans["a"][:42] == held


@pytest.mark.parametrize("closes", ["all", "quorum"])
def test_of_a_hello_no_more_than_so_much_is_looked_at_and_told(closes: str):
    world = World(replace(RULES, closes=closes, num_rounds=10**6), shard_sizes=(10**7,))
    world.start_coordinator("a", "b")
    world.join("a", "b")
    crumbs = tuple(DataRange(0, 0, 100 + 2 * number, 101 + 2 * number) for number in range(20_000))
    claim(world, "a", replace(forged(world, "a", "0.1", inner_steps=10_000), ranges=crumbs))
    plans = [
        replace(world.plan("b"), lease_id=f"0.{k + 1}", round=k + 1, ranges=(DataRange(0, 0, 4 * k, 4 * k + 4),))
        for k in range(3, 3000)
    ]
    claim(world, "b", *(replace(plan, round=number + 1) for number, plan in enumerate(plans)))
    assert "0.1" not in world.state.ledger.outstanding
    assert len(world.state.plans["b"]) == MAX_HELD
    assert len(world.notes) < 2 * MAX_TOLD + 10
    assert world.state.told == {"a": 2, "b": MAX_TOLD}


# ---- what people are told ----


def test_that_an_island_loses_its_place_is_told_however_much_it_says():
    world = at_work("a", "b")
    foreign = replace(world.islands["b"].contribution(0), run_id="another")
    for _ in range(3 * MAX_TOLD):
        world.submit(foreign)
    for _ in range(3):
        world.fetch_plan("b")
        world.submit(replace(world.islands["b"].contribution(0), codec="pickle"))
    assert world.standing("b") == "quarantined"
    assert any(note.startswith("b quarantined:") for note in world.notes), world.notes


def test_what_an_island_may_say_for_ever_is_told_so_often_and_once_more_for_each_round():
    world = at_work("a", "b")
    stale = replace(world.islands["b"].contribution(0), round=-1, base_version=5)
    for _ in range(3 * MAX_TOLD):
        assert world.submit(stale).status == "rejected"
    told = [note for note in world.notes if note.startswith("b: contribution to fragment 0 rejected")]
    assert len(told) == MAX_TOLD
    last = "b says much; what comes of it is told again when another round is done"
    assert world.notes.count(last) == 1
    assert world.notes[-1] == last
    for number in (1, 2):
        world.work()
        for _ in range(10):
            world.submit(stale)
        told = [note for note in world.notes if note.startswith("b: contribution to fragment 0 rejected")]
        assert (len(told), world.notes.count(last)) == (MAX_TOLD + number, 1 + number)


def test_an_island_that_says_hello_and_leaves_for_ever_is_told_of_no_more():
    world = at_work("a", "b", "c")
    world.notes.clear()
    for _ in range(200):
        world.leave("c")
        world.join("c")
    for _ in range(200):
        world.join("c")  # another process takes the name
    assert len(world.notes) <= MAX_TOLD + 1
    assert world.standing("c") == "alive"


def test_one_that_says_much_does_not_silence_the_others():
    world = at_work("a", "b", "c")
    stale = replace(world.islands["b"].contribution(0), round=-1, base_version=5)
    for _ in range(3 * MAX_TOLD):
        world.submit(stale)
    world.submit(replace(stale, island="c"))
    assert world.notes[-1].startswith("c: contribution to fragment 0 rejected")
    world.lose("b")
    assert "b lost: killed" in world.notes


def test_a_strangers_words_are_not_told():
    world = at_work("a", "b")
    world.notes.clear()
    assert world.submit(replace(world.islands["a"].contribution(0), island="x", run_id="y")).status == "rejected"
    assert world.notes == []


def test_texts_of_an_island_have_an_end():
    world = at_work("a", "b")
    world.leave("b")
    world.receive(Joined(0.0, "b", "process", 0, 1, "node" * 10**6))
    world.receive(Joined(0.0, "c", "process", 0, 1, "node"))
    assert len(world.state.members["b"].node) == 1000
    assert max(map(len, world.notes)) < 1100
