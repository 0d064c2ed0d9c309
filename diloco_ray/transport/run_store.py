"""The way for islands that are clusters of their own: what they share with the coordinator is the run store alone.

A call is a request file under the island's own prefix, and an answer beside it (`letters`); records and snapshots are
read from the log, where they lie anyway. No port is opened, and nothing but bytes with a schema crosses the border.

A store that does not answer is waited for until the deadline; meanwhile the inner loop goes on to the end of its round.
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import CorruptionError, DeadlineError, RunMismatchError, StoreError
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import check_sha256, record_path
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import list_snapshots, load_newest
from diloco_ray.transport.calls import CallingTransport
from diloco_ray.transport.letters import (
    CALLS,
    MAIL,
    MAX_HEADER_BYTES,
    NOTICE,
    Letter,
    LetterError,
    Notice,
    Token,
    plain,
    printable,
    understood,
    write_letter,
)
from diloco_ray.transport.protocol import ANSWER_BYTES, Bytes, Hello, LogStep, News, SnapshotState, Tidings, Welcome

T = TypeVar("T")
QUICKEST_S = 0.02  # between two looks, where the store is a folder
RECORDS_AT_ONCE = 8  # that `follow` brings, or less: see ANSWER_BYTES
LOOKS = 5  # for an answer, and then one whether there can be one
_NOTICE = TypeAdapter(Notice)


class RunStoreTransport(CallingTransport):
    """A Transport over a run store. Its calls may come from several threads.

    process: 32 hex digits that no other process has. poll_s: longest pause between two looks for an answer; it begins
    with a tenth of that. deadline_s, heartbeat_timeout_s: see `CallingTransport`; a silent store is waited for as
    long as a silent coordinator. new_replica: an empty one, for a snapshot to be read into.
    """

    def __init__(
        self,
        store: RunStore,
        run_id: str,
        token: Token,
        process: str,
        *,
        poll_s: float,
        deadline_s: float,
        heartbeat_timeout_s: float,
        new_replica: Callable[[], Replica],
    ):
        super().__init__(deadline_s, heartbeat_timeout_s)
        self._store, self._run_id, self._token, self._process = store, run_id, token, process
        self._poll_s, self._new_replica = poll_s, new_replica
        self._numbers, self._numbering = 0, threading.Lock()
        self._is_told = False

    def join(self, hello: Hello) -> Welcome:
        """After the hello of an earlier process that nobody has read is thrown away: a coordinator that stood still
        could answer it last, and the name would be with the dead."""
        if not hello.incarnation:
            self._patiently("look for letters of an earlier process", self._discard_hellos)
        return super().join(hello)

    def _discard_hellos(self) -> None:
        folder = f"{MAIL}/{self._token.island}"
        for name, size in self._store.sizes(folder).items():
            path = f"{folder}/{name}"
            if name.endswith(".request") and not name.startswith(self._process) and size <= MAX_HEADER_BYTES:
                with suppress(LetterError):
                    data = self._store.read_if_there(path)
                    if data and Letter.opened(path, data).body.get("call") == "join":
                        self._discard(path)

    def _offer(self, contribution: Contribution, payload: Bytes) -> Verdict:
        return self._call("submit", contribution, payload=payload)

    def follow(self, island: str, incarnation: int, after: int, wait_s: float, held: str = "") -> News:
        """As the coordinator says; records come from the log, and a run is over for whoever has had them all."""
        tidings: Tidings = self._call("follow", island, incarnation, after, wait_s, held, wait_s=wait_s)
        is_over = tidings.standing == "over"
        records: tuple[LogStep, ...] = ()
        if tidings.records or is_over:
            records = self._patiently("read the log", lambda: self._records_after(after, tidings.records))
        if is_over and records:
            return News("ok", records)
        return News.of(tidings, records)

    def snapshot(self, first: bool = False) -> SnapshotState:
        return self._patiently("read a snapshot", lambda: self._snapshot(first))

    def _snapshot(self, first: bool) -> SnapshotState:
        store, replica = self._store, self._new_replica()

        def listed() -> list[int]:
            return [0] if first else list_snapshots(store)

        index = load_newest(store, listed, replica, lambda index: self._record(index).digest())
        return SnapshotState.of(index, self._record(index).round, replica)

    def _record(self, index: int) -> Record:
        path = record_path(index)
        return Record.from_bytes(self._store.read(path), self._store.url_of(path))

    def _records_after(self, after: int, is_told: bool) -> tuple[LogStep, ...]:
        """One by one until there is none: a listing names the whole log, in pages, to show what came last.

        is_told: the coordinator has committed the first, so StoreError where the store does not show it.
        """
        steps: list[LogStep] = []
        num_bytes = 0
        while len(steps) < RECORDS_AT_ONCE and num_bytes < ANSWER_BYTES:
            path = record_path(after + 1 + len(steps))
            data = self._store.read(path) if is_told and not steps else self._store.read_if_there(path)
            if data is None:
                break
            record = Record.from_bytes(data, self._store.url_of(path))
            payload = self._store.read(record.payload)
            check_sha256(payload, record.payload_sha256, self._store.url_of(record.payload))
            steps.append((record, np.frombuffer(payload, np.uint8)))
            num_bytes += len(payload)
        return tuple(steps)

    # ---- calls ----

    def _call(self, method: str, *arguments: Any, wait_s: float = 0.0, payload: Bytes | None = None) -> Any:
        """A letter that a coordinator of before was to answer is written again to its successor."""
        takes, gives = CALLS[method]
        call = {"call": method, "arguments": plain(takes, arguments)}
        until_s = time.monotonic() + self._deadline_s + wait_s
        unanswered: list[str] = []
        while True:
            epoch, ended = self._patiently("find the coordinator", lambda: self._coordinator(until_s), until_s)
            if ended:
                return _answer_of_one_that_is_over(method, ended)
            path = self._new_path()
            letter = write_letter(
                self._token,
                self._run_id,
                f"{path}.request",
                {**call, "epoch": epoch},
                b"" if payload is None else payload.data,
            )
            self._patiently(method, partial(self._post, f"{path}.request", letter), until_s)
            body = self._await_answer(method, path, epoch, until_s)
            if body is not None:
                for earlier in unanswered:
                    self._discard(f"{earlier}.request")
                    self._discard(f"{earlier}.answer")
                try:
                    return understood(gives, body.get("answer"))
                except LetterError as error:
                    raise CorruptionError(f"the coordinator's answer is not understood: {error}", where=path) from error
            unanswered.append(path)
            self._pause(self._poll_s, until_s, f"no coordinator answered '{method}'")

    def _new_path(self) -> str:
        with self._numbering:
            self._numbers += 1
            return f"{MAIL}/{self._token.island}/{self._process}-{self._numbers:08d}"

    def _post(self, path: str, letter: bytes) -> None:
        try:
            self._store.create(path, letter)
        except FileExistsError:
            return  # of an attempt whose answer was lost: the name is ours alone

    def _coordinator(self, until_s: float) -> tuple[int, str]:
        """Its fence epoch, and the reason if the run has succeeded. Waits for one that opens the run, or reopens it."""
        while True:
            notice = read_notice(self._store)
            if notice is None:
                trouble = "no coordinator has opened this run to islands from outside"
            elif notice.state == "failed":
                trouble = f"the run has failed ({notice.reason}), and no coordinator has taken it up"
            else:
                return notice.fence_epoch, notice.reason if notice.state == "succeeded" else ""
            self._pause(self._poll_s, until_s, trouble)

    def _await_answer(self, method: str, path: str, epoch: int, until_s: float) -> dict[str, Any] | None:
        """None where it has to be written again."""
        pause_s, looks, may_come = max(QUICKEST_S, self._poll_s / 10), 0, True
        again_s = time.monotonic() + max(self._attempt_s(method, math.inf), 3 * self._poll_s)  # two looks and a turn
        while True:
            looks += 1
            if looks % LOOKS == 0:
                may_come = self._patiently(method, lambda: self._may_be_answered(path, epoch, until_s), until_s)
            answer = self._patiently(method, lambda: self._store.read_if_there(f"{path}.answer"), until_s)
            if answer is not None:
                return self._read(f"{path}.answer", answer)
            if not may_come:
                self._discard(f"{path}.request")
                return None
            if time.monotonic() > again_s:
                return None  # it stays: whenever it is opened, it is a sign of life
            self._pause(pause_s, until_s, f"the coordinator did not answer '{method}'")
            pause_s = min(self._poll_s, 1.5 * pause_s)

    def _may_be_answered(self, path: str, epoch: int, until_s: float) -> bool:
        """Whether it lies there, and whom it is for still reads the mail. An answer is there before its letter goes."""
        return self._coordinator(until_s) == (epoch, "") and self._store.exists(f"{path}.request")

    def _discard(self, path: str) -> None:
        with suppress(StoreError):  # it is in nobody's way: the next process's hello sweeps it away
            self._store.delete(path)

    def _read(self, path: str, answer: bytes) -> dict[str, Any] | None:
        try:
            letter = Letter.opened(path, answer)
            if letter.is_refusal:
                raise refusal(self._token.island, printable(str(letter.body.get("refused", "")), 500))
            letter.check(self._token.key, self._run_id)
        except LetterError as error:
            raise CorruptionError(f"the coordinator's answer is not believed: {error}", where=path) from error
        finally:
            self._discard(path)
        return None if "not_for" in letter.body else letter.body

    def _patiently(self, what: str, act: Callable[[], T], until_s: float | None = None) -> T:
        """Again and again while the store does not answer."""
        until_s = time.monotonic() + self._deadline_s if until_s is None else until_s
        while True:
            try:
                result = act()
                self._is_told = False
                return result
            except StoreError as error:
                if time.monotonic() > until_s:
                    raise
                if not self._is_told:
                    self._is_told = True
                    print(
                        f"cannot {what}: {error.what}; training goes on to the end of its round, and the run store is "
                        f"asked again for up to {self._deadline_s:g} s",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(self._poll_s)

    def _pause(self, pause_s: float, until_s: float, trouble: str) -> None:
        if time.monotonic() > until_s:
            raise DeadlineError(
                f"{trouble} for {self._deadline_s:g} s",
                where=self._store.url,
                remedy="look whether its command still runs, with islands from outside allowed; then join again",
            )
        time.sleep(pause_s)


def read_notice(store: RunStore) -> Notice | None:
    """What the coordinator lets islands know; None before there was one."""
    data = store.read_if_there(NOTICE)
    try:
        return None if data is None else _NOTICE.validate_json(data)
    except ValidationError as error:
        remedy = "a coordinator that takes the run up writes a new one"
        raise CorruptionError(
            "this is not what a coordinator writes", where=store.url_of(NOTICE), remedy=remedy
        ) from error


def refusal(island: str, reason: str) -> RunMismatchError:
    remedy = "ask whoever runs the coordinator for a token: `diloco-ray token create RUN --name ISLAND`"
    return RunMismatchError(f"the coordinator refuses this island: {reason}", where=island, remedy=remedy)


def _answer_of_one_that_is_over(method: str, reason: str) -> Any:
    answers: dict[str, Any] = {
        "join": Welcome(1),
        "beat": "go_on",
        "submit": Verdict("rejected", reason),
        "follow": Tidings("over", reason=reason),
        "measured": set[int](),
    }
    return answers.get(method)
