"""An island's heart: a thread that tells the coordinator, while the training thread is busy, that the island lives.

It also hears what the coordinator has to say: a restarted one does not know the island yet, a later round may have
made the work in hand void, another process may hold the name.
"""

from diloco_ray.island.exchange import Exchange
from diloco_ray.island.job import fenced
from diloco_ray.island.threads import OsThreads, Threads, start_thread
from diloco_ray.transport.protocol import Beat, Transport

HUNG = 75  # exit status of a process that gave up on its own training thread


class Heart:
    """Beats from construction to `stop`. Bad news reaches the training thread between two inner steps.

    A training thread that has a plan and makes no step for stall_timeout_s is hung: the process ends, so that another
    one can take its place.
    """

    def __init__(
        self,
        exchange: Exchange,
        transport: Transport,
        every_s: float,
        stall_timeout_s: float,
        threads: Threads | None = None,
    ):
        self._exchange, self._transport, self._every_s = exchange, transport, every_s
        self._stall_timeout_s, self._threads = stall_timeout_s, threads or OsThreads()
        self._moved_s = self._threads.now_s()
        self._last_seen: object = None
        self._has_stopped, self._stopping = False, self._threads.condition()
        start_thread(self._threads, "heart", self._beat_on, exchange.fail)  # in silence it would be an island lost

    def stop(self) -> None:
        with self._stopping:
            self._has_stopped = True
            self._stopping.notify_all()

    def _beat_on(self) -> None:
        while not self._pause():
            self._end_if_hung()
            self._beat()

    def _pause(self) -> bool:
        """Whether it has stopped."""
        with self._stopping:
            if not self._has_stopped:
                self._stopping.wait(self._every_s)
            return self._has_stopped

    def _end_if_hung(self) -> None:
        exchange = self._exchange
        seen = (exchange.plan, exchange.progress)
        if exchange.plan is None or exchange.is_waiting or seen != self._last_seen:
            self._last_seen, self._moved_s = seen, self._threads.now_s()
        elif self._threads.now_s() - self._moved_s > self._stall_timeout_s:
            self._threads.end_process(HUNG, f"no inner step for {self._stall_timeout_s:g} s")

    def _beat(self) -> None:
        exchange, plan = self._exchange, self._exchange.plan
        lease_id = plan.lease_id if plan else ""
        order = self._transport.beat(
            Beat(exchange.identity.island, exchange.incarnation, lease_id, dict(exchange.progress))
        )
        match order:
            case "go_on":
                pass
            case "abandon":
                if exchange.plan is plan:  # else the answer was long on its way: the work is done, maybe committed
                    exchange.void(lease_id)
            case "rejoin":
                exchange.say_hello()
            case "fenced":
                name = exchange.identity.island
                after = max(0, exchange.index)  # it may not have begun to follow
                raise fenced(name, self._transport.follow(name, exchange.incarnation, after, 0.0).reason)
