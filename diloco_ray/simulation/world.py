"""One story: a run with its coordinator and islands, what goes wrong in it, and who starts again what has died.

The world plays the driver's part, and where the run ends with an error of its storage, the user's, who gives the same
command again. Equal scenario and seed, equal trace.
"""

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass

from diloco_ray.coordination.state import ended
from diloco_ray.document import replica_of
from diloco_ray.ids import island_name, sha256_hex
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.run import Run
from diloco_ray.simulation.audit import Audit, BrokenInvariantError
from diloco_ray.simulation.beginning import Beginning, forget
from diloco_ray.simulation.green import Hub, Process
from diloco_ray.simulation.network import Network
from diloco_ray.simulation.processes import CoordinatorLife, IslandLife
from diloco_ray.simulation.scenario import Fault, Scenario, of_these
from diloco_ray.simulation.storage import IOCall
from diloco_ray.simulation.tampering import tampered

RESTART_S = (1.0, 4.0)  # until the driver has noticed a death and started another process
AGAIN_S = 30.0  # until the user gives the same command again
MOST_COMMANDS = 30
STORAGE_S = 0.02  # one call of the storage, at most
SLUGGISH_S = 5.0


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
        drawn = scenario.chance.draw(random.Random(f"faults {seed}"), beginning.run.config.max_islands)
        self.faults = of_these([*scenario.faults, *drawn], which)
        self._rng = random.Random(f"world {seed}")
        self.hub = Hub(self._rng)
        self._run: Run = beginning.run_in(beginning.copied_to(_Tap(self).call))
        self._coordinator_job, self._island_job = self._run.coordinator_job(), self._run.island_job()
        self.audit = Audit(self._run, beginning.store)
        self._network = Network(self.hub, scenario.network, lambda: self.coordinator)
        self.coordinator: CoordinatorLife | None = None
        self.coordinators: list[CoordinatorLife] = []  # all that were ever started
        self.islands: dict[str, IslandLife] = {}
        self._usurped: list[IslandLife] = []
        self._away: dict[str, float] = {}  # islands that left, until when
        self._speeds: dict[str, float] = {}
        self.trace: list[str] = []
        self._num_told = 0
        self._num_processes = self._num_commands = self._num_struck = 0
        self._outcome = ""
        self.full_until_s = self.sluggish_until_s = -1.0
        self._names = [island_name(number) for number in range(self._run.config.max_islands)]
        self._after_rounds = [fault for fault in self.faults if fault.after_round is not None]
        self.hub.after_each = self._look

    # ---- a story ----

    def play(self) -> Story:
        for fault in self.faults:
            if fault.at_s is not None:
                self.hub.call_later(fault.at_s, lambda fault=fault: self.strike(fault))
        self._give_command()
        problem = ""
        try:
            self.hub.run(self._scenario.longest_s, lambda: bool(self._outcome))
            self.audit.require(bool(self._outcome), "I11", f"not over after {self.hub.now_s:.0f} s: {self._waits()}")
            self._prove()
        except BrokenInvariantError as error:
            problem = str(error)
        except Exception as error:  # the product must not raise, whatever happened to it
            problem = f"{type(error).__name__}: {error}"
            self.tell("world", problem)
        finally:
            self._end_all()
            forget(self._run.store)
        return Story(
            self._seed,
            tuple(self.faults),
            problem,
            tuple(self.trace),
            self.hub.now_s,
            self.audit.num_steps,
            self.audit.num_contributions,
            self._network.num_messages,
            self._num_struck,
        )

    def tell(self, who: str, what: str) -> None:
        self.trace.append(f"{self.hub.now_s:9.3f}  {who}: {what}")

    def _look(self) -> None:
        """Between any two moments: the invariants, the news, the faults that wait for a round."""
        life = self.coordinator
        coordinator = life.coordinator if life else None
        if life is None or coordinator is None:
            return
        if not life.is_fenced:
            self.audit.looked_at(coordinator.state)
        events = coordinator.report.own_events
        while self._num_told < len(events):
            event = events[self._num_told]
            self._num_told += 1
            if text := event.get("text"):
                self.tell("coordinator", text)
            elif event["event"] in ("outer_step", "round"):
                self.tell("coordinator", f"{event['event']} {event.get('outer_step', event.get('round'))}")
        for fault in [f for f in self._after_rounds if coordinator.state.round >= (f.after_round or 0)]:
            self._after_rounds.remove(fault)
            self.strike(fault)
        if ended(coordinator.state) and life.process.is_alive:
            self._over(life, coordinator.state.phase, coordinator.state.reason, coordinator.error is not None)

    def _over(self, life: CoordinatorLife, phase: str, reason: str, by_error: bool) -> None:
        if not by_error:
            if life.has_finished():
                self._outcome = phase if phase == "succeeded" else f"{phase}: {reason}"
            return
        self.tell("world", f"the run ended: {reason}; the same command will be given again")
        self._end_all()
        self.hub.call_later(AGAIN_S, self._give_command)

    def _end_all(self) -> None:
        self.coordinator = None
        for life in [*self.coordinators, *self.islands.values(), *self._usurped]:
            life.process.on_end = lambda reason: None
            life.process.kill("ended")

    def _waits(self) -> str:
        life = self.coordinator
        if life is None or life.coordinator is None:
            return "no coordinator"
        state = life.coordinator.state
        return f"{state.phase}, round {state.round}, {', '.join(state.alive) or 'nobody'} alive; {state.reason}"

    def _prove(self) -> None:
        may_fail = self._scenario.may_fail and self._outcome.startswith("failed")
        self.audit.require(self._outcome == "succeeded" or may_fail, "I16", self._outcome)
        report = verify(RunStore(self._run.store.url), replica_of)
        self.audit.require(report.ok, "verify", "; ".join(report.problems[:3]))

    # ---- processes ----

    def _give_command(self) -> None:
        self._num_commands += 1
        self.audit.require(self._num_commands <= MOST_COMMANDS, "I16", "the run does not come to its end")
        self._start_coordinator()
        for name in self._names:
            self._start_island(name)

    def _start_coordinator(self) -> None:
        self._num_processes += 1
        life = CoordinatorLife(self.hub, self._num_processes, self._run.store, self._coordinator_job, self.audit)
        self.coordinators.append(life)
        self.coordinator, self._num_told = life, 0
        self.tell("world", f"coordinator process {self._num_processes}")
        life.process.on_end = lambda reason: self._coordinator_ended(life, reason)

    def _coordinator_ended(self, life: CoordinatorLife, reason: str) -> None:
        self.tell("world", f"the coordinator's process ended: {reason}")
        if self.coordinator is life:
            self.coordinator = None
            self.hub.call_later(self._rng.uniform(*RESTART_S), self._restart_coordinator)

    def _restart_coordinator(self) -> None:
        if self.coordinator is None:
            self._start_coordinator()

    def _start_island(self, name: str) -> None:
        if name in self.islands and self.islands[name].process.is_alive:
            return
        if self.hub.now_s < self._away.get(name, 0.0):
            self.hub.call_later(self._away[name] - self.hub.now_s + 0.1, lambda: self._start_island(name))
            return
        self._num_processes += 1
        speed = self._speeds.get(name, self._run.speed_of(self._names.index(name)))
        life = IslandLife(self.hub, self._island_job, name, self._num_processes, self._network, self.audit, speed)
        self.islands[name] = life
        self.tell("world", f"{name}: process {self._num_processes}")
        life.process.on_end = lambda reason: self._island_ended(life, reason)

    def _island_ended(self, life: IslandLife, reason: str) -> None:
        self.tell("world", f"a process of {life.name} ended{f': {reason}' if reason else ''}")
        if self.islands.get(life.name) is not life or not reason:
            return
        delay_s = self._rng.uniform(*RESTART_S)
        self.hub.call_later(delay_s, lambda: self._say_lost(life, reason))
        self.hub.call_later(delay_s, lambda: self._start_island(life.name))

    def _say_lost(self, life: IslandLife, reason: str) -> None:
        """The driver's word, which may be lost: heartbeats make that good."""
        coordinator = self.coordinator
        if coordinator is not None and coordinator.process.is_alive and self._rng.random() < 0.8:
            told = (life.name, life.identity.process, reason)
            coordinator.process.start("lost", lambda: coordinator.answer("lost", told))

    # ---- faults ----

    def strike(self, fault: Fault) -> None:
        if self._outcome:
            return
        who = self._processes(fault.who)
        self.tell("fault", f"{fault}{'' if who or fault.who == 'storage' else ' (nobody there)'}")
        self._num_struck += bool(who or fault.who == "storage")
        after = lambda undo: self.hub.call_later(fault.for_s, undo)  # noqa: E731
        match fault.kind:
            case "kill":
                for process in who:
                    process.kill("killed")
            case "freeze":
                for process in who:
                    process.freeze()
                    after(process.thaw)
            case "cut" | "mute" | "deafen":
                ways = {(fault.who, "coordinator")} if fault.kind != "deafen" else set[tuple[str, str]]()
                ways |= {("coordinator", fault.who)} if fault.kind != "mute" else set()
                self._network.cuts |= ways
                after(lambda: self._network.cuts.difference_update(ways))
            case "slow":
                self._change_speed(fault.who, 1.0 / fault.factor)
                after(lambda: self._change_speed(fault.who, 1.0))
            case "leave":
                self._away[fault.who] = self.hub.now_s + fault.for_s
                if life := self.islands.get(fault.who):
                    life.take_leave("preempted")
            case "usurp":
                self._usurp(fault.who)
            case "bad_payload":
                if life := self.islands.get(fault.who):
                    life.tampers.append(lambda c, payload: tampered(fault.how, c, payload, life.sent[:-1]))
            case "full":
                self.full_until_s = self.hub.now_s + fault.for_s
            case "sluggish":
                self.sluggish_until_s = self.hub.now_s + fault.for_s

    def _processes(self, who: str) -> list[Process]:
        islands = [life.process for name, life in self.islands.items() if who in (name, "everything")]
        own = [self.coordinator.process] if self.coordinator and who in ("coordinator", "everything") else []
        return [process for process in (*own, *islands) if process.is_alive]

    def _change_speed(self, name: str, speed: float) -> None:
        self._speeds[name] = speed
        if name in self.islands:
            self.islands[name].speed = speed

    def _usurp(self, who: str) -> None:
        """Another process in its place, while the first one still believes that it holds it."""
        if who == "coordinator":
            self._start_coordinator()
            return
        self._usurped += [old] if (old := self.islands.pop(who, None)) else []
        self._start_island(who)


class _Tap:
    """Where storage takes time, is full, or sees its process die."""

    def __init__(self, world: World):
        self._world = world
        self._points = [[fault, fault.skip] for fault in world.faults if fault.point]

    def call(self, call: IOCall) -> None:
        world = self._world
        task = world.hub.running
        if task is None:
            return
        life = next((life for life in world.coordinators if life.process is task.process), None)
        world.audit.stored(call, life is not None and life.step_began_fenced)
        if call.moment == "before" and call.changes and world.hub.now_s < world.full_until_s:
            raise OSError(errno.ENOSPC, "no space left on device")
        if task.process.may_pause:
            slowly = world.hub.now_s < world.sluggish_until_s
            world.hub.pause(world.hub.rng.random() * (SLUGGISH_S if slowly else STORAGE_S))
        for point in self._points:
            if point[0].is_at(call):
                point[1] -= 1
                if point[1] == -1:
                    world.strike(point[0])
