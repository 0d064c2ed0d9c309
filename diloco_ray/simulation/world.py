"""One story: a run with its coordinator and islands, what goes wrong in it, and who starts again what has died.

The world plays the driver's part, and where the run ends with an error of its storage, the user's, who gives the same
command again. Equal scenario and seed, equal trace.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from diloco_ray.coordination.state import RunState, ended
from diloco_ray.document import replica_of
from diloco_ray.ids import island_name, sha256_hex
from diloco_ray.log.verify import verify
from diloco_ray.simulation.audit import Audit, BrokenInvariantError
from diloco_ray.simulation.beginning import Beginning, forget
from diloco_ray.simulation.faults import Faults
from diloco_ray.simulation.green import Hub
from diloco_ray.simulation.network import Network
from diloco_ray.simulation.processes import CoordinatorLife, IslandLife
from diloco_ray.simulation.scenario import Fault, Scenario, of_these

RESTART_S = (1.0, 4.0)  # until the driver has noticed a death and started another process
AGAIN_S = 30.0  # until the user gives the same command again
MOST_COMMANDS = 30
ISLANDS_END_S = 1000.0  # by then every island has heard of the end, or its deadline is over


@dataclass(frozen=True)
class Story:
    """How it went. problem is "" where every invariant held."""

    seed: int
    faults: tuple[Fault, ...]
    problem: str
    trace: tuple[str, ...]
    virtual_s: float
    outer_steps: int
    contributions: int
    messages: int
    num_struck: int  # faults that found somebody to strike

    @property
    def trace_sha256(self) -> str:
        return sha256_hex("\n".join(self.trace).encode())


class World:
    def __init__(self, scenario: Scenario, beginning: Beginning, seed: int, which: Sequence[int] | None = None):
        """which: numbers of the faults that happen; all, if not given."""
        self._scenario, self._seed = scenario, seed
        drawn = scenario.chance.draw(random.Random(f"faults {seed}"), beginning.max_islands)
        self.hub = Hub(random.Random(f"world {seed}"))
        self._faults = Faults(self, of_these([*scenario.faults, *drawn], which))
        self._store = beginning.copied_to(self._faults.tap)
        self._coordinator_job, self._island_job = beginning.coordinator_job, beginning.island_job(self._store)
        self._speed_of = beginning.speed_of
        self.audit = Audit(self._coordinator_job, self._store)
        self.network = Network(self.hub, scenario.network, lambda: self.coordinator)
        self.coordinator: CoordinatorLife | None = None
        self.coordinators: list[CoordinatorLife] = []  # all that were ever started
        self.islands: dict[str, IslandLife] = {}
        self.usurped: list[IslandLife] = []
        self.trace: list[str] = []
        self._num_told = 0
        self._seen: RunState | None = None
        self._num_processes = self._num_commands = 0
        self.outcome = ""
        self._names = [island_name(number) for number in range(beginning.max_islands)]
        self.hub.after_each = self._look

    # ---- a story ----

    def play(self) -> Story:
        self._faults.begin()
        self._give_command()
        problem = ""
        try:
            self.hub.run(self._scenario.longest_s, lambda: bool(self.outcome))
            self.audit.require(bool(self.outcome), "I11", f"not over after {self.hub.now_s:.0f} s: {self._waits()}")
            self._prove()
            self.hub.run(self.hub.now_s + ISLANDS_END_S, lambda: not self._at_work())
            self.audit.require(not self._at_work(), "I11", f"over, and {', '.join(self._at_work())} goes on")
        except BrokenInvariantError as error:
            problem = str(error)
        except Exception as error:  # the product must not raise, whatever happened to it
            problem = f"{type(error).__name__}: {error}"
            self.tell("world", problem)
        finally:
            self._end_all()
            forget(self._store)
        return Story(
            self._seed,
            tuple(self._faults.all),
            problem,
            tuple(self.trace),
            self.hub.now_s,
            self.audit.num_steps,
            self.audit.num_contributions,
            self.network.num_messages,
            self._faults.num_struck,
        )

    def tell(self, who: str, what: str) -> None:
        self.trace.append(f"{self.hub.now_s:9.3f}  {who}: {what}")

    def _look(self) -> None:
        """Between any two moments: the invariants, the news, the faults that wait for a round."""
        life = self.coordinator
        coordinator = life.coordinator if life else None
        if life is None or coordinator is None:
            return
        state = coordinator.state
        is_news, self._seen = state is not self._seen, state  # a state never changes: one look at each is enough
        if is_news and not life.is_fenced:
            self.audit.looked_at(state, coordinator.fence_epoch)
        for event in coordinator.report.own_events_after(self._num_told):
            self._num_told += 1
            if text := event.get("text"):
                self.tell("coordinator", text)
            elif event["event"] in ("outer_step", "round"):
                self.tell("coordinator", f"{event['event']} {event.get('outer_step', event.get('round'))}")
        if is_news:
            self._faults.rounds_done(state.round)
        if ended(state) and life.process.is_alive and not self.outcome:
            self._over(life, state.phase, state.reason, coordinator.error is not None)

    def _over(self, life: CoordinatorLife, phase: str, reason: str, by_error: bool) -> None:
        if not by_error:
            if life.has_finished():
                self.outcome = phase if phase == "succeeded" else f"{phase}: {reason}"
            return
        self.tell("world", f"the run ended: {reason}; the same command will be given again")
        self._end_all()
        self.hub.call_later(AGAIN_S, self._give_command)

    def _end_all(self) -> None:
        self.coordinator = None
        for life in [*self.coordinators, *self.islands.values(), *self.usurped]:
            life.process.on_end = lambda reason: None
            life.process.kill("ended")

    def _at_work(self) -> list[str]:
        """Islands whose process lives, and is not stopped."""
        lives = self.islands.values()
        return [life.name for life in lives if life.process.is_alive and not life.process.is_frozen]

    def _waits(self) -> str:
        life = self.coordinator
        if life is None or life.coordinator is None:
            return "no coordinator"
        state = life.coordinator.state
        return f"{state.phase}, round {state.round}, {', '.join(state.alive) or 'nobody'} alive; {state.reason}"

    def _prove(self) -> None:
        may_fail = self._scenario.may_fail and self.outcome.startswith("failed")
        self.audit.require(self.outcome == "succeeded" or may_fail, "I16", self.outcome)
        report = verify(self._store, replica_of)
        self.audit.require(report.ok, "verify", "; ".join(report.problems[:3]))

    # ---- processes ----

    def _give_command(self) -> None:
        self._num_commands += 1
        self.audit.require(self._num_commands <= MOST_COMMANDS, "I16", "the run does not come to its end")
        self.start_coordinator()
        for name in self._names:
            self.start_island(name)

    def start_coordinator(self) -> None:
        self._num_processes += 1
        life = CoordinatorLife(self.hub, self._num_processes, self._store, self._coordinator_job, self.audit)
        self.coordinators.append(life)
        self.coordinator, self._num_told = life, 0
        self.tell("world", f"coordinator process {self._num_processes}")
        life.process.on_end = lambda reason: self._coordinator_ended(life, reason)

    def _coordinator_ended(self, life: CoordinatorLife, reason: str) -> None:
        self.tell("world", f"the coordinator's process ended: {reason}")
        if self.coordinator is life:
            self.coordinator = None
            self.hub.call_later(self.hub.rng.uniform(*RESTART_S), self._restart_coordinator)

    def _restart_coordinator(self) -> None:
        if self.coordinator is None:
            self.start_coordinator()

    def start_island(self, name: str) -> None:
        if name in self.islands and self.islands[name].process.is_alive:
            return
        if (away_s := self._faults.away_s(name)) > 0:
            self.hub.call_later(away_s, lambda: self.start_island(name))
            return
        self._num_processes += 1
        speed = self._faults.slowness.get(name, 1.0) * self._speed_of(self._names.index(name))
        life = IslandLife(self.hub, self._island_job, name, self._num_processes, self.network, self.audit, speed)
        self.islands[name] = life
        self.tell("world", f"{name}: process {self._num_processes}")
        life.process.on_end = lambda reason: self._island_ended(life, reason)

    def _island_ended(self, life: IslandLife, reason: str) -> None:
        self.tell("world", f"a process of {life.name} ended{f': {reason}' if reason else ''}")
        if self.islands.get(life.name) is not life or self.outcome or not reason:
            return
        delay_s = self.hub.rng.uniform(*RESTART_S)
        self.hub.call_later(delay_s, lambda: self._say_lost(life, reason))
        self.hub.call_later(delay_s, lambda: self.start_island(life.name))

    def _say_lost(self, life: IslandLife, reason: str) -> None:
        """The driver's word, which may be lost: heartbeats make that good."""
        coordinator = self.coordinator
        if coordinator is not None and coordinator.process.is_alive and self.hub.rng.random() < 0.8:
            told = (life.name, life.identity.process, reason)
            coordinator.process.start("lost", lambda: coordinator.answer("lost", told))
