"""A storm: seeded faults on the processes of a run, and how long the run took to notice each and to get over it.

    kill         SIGKILL of an island
    freeze       SIGSTOP of an island, SIGCONT before its silence counts
    hang         SIGSTOP of an island until long after it was given up and replaced: a zombie, if Ray has not ended it
    raylet       SIGSTOP of the raylet under which an island runs, SIGCONT before Ray minds
    node         SIGSTOP of that raylet until long after Ray has given its node up: it ends with all that ran under it
    preempt      SIGTERM of an island: it has notice, leaves, and comes back
    evict        the same, and its place is taken for a while: it joins later
    coordinator  SIGKILL of the coordinator

It knows the run from its status documents alone, and acts from outside, as a hostile machine would.
"""

import contextlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group

from diloco_ray.runtime.second_node import SecondNode

SHARES = {
    "kill": 0.35,
    "freeze": 0.15,
    "hang": 0.08,
    "raylet": 0.01,
    "node": 0.01,
    "preempt": 0.2,
    "evict": 0.08,
    "coordinator": 0.12,
}
SIGNALS = {
    "kill": signal.SIGKILL,
    "freeze": signal.SIGSTOP,
    "hang": signal.SIGSTOP,
    "raylet": signal.SIGSTOP,
    "node": signal.SIGSTOP,
    "preempt": signal.SIGTERM,
    "evict": signal.SIGTERM,
    "coordinator": signal.SIGKILL,
}
STOPPED = [kind for kind, number in SIGNALS.items() if number == signal.SIGSTOP]  # and woken
FROZEN_RAYLETS = ("raylet", "node")
PLACE = "island_place"  # the resource of which every island needs one
AWAY_S = 20.0  # how long an evicted island's place is taken
RAYLET_S, NODE_S = 5.0, 40.0  # how long a raylet is frozen; Ray gives it up after some 20 s
ENDS_WITHIN_S = 10.0  # a given up node, once its raylet wakes
OVER_WITHIN_S = 90.0  # a lost node: until islands live on another one
AGAIN_S = 1.0  # a strike that hit nothing is repeated
LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Planned:
    """A fault to come. victim: in [0, 1), which of the islands that are alive by then, in their order."""

    at_s: float
    kind: str
    victim: float


def schedule(per_hour: float, minutes: float, seed: int, without: Container[str] = ()) -> list[Planned]:
    """As many faults as the rate says, one in each equal part of the time, at a random moment of it.

    without: kinds that cannot be; those drawn become kills. A node that there is no time to get over is not lost.
    """
    rng, num_faults = random.Random(seed), round(per_hour * minutes / 60.0)
    every_s = minutes * 60.0 / max(1, num_faults)
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=num_faults)
    planned = [Planned((i + rng.random()) * every_s, kind, rng.random()) for i, kind in enumerate(kinds)]
    last_s = minutes * 60.0 - OVER_WITHIN_S
    planned = [replace(p, kind="raylet") if p.kind == "node" and p.at_s > last_s else p for p in planned]
    return [replace(p, kind="kill") if p.kind in without else p for p in planned]


@dataclass
class Fault:
    """One that hit. Times are seconds since the storm began; None: not yet. ends_s: when its cause is over."""

    kind: str
    island: str  # "" where it is the coordinator
    pid: int
    before: Any  # the island's process, or the coordinator's fence epoch, that was hit
    at_s: float
    ends_s: float
    outer_steps: int
    began: str = ""  # when the process was started, as the system has it
    detected_s: float | None = None
    recovered_s: float | None = None

    def observe(self, status: Mapping[str, Any], seen_s: float) -> None:
        """Detected: the status shows it. Recovered: the island is alive again; outer steps are taken again."""
        if not self.island:
            changed = status["coordinator"]["fence_epoch"] != self.before
            well = changed and status["outer_steps"] > self.outer_steps
        else:
            islands = {island["name"]: island for island in status["islands"]}
            island = islands.get(self.island, {"state": "absent"})  # a restarted coordinator may not know it yet
            alive = island["state"] == "alive"
            is_another = alive and island["process"] != self.before
            changed = is_another or not alive
            may_go_on = alive and self.kind in STOPPED
            since_s = self.ends_s + (ENDS_WITHIN_S if self.kind == "node" else 0.0)
            well = is_another or (may_go_on and seen_s - island["last_seen_s"] > since_s)
        if changed and self.detected_s is None:
            self.detected_s = seen_s
        if well:
            self.recovered_s = seen_s

    @property
    def over_s(self) -> float:
        """When nothing is left of it to be seen."""
        return math.inf if self.recovered_s is None else max(self.recovered_s, self.ends_s)

    @property
    def from_s(self) -> float:
        """What recovery is counted from: an island that has no place cannot come back before there is one."""
        return self.ends_s if self.kind == "evict" else self.at_s


