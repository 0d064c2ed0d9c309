"""The coordinator's side of the run-store carrier: opens the islands' letters, calls its doors, writes the answers.

    turn:  list every island's prefix -> open what is new and small enough -> believe it -> door -> answer

A letter is read only after its size is known to be allowed, and is answered once: the request is deleted when its
answer lies beside it. A coordinator that dies before that leaves the request to its successor, whose fence epoch is
another one, by which the island knows that it has to write again. What is not a letter is left where it lies.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diloco_ray.errors import StoreError
from diloco_ray.ids import canonical_json
from diloco_ray.log.run_log import check_fence
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
    Notice,
    Token,
    plain,
    printable,
    understood,
    write_letter,
    write_refusal,
)
from diloco_ray.transport.protocol import Doors, Tidings
from diloco_ray.transport.tokens import KeyRing

MAX_WAIT_S = 60.0  # of a long poll
SMALL_BYTES = 64 * 1024  # larger letters are read beside the others, so that no heartbeat waits behind a payload
MAX_HANDLED = 100_000  # names of letters that are not taken a second time
MAX_IN_HAND = 16  # letters of one island: its process has a handful under way
MAX_NOTES, MAX_NOTE = 20, 300  # of one island, and characters of one


@dataclass(frozen=True)
class _LongPoll:
    token: Token
    arguments: tuple[str, int, int, str]
    until_s: float


@dataclass(frozen=True)
class _Knock:
    """A letter that is believed, and what it asks of the coordinator's doors."""

    path: str
    token: Token
    call: str
    arguments: tuple[Any, ...]


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
        self._noted: dict[str, set[str]] = {}
        self._remembering = threading.Lock()

    def put_up_notice(self, config: Mapping[str, Any], state: str = "running", reason: str = "") -> None:
        """Tells islands whom they write to, and by which recipe the run goes on now. FencedError where that is not us:
        the word of a coordinator that was overtaken must not cover its successor's.
        """
        check_fence(self._store, self._epoch)
        notice = Notice(self._epoch, state, reason, dict(config), self._keys.mark)
        self._store.write(NOTICE, canonical_json(asdict(notice)))

    def turn(self) -> bool:
        """Whether there was anything to do. StoreError: nothing is lost, the next turn takes it up."""
        was_busy = False
        for island in self._store.list(MAIL):
            if not ISLAND.fullmatch(island) or island == NOTICE.rpartition("/")[2]:
                continue
            for path, size in self._new_letters(island):
                was_busy = True
                self._in_hand.add(path)
                if size <= SMALL_BYTES or self._beside is None:
                    self._handle(island, path, size)
                else:
                    self._beside.submit(self._handle, island, path, size)
        return self._answer_long_polls() or was_busy

    def _new_letters(self, island: str) -> list[tuple[str, int]]:
        """Paths and sizes; not more at once than is fair to the others."""
        try:
            sizes = self._store.sizes(f"{MAIL}/{island}")
        except StoreError as error:  # perhaps this folder's only
            self._say(island, f"mail of {island}: {error.what}")
            return []
        letters = [(f"{MAIL}/{island}/{name}", size) for name, size in sizes.items() if REQUEST.fullmatch(name)]
        new = [letter for letter in letters if letter[0] not in self._in_hand]
        return new[: max(0, MAX_IN_HAND - (len(letters) - len(new)))]

    def _handle(self, island: str, path: str, size: int) -> None:
        with self._minding(island, path):
            knock = self._open(path, size, island)
            if knock and knock.call == "submit" and size <= SMALL_BYTES and self._beside:
                self._beside.submit(self._knock, knock)  # its answer may take as long as an outer step
            elif knock:
                self._ask(knock)

    def _knock(self, knock: "_Knock") -> None:
        with self._minding(knock.token.island, knock.path):
            self._ask(knock)

    def _ask(self, knock: "_Knock") -> None:
        answer = getattr(self._doors, knock.call)(*knock.arguments)
        self._answer(knock.path, knock.token, {"answer": plain(CALLS[knock.call][1], answer)})
        if knock.call == "join" and not answer.problem:
            self._sweep(knock.token.island, knock.path)

    @contextlib.contextmanager
    def _minding(self, island: str, path: str) -> Generator[None]:
        """What goes wrong with a letter stays with it."""
        try:
            try:
                yield
            except LetterError as error:
                self._refuse(island, path, str(error))
            return
        except StoreError as error:
            trouble, is_left = f"mail of {island}: {error.what}", True
        except TimeoutError:
            trouble, is_left = f"mail of {island}: the coordinator is busy", True
        except Exception as error:
            trouble, is_left = f"a letter of {island} has no answer: {type(error).__name__}: {error}", False
        self._hang_up(path)
        if is_left:  # it lies there still; else it stays in hand, and this coordinator does not try it again
            self._in_hand.discard(path)
        self._say(island, trouble)

    def _open(self, path: str, size: int, island: str) -> "_Knock | None":
        """What is to be asked at the doors now; LetterError where the letter is not believed."""
        if path in self._handled:
            self._put_away(path)
            return None
        if size > self._max_bytes:
            raise LetterError(f"size: {size:,} bytes, the largest letter of this run has {self._max_bytes:,}")
        data = self._store.read(path, size) if size else b""  # not what it has grown to meanwhile
        letter = Letter.opened(path, data)
        token = self._keys.token(island, letter.serial, letter.expires)
        letter.check(token.key, self._run_id)
        body = letter.body
        epoch, call = body.get("epoch"), str(body.get("call"))
        if call not in CALLS or not isinstance(epoch, int):
            raise LetterError(f"form: there is no call {call[:40]!r}")
        if call == "evaluated":
            raise LetterError("name: the run's own evaluator measures it, not an island")
        if epoch != self._epoch:
            if epoch < self._epoch:
                self._answer(path, token, {"not_for": self._epoch})
            return None  # of a coordinator that has taken over from this one: it answers itself
        arguments = understood(CALLS[call][0], body.get("arguments"))
        speaker = getattr(arguments[0], "island", arguments[0]) if arguments else island
        is_observer = call == "follow" and speaker == ""
        if isinstance(speaker, str) and speaker != island and not is_observer:
            raise LetterError(f"name: it speaks for {speaker[:64]!r}")
        if call == "follow":
            name, incarnation, after, wait_s, held = arguments
            until_s = time.monotonic() + min(max(0.0, wait_s), MAX_WAIT_S)
            with self._remembering:
                self._long_polls[path] = _LongPoll(token, (name, incarnation, after, held), until_s)
            return None
        if call == "submit":
            arguments = (*arguments, np.frombuffer(letter.payload, np.uint8))
        return _Knock(path, token, call, arguments)

    def _answer_long_polls(self) -> bool:
        was_busy = False
        with self._remembering:
            polls = list(self._long_polls.items())
        for path, poll in polls:
            with self._minding(poll.token.island, path):
                tidings = self._doors.news(*poll.arguments)
                if tidings or time.monotonic() >= poll.until_s:
                    was_busy = True
                    self._answer(path, poll.token, {"answer": plain(CALLS["follow"][1], tidings or Tidings("ok"))})
                    self._hang_up(path)
        return was_busy

    def _hang_up(self, path: str) -> None:
        with self._remembering:
            self._long_polls.pop(path, None)

    def _answer(self, path: str, token: Token, body: Mapping[str, Any]) -> None:
        answer = f"{path.removesuffix('.request')}.answer"
        self._finish(path, answer, write_letter(token, self._run_id, answer, body))

    def _refuse(self, island: str, path: str, reason: str) -> None:
        """Unsigned: there may be no key that both have."""
        reason = printable(reason, MAX_NOTE)
        self._say(island, f"a letter of {island} is refused: {reason}")
        self._finish(path, f"{path.removesuffix('.request')}.answer", write_refusal(reason))

    def _finish(self, path: str, answer: str, letter: bytes) -> None:
        if path not in self._handled:
            with contextlib.suppress(FileExistsError):  # of an attempt whose own answer was lost
                self._store.create(answer, letter)
        with self._remembering:
            self._handled[path] = None
            if len(self._handled) > MAX_HANDLED:
                del self._handled[next(iter(self._handled))]
        self._put_away(path)

    def _put_away(self, path: str) -> None:
        self._store.delete(path)
        self._in_hand.discard(path)

    def _sweep(self, island: str, path: str) -> None:
        """Answers that an earlier process of this island did not live to read."""
        process = path.rpartition("/")[2].partition("-")[0]
        for name in self._store.list(f"{MAIL}/{island}"):
            if name.endswith(".answer") and not name.startswith(process):
                self._store.delete(f"{MAIL}/{island}/{name}")

    def _say(self, island: str, text: str) -> None:
        text, noted = printable(text, MAX_NOTE), self._noted.setdefault(island, set())
        if text not in noted and len(noted) < MAX_NOTES:
            noted.add(text)
            self._note(text)
