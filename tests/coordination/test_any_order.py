"""Whatever happens, in whatever order: islands, losses, restarts, duplicates and bad payloads, drawn by hypothesis.

The toy world checks its invariants after every event. At the end of every story the world turns fair again, and the
run must get on: with enough healthy islands the round closes, though some island may hang for ever.
"""

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from toy_world import RULES, ToyIsland, World

from diloco_ray.coordination.messages import Committed, Contribution, Event, Heartbeat, Inspect, Left, Lost, Submitted
from diloco_ray.coordination.state import ended, plan_for

NAMES = ("a", "b", "c", "d")
names = st.sampled_from(NAMES)


class AnyOrder(RuleBasedStateMachine):
    world: World
    mail: list[Event]  # what islands and driver ever said: any of it may come once more

    @initialize(
        num_islands=st.integers(2, 4),
        num_fragments=st.sampled_from([1, 3]),
        min_islands=st.integers(1, 2),
        quorum=st.integers(1, 2),
        num_rounds=st.sampled_from([5, 1000]),
        num_sequences=st.sampled_from([6, 64]),
    )
    def start(self, num_islands: int, num_sequences: int, **changes: int) -> None:
        self.world = World(replace(RULES, **changes), num_sequences, held=True)
        self.world.start_coordinator(*NAMES[:num_islands])
        self.world.join(*NAMES[:num_islands])
        self.mail = []

    def say(self, event: Event) -> None:
        self.mail.append(event)
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

    # ---- contributions ----

    @rule(name=names, payload=st.sampled_from(["", "", "", "", "nan", "norm 1e9", "other", "codec"]))
    def an_island_sends_its_next_fragment(self, name: str, payload: str) -> None:
        island = self.at_work(name)
        if island:
            c = island.contribution(island.sent, payload)
            self.say(Submitted(self.world.now_s, replace(c, codec="float32") if payload == "codec" else c))
            self.hear_verdict(island, c)

    @rule(name=names, times=st.integers(1, 3))
    def an_island_sends_rubbish(self, name: str, times: int) -> None:
        for _ in range(times):
            island = self.at_work(name)
            if island:
                self.say(Submitted(self.world.now_s, island.contribution(island.sent, "nan")))
                self.world.run_jobs()
                island.plan = None

    @rule(name=names)
    def an_island_sends_all_it_has(self, name: str) -> None:
        self.send_all(name)

    @rule(without=names)
    def all_but_one_send_what_they_have(self, without: str) -> None:
        self.world.beat()
        for name in sorted(set(self.world.islands) - {without}):
            self.send_all(name)

    @rule(name=names, fragment=st.integers(0, 2), version=st.integers(0, 3))
    def an_island_sends_what_nobody_asked_for(self, name: str, fragment: int, version: int) -> None:
        island = self.at_work(name)
        if island:
            self.say(Submitted(self.world.now_s, replace(island.contribution(fragment), base_version=version)))

    def at_work(self, name: str) -> ToyIsland | None:
        island = self.world.islands.get(name)
        if island is None or island.fenced or island.hung:
            return None
        self.world.fetch_plan(name)
        return island if island.plan else None

    def send_all(self, name: str) -> None:
        """One fragment after the other, each with its verdict, as an island does it."""
        for _ in range(2 * self.world.rules.num_fragments):
            island = self.at_work(name)
            if island:
                c = island.contribution(island.sent)
                self.say(Submitted(self.world.now_s, c))
                self.world.run_jobs()
                self.hear_verdict(island, c)

    def hear_verdict(self, island: ToyIsland, c: Contribution) -> None:
        verdict = self.world.verdicts.get((c.key, c.payload_sha256))
        if verdict is None or island.plan is None:
            return
        if verdict.status == "unknown":
            self.world.hello(island.name)
            return
        island.sent += 1
        if island.sent == self.world.rules.num_fragments:
            island.done_lease, island.plan = island.plan.lease_id, None

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
        for _ in range(60):
            if ended(world.state) or world.state.round >= goal:
                return
            for name in NAMES:
                barred = name in world.state.members and world.standing(name) == "quarantined"
                missing = name not in world.islands or world.islands[name].fenced
                if missing and not barred and world.now_s % 2.0 < 1.0:
                    world.join(name)
            world.run_jobs()
            for name in world.islands:
                self.send_all(name)
            world.run_jobs()
            world.pass_time(5.0)
        healthy = [i for i in world.islands.values() if not i.hung and world.standing(i.name) == "alive"]
        enough = max(world.rules.min_islands, world.rules.quorum)
        assert len(healthy) < enough, f"round {world.state.round + 1} does not close: {world.state}"
        for name, island in world.islands.items():
            assert island.hung or plan_for(world.state, name, island.incarnation) is None or island.done_lease


AnyOrder.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase
