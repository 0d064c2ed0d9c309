"""A gang: the ranks of one island, and how they talk about anything but gradients.

A rank is one process with one accelerator. Rank 0 leads: it alone speaks with the coordinator, and says to the others
what is so. All of this goes by messages between two ranks on a gloo group of its own, from host memory, never waited
for longer than the rank timeout; where one does not come, the error says whose it was. Decisions travel as JSON, values
as flat tensors. It does not know what is decided.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diloco_ray.errors import ClusterError, DeadlineError, DiLoCoError
from diloco_ray.island.job import PreemptedError, RoundAbandonedError, RunOverError

LOOK_S = 2.0  # at most between two looks at rank 0's own work
INLINE_BYTES = 248  # of a note that need not be announced: nearly all
_SIGNALS: dict[str, type[Exception]] = {
    "abandoned": RoundAbandonedError,
    "over": RunOverError,
    "preempted": PreemptedError,
}


class RankLostError(ClusterError):
    """Another rank of this island did not answer, or has failed: there, or in its own error, is the cause."""


class Gang:
    """All ranks make the same calls in the same order. The process group of torch.distributed is there already."""

    def __init__(self, island: str, timeout_s: float):
        self.island, self.timeout_s = island, timeout_s
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    # ---- values ----

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], what: str) -> None:
        """outgoing[r] goes to rank r, incoming[r] is filled by it; flat, on the CPU, and nothing where empty."""
        works: list[tuple[int, Any]] = []
        for rank in self.others:
            if incoming[rank].numel():
                works.append((rank, self._begin(rank, what, lambda r=rank: dist.irecv(incoming[r], r, self._group))))
        for rank in self.others:
            if outgoing[rank].numel():
                works.append((rank, self._begin(rank, what, lambda r=rank: dist.isend(outgoing[r], r, self._group))))
        if incoming[self.rank].numel():
            incoming[self.rank].copy_(outgoing[self.rank])
        for rank, work in works:
            self._begin(rank, what, work.wait)

    def gather(self, mine: Tensor, sizes: Sequence[int], what: str) -> list[Tensor]:
        """On rank 0 each rank's flat tensor, of sizes[r] values and this dtype; elsewhere nothing."""
        everyones = [mine.new_empty(size) for size in sizes] if self.leads else []
        nothing = [mine.new_empty(0)] * self.size
        outgoing = [mine, *nothing[1:]]
        self.swap(outgoing, everyones or nothing, what)
        return everyones

    def scatter(self, whose: Callable[[int], Tensor], mine: Tensor, what: str) -> None:
        """On rank 0 `whose` makes the flat tensor of each rank, one at a time; it comes into that rank's `mine`."""
        nothing = [mine.new_empty(0)] * self.size
        for rank in range(self.size):
            here = rank == self.rank
            outgoing = [whose(rank) if self.leads and r == rank else nothing[r] for r in range(self.size)]
            self.swap(outgoing, [mine if here and r == 0 else nothing[r] for r in range(self.size)], what)

    # ---- decisions ----

    def decide(self, make: Callable[[], Any], what: str, trouble: Exception | None = None) -> Any:
        """What `make` gives on rank 0, JSON, on all ranks. What it raises there, or any's trouble, is raised on all.

        A rank that is in trouble raises its own error, the others learn what it was.
        """
        notes = self._collect({"trouble": _as_note(trouble)} if trouble else {}, what)
        answer: dict[str, Any] = {}
        if self.leads:
            found = next((note for note in notes if "trouble" in note), None)
            if found is None:
                try:
                    answer = {"value": make()}
                except Exception as error:
                    trouble, answer = error, {"trouble": _as_note(error)}
            else:
                answer = found
        answer = self._tell(answer, what)
        if trouble is not None:
            raise trouble
        if "trouble" in answer:
            raise self._raised_elsewhere(answer["trouble"])
        return answer["value"]

    def lead_alone(
        self,
        act: Callable[[], object],
        what: str,
        within_s: float,
        trouble: Callable[[], Exception | None] = lambda: None,
    ) -> None:
        """Rank 0 acts for longer than a rank is waited for; the others hear again and again that it still does.

        trouble: of this rank, meanwhile; as in `decide`. DeadlineError on rank 0 where it takes too long.
        """
        done: Future[object] = Future()
        until_s = time.monotonic() + within_s
        if self.leads:
            threading.Thread(target=_run, args=(act, done), name=what, daemon=True).start()

        def is_done() -> bool:
            if wait([done], min(self.timeout_s / 4, LOOK_S)).done:
                done.result()
            elif time.monotonic() > until_s:
                raise DeadlineError(f"no {what} for {within_s:g} s", where=self.island)
            return done.done()

        while not self.decide(is_done, what, trouble()):
            pass

    def all_equal(self, value: Any, what: str) -> bool:
        """Whether this, as JSON, is the same on all ranks."""
        notes = self._collect({"value": value}, what)
        return self.decide(lambda: all(note == notes[0] for note in notes), what)

    def _collect(self, note: dict[str, Any], what: str) -> list[dict[str, Any]]:
        if self.leads:
            return [json.loads(json.dumps(note)), *(self._receive(rank, what) for rank in self.others)]
        self._send(0, note, what)
        return []

    def _tell(self, note: dict[str, Any], what: str) -> dict[str, Any]:
        if self.leads:
            for rank in self.others:
                self._send(rank, note, what)
            return note
        return self._receive(0, what)

    def _send(self, rank: int, note: dict[str, Any], what: str) -> None:
        data = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
        first = torch.zeros(8 + INLINE_BYTES, dtype=torch.uint8)
        first[:8].view(torch.int64)[0] = data.numel()
        inline = min(data.numel(), INLINE_BYTES)
        first[8 : 8 + inline] = data[:inline]
        self._begin(rank, what, lambda: dist.send(first, rank, self._group))
        if inline < data.numel():
            self._begin(rank, what, lambda: dist.send(data[inline:], rank, self._group))

    def _receive(self, rank: int, what: str) -> dict[str, Any]:
        first = torch.empty(8 + INLINE_BYTES, dtype=torch.uint8)
        self._begin(rank, what, lambda: dist.recv(first, rank, self._group))
        num_bytes = int(first[:8].view(torch.int64))
        data = torch.empty(num_bytes, dtype=torch.uint8)
        inline = min(num_bytes, INLINE_BYTES)
        data[:inline] = first[8 : 8 + inline]
        if inline < num_bytes:
            self._begin(rank, what, lambda: dist.recv(data[inline:], rank, self._group))
        return json.loads(data.numpy().tobytes())

    def _begin(self, rank: int, what: str, act: Callable[[], Any]) -> Any:
        """Acts; where gloo gives up, says on whom it waited."""
        began_s = time.monotonic()
        try:
            return act()
        except RuntimeError as error:
            waited_s = time.monotonic() - began_s
            raise RankLostError(
                f"rank {self.rank} of {self.size} waited {waited_s:.1f} s for rank {rank} ({what}): "
                f"{str(error).splitlines()[0]}",
                where=self.island,
                remedy=f"look why rank {rank} ended or hangs; cluster.rank_timeout_s is {self.timeout_s:g}",
            ) from error

    def _raised_elsewhere(self, note: dict[str, str]) -> Exception:
        if note["signal"]:
            return _SIGNALS[note["signal"]]()
        return RankLostError(f"another rank of this island has failed: {note['text']}", where=self.island)


def _run(act: Callable[[], object], done: "Future[object]") -> None:
    try:
        done.set_result(act())
    except BaseException as error:
        done.set_exception(error)


def _as_note(error: Exception) -> dict[str, str]:
    signals = [name for name, kind in _SIGNALS.items() if isinstance(error, kind)]
    text = error.what if isinstance(error, DiLoCoError) else f"{type(error).__name__}: {error}"
    return {"signal": signals[0] if signals else "", "text": text}
