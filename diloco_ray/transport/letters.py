"""What islands and coordinator write to each other through a run store: bytes with a schema, signed, never code.

    mail/coordinator.json                        who reads the mail now, and whether the run is over
    mail/<island>/<process>-<number>.request     one call of a door, by the island; create-only
    mail/<island>/<process>-<number>.answer      by the coordinator; create-only

A letter is a line with its signature, a line of JSON, and for a contribution the payload:

    dr1 <serial of the token> <its expiry> HMAC-SHA256(key, run id, file name, JSON)

The JSON of a contribution has the sha256 of its payload, so the signature holds for that too. An island's key is
HMAC-SHA256(secret, run id, island, serial, expiry): a coordinator that has the secret knows every key, and stores none.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import ConfigError
from diloco_ray.transport.protocol import Beat, Hello, Order, Tidings, Welcome

MAIL = "mail"
NOTICE = f"{MAIL}/coordinator.json"
MAX_HEADER_BYTES = 1024**2  # of a letter, without its payload
ISLAND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
REQUEST = re.compile(r"([0-9a-f]{32}-[0-9]{8})\.request")
UNSIGNED = "unsigned"
_MARK = "dr1"
_FIRST_LINE = re.compile(rb"dr1 ([0-9A-Za-z]{1,32}) ([0-9]{1,12}) ([0-9a-f]{64}|unsigned)\n")
_TOKEN = re.compile(rf"dr1:({ISLAND.pattern}):([0-9A-Za-z]{{1,32}}):([0-9]{{1,12}}):([0-9a-f]{{64}})", re.ASCII)
_MAX_DIGITS = 18  # of a number in a letter: those of Python have no end


class LetterError(Exception):
    """A letter that is not believed, or not understood. Its text is the reason."""


@dataclass(frozen=True)
class Notice:
    """What everybody may read of the coordinator. Nobody signs it. config: the recipe as it is driven now.
    secret_mark: by which whoever has a secret can tell whether it is the coordinator's."""

    fence_epoch: int
    state: str
    reason: str
    config: dict[str, Any]
    secret_mark: str = ""


CALLS: Mapping[str, tuple[TypeAdapter[Any], TypeAdapter[Any]]] = {  # arguments, answer
    "join": (TypeAdapter(tuple[Hello]), TypeAdapter(Welcome)),
    "beat": (TypeAdapter(tuple[Beat]), TypeAdapter(Order)),
    "submit": (TypeAdapter(tuple[Contribution]), TypeAdapter(Verdict)),
    "follow": (TypeAdapter(tuple[str, int, int, float, str]), TypeAdapter(Tidings)),
    "leave": (TypeAdapter(tuple[str, int, str]), TypeAdapter(None)),
    "measured": (TypeAdapter(tuple[()]), TypeAdapter(set[int])),
    "evaluated": (TypeAdapter(tuple[int, int, dict[str, float], str]), TypeAdapter(None)),
}


def mark_of(secret: str, run_id: str) -> str:
    return hmac.new(secret.encode(), f"{run_id}/mark".encode(), hashlib.sha256).hexdigest()[:16]


@dataclass(frozen=True)
class Token:
    """An island's right to take part in one run. expires: Unix seconds, 0 for never."""

    island: str
    serial: str
    expires: int
    key: bytes = field(repr=False)

    @staticmethod
    def make(secret: str, run_id: str, island: str, serial: str = "", expires: int = 0) -> "Token":
        """With a new serial unless one is given."""
        serial = serial or secrets.token_hex(4)
        named = "/".join((run_id, island, serial, str(expires)))
        return Token(island, serial, expires, hmac.digest(secret.encode(), named.encode(), hashlib.sha256))

    @property
    def text(self) -> str:
        """A secret: what `read` reads."""
        return ":".join((_MARK, self.island, self.serial, str(self.expires), self.key.hex()))

    @staticmethod
    def read(text: str) -> "Token":
        """ConfigError, which does not repeat the text, where this is no token."""
        parts = _TOKEN.fullmatch(text.strip())
        if parts:
            return Token(parts[1], parts[2], int(parts[3]), bytes.fromhex(parts[4]))
        raise ConfigError(
            "this is not an island's token" if text.strip() else "there is no token",
            where="DILOCO_RAY_TOKEN",
            remedy="set it to what `diloco-ray token create RUN --name ISLAND` printed",
        )


@dataclass(frozen=True)
class Letter:
    """body: JSON. payload: bytes beside it. The file's name is `path`."""

    path: str
    serial: str
    expires: int
    signature: str
    header: bytes = field(repr=False)
    payload: memoryview = field(repr=False)

    @property
    def is_refusal(self) -> bool:
        """Whether it is one of `write_refusal`. It proves nothing but that somebody could write it."""
        return self.signature == UNSIGNED

    @property
    def body(self) -> dict[str, Any]:
        """LetterError where it is not a JSON object."""
        try:
            body: Any = json.loads(self.header, parse_int=_number)
        except (ValueError, RecursionError) as error:
            raise LetterError(f"form: no JSON: {error}") from error
        if not isinstance(body, dict):
            raise LetterError("form: no JSON object")
        return body

    @staticmethod
    def opened(path: str, data: bytes) -> "Letter":
        """Nothing of it is believed yet. LetterError where these bytes are no letter."""
        first = _FIRST_LINE.match(data)
        end = data.find(b"\n", first.end(), first.end() + MAX_HEADER_BYTES + 1) if first else -1
        if first is None or end < 0:
            raise LetterError("form: not a letter")
        serial, expires, signature = (word.decode() for word in first.groups())
        return Letter(path, serial, int(expires), signature, data[first.end() : end], memoryview(data)[end + 1 :])

    def check(self, key: bytes, run_id: str) -> None:
        if not hmac.compare_digest(_sign(key, run_id, self.path, self.header), self.signature):
            raise LetterError("signature: not of this island's token, run and file")


def write_letter(token: Token, run_id: str, path: str, body: Mapping[str, Any], payload: Any = b"") -> bytes:
    header = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    line = " ".join((_MARK, token.serial, str(token.expires), _sign(token.key, run_id, path, header)))
    return b"\n".join((line.encode(), header, payload))


def write_refusal(reason: str) -> bytes:
    """A letter without a signature, for there may be no key that both sides have. It says why, and does no more."""
    return b"\n".join((f"{_MARK} {UNSIGNED} 0 {UNSIGNED}".encode(), json.dumps({"refused": reason}).encode(), b""))


def _sign(key: bytes, run_id: str, path: str, header: bytes) -> str:
    return hmac.new(key, f"{run_id}\n{path}\n".encode() + header, hashlib.sha256).hexdigest()


def _number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def plain(kind: TypeAdapter[Any], value: Any) -> Any:
    """As JSON has it."""
    return kind.dump_python(value, mode="json")


def understood(kind: TypeAdapter[Any], value: Any) -> Any:
    """The inverse of `plain`. LetterError for anything else: no type is guessed, all text can be written as UTF-8."""
    try:
        return kind.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise LetterError(f"form: {printable(where, 80) or 'all of it'} is not as it should be") from error


def printable(text: str, most: int) -> str:
    """Of what somebody else wrote: no control characters, no lone surrogates, an end."""
    return "".join(letter for letter in text[:most] if letter.isprintable())
