"""An island's heart: a thread that tells the coordinator, while the training thread is busy, that the island lives.

It also hears what the coordinator has to say: a restarted one does not know the island yet, a later round may have
made the work in hand void, another process may hold the name.
"""

import os
import sys
import threading
import time

from diloco_ray.errors import FencedError
from diloco_ray.island.exchange import Exchange
from diloco_ray.transport.protocol import Beat, Transport

HUNG = 75  # exit status of a process that gave up on its own training thread


class Heart:
    """Beats from construction to `stop`. Bad news reaches the training thread between two inner steps.

    A training thread that has a plan and makes no step for stall_timeout_s is hung: the process ends, so that another
    one can take its place.
    """

    def __init__(self, exchange: Exchange, transport: Transport, every_s: float, stall_timeout_s: float):
        self._exchange, self._transport, self._every_s = exchange, transport, every_s
        self._stall_timeout_s = stall_timeout_s
        self._moved_s = time.monotonic()
        self._last_seen: object = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _beat_on(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._end_if_hung()
            try:
                self._beat()
            except Exception as error:  # of any kind: a heart that stops in silence is an island that is lost
                self._exchange.fail(error)
                return

    def _end_if_hung(self) -> None:
        exchange = self._exchange
        seen = (exchange.plan, exchange.progress)
        if exchange.plan is None or exchange.is_waiting or seen != self._last_seen:
            self._last_seen, self._moved_s = seen, time.monotonic()
        elif time.monotonic() - self._moved_s > self._stall_timeout_s:
            print(f"no inner step for {self._stall_timeout_s:g} s: ending this process", file=sys.stderr, flush=True)
            os._exit(HUNG)

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
                exchange.void(lease_id)
            case "rejoin":
                exchange.say_hello()
            case "fenced":
                raise FencedError("another process took this island's name", where=exchange.identity.island)
