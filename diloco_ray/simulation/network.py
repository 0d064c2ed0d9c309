"""A network that delays, loses, doubles and reorders, and the line that an island speaks through it.

Nothing is ever spoken to a process directly: a question and its answer are two messages, each with a fate of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from diloco_ray.errors import DeadlineError
from diloco_ray.simulation.green import Hub, Process, Task
from diloco_ray.transport.calls import WITH_TENSORS, CallingTransport
from diloco_ray.transport.protocol import News, SnapshotState

CALL_S = 6.0  # the first attempt at most, as a carrier makes it; a deadline holds several
PAUSE_S = 0.5


STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
Amount = TypeVar("Amount", int, float)


def _in_order(both: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= both[0] <= both[1]:
        raise ValueError("not a least and a most; give two numbers from 0 on, the smaller one first")
    return both


LeastAndMost = Annotated[tuple[Amount, Amount], AfterValidator(_in_order)]


class NetworkSettings(BaseModel):
    """Of every message, drawn for each."""

    model_config = STRICT

    delay_s: LeastAndMost[float] = (0.01, 0.3)
    loss: float = Field(0.02, ge=0, lt=1)
    doubled: float = Field(0.05, ge=0, lt=1)
    late: float = Field(0.03, ge=0, lt=1, description="probability that one takes ten times as long: it is overtaken")
    bytes_per_s: float | None = Field(
        None, gt=0, description="of tensors; what has none of them goes past, as with Ray"
    )


class Server(Protocol):
    """A process that answers: what it returns is the answer; it may wait."""

    process: Process

    def answer(self, method: str, arguments: tuple[Any, ...]) -> Any: ...


@dataclass
class _Question:
    """One attempt. Only the first answer counts."""

    asker: Task
    has_answer: bool = False
    answer: Any = None


class Network:
    """address: whoever answers at the moment when a question arrives; None while nobody does."""

    def __init__(self, hub: Hub, settings: NetworkSettings, address: Callable[[], Server | None]):
        self.hub, self.settings, self._address = hub, settings, address
        self.cuts: set[tuple[str, str]] = set()  # from a process name to another; one way
        self.num_messages = 0

    def ask(self, process: Process, method: str, arguments: tuple[Any, ...], timeout_s: float) -> tuple[bool, Any]:
        """Whether an answer came in time, and which."""
        asker = self.hub.running
        assert asker is not None
        question = _Question(asker)

        def arrive() -> None:
            server = self._address()
            if server is not None and server.process.is_alive:
                server.process.start(method, lambda: self._serve(server, question, process, method, arguments))

        self._send(process.name, "coordinator", arrive, _tensor_bytes(arguments))
        until_s = self.hub.now_s + timeout_s
        while not question.has_answer and self.hub.now_s < until_s:
            self.hub.pause(until_s - self.hub.now_s)
        return question.has_answer, question.answer

    def _serve(
        self, server: Server, question: _Question, process: Process, method: str, arguments: tuple[Any, ...]
    ) -> None:
        answer = server.answer(method, tuple(np.array(a) if isinstance(a, np.ndarray) else a for a in arguments))

        def arrive() -> None:
            if not question.has_answer and process.is_alive:
                question.has_answer, question.answer = True, answer
                self.hub.wake(question.asker)

        self._send("coordinator", process.name, arrive, _tensor_bytes(answer))

    def _send(self, sender: str, receiver: str, arrive: Callable[[], None], tensor_bytes: int) -> None:
        """A cut is looked at when a message leaves and when it would arrive."""
        rng, settings = self.hub.rng, self.settings
        self.num_messages += 1
        for _ in range(2 if rng.random() < settings.doubled else 1):
            if rng.random() < settings.loss or (sender, receiver) in self.cuts:
                continue
            delay_s = rng.uniform(*settings.delay_s) * (10.0 if rng.random() < settings.late else 1.0)
            delay_s += tensor_bytes / settings.bytes_per_s if settings.bytes_per_s else 0.0
            self.hub.call_later(delay_s, lambda: None if (sender, receiver) in self.cuts else arrive())


def _tensor_bytes(said: Any) -> int:
    """Of all arrays in a question or an answer."""
    match said:
        case np.ndarray():
            return said.nbytes
        case tuple():
            return sum(map(_tensor_bytes, said))
        case News():
            return _tensor_bytes(said.records)
        case SnapshotState():
            return _tensor_bytes((said.parameters, said.buffers))
        case _:
            return 0


class Line(CallingTransport):
    """A Transport: every call is made again until it is answered, or its deadline is over."""

    def __init__(self, network: Network, process: Process, deadline_s: float, heartbeat_timeout_s: float):
        super().__init__(deadline_s, heartbeat_timeout_s)
        self._network, self._process = network, process

    def _now_s(self) -> float:
        return self._network.hub.now_s

    def _call(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        hub = self._network.hub
        until_s, attempt_s = hub.now_s + self._deadline_s, self._attempt_s(method, CALL_S)
        while True:
            answered, answer = self._network.ask(self._process, method, arguments, attempt_s + wait_s)
            if answered:
                return answer
            attempt_s *= 2 if method in WITH_TENSORS else 1
            if hub.now_s > until_s:
                raise DeadlineError(f"the coordinator did not answer '{method}' for {self._deadline_s:g} s")
            hub.pause(PAUSE_S)
