"""The coordinator as a Ray actor: one asyncio loop that alone touches its state, one thread for tensors and files.

Joins, heartbeats and submissions are answered while an outer step is computed; followers wait in the loop for news.
Ray restarts a dead coordinator with empty memory; the new life takes the next fence and replays the log.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.coordination.rounds import next_look_s
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.coordinator.jobs import Job
from diloco_ray.errors import DiLoCoError, FencedError, OvertakenError, StoreError
from diloco_ray.ids import canonical_json
from diloco_ray.log.run_log import check_fence
from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.status import STATUS
from diloco_ray.runtime.office import Mail, OfficeThread
from diloco_ray.transport.protocol import Beat, Bytes, Hello, LogStep, News, Order, SnapshotState, Tidings, Welcome

TICK_S = 0.5
REMOTE_STATUS_EVERY_S = 10.0  # a bucket is not asked more often than this
VERDICT_TIMEOUT_S = 50.0  # under one attempt of a caller, which then asks again


MAX_WAITING_CALLS = 1000  # long polls included


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)
class CoordinatorActor:
    """Start it with max_concurrency=MAX_WAITING_CALLS. See `diloco_ray.coordinator`; doors mirror the transport's."""

    def __init__(self, run_url: str, job: CoordinatorJob, mail: Mail | None = None):
        """mail: how islands from outside reach it, where they may."""
        self._store, self._job, self._mail = RunStore(run_url), job, mail
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tensors")
        self._files = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="reads")  # the clock never waits for these
        holder = f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"
        self._coordinator = Coordinator(self._store, job, later=self._run_later, holder=holder, pid=os.getpid())
        self._snapshots: dict[bool, asyncio.Future[ray.ObjectRef[SnapshotState]]] = {}  # being read
        self._changed = asyncio.Event()
        self._clock: asyncio.Task[None] | None = None
        self._office: OfficeThread | None = None
        self._has_told = False  # that there is no writing the status

    # ---- doors ----

    async def join(self, hello: Hello) -> Welcome:
        return self._heard(self._coordinator.join(hello))

    async def beat(self, beat: Beat) -> Order:
        return self._coordinator.beat(beat)

    async def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        verdict = self._heard(self._coordinator.submit(contribution, payload))
        until = asyncio.get_running_loop().time() + VERDICT_TIMEOUT_S
        while verdict.status == "pending" and asyncio.get_running_loop().time() < until:
            await self._change(until - asyncio.get_running_loop().time())
            verdict = self._coordinator.verdict_on(contribution)
        return verdict

    async def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str) -> News:
        until = asyncio.get_running_loop().time() + wait_s
        while True:
            tidings = self._coordinator.news(island, incarnation, after, held)
            left_s = until - asyncio.get_running_loop().time()
            if tidings or left_s <= 0:
                return News.of(tidings or Tidings("ok"), await self._records_of(tidings, after))
            await self._change(left_s)

    async def _records_of(self, tidings: Tidings | None, after: int) -> tuple[LogStep, ...]:
        """Old ones are read beside the loop: nobody's heartbeat waits for a bucket."""
        if not tidings or not tidings.records:
            return ()
        recent = self._coordinator.feed.recent_after(after)
        if recent:
            return recent
        loop = asyncio.get_running_loop()
        return (await loop.run_in_executor(self._reads, self._coordinator.feed.read, after + 1),)

    async def measured(self) -> set[int]:
        return self._coordinator.measured()

    async def snapshot(self, first: bool) -> "ray.ObjectRef[SnapshotState]":
        """One object of one read for all who ask meanwhile, those who gave up waiting and ask again among them.

        It is this process's, and gone with the last of them.
        """
        reading = self._snapshots.get(first)
        if reading is None:
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(self._reads, lambda: ray.put(self._coordinator.snapshot(first)))
            reading.add_done_callback(lambda _: self._snapshots.pop(first))
            self._snapshots[first] = reading
        return await asyncio.shield(reading)

    async def leave(self, island: str, incarnation: int, reason: str) -> None:
        self._heard(self._coordinator.leave(island, incarnation, reason))

    async def lost(self, island: str, process: str, reason: str) -> None:
        self._heard(self._coordinator.lost(island, process, reason))

    async def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None:
        self._heard(self._coordinator.evaluated(index, round, metrics, sample))

    async def watch(self, fence_epoch: int, num_seen: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The status document and what is new: this life's events, past num_seen if those were of this life too."""
        self._heard(None)
        skip = num_seen if fence_epoch == self._coordinator.fence_epoch else 0
        return self._status(), self._coordinator.report.own_events_after(skip)

    async def error(self) -> DiLoCoError | None:
        return self._coordinator.error

    async def finish(self) -> dict[str, Any]:
        """Waits until everything is written; the last status."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._worker, self._coordinator.report.flush)
        if self._office:
            with contextlib.suppress(FencedError, StoreError):
                await loop.run_in_executor(self._files, self._office.close)
        if self._clock:
            self._clock.cancel()
        with contextlib.suppress(FencedError):
            await self._publish()
        return self._status()

    # ---- the loop ----

    def _heard(self, answer: Any) -> Any:
        """After whatever may have changed the state: wakes those who wait, and keeps the clock going."""
        self._changed.set()
        self._changed = asyncio.Event()
        if self._clock is None:
            self._clock = asyncio.get_running_loop().create_task(self._keep_time())
            self._clock.add_done_callback(self._clock_stopped)
            if self._mail:
                self._office = OfficeThread(self._store, self._job, self._mail, self._coordinator, self)
        return answer

    async def _change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def _keep_time(self) -> None:
        """Ticks twice a second, and besides when an outer step may be due."""
        loop = asyncio.get_running_loop()
        ticked_s = written_s = 0.0
        while True:
            due_s, look_s = ticked_s + TICK_S, next_look_s(self._coordinator.state)
            if look_s is not None and look_s > ticked_s:
                due_s = min(due_s, look_s)
            if time.monotonic() < due_s:
                await self._change(due_s - time.monotonic())
                continue
            ticked_s = time.monotonic()
            self._coordinator.tick()
            self._heard(None)
            every_s = TICK_S if self._store.is_local else REMOTE_STATUS_EVERY_S
            if loop.time() - written_s > every_s - TICK_S / 2:  # ticks are not to the millisecond
                written_s = loop.time()
                with contextlib.suppress(StoreError):  # a missed status is only that
                    await self._publish()

    def _clock_stopped(self, clock: "asyncio.Task[None]") -> None:
        """Without its clock a coordinator waits for ever: what stops the one ends the other."""
        error = None if clock.cancelled() else clock.exception()
        if error is not None:
            self._coordinator.fail(error)
            self._heard(None)

    def _status(self) -> dict[str, Any]:
        return self._coordinator.report.status(self._coordinator.state)

    async def _publish(self) -> None:
        """Writes the status; FencedError, StoreError. Whatever else is wrong with it ends no run: it is for people, and
        nothing that a run is made of is read from it.
        """
        try:
            await asyncio.get_running_loop().run_in_executor(self._files, self._write_status, self._status())
        except (FencedError, StoreError):
            raise
        except Exception as error:
            if not self._has_told:
                self._coordinator.report.note(f"{STATUS} cannot be written: {type(error).__name__}: {error}")
            self._has_told = True

    def _write_status(self, status: dict[str, Any]) -> None:
        check_fence(self._store, self._coordinator.fence_epoch)
        self._store.write(STATUS, canonical_json(status))

    def _run_later(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        future = self._worker.submit(job)
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(self._done, done))

    def _done(self, future: "Future[Any]") -> None:
        error = future.exception()
        if isinstance(error, OvertakenError):
            os._exit(1)  # Ray starts the next life, which replays the log with the record that overtook this one
        if error is not None:
            self._coordinator.fail(error)
        else:
            self._coordinator.receive(future.result())
        self._heard(None)
