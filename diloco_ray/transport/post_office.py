"""The coordinator's side of the run-store carrier: opens the islands' letters, calls its doors, writes the answers.

    turn:  list every island's prefix -> open what is new and small enough -> believe it -> door -> answer

A letter is read only after its size is known to be allowed, and is answered once: the request is deleted when its
answer lies beside it. A coordinator that dies before that leaves the request to its successor, whose fence epoch is
another one, by which the island knows that it has to write again. What is not a letter is left where it lies.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from diloco_ray.errors import StoreError
from diloco_ray.ids import canonical_json
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.letters import (
    CALLS,
    ISLAND,
    MAIL,
    MAX_HEADER_BYTES,
    NOTICE,
    REQUEST,
    Letter,
    LetterError,
    Token,
    plain,
    retold,
    understood,
    write_letter,
    write_refusal,
)
from diloco_ray.transport.protocol import Doors
from diloco_ray.transport.tokens import KeyRing

MAX_WAIT_S = 60.0  # of a long poll
SMALL_BYTES = 64 * 1024  # larger letters are read beside the others, so that no heartbeat waits behind a payload
MAX_HANDLED = 100_000  # names of letters that are not taken a second time


@dataclass(frozen=True)
class _LongPoll:
    token: Token
    arguments: tuple[str, int, int, str]
    until_s: float


class PostOffice:
    """Of one coordinator life. `turn` is called again and again, by one thread.

    max_payload_bytes: of the largest contribution. beside: reads large letters; None: nothing is done beside.
    note: what people should know.
    """

    def __init__(
        self,
        store: RunStore,
        doors: Doors,
        keys: KeyRing,
        *,
        run_id: str,
        fence_epoch: int,
        max_payload_bytes: int,
        note: Callable[[str], None],
        beside: Executor | None = None,
    ):
        self._store, self._doors, self._keys, self._run_id = store, doors, keys, run_id
        self._epoch, self._note, self._beside = fence_epoch, note, beside
        self._max_bytes = MAX_HEADER_BYTES + max_payload_bytes
        self._in_hand: set[str] = set()
        self._handled: dict[str, None] = {}
        self._long_polls: dict[str, _LongPoll] = {}
        self._noted: set[str] = set()

    def put_up_notice(self, config: Mapping[str, Any], state: str = "running", reason: str = "") -> None:
        """Tells islands whom they write to, and by which recipe the run goes on now."""
        notice = {"fence_epoch": self._epoch, "state": state, "reason": reason, "config": config}
        self._store.write(NOTICE, canonical_json(notice))

    def turn(self) -> bool:
        """Whether there was anything to do. StoreError: nothing is lost, the next turn takes it up."""
        was_busy = False
        for island in self._store.list(MAIL):
            if not ISLAND.fullmatch(island) or island == NOTICE.rpartition("/")[2]:
                continue
            for name, size in self._store.sizes(f"{MAIL}/{island}").items():
                path = f"{MAIL}/{island}/{name}"
                if REQUEST.fullmatch(name) and path not in self._in_hand:
                    was_busy = True
                    self._in_hand.add(path)
                    if size <= SMALL_BYTES or self._beside is None:
                        self._handle(island, path, size)
                    else:
                        self._beside.submit(self._handle, island, path, size)
        return self._answer_long_polls() or was_busy

    def _handle(self, island: str, path: str, size: int) -> None:
        try:
            if path in self._handled:
                self._store.delete(path)
                self._in_hand.discard(path)
            elif size > self._max_bytes:
                self._refuse(
                    island, path, f"size: {size:,} bytes, the largest letter of this run has {self._max_bytes:,}"
                )
            else:
                self._open(island, path)
        except LetterError as error:
            self._refuse(island, path, str(error))
        except StoreError as error:  # it lies there still
            self._in_hand.discard(path)
            self._say(f"mail of {island}: {error.what}")

    def _open(self, island: str, path: str) -> None:
        letter = Letter.opened(path, self._store.read(path))
        token = self._keys.token(island, letter.serial, letter.expires)
        letter.check(token.key, self._run_id)
        body = letter.body
        epoch, call = body.get("epoch"), str(body.get("call"))
        if call not in CALLS or not isinstance(epoch, int):
            raise LetterError(f"form: there is no call {call[:40]!r}")
        if epoch != self._epoch:
            if epoch < self._epoch:
                self._answer(path, token, {"not_for": self._epoch})
            return  # of a coordinator that has taken over from this one: it answers itself
        takes, gives = CALLS[call]
        arguments = understood(takes, body.get("arguments"))
        speaker = getattr(arguments[0], "island", arguments[0]) if arguments else ""
        if isinstance(speaker, str) and speaker not in (island, ""):  # an observer has no name
            raise LetterError(f"name: it speaks for {speaker!r}")
        if call == "follow":
            name, incarnation, after, wait_s, held = arguments
            until_s = time.monotonic() + min(max(0.0, wait_s), MAX_WAIT_S)
            self._long_polls[path] = _LongPoll(token, (name, incarnation, after, held), until_s)
            return
        if call == "submit":
            arguments = (*arguments, np.frombuffer(letter.payload, np.uint8))
        answer = getattr(self._doors, call)(*arguments)
        self._answer(path, token, {"answer": plain(gives, answer)})
        if call == "join":
            self._sweep(island, path)

    def _answer_long_polls(self) -> bool:
        was_busy = False
        for path, poll in list(self._long_polls.items()):
            news = self._doors.news(*poll.arguments)
            if news or time.monotonic() >= poll.until_s:
                was_busy = True
                tidings = retold(news)
                self._answer(path, poll.token, {"answer": plain(CALLS["follow"][1], tidings)})
                del self._long_polls[path]
        return was_busy

    def _answer(self, path: str, token: Token, body: Mapping[str, Any]) -> None:
        answer = f"{path.removesuffix('.request')}.answer"
        self._finish(path, answer, write_letter(token, self._run_id, answer, body))

    def _refuse(self, island: str, path: str, reason: str) -> None:
        """Unsigned: there may be no key that both have."""
        self._say(f"a letter of {island} is refused: {reason}")
        self._finish(path, f"{path.removesuffix('.request')}.answer", write_refusal(reason))

    def _finish(self, path: str, answer: str, letter: bytes) -> None:
        with contextlib.suppress(FileExistsError):  # of an attempt whose own answer was lost
            self._store.create(answer, letter)
        self._store.delete(path)
        self._handled[path] = None
        self._in_hand.discard(path)
        if len(self._handled) > MAX_HANDLED:
            del self._handled[next(iter(self._handled))]

    def _sweep(self, island: str, path: str) -> None:
        """Answers that an earlier process of this island did not live to read."""
        process = path.rpartition("/")[2].partition("-")[0]
        for name in self._store.list(f"{MAIL}/{island}"):
            if name.endswith(".answer") and not name.startswith(process):
                self._store.delete(f"{MAIL}/{island}/{name}")

    def _say(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)
