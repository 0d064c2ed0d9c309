"""Identities: names, digests and the canonical bytes that digests are taken of. Knows nothing of what they identify."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

PROTOCOL_VERSION = 1
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def new_run_id() -> str:
    return uuid.uuid4().hex


def island_name(number: int) -> str:
    """Names sort in the order of their numbers up to 100 islands: sums run in island order."""
    return f"island-{number:02d}"


def island_number(name: str) -> int:
    """The inverse of island_name; of a name that it did not make, a number that is the same everywhere and always."""
    number = name.removeprefix("island-")
    return int(number) if number != name and number.isdecimal() else int(sha256_hex(name.encode())[:8], 16)


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical_json(body: Mapping[str, Any]) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8, no NaN. What is digested is always this."""
    return _CANONICAL.encode(body).encode()
