"""Virtual time, and processes whose threads are greenlets: one runs at a time, until it waits.

What runs next is the earliest of what is due; nothing else decides it, so that equal seeds give equal stories. A thread
may also be made to wait where it takes a lock, for it is there that the operating system's threads overtake each other.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from greenlet import getcurrent, greenlet

PREEMPTED = 0.05  # probability that a thread that takes a lock is overtaken first
PREEMPTION_S = 0.01  # for so long at most


class KilledError(BaseException):
    """Ends a thread of a killed process where it stands. No handler of errors takes it for one."""


class Hub:
    """The clock and all that is to come. `after_each` is called when nothing runs: between any two moments."""

    def __init__(self, rng: random.Random):
        self.now_s, self.rng = 0.0, rng
        self.after_each: Callable[[], None] = lambda: None
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._num_calls = 0
        self.green = getcurrent()

    def call_later(self, delay_s: float, act: Callable[[], None]) -> None:
        self._num_calls += 1
        heapq.heappush(self._coming, (self.now_s + delay_s, self._num_calls, act))

    def run(self, until_s: float, has_ended: Callable[[], bool]) -> None:
        """Until the time is over, nothing is to come, or has_ended."""
        while self._coming and not has_ended():
            when_s, _, act = heapq.heappop(self._coming)
            if when_s > until_s:
                return
            self.now_s = max(self.now_s, when_s)
            act()
            self.after_each()

    def pause(self, seconds: float | None = None) -> None:
        """Of the running thread: until it is woken, or so long at most."""
        task = self.running
        assert task is not None, "only a thread can wait"
        if not task.process.is_alive:
            raise KilledError
        task.turn += 1
        if seconds is not None:
            self.wake(task, seconds)
        self.green.switch()
        if not task.process.is_alive:
            raise KilledError

    def wake(self, task: "Task", delay_s: float = 0.0) -> None:
        """Goes on with a thread, unless something else has done so before."""
        self.call_later(delay_s, partial(task.go_on, task.turn))

    @property
    def running(self) -> "Task | None":
        """None outside of threads, and in threads of the operating system."""
        return getattr(getcurrent(), "task", None)


class _Green(greenlet):
    task: "Task"


class Task:
    """One thread of a process."""

    def __init__(self, process: "Process", name: str, work: Callable[[], None]):
        self.process, self.name, self.turn = process, name, 0
        self._green = _Green(partial(self._live, work), parent=process.hub.green)
        self._green.task = self

    def _live(self, work: Callable[[], None]) -> None:
        with suppress(KilledError):
            work()
        self.process.tasks.remove(self)

    def go_on(self, turn: int) -> None:
        if turn != self.turn or not self.process.is_alive:
            return
        if self.process.is_frozen:
            self.process.held_back.append((self, turn))
            return
        self._green.switch()

    def end(self) -> None:
        if self._green.dead:
            return
        if not self._green:  # never begun
            self.process.tasks.remove(self)
            return
        self._green.parent = getcurrent()  # it gives back to whoever kills its process, not to the hub
        self._green.throw(KilledError)


class Process:
    """Threads that live and die together, and the `island.threads.Threads` that they are made with."""

    def __init__(self, hub: Hub, name: str):
        self.hub, self.name = hub, name
        self.is_alive, self.is_frozen = True, False
        self.tasks: list[Task] = []
        self.held_back: list[tuple[Task, int]] = []
        self.on_end: Callable[[str], None] = lambda reason: None
        self._undisturbed = 0

    def start(self, name: str, work: Callable[[], None]) -> None:
        task = Task(self, name, work)
        self.tasks.append(task)
        self.hub.wake(task)

    def condition(self) -> "GreenCondition":
        return GreenCondition(self)

    def now_s(self) -> float:
        return self.hub.now_s

    def end_process(self, status: int, why: str) -> None:
        self.kill(f"{why} (status {status})")

    def kill(self, reason: str) -> None:
        """SIGKILL: nothing more of it runs, also not what is running."""
        if not self.is_alive:
            return
        self.is_alive = False
        mine = self.hub.running
        for task in list(self.tasks):
            if task is not mine:
                task.end()
        self.on_end(reason)
        if mine is not None and mine.process is self:
            raise KilledError

    def freeze(self) -> None:
        self.is_frozen = True

    def thaw(self) -> None:
        """SIGCONT: everything that came due meanwhile goes on at once."""
        self.is_frozen = False
        held_back, self.held_back = self.held_back, []
        for task, turn in held_back:
            if turn == task.turn:
                self.hub.wake(task)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """What runs now is not overtaken, nor does its storage take time: as an event loop's code."""
        self._undisturbed += 1
        try:
            yield
        finally:
            self._undisturbed -= 1

    @property
    def may_pause(self) -> bool:
        return not self._undisturbed

    def preempt(self) -> None:
        """The running thread may be overtaken here."""
        if self.may_pause and self.hub.rng.random() < PREEMPTED:
            self.hub.pause(self.hub.rng.random() * PREEMPTION_S)


class GreenCondition:
    """A lock that its holder may take again, with a wait for what another thread tells."""

    def __init__(self, process: Process):
        self._process, self._hub = process, process.hub
        self._holder: Task | None = None
        self._depth = 0
        self._entering: list[Task] = []
        self._waiting: list[Task] = []

    def __enter__(self) -> "GreenCondition":
        me = self._hub.running
        if me is not None and self._holder is not me:
            self._process.preempt()
            while self._holder is not None:
                self._entering.append(me)
                self._hub.pause()
        self._holder = me
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._let_go()

    def _let_go(self) -> None:
        self._holder = None
        for task in self._entering:
            self._hub.wake(task)
        self._entering.clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Gives the lock back meanwhile. Whether it was told something."""
        me, depth = self._hub.running, self._depth
        assert me is not None
        self._depth = 0
        self._waiting.append(me)
        self._let_go()
        self._hub.pause(timeout)
        was_told = me not in self._waiting
        if not was_told:
            self._waiting.remove(me)
        while self._holder is not None:
            self._entering.append(me)
            self._hub.pause()
        self._holder, self._depth = me, depth
        return was_told

    def notify_all(self) -> None:
        for task in self._waiting:
            self._hub.wake(task)
        self._waiting.clear()
