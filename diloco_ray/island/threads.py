"""What an island's threads are made of: the operating system's own, or those of a simulated world."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Condition(AbstractContextManager[object], Protocol):
    """A lock that its holder may take again, with a wait for what another thread tells."""

    def wait(self, timeout: float | None = None) -> bool: ...
    def notify_all(self) -> None: ...


class Threads(Protocol):
    """Those of one process, and its clock. `end_process`: at once, with a word on why; nothing more of it runs."""

    def start(self, name: str, work: Callable[[], None]) -> None: ...
    def condition(self) -> Condition: ...
    def now_s(self) -> float: ...
    def end_process(self, status: int, why: str) -> None: ...


class OsThreads:
    """Daemons: they end with their process."""

    def start(self, name: str, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name=name, daemon=True).start()

    def condition(self) -> Condition:
        return threading.Condition(threading.RLock())

    def now_s(self) -> float:
        return time.monotonic()

    def end_process(self, status: int, why: str) -> None:
        print(f"{why}: ending this process", file=sys.stderr, flush=True)
        os._exit(status)


def start_thread(threads: Threads, name: str, work: Callable[[], None], fail: Callable[[Exception], None]) -> None:
    """An error of any kind ends the thread and goes to `fail`."""

    def run() -> None:
        try:
            work()
        except Exception as error:
            fail(error)

    threads.start(name, run)


class Mailbox(Generic[T]):
    """A queue between two threads."""

    def __init__(self, threads: Threads):
        self._filled = threads.condition()
        self._items: deque[T] = deque()

    def put(self, item: T) -> None:
        with self._filled:
            self._items.append(item)
            self._filled.notify_all()

    def get(self) -> T:
        """Waits for one: an idle thread of a living process."""
        with self._filled:
            while not self._items:
                self._filled.wait()
            return self._items.popleft()
