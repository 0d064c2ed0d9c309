"""An island that is a Ray cluster of its own: it shares the run store with the coordinator, and nothing else.

Keeps one island's process there, as the driver does for those of its own cluster, until the run is over.
"""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diloco_ray.document import replica_of
from diloco_ray.errors import ClusterError, DeadlineError, DiLoCoError, StoreError
from diloco_ray.observe.status import read_status
from diloco_ray.run import Run
from diloco_ray.runtime.cluster import POLL_S, Place, wait_for_places
from diloco_ray.runtime.driver import raise_if_hopeless, reason_of
from diloco_ray.runtime.island_process import OVER
from diloco_ray.transport.letters import Token
from diloco_ray.transport.run_store import RunStoreTransport

TOLD_EVERY_S = 10.0  # a line on how the run stands
START_S = 60.0  # at least, for a process where there is room
FAREWELL_S = 30.0  # for an island that has been told to go
INTERRUPTED = "interrupted"
UNHEARD = "was not heard: the coordinator gives its work to another one after sync.heartbeat_timeout_s"


def check_token(run: Run, token: Token, tell: Callable[[str], None]) -> None:
    """Asks the coordinator something cheap, before anything is spent. RunMismatchError where it refuses this token;
    DeadlineError or StoreError where nobody answers for `sync.coordinator_timeout_s`."""
    within_s = run.config.sync.coordinator_timeout_s
    try:
        connect(run, token, uuid.uuid4().hex, min(TOLD_EVERY_S, within_s)).measured()
    except (DeadlineError, StoreError) as error:
        tell(f"{error.what}; waiting up to {within_s:g} s")
        connect(run, token, uuid.uuid4().hex).measured()


def join_on_ray(run: Run, token: Token, tell: Callable[[str], None], wait_s: float) -> str:
    """Trains until the run is over, or this process is interrupted; returns which. wait_s: for room on this cluster.

    An island that dies is started again, and goes on from its own checkpoint with the data that it had. ClusterError
    where it finds no room or dies too often; errors that a restart would meet again as they are.
    """
    failures = 0
    while True:
        outpost = _Outpost(run, token, wait_s)
        try:
            outpost.begin(tell)
            why = outpost.wait(_Teller(run, token.island, tell))
            if why == OVER:
                return why
            tell(f"{token.island} left: {why}")
        except KeyboardInterrupt:
            tell(f"interrupted: {token.island} gives its work back, for up to {FAREWELL_S:g} s")
            left = "has left: the coordinator has its work" if outpost.send_home() else UNHEARD
            tell(f"{token.island} {left}")
            return INTERRUPTED
        except exceptions.RayError as error:
            raise_if_hopeless(error)
            cause = error.cause if isinstance(error, exceptions.RayTaskError) else None
            if isinstance(cause, DiLoCoError) and not isinstance(cause, ClusterError):  # a lost rank is no such reason
                raise cause from error
            failures += 1
            if failures > run.config.cluster.max_island_failures:
                raise ClusterError(
                    f"{token.island} failed {failures} times, last: {reason_of(error)}",
                    where=token.island,
                    remedy="mend the cause; the same command joins again",
                ) from error
            tell(f"{token.island} died: {reason_of(error)}; it is started again")
        finally:
            outpost.close()


def connect(run: Run, token: Token, process: str, deadline_s: float | None = None) -> RunStoreTransport:
    """The line of one process of an island. deadline_s: instead of the recipe's."""
    return RunStoreTransport(
        run.store,
        run.run_id,
        token,
        process,
        poll_s=run.config.sync.poll_s,
        deadline_s=run.config.sync.coordinator_timeout_s if deadline_s is None else deadline_s,
        heartbeat_timeout_s=run.config.sync.heartbeat_timeout_s,
        new_replica=partial(replica_of, run.document),
    )


@ray.remote(num_cpus=0, max_retries=0)
def _end_politely(pid: int) -> None:
    """Of a process on the node where this runs."""
    os.kill(pid, signal.SIGTERM)


