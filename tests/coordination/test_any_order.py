"""Whatever happens, in whatever order: islands, losses, restarts, duplicates and bad payloads, drawn by hypothesis.

The toy world checks its invariants after every event. At the end of every story the world turns fair again, and the
run must get on: with enough healthy islands the round closes, though some island may hang for ever; and when those
that hang have ended themselves, as processes do, it must get on whatever was before.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from toy_world import RULES, ToyIsland, World

from diloco_ray.coordination.experiments import islands_by_round
from diloco_ray.coordination.messages import (
    Committed,
    Contribution,
    DataRange,
    Event,
    Heartbeat,
    InnerPlan,
    Inspect,
    Joined,
    Left,
    Lost,
    Submitted,
    Verdict,
)
from diloco_ray.coordination.rounds import next_look_s
from diloco_ray.coordination.state import Rules, ended
from diloco_ray.ids import island_name

NAMES = tuple(island_name(number) for number in range(4))
names = st.sampled_from(NAMES)


class AnyOrder(RuleBasedStateMachine):
    world: World
    mail: list[Event]  # what islands and driver ever said: any of it may come once more

    @initialize(
        rules=st.data(),
        num_islands=st.integers(2, 4),
        shard_sizes=st.sampled_from([(6,), (64,), (10, 7)]),
        digests_differ=st.booleans(),
    )
    def start(self, rules: st.DataObject, num_islands: int, shard_sizes: tuple[int, ...], digests_differ: bool) -> None:
        self.world = World(self.draw_rules(rules.draw), shard_sizes, held=True, digests_differ=digests_differ)
        self.world.start_coordinator(*NAMES[:num_islands])
        self.world.join(*NAMES[:num_islands])
        self.mail = []

    def draw_rules(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Rules:
        raise NotImplementedError

    def say(self, event: Event) -> None:
        self.mail.append(event)
        if isinstance(event, Submitted):
            self.world.verdicts.pop((event.contribution.key, event.contribution.payload_sha256), None)
        self.world.receive(event)

    # ---- islands ----

    @rule(name=names)
    def a_process_starts(self, name: str) -> None:
        """Also where another process holds the name."""
        self.world.join(name)

    @rule(name=names, how=st.sampled_from(["killed", "unheard", "drained", "cut off", "hung"]))
    def a_process_fails(self, name: str, how: str) -> None:
        world, island = self.world, self.world.islands.get(name)
        if island is None:
            return
        match how:
            case "hung":
                island.hung = True
                return
            case "cut off":  # the driver believes it dead
                self.say(Lost(world.now_s, name, "", "partition"))
                return
            case "killed":
                self.say(Lost(world.now_s, name, island.process, "killed"))
            case "drained":
                self.say(Left(world.now_s, name, island.incarnation, "preempted"))
            case _:
                pass
        del world.islands[name]

    @rule(name=names, again=st.booleans())
    def an_island_is_heard(self, name: str, again: bool) -> None:
        if name in self.world.islands:
            self.mail.append(Heartbeat(self.world.now_s, name, self.world.islands[name].incarnation))
            self.mail.append(self.world.hello(name)) if again else self.world.beat(name)

    @rule(name=names, data=st.data())
    def an_island_claims_work_that_it_was_not_given(self, name: str, data: st.DataObject) -> None:
        """That of another one, or of nobody: what fits into no ledger, and what is free."""
        island = self.world.islands.get(name)
        if island is None or island.fenced:
            return
        claims = [self.claim(name, data.draw) for _ in range(data.draw(st.integers(1, 2)))]
        held = self.world.state.plans.get(name, ()) if data.draw(st.booleans()) else island.held
        mine = {plan.lease_id for plan in self.world.state.plans.get(name, ())}
        self.world.claimed |= {(name, plan.lease_id) for plan in claims if plan.lease_id not in mine}
        self.say(Joined(self.world.now_s, name, island.process, island.incarnation, 1, "node", (*held, *claims)))
        self.world.welcome(island)

    def claim(self, name: str, draw: Callable[[st.SearchStrategy[Any]], Any]) -> InnerPlan:
        """The island's next work as it might be, but for a lie or two."""
        world, state, ledger = self.world, self.world.state, self.world.state.ledger
        everybodys = [plan.lease_id for plans in state.plans.values() for plan in plans]
        settled = [f"{world.life}.{number + 1}" for number in range(ledger.num_leases)]
        to_come = [f"{world.life}.{ledger.num_leases + ahead}" for ahead in (1, 2, 3)]
        mine, shard = state.plans.get(name, ()), ledger.shard_of(name)
        round = mine[-1].round + 1 if mine else state.round if world.rules.in_step else state.num_plans.get(name, 0)
        epoch, position = ledger.cursor(shard)
        told: dict[str, list[Any]] = {
            "lease": [f"0.{number}" for number in range(1, 9)],
            "place": [None],
            "shard": [shard],
            "round": [round],
            "silent": [0],
            "steps": [world.rules.inner_steps_per_round],
            "cut": [0],
        }
        lies: dict[str, list[Any]] = {
            "lease": [*everybodys, *settled, *to_come, "99.1", "x"],
            "place": [(epoch, position + 1), (epoch + 1, 0), (epoch, 0), (-1, 0), (10**15, 0)],
            "shard": [0, 1, 2],
            "round": [state.round, round + 1, 10**15],
            "silent": [1, 2],
            "steps": [0, 1, 3],
            "cut": [1],
        }
        lying = set(draw(st.lists(st.sampled_from([*lies, "lease", "lease", "lease"]), max_size=2)))
        told |= {lie: lies[lie] for lie in sorted(lying)}
        word = {key: draw(st.sampled_from(values)) for key, values in told.items()}
        steps = (word["silent"] + 1) * word["steps"]
        num_sequences = steps * RULES.sequences_per_inner_step
        ranges = ledger.lease(name, num_sequences, shard)[1].ranges
        if lying & {"place", "shard", "cut"}:
            epoch, start = word["place"] or (epoch, position)
            cuts = sorted({start, start + word["cut"], start + num_sequences})
            ranges = tuple(DataRange(word["shard"], epoch, one, two) for one, two in pairwise(cuts))
        return InnerPlan(
            island=name,
            incarnation=world.islands[name].incarnation,
            lease_id=word["lease"],
            round=word["round"] + word["silent"],
            base_index=0,
            inner_steps=steps,
            silent_steps=word["silent"] * word["steps"],
            first_inner_step=0,
            num_islands=1,
            ranges=ranges,
        )

    # ---- contributions ----

    @rule(name=names, payload=st.sampled_from(["", "", "", "", "nan", "norm 1e9", "other", "codec"]))
    def an_island_sends_its_next_fragment(self, name: str, payload: str) -> None:
        island = self.at_work(name)
        if island:
            c = self.post(island, island.sent, payload)
            self.say(Submitted(self.world.now_s, c))
            self.hear_verdict(island, c)

    @rule(name=names, times=st.integers(1, 3))
    def an_island_sends_rubbish(self, name: str, times: int) -> None:
        for _ in range(times):
            island = self.at_work(name)
            if island:
                self.say(Submitted(self.world.now_s, island.contribution(island.sent, "nan")))
                self.world.run_jobs()
                self.world.beat(name)

    @rule(name=names)
    def an_island_sends_all_it_has(self, name: str) -> None:
        self.send_all(name)

    @rule(without=names)
    def all_but_one_send_what_they_have(self, without: str) -> None:
        self.world.beat()
        for name in sorted(set(self.world.islands) - {without}):
            self.send_all(name)

    @rule(name=names, fragment=st.integers(0, 2), version=st.integers(0, 3), later=st.integers(-1, 2))
    def an_island_sends_what_nobody_asked_for(self, name: str, fragment: int, version: int, later: int) -> None:
        island = self.at_work(name)
        if island and fragment < self.world.rules.num_fragments:
            c = island.contribution(fragment)
            self.say(Submitted(self.world.now_s, replace(c, base_version=version, round=c.round + later)))

    @rule(name=names, ahead=st.integers(0, 2))
    def an_island_works_ahead_of_its_fragments_turn(self, name: str, ahead: int) -> None:
        """Messages overtake each other."""
        island = self.at_work(name)
        if island and island.sent + ahead < self.world.rules.num_fragments:
            self.say(Submitted(self.world.now_s, self.post(island, island.sent + ahead)))

    def at_work(self, name: str) -> ToyIsland | None:
        island = self.world.islands.get(name)
        if island is None or island.fenced or island.hung:
            return None
        self.world.fetch_plan(name)
        while (plan := island.plan) and self.world.has_closed(plan, island.sent):
            self.world.sent_one(island)
            self.world.begin(island)
        return island if island.plan and self.world.may_send(island, island.sent) else None

    def send_all(self, name: str) -> None:
        """One fragment after the other, each with its verdict, as an island does it."""
        for _ in range(2 * self.world.rules.num_fragments):
            island = self.at_work(name)
            if island:
                c = self.post(island, island.sent)
                self.say(Submitted(self.world.now_s, c))
                self.world.run_jobs()
                self.hear_verdict(island, c)

    def post(self, island: ToyIsland, fragment: int, payload: str = "") -> Contribution:
        """The same once more until its fate is known."""
        plan, c = island.plan, island.contribution(fragment, payload)
        posted = [old for p, old in island.outgoing if (p, old.key) == (plan, c.key)]
        if posted or plan is None:
            return posted[0]
        c = replace(c, codec="float32") if payload == "codec" else c
        self.world.hear(island, plan, c, Verdict("pending"))
        return c

    def hear_verdict(self, island: ToyIsland, c: Contribution) -> None:
        world, plan = self.world, island.plan
        verdict = world.verdicts.get((c.key, c.payload_sha256))
        if verdict is None or plan is None or plan.lease_id != c.lease_id:
            return
        if verdict.status == "unknown":
            world.hello(island.name)
            return
        world.hear(island, plan, c, verdict)
        world.sent_one(island)

    # ---- the coordinator and the world ----

    @precondition(lambda self: self.world.jobs)
    @rule(all_of_them=st.booleans())
    def jobs_are_done(self, all_of_them: bool) -> None:
        self.mail.append(self.world.run_job())
        while all_of_them and self.world.jobs:
            self.mail.append(self.world.run_job())

    @precondition(lambda self: self.world.state.index > 0 or self.world.life < 3)
    @rule(committed=st.booleans(), heard=st.booleans())
    def the_coordinator_dies_and_comes_back(self, committed: bool, heard: bool) -> None:
        """Perhaps between the commit of a record and the news of it."""
        job = self.world.jobs[0] if self.world.jobs else None
        if committed and job and not isinstance(job, Inspect):
            self.world.commit(job)
        self.mail = [event for event in self.mail if not isinstance(event, Committed)]
        self.world.restart_coordinator()
        if heard:
            self.world.beat()

    @rule(seconds=st.sampled_from([0.5, 5.0, 12.0, 40.0]), name=names)
    def time_passes(self, seconds: float, name: str) -> None:
        """In which all but one island are heard."""
        self.world.pass_time(seconds, beating=[n for n in self.world.islands if n != name])

    @precondition(lambda self: self.mail)
    @rule(data=st.data())
    def an_old_message_comes_again(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from(self.mail))
        self.world.receive(replace(event, now_s=self.world.now_s))

    # ---- and the run gets on ----

    def teardown(self) -> None:
        world = self.world
        goal = world.state.round + 2
        if self.gets_to(goal):
            return
        healthy = [i for i in world.islands.values() if not i.hung and world.standing(i.name) == "alive"]
        enough = max(world.rules.min_islands, world.rules.quorum)
        assert len(healthy) < enough or self.may_wait_for_the_hung, f"it does not get on: {world.state}"
        for name in [name for name, island in world.islands.items() if island.hung]:
            self.world.lose(name)
        assert self.gets_to(goal), f"it does not get on though nobody hangs: {world.state}"

    @property
    def may_wait_for_the_hung(self) -> bool:
        """Who takes part in a round, or is not dropped from it, is fewer than are alive."""
        return bool(self.world.rules.islands_by_round or self.world.rules.drop_probability)

    def gets_to(self, goal: int) -> bool:
        world = self.world
        for _ in range(60):
            if ended(world.state) or world.state.round >= goal:
                return True
            for name in NAMES:
                barred = name in world.state.members and world.standing(name) == "quarantined"
                missing = name not in world.islands or world.islands[name].fenced
                if missing and not barred and world.now_s % 2.0 < 1.0:
                    world.join(name)
            world.run_jobs()
            for name in world.islands:
                self.send_all(name)
            world.run_jobs()
            look_s = next_look_s(world.state)
            ahead_s = 5.0 if look_s is None or look_s <= world.now_s else look_s - world.now_s
            world.pass_time(min(5.0, max(0.5, ahead_s)))
        return False


