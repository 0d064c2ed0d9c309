"""One record of the log: an outer step of one fragment, as sealed canonical JSON.

    record[i].parent = sha256(bytes of record[i - 1])

Equal decisions give equal bytes: a record holds no time and no machine, so two runs of the same seeds differ only in
their run id. A seal finds damage; it does not stop a forger. This module does not know where records are stored.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diloco_ray.algorithm.replica import StateDigest
from diloco_ray.coordination.messages import Share
from diloco_ray.errors import CorruptionError
from diloco_ray.ids import canonical_json, sha256_hex

T = TypeVar("T")
_MAX_DIGITS = 40  # of a whole number in a sealed file; Python itself neither reads nor writes more than 4,300

STRICT = ConfigDict(extra="forbid", strict=True)  # what is stored is exactly the fields, with exactly their types


def seal(body: dict[str, Any]) -> bytes:
    """Canonical JSON of the body with its own sha256 in it, one line. ValueError if the body has a "sha256" already."""
    if "sha256" in body:
        raise ValueError("a body to be sealed cannot have a field named sha256")
    return canonical_json({**body, "sha256": sha256_hex(canonical_json(body))}) + b"\n"


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The body. CorruptionError, naming `where`, unless sealing it gives exactly these bytes again."""
    try:
        parsed: Any = json.loads(data, parse_int=_whole_number)
        body = cast(dict[str, Any], parsed) if isinstance(parsed, dict) else {}
        if body.pop("sha256", None) is not None and seal(body) == data:
            return body
        problem = "the bytes are not those that were sealed"
    except (ValueError, RecursionError) as error:
        problem = f"not a sealed file: {error}"
    raise CorruptionError(problem, where=where, remedy="restore the file from a copy of the run store")


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def unseal_as(kind: TypeAdapter[T], data: bytes, where: str) -> T:
    """The body as a value of this kind, with its types checked; else CorruptionError, naming `where`."""
    return checked(kind, unseal(data, where), where, "not of this format", "use the version that wrote this run")


def checked(kind: TypeAdapter[T], body: dict[str, Any], where: str, what: str, remedy: str) -> T:
    """What is unsealed, as a value of this kind; else CorruptionError: where, what it is not, the first such field."""
    try:
        return kind.validate_json(canonical_json(body))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{what}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CorruptionError(problem, where=where, remedy=remedy) from error


@dataclass(frozen=True, slots=True)
class Record:
    """One commit. `version` is the fragment's after it; `round`: how many rounds are whole with it.

    payload: the store path of the combined outer gradient, encoded with `codec`. shares: in island order. The digests
    are of the fragment's state after the step. tokens: leased, committed, rejected, expired, rewound, outstanding, all
    since the run began. An init record (index 0) has no parent, no payload and no shares; its digests are
    `model_digest` of all fragments at version 0.
    """

    index: int
    parent: str
    run_id: str
    fence_epoch: int
    kind: Literal["init", "outer_step"]
    fragment: int
    version: int
    round: int
    codec: str
    payload: str
    payload_sha256: str
    shares: tuple[Share, ...]
    parameters_digest: str
    optimizer_digest: str
    tokens: dict[str, int]

    __pydantic_config__ = STRICT

    @property
    def state_digest(self) -> StateDigest:
        return StateDigest(self.parameters_digest, self.optimizer_digest)

    def to_bytes(self) -> bytes:
        return seal({**_plain(self), "shares": [_share_body(share) for share in self.shares]})

    def digest(self) -> str:
        """What the next record names as its parent: sha256 hex of to_bytes()."""
        return sha256_hex(self.to_bytes())

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Record":
        """The inverse of to_bytes. CorruptionError, naming `where`, for damage or a record of another format."""
        record = unseal_as(_RECORD, data, where)
        if record.to_bytes() != data:
            raise CorruptionError("not written as this version writes records", where=where)
        return record


_RECORD = TypeAdapter(Record)


def _plain(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _share_body(share: Share) -> dict[str, Any]:
    spent = [_plain(piece) for piece in share.spent]
    # 1 and 1.0 are equal numbers with different bytes.
    return {**_plain(share), "weight": float(share.weight), "norm": float(share.norm), "spent": spent}


def payload_path(index: int, sha256: str) -> str:
    """Where the payload of record `index` is stored. The name holds its digest: a retry writes the same bytes."""
    return f"payloads/{index:08d}-{sha256[:12]}.bin"


def model_digest(fragments: Sequence[StateDigest]) -> StateDigest:
    """One digest of all fragments, given in order: a single fragment's own, else 32 hex digits of their sha256."""
    if len(fragments) == 1:
        return fragments[0]
    parameters = sha256_hex(",".join(digest.parameters for digest in fragments).encode())
    optimizer = sha256_hex(",".join(digest.optimizer for digest in fragments).encode())
    return StateDigest(parameters[:32], optimizer[:32])
