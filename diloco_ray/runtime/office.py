"""The post office of a coordinator that is a Ray actor: a thread beside its loop, which alone may touch its state."""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.coordination.state import ended
from diloco_ray.coordinator.coordinator import Coordinator
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.errors import FencedError, StoreError
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.post_office import PostOffice
from diloco_ray.transport.protocol import Beat, Bytes, Hello, Order, Tidings, Welcome
from diloco_ray.transport.tokens import KeyRing

DOOR_TIMEOUT_S = 90.0  # over the coordinator's own time-outs
CLOSING_S = 20.0  # for the turn that is under way
LARGE_LETTERS_AT_ONCE = 4
RENEWED_EVERY_S = 30.0  # the notice: one that woke up between its look at the fence and its word may have covered it


@dataclass(frozen=True)
class Mail:
    """How islands from outside may reach a coordinator. config: the recipe as it is driven now, plain."""

    secret: str = field(repr=False)
    poll_s: float
    config: Mapping[str, Any]


class OfficeThread:
    """Turns the office until it is closed, or the process ends. actor: its doors are coroutines, of this loop."""

    def __init__(self, store: RunStore, job: CoordinatorJob, mail: Mail, coordinator: Coordinator, actor: Any):
        self._coordinator, self._mail = coordinator, mail
        self._office = PostOffice(
            store,
            _DoorsOfALoop(actor, coordinator, asyncio.get_running_loop()),
            KeyRing(store, job.rules.run_id, mail.secret),
            run_id=job.rules.run_id,
            fence_epoch=coordinator.fence_epoch,
            max_payload_bytes=max(job.rules.payload_bytes),
            note=coordinator.report.note,
            beside=ThreadPoolExecutor(LARGE_LETTERS_AT_ONCE, thread_name_prefix="letters"),
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="office", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The last turn, in which islands hear how the run ended. FencedError, StoreError: they do not hear it."""
        self._closing.set()
        self._thread.join(CLOSING_S)
        state = self._coordinator.state
        self._office.put_up_notice(self._mail.config, state.phase, state.reason)
        self._office.turn()

    def _keep(self) -> None:
        pause_s, told, is_waiting, renew_s = self._mail.poll_s / 10, "", False, 0.0
        while not (self._coordinator.is_fenced or self._closing.wait(pause_s)):
            state, was_busy = self._coordinator.state, False
            troubles: list[str] = []
            try:
                if time.monotonic() > renew_s or (state.phase != told and ended(state)):
                    self._office.put_up_notice(self._mail.config, state.phase, state.reason)
                    told, renew_s = state.phase, time.monotonic() + RENEWED_EVERY_S
            except FencedError:
                return
            except StoreError as error:
                troubles.append(error.what)
            try:
                was_busy = self._office.turn()
            except StoreError as error:
                troubles.append(error.what)
            except Exception as error:  # nobody would be heard any more if this thread ended
                troubles.append(f"{type(error).__name__}: {error}")
            if troubles and not is_waiting:
                self._coordinator.report.note(f"the mail waits: {troubles[0]}")
            is_waiting = bool(troubles)
            pause_s = self._mail.poll_s / 10 if was_busy else min(self._mail.poll_s, 1.5 * pause_s)


class _DoorsOfALoop:
    """Doors that are opened on the loop's thread, whoever knocks."""

    def __init__(self, actor: Any, coordinator: Coordinator, loop: asyncio.AbstractEventLoop):
        self._actor, self._coordinator, self._loop = actor, coordinator, loop

    def join(self, hello: Hello) -> Welcome:
        return self._knock(self._actor.join, hello)

    def beat(self, beat: Beat) -> Order:
        return self._knock(self._actor.beat, beat)

    def submit(self, contribution: Contribution, payload: Bytes) -> Verdict:
        return self._knock(self._actor.submit, contribution, payload)

    def news(self, island: str, incarnation: int, after: int, held: str) -> Tidings | None:
        return self._knock(self._coordinator.news, island, incarnation, after, held)

    def leave(self, island: str, incarnation: int, reason: str) -> None:
        self._knock(self._actor.leave, island, incarnation, reason)

    def measured(self) -> set[int]:
        return self._knock(self._actor.measured)

    def evaluated(self, index: int, round: int, metrics: Mapping[str, float], sample: str) -> None:
        self._knock(self._actor.evaluated, index, round, metrics, sample)

    def _knock(self, door: Callable[..., Any], *arguments: Any) -> Any:
        async def opened() -> Any:
            answer = door(*arguments)
            return await answer if inspect.isawaitable(answer) else answer

        return asyncio.run_coroutine_threadsafe(opened(), self._loop).result(DOOR_TIMEOUT_S)