RULES_OF_ALL = {
    "min_islands": st.integers(1, 2),
    "quorum": st.integers(1, 2),
    "num_rounds": st.sampled_from([3, 1000]),
    "max_islands": st.just(len(NAMES)),
    "max_inbox_bytes": st.sampled_from([0, 250, 2**31]),  # a contribution has 100
}


class InStep(AnyOrder):
    """closes = all."""

    def draw_rules(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Rules:
        rules = replace(
            RULES,
            **{name: draw(values) for name, values in RULES_OF_ALL.items()},
            num_fragments=draw(st.sampled_from([1, 3])),
            overlap=draw(st.sampled_from([0, 1, RULES.inner_steps_per_round])),
            drop_probability=draw(st.sampled_from([0.0, 0.5])),
            drop_seed=draw(st.integers(0, 9)),
        )
        schedule = draw(st.sampled_from(["constant", "constant", "doubling", "halving", "ramp_up", "ramp_down"]))
        return replace(rules, islands_by_round=islands_by_round(schedule, len(NAMES), min(rules.num_rounds, 6)))


class OutOfStep(AnyOrder):
    """closes = quorum, arrival."""

    def draw_rules(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Rules:
        closes = draw(st.sampled_from(["quorum", "arrival"]))
        return replace(
            RULES,
            **{name: draw(values) for name, values in RULES_OF_ALL.items()},
            closes=closes,
            num_fragments=draw(st.sampled_from([1, 3])) if closes == "quorum" else 1,
            overlap=draw(st.sampled_from([0, 1, RULES.inner_steps_per_round])),
            launch_interval_s=draw(st.sampled_from([None, 0.0, 7.0])),
            max_staleness=draw(st.sampled_from([0, 1, 64])),
            steps_by_speed=draw(st.booleans()),
            weighting=draw(st.sampled_from(["uniform", "tokens_squared_per_step"])),
        )


PROFILE = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
InStep.TestCase.settings = OutOfStep.TestCase.settings = PROFILE
TestInStep, TestOutOfStep = InStep.TestCase, OutOfStep.TestCase
