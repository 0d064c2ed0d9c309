"""A toy world around the reducer: islands with verbs, a coordinator that can die, a clock that moves when told.

Jobs (inspections, outer steps) run in order, at once unless the world is told to hold them. After every event the
world checks what must always be true.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from diloco_ray.coordination.data_ledger import FATES, DataLedger
from diloco_ray.coordination.membership import is_current, may_return
from diloco_ray.coordination.messages import (
    Answer,
    CloseRound,
    Command,
    Committed,
    Contribution,
    DataRange,
    End,
    Event,
    Heartbeat,
    InnerPlan,
    Inspect,
    Inspected,
    Joined,
    Left,
    Lost,
    Note,
    Submitted,
    TakeOuterStep,
    Tick,
    Verdict,
)
from diloco_ray.coordination.recovery import expect, recover
from diloco_ray.coordination.reducer import reduce
from diloco_ray.coordination.rounds import next_look_s
from diloco_ray.coordination.state import Key, Rules, RunState, ended, plan_for

TOKENS_PER_SEQUENCE = 8
RULES = Rules(
    run_id="run",
    num_rounds=100,
    inner_steps_per_round=2,
    sequences_per_inner_step=2,
    num_fragments=1,
    min_islands=2,
    max_islands=8,
    uplink="int8",
    payload_bytes=(100,),
    quorum=2,
    grace_s=10.0,
    heartbeat_timeout_s=30.0,
    waiting_timeout_s=100.0,
)


@dataclass
class ToyIsland:
    """What an island's process remembers."""

    name: str
    process: str
    incarnation: int = 0
    plans: list[InnerPlan] = field(default_factory=list)  # work in hand, oldest first
    sent: int = 0  # fragments of the first plan that have their verdict
    begun: str = ""  # lease of the first plan, when it is begun
    stands_at: int = -1  # the round whose plan it goes on with from its own parameters
    bases: tuple[int, ...] = ()  # versions that its contributions are measured from
    outgoing: list[tuple[InnerPlan, Contribution]] = field(default_factory=list)  # sent; their fate is not known
    newest_lease: str = ""
    step_s: float = 0.0  # what it says that an inner step takes
    other_s: float = 0.0  # between two contributions, beside inner steps
    digests_differ: bool = False
    fenced: bool = False
    hung: bool = False  # its heart beats, its work does not get on

    @property
    def plan(self) -> InnerPlan | None:
        return self.plans[0] if self.plans else None

    @property
    def held(self) -> tuple[InnerPlan, ...]:
        by_lease = {plan.lease_id: plan for plan in [*(plan for plan, _ in self.outgoing), *self.plans]}
        return tuple(sorted(by_lease.values(), key=lambda plan: plan.round))

    def forget(self, leases: set[str]) -> None:
        """Work that has become void leaves no trace."""
        if self.plan and self.plan.lease_id in leases:
            self.sent, self.stands_at = 0, -1
        self.plans = [plan for plan in self.plans if plan.lease_id not in leases]
        self.outgoing = [(plan, c) for plan, c in self.outgoing if plan.lease_id not in leases]

    def contribution(self, fragment: int, payload: str = "") -> Contribution:
        assert self.plan is not None
        work = f"{self.name}/{self.plan.round}/{fragment}" + f"/{self.plan.lease_id}" * self.digests_differ
        return Contribution(
            run_id="run",
            island=self.name,
            incarnation=self.incarnation,
            fragment=fragment,
            round=self.plan.round,
            base_version=self.bases[fragment],
            inner_steps=self.plan.inner_steps,
            lease_id=self.plan.lease_id,
            codec="int8",
            payload_sha256=payload or work,
            payload_bytes=100,
            metrics={
                "inner_seconds": self.step_s * self.plan.inner_steps,
                "sync_wait_seconds": self.other_s,
                "tokens": float(sum(r.num_sequences for r in self.plan.ranges) * TOKENS_PER_SEQUENCE),
            },
        )


