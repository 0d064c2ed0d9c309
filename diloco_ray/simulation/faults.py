"""What goes wrong in one story, and when: at a time, after a round, at a moment of a storage call."""

import errno
from typing import TYPE_CHECKING, Any

from diloco_ray.simulation.green import Process
from diloco_ray.simulation.scenario import Fault
from diloco_ray.simulation.storage import AnswerLostError, IOCall
from diloco_ray.simulation.tampering import tampered

if TYPE_CHECKING:
    from diloco_ray.simulation.world import World

STORAGE_S = 0.02  # one call of the storage, at most
SLUGGISH_S = 30.0


class Faults:
    """slowness: of an island, under 1 while a fault slows it down."""

    def __init__(self, world: "World", faults: list[Fault]):
        self.all = faults
        self.num_struck = 0  # of those that found somebody to strike
        self.slowness: dict[str, float] = {}
        self._world = world
        self._away_until_s: dict[str, float] = {}
        self._after_rounds = [fault for fault in faults if fault.after_round is not None]
        self._at_points: list[list[Any]] = [[fault, fault.skip] for fault in faults if fault.point]
        self._full_until_s = self._sluggish_until_s = -1.0

    def begin(self) -> None:
        for fault in self.all:
            if fault.at_s is not None:
                self._world.hub.call_later(fault.at_s, lambda fault=fault: self._strike(fault))

    def rounds_done(self, round: int) -> None:
        for fault in [fault for fault in self._after_rounds if round >= (fault.after_round or 0)]:
            self._after_rounds.remove(fault)
            self._strike(fault)

    def away_s(self, name: str) -> float:
        """For how long an island that has left stays away yet."""
        return self._away_until_s.get(name, 0.0) - self._world.hub.now_s

    def tap(self, call: IOCall) -> None:
        """Storage takes time, may be full, and may see its process die."""
        world, hub = self._world, self._world.hub
        task = hub.running
        if task is None:
            return
        life = next((life for life in world.coordinators if life.process is task.process), None)
        world.audit.stored(call, life is not None and life.step_began_fenced)
        if call.moment == "before" and call.changes and hub.now_s < self._full_until_s:
            world.audit.storage_had_trouble = True
            raise OSError(errno.ENOSPC, "no space left on device")
        if task.process.may_pause:
            hub.pause(hub.rng.random() * (SLUGGISH_S if hub.now_s < self._sluggish_until_s else STORAGE_S))
        met = [point for point in self._at_points if point[0].is_at(call)]
        for point in met:  # each counts the call, though the first to strike may end the process that makes it
            point[1] -= 1
        for fault, left in met:
            if left == -1:
                self._strike(fault)
                if fault.kind == "refuse":
                    world.audit.storage_had_trouble = True
                    raise OSError(errno.EIO, "input/output error")
                if fault.kind == "repeat":
                    raise AnswerLostError
        if met and task.process.is_frozen and task.process.may_pause:
            hub.pause(0.0)  # who is stopped at this moment makes no further call

    def _strike(self, fault: Fault) -> None:
        world, hub = self._world, self._world.hub
        if world.outcome:
            return
        who = self._processes(fault.who)
        is_there = bool(who) or fault.who == "storage"
        world.tell("fault", f"{fault}{'' if is_there else ' (nobody there)'}")
        self.num_struck += is_there
        match fault.kind:
            case "kill":
                for process in who:
                    process.kill("killed")
            case "freeze":
                for process in who:
                    process.freeze()
                    hub.call_later(fault.for_s, process.thaw)
            case "cut" | "mute" | "deafen":
                ways: set[tuple[str, str]] = set()
                ways |= {(fault.who, "coordinator")} if fault.kind != "deafen" else ways
                ways |= {("coordinator", fault.who)} if fault.kind != "mute" else ways
                world.network.cuts |= ways
                hub.call_later(fault.for_s, lambda: world.network.cuts.difference_update(ways))
            case "slow":
                self._slow(fault.who, 1.0 / fault.factor)
                hub.call_later(fault.for_s, lambda: self._slow(fault.who, fault.factor))
            case "leave":
                self._away_until_s[fault.who] = hub.now_s + fault.for_s
                if life := world.islands.get(fault.who):
                    life.take_leave("preempted")
            case "usurp":
                self._usurp(fault.who)
            case "bad_payload":
                if life := world.islands.get(fault.who):
                    life.tampers.append(lambda c, payload: tampered(fault.how, c, payload, life.sent[:-1]))
            case "full":
                self._full_until_s = hub.now_s + fault.for_s
            case "sluggish":
                self._sluggish_until_s = hub.now_s + fault.for_s
            case "refuse" | "repeat":
                pass  # by whoever makes the call

    def _processes(self, who: str) -> list[Process]:
        world = self._world
        islands = [life.process for name, life in world.islands.items() if who in (name, "everything")]
        own = [world.coordinator.process] if world.coordinator and who in ("coordinator", "everything") else []
        return [process for process in (*own, *islands) if process.is_alive]

    def _slow(self, name: str, factor: float) -> None:
        self.slowness[name] = self.slowness.get(name, 1.0) * factor
        if name in self._world.islands:
            self._world.islands[name].speed *= factor

    def _usurp(self, who: str) -> None:
        """Another process in its place, while the first one still believes that it holds it."""
        if who == "coordinator":
            self._world.start_coordinator()
            return
        if old := self._world.islands.pop(who, None):
            self._world.usurped.append(old)
        self._world.start_island(who)