class Storm:
    """Give it the run's status documents (`see`), and let it `rage` in a thread until it is `over`."""

    def __init__(
        self,
        planned: list[Planned],
        heartbeat_timeout_s: float,
        tell: Callable[[str], None],
        node: SecondNode | None = None,
    ):
        """node: whose raylet is frozen, where that is planned."""
        self._planned, self._tell, self._node = planned, tell, node
        # An island that stays silent is given up after one time-out and replaced after a second.
        self._lasts_s = {"freeze": heartbeat_timeout_s / 4, "hang": 4 * heartbeat_timeout_s}
        self._lasts_s |= {"evict": AWAY_S, "raylet": RAYLET_S, "node": NODE_S}
        self.faults: list[Fault] = []
        self.missed: list[str] = []  # kinds of strikes that hit nothing: no island alive, or the process gone already
        self._status: Mapping[str, Any] = {"islands": ()}
        self._seen_s = 0.0
        self._began_s = time.monotonic()
        self._to_end: list[tuple[float, Callable[[], None]]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._rage, name="storm", daemon=True)

    def see(self, status: Mapping[str, Any]) -> None:
        """The storm breaks when the first round is whole."""
        if status["rounds"] and not self._thread.ident:
            self._began_s = time.monotonic()
            self._thread.start()
        self._status, self._seen_s = status, self.now_s

    def stop(self) -> None:
        """Lets go of what is still frozen or taken."""
        self._stopped.set()
        if self._thread.ident:
            self._thread.join()
        for _, end in self._to_end:
            end()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def num_planned(self) -> int:
        return len(self._planned)

    @property
    def zombies(self) -> list[int]:
        """Processes that hung, were replaced, and still live."""
        holders = {island["pid"] for island in self._status["islands"]}
        hung = [fault for fault in self.faults if fault.kind in ("hang", "node")]
        return [fault.pid for fault in hung if fault.pid not in holders and _lives(fault.pid, fault.began)]

    def _rage(self) -> None:
        coming = list(self._planned)
        while not self._stopped.wait(LOOK_EVERY_S):
            for ended in [item for item in self._to_end if item[0] <= self.now_s]:
                self._to_end.remove(ended)
                ended[1]()
            if self._node:
                self._node.tend()
            for fault in self.faults:
                if fault.recovered_s is None:
                    fault.observe(self._status, self._seen_s)
            if coming and coming[0].at_s <= self.now_s:
                planned = coming.pop(0)
                if not self._strike(planned):
                    coming.insert(0, replace(planned, at_s=self.now_s + AGAIN_S))

    def _strike(self, planned: Planned) -> bool:
        """Whether it hit."""
        status = self._status
        if planned.kind == "coordinator":
            targets = [(status["coordinator"]["pid"], status["coordinator"]["fence_epoch"], "")]
        else:
            targets = [(i["pid"], i["process"], i["name"]) for i in status["islands"] if i["state"] == "alive"]
        if planned.kind in FROZEN_RAYLETS:
            targets = [target for target in targets if self._raylet_of(target[0])]
        spared = {f.pid for f in self.faults if f.ends_s > self.now_s or f.kind in ("kill", "coordinator")}
        targets = [target for target in targets if target[0] not in spared]  # what is frozen or dead is no target
        try:
            pid, before, name = targets[int(planned.victim * len(targets))]
            began, ends_s = start_of(pid), self._hit(planned.kind, pid)
        except (IndexError, ProcessLookupError):
            self.missed.append(planned.kind)
            return False
        self.faults.append(Fault(planned.kind, name, pid, before, self.now_s, ends_s, status["outer_steps"], began))
        self._tell(f"fault {len(self.faults)}: {planned.kind} of {name or 'the coordinator'} (pid {pid})")
        return True

    def _hit(self, kind: str, pid: int) -> float:
        """When its cause is over. ProcessLookupError where there is no such process."""
        ends_s, struck = self.now_s + self._lasts_s.get(kind, 0.0), pid
        os.kill(pid, 0)
        if kind == "evict":
            place = placement_group([{PLACE: 1}])
            self._to_end.append((ends_s, lambda: remove_placement_group(place)))
        if kind in FROZEN_RAYLETS:
            struck = self._raylet_of(pid) or pid
        os.kill(struck, SIGNALS[kind])
        if kind in STOPPED:
            self._to_end.append((ends_s, lambda: _go_on(struck)))
        return ends_s

    def _raylet_of(self, pid: int) -> int | None:
        """That is not the driver's own, and not frozen already."""
        if self._node is None or any(f.kind in FROZEN_RAYLETS and f.ends_s > self.now_s for f in self.faults):
            return None
        return self._node.raylet_of(pid)


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _lives(pid: int, began: str) -> bool:
    """The very process: numbers are given again, to threads too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return start_of(pid) == began


def start_of(pid: int) -> str:
    """Linux: the clock tick at which it was started. Elsewhere "", as for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
