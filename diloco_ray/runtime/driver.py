"""The driver: opens the run, starts coordinator, islands and evaluator on Ray, keeps them there, tells how it goes.

It decides nothing about training. It brings back islands that died, says so to the coordinator, and waits, always
with a deadline, for the coordinator to say that the run is over.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import exceptions

from diloco_ray.errors import (
    ClusterError,
    ConfigError,
    CorruptionError,
    DataError,
    DeadlineError,
    RunMismatchError,
    StoreError,
)
from diloco_ray.ids import island_name
from diloco_ray.observe.status import other_writer
from diloco_ray.run import Run
from diloco_ray.runtime.cluster import POLL_S, Place, actor_options, placeable, wait_for_places
from diloco_ray.runtime.coordinator_actor import MAX_WAITING_CALLS, CoordinatorActor
from diloco_ray.runtime.island_actor import EvaluatorActor
from diloco_ray.runtime.island_process import PREEMPTED
from diloco_ray.runtime.office import Mail
from diloco_ray.transport.ray_object_store import RayTransport

GONE_S = 15.0  # an actor that Ray calls dead for so long, it will not start again
FINISH_S = 60.0  # at least, for events, status and the last letters
EVALUATION_TIMEOUT_S = 600.0  # for what is left to measure when training is over
HOPELESS = (ConfigError, CorruptionError, DataError, RunMismatchError, StoreError)

Watcher = Callable[[dict[str, Any], list[dict[str, Any]]], None]  # status, new events


@dataclass
class Life:
    """One process of one island."""

    name: str
    process: str
    place: Place


def train_on_ray(run: Run, watch: Watcher, secret: str = "") -> dict[str, Any]:
    """Trains to the end; returns the last status. Raises ClusterError or the error that ended the run.

    secret: what the tokens of islands from outside are made of, where the recipe has such islands.
    """
    cluster = run.config.cluster
    with contextlib.suppress(CorruptionError):  # of the status, which the coordinator writes anew
        if told := other_writer(run.store):
            watch({}, [{"event": "decision", "text": told}])
    names = [island_name(number) for number in range(run.config.max_islands - cluster.external_islands)]
    wait_for_places(
        cluster,
        names,
        run.config.inner.ranks,
        lambda text: watch({}, [{"event": "decision", "text": text}]),
        least=run.config.min_islands - cluster.external_islands,
        within_s=cluster.placement_timeout_s,
        where="cluster.island_resources",
        more="add nodes",
        less="lower `islands`, or ask for less in cluster.island_resources",
    )
    driver = _Driver(run, names, watch, secret)
    try:
        return driver.run_to_the_end()
    finally:
        driver.stop()


class _Driver:
    def __init__(self, run: Run, names: Sequence[str], watch: Watcher, secret: str):
        self._run, self._names, self._watch = run, names, watch
        self._silence_s = run.config.sync.coordinator_timeout_s
        cluster, poll_s = run.config.cluster, run.config.sync.poll_s
        mail = Mail(secret, poll_s, run.config.model_dump(mode="json")) if cluster.external_islands else None
        name = f"coordinator-{run.run_id}-{uuid.uuid4().hex[:6]}"
        self._coordinator = CoordinatorActor.options(name=name, max_concurrency=MAX_WAITING_CALLS).remote(
            run.store.url, run.coordinator_job(placeable(cluster, names, run.config.inner.ranks)), mail
        )
        self._seen = (0, 0)  # fence epoch, and how many of its events
        self._quarantined: set[str] = set()
        self._lives: dict[Any, Life] = {}
        self._failures: dict[str, int] = {}
        self._evaluation: Any = None
        self._evaluator: Any = None
        self._evaluator_failures = 0

    def run_to_the_end(self) -> dict[str, Any]:
        status, events = self._ask()
        self._show(status, events)
        if status["state"] not in ("succeeded", "failed"):
            for name in self._names:
                self._start_island(name)
        self._start_evaluator()
        while status["state"] not in ("succeeded", "failed"):
            self._tend()
            status, events = self._ask()
            self._show(status, events)
            self._end_the_silent(status)
        self._raise_if_failed(status)
        return self._finish()

    def stop(self) -> None:
        for life in self._lives.values():
            life.place.clear()
        actors: list[Any] = [self._evaluator, self._coordinator]
        for actor in actors:
            if actor is not None:
                ray.kill(actor, no_restart=True)

    # ---- islands ----

    def _start_island(self, name: str) -> None:
        process = uuid.uuid4().hex
        cluster, job = self._run.config.cluster, self._run.island_job()
        speed, sync = self._run.speed_of(self._names.index(name)), self._run.config.sync
        connect = partial(RayTransport, self._coordinator, sync.coordinator_timeout_s, sync.heartbeat_timeout_s)
        place = Place(cluster, name, job.inner.ranks)
        self._lives[place.actor.live.remote(job, name, process, connect, sync, speed)] = Life(name, process, place)

    def _start_evaluator(self) -> None:
        resources = self._run.config.evaluation.resources
        self._evaluator = EvaluatorActor.options(**actor_options(resources)).remote()
        self._evaluation = self._evaluator.live.remote(
            self._run.island_job(), self._run.evaluation_plan(), self._coordinator, self._silence_s
        )

    def _tend(self) -> None:
        """Waits a moment for processes that end, and brings them back."""
        ended, _ = ray.wait([*self._lives, self._evaluation], num_returns=1, timeout=POLL_S)
        for ref in ended:
            if ref == self._evaluation:
                self._tend_evaluator()
            else:
                self._tend_island(self._lives.pop(ref), ref)

    def _tend_island(self, life: Life, ref: Any) -> None:
        life.place.clear()
        try:
            if ray.get(ref, timeout=POLL_S) == PREEMPTED:  # no failure: it comes back where there is room
                self._start_island(life.name)
            return
        except exceptions.RayError as error:
            if life.name in self._quarantined:
                return
            reason = reason_of(error)
            self._failures[life.name] = self._failures.get(life.name, 0) + 1
            raise_if_hopeless(error)
            if self._failures[life.name] > self._run.config.cluster.max_island_failures:
                raise ClusterError(
                    f"{life.name} failed {self._failures[life.name]} times, last: {reason}",
                    where=life.name,
                    remedy="mend the cause; the same command goes on from the last committed record",
                ) from error
        self._try(self._coordinator.lost.remote(life.name, life.process, reason))
        self._start_island(life.name)

    def _end_the_silent(self, status: dict[str, Any]) -> None:
        """A process that the coordinator has given up, and that has not come back since, makes room for another."""
        patience_s = 2 * self._run.config.sync.heartbeat_timeout_s
        silent = {i["process"] for i in status["islands"] if i["state"] == "lost" and i["last_seen_s"] > patience_s}
        for life in self._lives.values():
            if life.process in silent:
                life.place.clear()  # its call ends with an error, which `_tend` sees

    def _tend_evaluator(self) -> bool:
        """Whether it has measured all; one that died is brought back."""
        try:
            ray.get(self._evaluation, timeout=POLL_S)
            return True
        except exceptions.RayError as error:
            raise_if_hopeless(error)
            self._evaluator_failures += 1
            if self._evaluator_failures > self._run.config.cluster.max_island_failures:
                raise ClusterError(f"the evaluator failed: {reason_of(error)}", where="evaluator") from error
            self._start_evaluator()
            return False

    # ---- the coordinator ----

    def _ask(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Status and new events; while Ray restarts the coordinator, waits, but not for ever."""
        began_s, gone_s = time.monotonic(), None
        while True:
            try:
                return ray.get(self._coordinator.watch.remote(*self._seen), timeout=30.0)
            except exceptions.RayTaskError:
                raise
            except (exceptions.RayActorError, exceptions.GetTimeoutError) as error:
                if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
                    raise ClusterError(
                        f"the coordinator could not start: {str(error).strip().splitlines()[-1]}",
                        where=self._run.store.url,
                        remedy="mend the cause; the same command goes on from the last committed record",
                    ) from error
                now_s = time.monotonic()
                gone_s = (gone_s or now_s) if isinstance(error, exceptions.ActorDiedError) else None
                if gone_s and now_s - gone_s > GONE_S:
                    raise ClusterError(
                        f"Ray has given the coordinator up: {reason_of(error)}",
                        where=self._run.store.url,
                        remedy="give the same command again: it goes on from the last committed record",
                    ) from error
                if now_s - began_s > self._silence_s:
                    raise DeadlineError(
                        f"the coordinator did not answer for {self._silence_s:g} s: {reason_of(error)}",
                        where=self._run.store.url,
                        remedy="give the same command again: it goes on from the last committed record",
                    ) from error
                time.sleep(POLL_S)

    def _show(self, status: dict[str, Any], events: list[dict[str, Any]]) -> None:
        self._quarantined |= {i["name"] for i in status["islands"] if i["state"] == "quarantined"}
        fence_epoch, num_seen = status["coordinator"]["fence_epoch"], self._seen[1]
        self._seen = (fence_epoch, (num_seen if fence_epoch == self._seen[0] else 0) + len(events))
        self._watch(status, events)

    def _try(self, ref: Any) -> None:
        """A message whose loss the heartbeats make good."""
        try:
            ray.get(ref, timeout=10.0)
        except (exceptions.RayActorError, exceptions.GetTimeoutError):
            return

    def _raise_if_failed(self, status: dict[str, Any]) -> None:
        if status["state"] != "failed":
            return
        error: Any = ray.get(self._coordinator.error.remote(), timeout=60.0)
        raise error or ClusterError(
            f"the run failed: {status['reason']}",
            where=self._run.store.url,
            remedy="mend the cause; the same command goes on from the last committed record",
        )

    def _finish(self) -> dict[str, Any]:
        """Lets the evaluator measure the last outer step, then has everything written."""
        until = time.monotonic() + EVALUATION_TIMEOUT_S
        while not (ray.wait([self._evaluation], timeout=POLL_S)[0] and self._tend_evaluator()):
            if time.monotonic() > until:
                raise DeadlineError(f"the evaluator did not finish in {EVALUATION_TIMEOUT_S:g} s", where="evaluator")
            self._show(*self._ask())
        self._show(*self._ask())
        try:
            return ray.get(self._coordinator.finish.remote(), timeout=max(FINISH_S, self._silence_s))
        except (exceptions.RayActorError, exceptions.GetTimeoutError) as error:
            raise ClusterError(
                f"the run is over, but not all that people see of it is written: {reason_of(error)}",
                where=self._run.store.url,
                remedy="give the same command again: it trains nothing, and writes what is missing",
            ) from error


def reason_of(error: BaseException) -> str:
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__


def raise_if_hopeless(error: BaseException) -> None:
    """Errors that a restart meets again end the run as what they are."""
    if isinstance(error, exceptions.RayTaskError) and isinstance(error.cause, HOPELESS):
        raise error.cause from error