@dataclass
class World:
    rules: Rules = RULES
    shard_sizes: tuple[int, ...] = (64,)  # sequences in one epoch
    now_s: float = 0.0
    life: int = 0
    held: bool = False  # jobs wait until `run_jobs`
    digests_differ: bool = False  # of work that is done once more
    log: list[TakeOuterStep] = field(default_factory=list)
    jobs: deque[Inspect | TakeOuterStep] = field(default_factory=deque)
    islands: dict[str, ToyIsland] = field(default_factory=dict)
    verdicts: dict[Any, Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    closed: list[CloseRound] = field(default_factory=list)
    end: End | None = None
    taken: list[TakeOuterStep] = field(default_factory=list)  # by this coordinator, committed or not
    accepted: dict[Key, Contribution] = field(default_factory=dict)  # by this coordinator
    log_versions: list[int] = field(init=False)  # per fragment
    log_rounds: dict[Key, str] = field(default_factory=dict)  # what is committed, with its digest
    claimed: set[tuple[str, str]] = field(default_factory=set)  # islands, and leases that they say they were given
    num_processes: int = 0
    state: RunState = field(init=False)

    def __post_init__(self) -> None:
        if len(self.rules.payload_bytes) != self.rules.num_fragments:
            self.rules = replace(self.rules, payload_bytes=(100,) * self.rules.num_fragments)
        self.log_versions = [0] * self.rules.num_fragments
        self.start_coordinator()

    # ---- the coordinator ----

    def start_coordinator(self, *expected: str, within_s: float = 20.0) -> None:
        """A new life with nothing but the log."""
        self.life += 1
        self.jobs.clear()
        self.verdicts.clear()
        self.taken = []
        self.accepted.clear()
        self.state = expect(self.recovered(), expected, now_s=self.now_s, within_s=within_s)
        self.check()

    def recovered(self) -> RunState:
        ledger = DataLedger(self.shard_sizes, TOKENS_PER_SEQUENCE, str(self.life))
        fresh = RunState(self.rules, ledger, versions=(0,) * self.rules.num_fragments)
        return recover(fresh, self.log)

    def restart_coordinator(self, **options: float) -> None:
        """As the coordinator does it: whoever is in the newest record is expected back."""
        last = [share.island for share in self.log[-1].shares] if self.log else list(self.islands)
        self.start_coordinator(*last, **options)

    def receive(self, event: Event) -> list[Command]:
        was, self.commands = self.state, []
        self.state, commands = reduce(self.state, event)
        for command in commands:
            self.perform(command)
        self.check()
        assert not ended(was) or self.state.phase == was.phase
        if not self.held:
            self.run_jobs()
        return commands

    def perform(self, command: Command) -> None:
        match command:
            case Inspect():
                self.jobs.append(command)
            case TakeOuterStep():
                self.jobs.append(command)
                self.taken.append(command)
            case Answer(contribution, verdict):
                self.verdicts[contribution.key, contribution.payload_sha256] = verdict
                if verdict.status == "accepted":
                    self.accepted[contribution.key] = self.state.inbox[contribution.key].contribution
            case CloseRound():
                self.closed.append(command)
            case Note(text):
                self.notes.append(text)
            case End():
                self.end = command

    def run_jobs(self) -> None:
        while self.jobs:
            self.run_job()

    def run_job(self) -> Inspected | Committed:
        job = self.jobs.popleft()
        event = self.inspect(job.contribution) if isinstance(job, Inspect) else self.commit(job)
        self.receive(event)
        return event

    def inspect(self, c: Contribution) -> Inspected:
        """Payloads say what they are: "nan ...", "norm 1e9 ..."."""
        words = c.payload_sha256.split()
        problem = "values: not finite" if words[0] == "nan" else ""
        return Inspected(self.now_s, c, float(words[1]) if words[0] == "norm" else 1.0, problem)

    def commit(self, step: TakeOuterStep) -> Committed:
        self.log.append(step)
        self.check_log()
        self.log_versions[step.fragment] += 1
        for share in step.shares:
            self.log_rounds[step.fragment, share.round, share.island] = share.payload_sha256
        return Committed(self.now_s, step.fragment, step.base_version + 1, len(self.log))

    # ---- islands ----

    def join(self, *names: str) -> None:
        """New processes."""
        for name in names:
            self.num_processes += 1
            self.islands[name] = ToyIsland(name, f"process-{self.num_processes}", digests_differ=self.digests_differ)
            self.hello(name)

    def hello(self, name: str) -> Joined:
        """What the living process says first, and says again after a coordinator restart."""
        island = self.islands[name]
        event = Joined(self.now_s, name, island.process, island.incarnation, 1, "node", island.held)
        self.receive(event)
        self.welcome(island)
        if not island.fenced:
            self.send_again(island)
        return event

    def send_again(self, island: ToyIsland, verdict: str = "") -> None:
        """All, or what had this verdict. A restarted coordinator has lost what was accepted and not committed."""
        for plan, c in list(island.outgoing):
            had = self.verdicts.get((c.key, c.payload_sha256), Verdict("unknown")).status
            if not self.is_final(c) and verdict in ("", had):
                self.hear(island, plan, c, self.submit(c))

    def welcome(self, island: ToyIsland) -> None:
        member = self.state.members[island.name]
        if member.standing == "alive" and member.process == island.process:
            island.incarnation = member.incarnation
        else:
            island.fenced = True

    def beat(self, *names: str) -> None:
        for name in names or tuple(self.islands):
            island = self.islands[name]
            if island.fenced:
                continue
            self.receive(Heartbeat(self.now_s, name, island.incarnation))
            self.abandon(island)
            if not is_current(self.state.members, name, island.incarnation):
                if may_return(self.state.members, name, island.incarnation):
                    self.hello(name)
                else:
                    island.fenced = True

    def lose(self, *names: str) -> None:
        """The driver sees the process die."""
        for name in names:
            island = self.islands.pop(name)
            self.receive(Lost(self.now_s, name, island.process, "killed"))

    def vanish(self, *names: str) -> None:
        """The process dies and nobody says so."""
        for name in names:
            del self.islands[name]

    def leave(self, *names: str) -> None:
        for name in names:
            island = self.islands.pop(name)
            self.receive(Left(self.now_s, name, island.incarnation, "preempted"))

    def abandon(self, island: ToyIsland) -> None:
        """The answer to a beat: work in hand whose lease has ended is void."""
        if is_current(self.state.members, island.name, island.incarnation):
            while island.plan and island.plan.lease_id not in self.state.ledger.outstanding:
                island.forget({island.plan.lease_id})

    def fetch_plan(self, *names: str) -> None:
        """What is given replaces what was given for the same round."""
        for name in names or tuple(self.islands):
            island = self.islands[name]
            island.outgoing = [(plan, c) for plan, c in island.outgoing if not self.is_final(c)]
            self.send_again(island, "full")
            while plan := plan_for(self.state, name, island.incarnation, island.newest_lease):
                island.forget({old.lease_id for old in island.held if old.round >= plan.round} - {plan.lease_id})
                island.newest_lease = plan.lease_id
                if plan.lease_id not in {old.lease_id for old in island.held}:
                    island.plans.append(plan)
            self.begin(island)

    def begin(self, island: ToyIsland) -> None:
        """From its own parameters, or afresh from the global ones, once they are those that the round begins with."""
        plan = island.plan
        if plan is None or island.begun == plan.lease_id:
            return
        first = max(0, plan.first_round - self.lag)
        if self.rules.in_step and island.stands_at == plan.first_round:
            island.begun, island.bases = plan.lease_id, (first,) * self.rules.num_fragments
        elif not self.rules.in_step or min(self.log_versions) >= plan.first_round:
            island.begun, island.bases, island.stands_at = plan.lease_id, tuple(self.log_versions), -1

    @property
    def lag(self) -> int:
        """With a whole round of overlap an island sends a fragment again before it has merged its last outer step."""
        return int(self.rules.overlap >= self.rules.inner_steps_per_round)

    def is_final(self, c: Contribution) -> bool:
        if self.rules.in_step:
            return self.log_versions[c.fragment] > c.round
        return any((c.fragment, c.island) == (p, name) and c.round <= round for p, round, name in self.log_rounds)

    def may_send(self, island: ToyIsland, fragment: int) -> bool:
        """An island merges before it sends again, or where its steps are in time with nobody's, when it comes to it."""
        plan = island.plan
        if plan is None or island.begun != plan.lease_id:
            return False
        if self.rules.in_step:
            begins_afresh, late = island.stands_at != plan.first_round, int(self.rules.overlap > 0)
            merged = [0] * fragment + [self.lag] + [late] * (self.rules.num_fragments - fragment - 1)
            return begins_afresh or all(
                version >= plan.first_round - behind for version, behind in zip(self.log_versions, merged)
            )
        if self.rules.closes == "quorum" and self.rules.overlap:
            return True
        unmerged = [c for _, c in island.outgoing if not self.is_final(c)]
        if not self.rules.overlap:
            return not unmerged
        return len([c for c in unmerged if c.fragment == fragment]) <= self.lag

    def send(self, name: str, fragment: int = 0, payload: str = "") -> Verdict:
        island = self.islands[name]
        plan, c = island.plan, island.contribution(fragment, payload)
        assert plan is not None
        verdict = self.submit(c)
        self.hear(island, plan, c, verdict)
        return verdict

    def hear(self, island: ToyIsland, plan: InnerPlan, c: Contribution, verdict: Verdict) -> None:
        known = plan in self.state.plans.get(island.name, ())
        assert not known or "begins at" not in verdict.reason, "an honest island's base is refused"
        island.outgoing = [item for item in island.outgoing if item[1].key != c.key]
        if verdict.status != "rejected":
            island.outgoing.append((plan, c))

    def submit(self, c: Contribution) -> Verdict:
        self.verdicts.pop((c.key, c.payload_sha256), None)
        self.receive(Submitted(self.now_s, c))
        return self.verdicts.get((c.key, c.payload_sha256), Verdict("pending"))

    def work(self, *names: str) -> list[Verdict]:
        """Each does one plan, sends what is left of its fragments, and says hello again where it is not known."""
        verdicts: list[Verdict] = []
        for name in names or tuple(self.islands):
            self.fetch_plan(name)
            island = self.islands[name]
            while (plan := island.plan) and self.may_send(island, island.sent):
                fragment = island.sent
                if not self.has_closed(plan, fragment):
                    verdict = self.send(name, fragment)
                    if verdict.status == "unknown":
                        c = island.outgoing[-1][1]
                        self.hello(name)
                        verdict = self.verdicts.get((c.key, c.payload_sha256), Verdict("pending"))
                    verdicts.append(verdict)
                if self.sent_one(island):
                    break
        return verdicts

    def has_closed(self, plan: InnerPlan, fragment: int) -> bool:
        return self.rules.in_step and self.log_versions[fragment] > plan.round

    def sent_one(self, island: ToyIsland) -> bool:
        """On to the next fragment; whether the plan is done."""
        island.sent += 1
        if island.sent < self.rules.num_fragments:
            return False
        island.stands_at = island.plans[0].round + 1
        island.plans, island.sent = island.plans[1:], 0
        return True

    def look(self) -> None:
        """Time passes to when the coordinator may do something though nothing happens."""
        look_s = next_look_s(self.state)
        assert look_s is not None
        self.now_s = max(self.now_s, look_s)
        self.receive(Tick(self.now_s))

    def pass_time(self, seconds: float, *, beating: Sequence[str] | None = None) -> None:
        """Time passes in small steps, in which the living beat."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s = min(self.now_s + 5.0, until_s)
            self.beat(*self.islands) if beating is None else [self.beat(name) for name in beating]
            self.receive(Tick(self.now_s))

    # ---- what tests ask ----

    @property
    def at_work(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, plans in self.state.plans.items() if plans))

    def plan(self, name: str, number: int = 0) -> InnerPlan:
        return self.state.plans[name][number]

    def ranges(self, name: str, number: int = 0) -> tuple[DataRange, ...]:
        return self.plan(name, number).ranges

    def rounds(self, name: str) -> list[int]:
        """That the island holds work for."""
        return [plan.round for plan in self.state.plans.get(name, ())]

    def standing(self, name: str) -> str:
        return self.state.members[name].standing

    def shares(self, index: int = -1) -> list[tuple[str, int]]:
        """Island and round of all that an outer step took in."""
        return [(share.island, share.round) for share in self.log[index].shares]

    # ---- what must always be true ----

    def check(self) -> None:
        state, in_step = self.state, self.rules.in_step
        check_account(state.ledger.account())
        check_cover(state.ledger, [r for step in [*self.committed_before(), *self.taken] for r in spent_by(step)])
        self.check_plans()
        assert sum(state.versions) == state.index <= len(self.log)
        if in_step:
            assert state.round == min(state.versions) == state.versions[-1]
            ahead = 2 if self.rules.overlap else 1
            assert self.rules.drop_probability or max(state.versions) <= state.round + ahead
        for key, item in state.inbox.items():
            assert key == item.contribution.key
            assert item.lease.island == key[2]
            assert not in_step or key[1] >= state.versions[key[0]], "what has come too late is kept"
        for fragment, keys in state.stepping.items():
            assert len(set(keys)) == len(keys) > 0
            assert all(key[0] == fragment and state.inbox[key].norm is not None for key in keys)
        for key, c in list(self.accepted.items()):
            if self.log_rounds.get(key) == c.payload_sha256 or c.lease_id not in state.ledger.outstanding:
                del self.accepted[key]  # an island that comes back to the same lease sends it again
                continue
            assert key in state.inbox, f"{key} was accepted and is gone"

    def check_plans(self) -> None:
        state, ledger = self.state, self.state.ledger
        leases = [plan.lease_id for plans in state.plans.values() for plan in plans]
        assert len(set(leases)) == len(leases)
        assert set(ledger.outstanding) <= set(leases), "a lease that nobody works on is outstanding"
        for name, plans in state.plans.items():
            given = [plan for plan in state.open_plans(name) if plan.lease_id.startswith(f"{self.life}.")]
            given = [plan for plan in given if (name, plan.lease_id) not in self.claimed]
            assert len(given) <= (2 if self.rules.overlap else 1)
            for one, following in pairwise(plans):
                assert following.first_round == one.round + 1
            if plans and self.rules.in_step:
                assert plans[0].first_round <= state.round <= plans[0].round
                assert plans[-1].round < self.rules.num_rounds
            for plan in plans:
                assert plan.island == name
                assert sum(r.num_sequences for r in plan.ranges) == plan.inner_steps * RULES.sequences_per_inner_step
                assert 0 < plan.inner_steps - plan.silent_steps <= self.rules.inner_steps_per_round
                assert self.rules.drop_probability or not plan.silent_steps
                if lease := ledger.outstanding.get(plan.lease_id):
                    assert (lease.island, lease.ranges) == (name, plan.ranges)

    def committed_before(self) -> list[TakeOuterStep]:
        """By earlier coordinators."""
        mine = {id(step) for step in self.taken}
        return [step for step in self.log if id(step) not in mine]

    def check_log(self) -> None:
        """The newest record goes with those before it (I2, I4, I8, I9, I10)."""
        step, rules = self.log[-1], self.rules
        check_account(dict(step.tokens))
        same = [other for other in self.log if other.fragment == step.fragment]
        assert [other.base_version for other in same] == list(range(len(same))), "versions have a gap or a twin"
        keys = [(share.island, share.round) for share in step.shares]
        assert keys == sorted(set(keys)), "a contribution is in twice, or out of order"
        assert not any((step.fragment, round, name) in self.log_rounds for name, round in keys), "committed twice"
        assert not any(share.payload_sha256.startswith("nan") for share in step.shares)
        assert all(share.base_version <= step.base_version for share in step.shares)
        closing = step.fragment == rules.num_fragments - 1
        assert all(bool(share.spent) == bool(share.tokens) == closing for share in step.shares)
        check_no_overlap([r for other in self.log for r in spent_by(other)])
        tokens = sum(r.num_sequences for other in self.log for r in spent_by(other)) * TOKENS_PER_SEQUENCE
        assert step.tokens["committed"] == tokens
        if rules.in_step:
            self.check_in_step(step)
        else:
            per_round = rules.max_islands * rules.sequences_per_round * TOKENS_PER_SEQUENCE
            assert step.round == min(rules.num_rounds, tokens // per_round)
            assert len(keys) == 1 or rules.closes == "quorum"

    def check_in_step(self, step: TakeOuterStep) -> None:
        """All for the one round, from where it began (for islands whose contributions are dropped: earlier)."""
        rules = self.rules
        assert step.round == min(v + (p == step.fragment) for p, v in enumerate(self.log_versions))
        assert {share.round for share in step.shares} == {step.base_version}
        if not rules.drop_probability:
            assert min(share.base_version for share in step.shares) >= step.base_version - self.lag
            assert len(step.shares) >= min(rules.min_islands, rules.islands_in(step.base_version))
            if step.fragment == rules.num_fragments - 1:  # others have what the lost had sent before their leases ended
                assert len(step.shares) <= rules.islands_in(step.base_version)


def at_work(*names: str, **changes: object) -> World:
    """A world whose first round is open, with these islands in it."""
    world = World(replace(RULES, **changes))
    world.start_coordinator(*names)
    world.join(*names)
    world.fetch_plan()
    return world


def spent_by(step: TakeOuterStep) -> list[DataRange]:
    return [r for share in step.shares for r in share.spent]


def check_account(account: dict[str, int]) -> None:
    """I8."""
    assert account["leased"] == sum(account[fate] for fate in FATES) + account["outstanding"]
    assert min(account.values()) >= 0


def check_no_overlap(ranges: list[DataRange]) -> None:
    """I9."""
    for one, next_one in pairwise(sorted(ranges)):
        apart = (one.shard, one.epoch) < (next_one.shard, next_one.epoch) or one.stop <= next_one.start
        assert apart, f"{one} and {next_one} overlap"


def check_cover(ledger: DataLedger, spent: list[DataRange]) -> None:
    """Every sequence before its shard's cursor is in exactly one place: spent, outstanding or returned."""
    outstanding = [r for lease in ledger.outstanding.values() for r in lease.ranges]
    everything = spent + outstanding + [r for r, _ in ledger.returned]
    check_no_overlap(everything)
    for shard, size in enumerate(ledger.shard_sizes):
        ranges = [r for r in everything if r.shard == shard]
        epoch, position = ledger.cursor(shard)
        assert all(0 <= r.start < r.stop <= size for r in ranges)
        assert sum(r.num_sequences for r in ranges) == epoch * size + position
        assert not ranges or (max(ranges).epoch, max(ranges).stop) <= ledger.cursor(shard)
    assert {r.shard for r in everything} <= set(range(len(ledger.shard_sizes)))