class _Outpost:
    """One process of the island."""

    def __init__(self, run: Run, token: Token, wait_s: float):
        self._run, self._token, self._ranks = run, token, run.config.inner.ranks
        self._wait_s = wait_s
        self._place: Place | None = None
        self._node, self._pid, self._process = "", 0, uuid.uuid4().hex
        self._life: Any = None
        self._over_since_s: float | None = None

    def begin(self, tell: Callable[[str], None]) -> None:
        """ClusterError where the cluster is too small for it, RayError where what it has is taken."""
        run, island, cluster = self._run, self._token.island, self._run.config.cluster
        wait_for_places(
            cluster,
            [island],
            self._ranks,
            tell,
            least=1,
            within_s=self._wait_s,
            where="this cluster",
            more="give this cluster more, or wait longer for room: `--wait-s`",
            less="give this island less: `--resource`",
        )
        self._place = Place(cluster, island, self._ranks)
        actor, line = self._place.actor, partial(connect, run, self._token, self._process)
        within_s = max(self._wait_s, START_S)
        self._node, self._pid = ray.get(actor.place.remote(), timeout=within_s)
        self._life = actor.live.remote(run.island_job(), island, self._process, line, run.config.sync)
        if not self._place.wait_for_ranks(self._life, within_s):
            raise exceptions.GetTimeoutError(f"no room for its ranks in {within_s:g} s")

    def wait(self, look: Callable[[], Mapping[str, Any] | None]) -> str:
        """Why it ended; raises what ended it. look: how the run stands, now and then."""
        while not ray.wait([self._life], timeout=1.0)[0]:
            status = look()
            if status and self._place and self._hangs(status):
                self._place.clear()  # its call ends with an error
        return ray.get(self._life, timeout=POLL_S)

    def _hangs(self, status: Mapping[str, Any]) -> bool:
        """Whether the coordinator has given this process up for long, or the run has been over for as long."""
        now_s, patience_s = time.monotonic(), 2 * self._run.config.sync.heartbeat_timeout_s
        if status["state"] == "succeeded":
            self._over_since_s = self._over_since_s or now_s
            return now_s - self._over_since_s > patience_s
        mine = [island for island in status["islands"] if island["process"] == self._process]
        return any(island["state"] == "lost" and island["last_seen_s"] > patience_s for island in mine)

    def send_home(self) -> bool:
        """As a machine's notice would: what is done is sent, work in hand is given back; whether it was in time. The
        actor of one process is busy with its life: it hears a signal, from a task on its node where that is another one
        than this."""
        if self._place is None or self._life is None:
            return True  # it had no work yet
        until_s = time.monotonic() + FAREWELL_S
        with contextlib.suppress(ProcessLookupError, exceptions.RayError):
            if self._ranks > 1:
                ray.get(self._place.actor.send_home.remote(), timeout=FAREWELL_S)
            elif self._node == ray.get_runtime_context().get_node_id():
                os.kill(self._pid, signal.SIGTERM)
            else:
                there = NodeAffinitySchedulingStrategy(self._node, soft=False)
                told = _end_politely.options(scheduling_strategy=there).remote(self._pid)
                ray.get(told, timeout=FAREWELL_S)
            ray.get(self._life, timeout=max(0.0, until_s - time.monotonic()))
            return True
        return False

    def close(self) -> None:
        if self._place is not None:
            self._place.clear()
        self._place = self._life = None


class _Teller:
    """A line now and then, from what the coordinator writes for everybody."""

    def __init__(self, run: Run, island: str, tell: Callable[[str], None]):
        self._run, self._island, self._tell = run, island, tell
        self._due_s = time.monotonic()
        self._last = ""

    def __call__(self) -> Mapping[str, Any] | None:
        """The status, when it was looked at again."""
        if time.monotonic() < self._due_s:
            return None
        self._due_s = time.monotonic() + TOLD_EVERY_S
        with contextlib.suppress(DiLoCoError):
            status = read_status(self._run.store)
            states = {island["name"]: island["state"] for island in status["islands"]}
            alive, mine = sum(state == "alive" for state in states.values()), states.get(self._island, "not there")
            line = f"round {status['rounds']}/{status['num_rounds']} | {self._island} {mine} | alive {alive}"
            if line != self._last:
                self._tell(line)
            self._last = line
            return status
        return None
