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
from diloco_ray.coordination.state import Rules, RunState, ended, plan_for

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
    plan: InnerPlan | None = None
    sent: int = 0  # fragments of the plan that have their verdict
    done_lease: str = ""
    fenced: bool = False
    hung: bool = False  # its heart beats, its work does not get on

    def contribution(self, fragment: int, payload: str = "") -> Contribution:
        assert self.plan is not None
        sha256 = payload or f"{self.name}/{self.plan.round}/{fragment}"
        return Contribution(
            "run",
            self.name,
            self.incarnation,
            fragment,
            self.plan.base_version,
            self.plan.lease_id,
            "int8",
            sha256,
            payload_bytes=100,
        )


@dataclass
class World:
    rules: Rules = RULES
    num_sequences: int = 64  # in one epoch
    now_s: float = 0.0
    life: int = 0
    held: bool = False  # jobs wait until `run_jobs`
    log: list[TakeOuterStep] = field(default_factory=list)
    jobs: deque[Inspect | TakeOuterStep] = field(default_factory=deque)
    islands: dict[str, ToyIsland] = field(default_factory=dict)
    verdicts: dict[Any, Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    closed: list[CloseRound] = field(default_factory=list)
    end: End | None = None
    taken: list[TakeOuterStep] = field(default_factory=list)  # by this coordinator, committed or not
    num_processes: int = 0
    state: RunState = field(init=False)

    def __post_init__(self) -> None:
        if len(self.rules.payload_bytes) != self.rules.num_fragments:
            self.rules = replace(self.rules, payload_bytes=(100,) * self.rules.num_fragments)
        self.start_coordinator()

    # ---- the coordinator ----

    def start_coordinator(self, *expected: str, within_s: float = 20.0) -> None:
        """A new life with nothing but the log."""
        self.life += 1
        self.jobs.clear()
        self.verdicts.clear()
        self.taken = []
        self.state = expect(self.recovered(), expected, now_s=self.now_s, within_s=within_s)
        self.check()

    def recovered(self) -> RunState:
        ledger = DataLedger((self.num_sequences,), TOKENS_PER_SEQUENCE, str(self.life))
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
        return Committed(self.now_s, step.fragment, step.base_version + 1, len(self.log))

    # ---- islands ----

    def join(self, *names: str) -> None:
        """New processes."""
        for name in names:
            self.num_processes += 1
            self.islands[name] = ToyIsland(name, f"process-{self.num_processes}")
            self.hello(name)

    def hello(self, name: str) -> Joined:
        """What the living process says first, and says again after a coordinator restart."""
        island = self.islands[name]
        event = Joined(self.now_s, name, island.process, island.incarnation, 1, "node", island.plan)
        self.receive(event)
        self.welcome(island)
        return event

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

    def fetch_plan(self, *names: str) -> None:
        for name in names or tuple(self.islands):
            island = self.islands[name]
            plan = plan_for(self.state, name, island.incarnation)
            if island.plan is None and plan and plan.lease_id != island.done_lease:
                island.plan, island.sent = plan, 0

    def send(self, name: str, fragment: int = 0, payload: str = "") -> Verdict:
        return self.submit(self.islands[name].contribution(fragment, payload))

    def submit(self, c: Contribution) -> Verdict:
        self.verdicts.pop((c.key, c.payload_sha256), None)
        self.receive(Submitted(self.now_s, c))
        return self.verdicts.get((c.key, c.payload_sha256), Verdict("pending"))

    def work(self, *names: str) -> list[Verdict]:
        """Each does its plan, sends what is left of its fragments, and says hello again where it is not known."""
        verdicts: list[Verdict] = []
        for name in names or tuple(self.islands):
            self.fetch_plan(name)
            island = self.islands[name]
            if island.plan is None:
                continue
            for fragment in range(island.sent, self.rules.num_fragments):
                verdict = self.send(name, fragment)
                if verdict.status == "unknown":
                    self.hello(name)
                    verdict = self.send(name, fragment)
                verdicts.append(verdict)
            island.done_lease, island.plan = island.plan.lease_id, None
        return verdicts

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
        return tuple(sorted(self.state.plans))

    def ranges(self, name: str) -> tuple[DataRange, ...]:
        return self.state.plans[name].ranges

    def standing(self, name: str) -> str:
        return self.state.members[name].standing

    # ---- what must always be true ----

    def check(self) -> None:
        state = self.state
        check_account(state.ledger.account())
        check_cover(state.ledger, [r for step in [*self.committed_before(), *self.taken] for r in spent_by(step)])
        plans = {plan.lease_id for plan in state.plans.values()}
        assert set(state.ledger.outstanding) <= plans, "a lease that nobody works on is outstanding"
        for name, plan in state.plans.items():
            assert plan.island == name
            assert plan.round == plan.base_version == state.round
        assert set(state.versions) <= {state.round, state.round + 1}
        assert state.round == min(state.versions)
        assert sum(state.versions) == state.index <= len(self.log)
        for key, item in state.inbox.items():
            assert key == item.contribution.key
            assert key[1] == state.versions[key[0]] == state.round
            assert item.norm is not None or key[0] not in state.stepping

    def committed_before(self) -> list[TakeOuterStep]:
        """By earlier coordinators."""
        mine = {id(step) for step in self.taken}
        return [step for step in self.log if id(step) not in mine]

    def check_log(self) -> None:
        """The newest record goes with those before it (I2, I4, I8, I9, I10)."""
        step = self.log[-1]
        check_account(dict(step.tokens))
        same = [other for other in self.log if other.fragment == step.fragment]
        assert [other.base_version for other in same] == list(range(len(same))), "versions have a gap or a twin"
        names = [share.island for share in step.shares]
        assert names == sorted(set(names)), "an island is in twice, or out of order"
        assert len(names) >= self.rules.min_islands
        assert {share.base_version for share in step.shares} == {step.base_version}
        assert not any(share.payload_sha256.startswith("nan") for share in step.shares)
        closing = step.fragment == self.rules.num_fragments - 1
        assert all(bool(share.spent) == bool(share.tokens) == closing for share in step.shares)
        check_no_overlap([r for other in self.log for r in spent_by(other)])
        tokens = sum(r.num_sequences for other in self.log for r in spent_by(other)) * TOKENS_PER_SEQUENCE
        assert step.tokens["committed"] == tokens


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
