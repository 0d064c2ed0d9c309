"""The coordinator's side of the mail: what is bad is refused with its reason, costs nothing, and stops nobody else."""

import gzip
import math
import os
import pickle
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import RunMismatchError
from diloco_ray.ids import sha256_hex
from diloco_ray.simulation.storage import IOCall
from diloco_ray.transport import post_office
from diloco_ray.transport.letters import Token, write_letter, write_refusal
from diloco_ray.transport.protocol import Beat, Hello
from diloco_ray.transport.tokens import REMEMBERED_S, create_token, revoke_tokens
from tests.mail import SECRET
from tests.mailroom import Mailroom, VirtualTime, answer_to, letter_of, letter_path, to_the_end
from tests.memory import Cost, measured
from tests.small_run import RUN_ID, small_job

Sent = tuple[Contribution, np.ndarray]


class Room(Mailroom):
    """Two good islands and a bad one, all at work on the second round."""

    def __init__(self, url: str, time: VirtualTime):
        super().__init__(url, time, small_job(num_islands=3))
        self.good, self.bad = [self.worker(0), self.worker(1)], self.worker(2)
        for worker in (*self.good, self.bad):
            worker.hello()
        for worker in (*self.good, self.bad):
            worker.turn()
        self.calls: list[IOCall] = []
        self.tap = self.calls.append

    @property
    def epoch(self) -> int:
        return self.coordinator.fence_epoch

    def put(self, data: bytes, path: str = "") -> str:
        """A file in the bad island's folder, or elsewhere; the office has had its turn."""
        path = path or letter_path(self.bad.name)
        self.store.create(path, data)
        self.office.turn()
        return path

    def was_read(self, path: str) -> bool:
        return any((call.act, call.path) == ("read", path) for call in self.calls)

    def sent(self, **fields: Any) -> Sent:
        """What the bad island would honestly send, but for these fields of the header."""
        plan = self.coordinator.state.open_plans(self.bad.name)[0]
        header, payload = self.bad.island.contribution(plan)
        return replace(header, **fields), payload

    def ends_well(self, num_shares: int = 2) -> None:
        """The good ones go on, without the bad one or with it, by now honest."""
        if num_shares == 2:
            self.coordinator.leave(self.bad.name, self.bad.island.incarnation, "sent away")
        to_the_end([*self.good, self.bad] if num_shares == 3 else self.good)
        assert [len(record.shares) for record in self.proved()] == [3, num_shares, num_shares]
        assert not self.store.exists("pwned")


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    return VirtualTime(monkeypatch)


@pytest.fixture(params=["folder", "memory"])
def room(request: pytest.FixtureRequest, tmp_path: Path, time: VirtualTime) -> Room:
    return Room(str(tmp_path / "run") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/run", time)


@pytest.fixture
def quick(time: VirtualTime) -> Room:
    return Room(f"memory://{uuid.uuid4().hex}/run", time)


# ---- contributions that are bad, in good letters ----


class Code:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def of_values(room: Room, change: Callable[[torch.Tensor], torch.Tensor]) -> Sent:
    plan = room.coordinator.state.open_plans(room.bad.name)[0]
    return room.bad.island.contribution(plan, change(room.bad.island.values(plan.round, 0)))


def of_bytes(room: Room, data: bytes, **fields: Any) -> Sent:
    """A header that is right about size and digest."""
    payload = np.frombuffer(data, np.uint8)
    return room.sent(payload_sha256=sha256_hex(data), payload_bytes=len(data), **fields)[0], payload


PICKLE, BOMB = pickle.dumps(Code("pwned")), gzip.compress(bytes(50_000_000))
LADDER: dict[str, tuple[Callable[[Room], Sent], str]] = {
    "not a number": (lambda r: of_values(r, lambda v: v * math.nan), "values: the norm of the outer gradient is nan"),
    "infinite": (lambda r: of_values(r, lambda v: v / 0.0), "values: the norm of the outer gradient is"),
    "huge": (lambda r: of_values(r, lambda v: v * 1e6), "norm: "),
    "all zero": (lambda r: of_values(r, torch.zeros_like), ""),
    "misshapen": (lambda r: of_values(r, lambda v: v[:-1]), "schema: 4860 bytes of float32 where 4864"),
    "truncated": (lambda r: (r.sent()[0], r.sent()[1][:-4]), "form: uint8 (4860,), announced were 4864 bytes"),
    "empty": (lambda r: (r.sent()[0], r.sent()[1][:0]), "form: uint8 (0,), announced were 4864 bytes"),
    "another digest": (lambda r: r.sent(payload_sha256="0" * 64), "digest: the payload is not what its header says"),
    "a gigabyte announced": (lambda r: r.sent(payload_bytes=10**9), "schema: 1000000000 bytes of float32"),
    "a terabyte announced": (lambda r: r.sent(payload_bytes=10**12), "schema: 1000000000000 bytes of float32"),
    "a pickle": (lambda r: of_bytes(r, PICKLE), "schema: "),
    "a bomb": (lambda r: of_bytes(r, BOMB), "schema: "),
    "a bomb in an announced payload": (lambda r: (r.sent()[0], np.frombuffer(BOMB, np.uint8)), "form: uint8 ("),
    "for an old round": (lambda r: r.sent(round=-1), "stale: a contribution to round 1 is committed, this one is for"),
    "for a round to come": (lambda r: r.sent(round=2), "stale: based on version 1, round 3 begins at 2"),
    "from an old base": (lambda r: r.sent(base_version=0), "stale: based on version 0, round 2 begins at 1"),
    "under another's lease": (
        lambda r: r.sent(lease_id=r.good[0].plan.lease_id if r.good[0].plan else ""),
        "lease: 1.4 is not held by island-02",
    ),
    "of another run": (lambda r: r.sent(run_id="another"), "foreign: run another contributed to run 555"),
}


@pytest.mark.parametrize("name", LADDER)
def test_a_bad_contribution_is_refused_with_its_reason_and_the_run_goes_on(room: Room, name: str) -> None:
    make, reason = LADDER[name]
    for good in room.good:  # so that there is a median of norms
        good.turn()
    header, payload = make(room)
    room.stands_still = True
    path = letter_path(room.bad.name)
    room.store.create(path, letter_of(room.bad.token, path, room.epoch, "submit", header, payload=payload))
    with measured() as cost:
        room.office.turn()
    room.stands_still = False
    cost.assert_at_most(400_000)
    verdict = Verdict(**answer_to(room.store, path)["answer"])
    assert (verdict.status, verdict.reason[: len(reason)]) == ("rejected" if reason else "accepted", reason)
    is_strike = room.coordinator.state.members[room.bad.name].strikes
    told = [event.get("text", "") for event in room.coordinator.report.own_events]
    assert is_strike == any(f"{room.bad.name}: contribution rejected (strike 1): {reason}" in text for text in told)
    room.ends_well(3)


# ---- letters that are bad ----


def beat(room: Room, island: str = "", **fields: Any) -> bytes:
    """A letter at the bad island's first path, honest but for these."""
    given = {"token": room.bad.token, "path": letter_path(room.bad.name), "epoch": room.epoch, **fields}
    return letter_of(given["token"], given["path"], given["epoch"], "beat", Beat(island or room.bad.name, 1))


def said(room: Room, body: Any) -> bytes:
    return write_letter(room.bad.token, RUN_ID, letter_path(room.bad.name), body)


def revoked(room: Room) -> Token:
    room.time.now_s += REMEMBERED_S
    revoke_tokens(room.store, room.bad.name)
    return room.bad.token


def forged(room: Room) -> Token:
    return Token.make("another secret than that", RUN_ID, room.bad.name, room.bad.token.serial)


def ended(room: Room) -> Token:
    token = create_token(room.store, RUN_ID, SECRET, room.bad.name, days=1)
    room.wall_s = token.expires + 1.0
    return token


def nameless(room: Room) -> bytes:
    hello = Hello("", "p" * 32, 1, "here")
    return letter_of(room.bad.token, letter_path(room.bad.name), room.epoch, "join", hello)


SIGNATURE, NEVER = "signature: not of this island's token, run and file", "token: this run has not given it out"
LETTERS: dict[str, tuple[Callable[[Room], bytes], str]] = {
    "nothing": (lambda r: b"", "form: not a letter"),
    "garbage": (lambda r: bytes(range(256)) * 10, "form: not a letter"),
    "a pickle": (lambda r: PICKLE, "form: not a letter"),
    "a bomb": (lambda r: BOMB, "form: not a letter"),
    "a refusal": (lambda r: write_refusal("you"), "token: this run has not given it out"),
    "a number without end": (lambda r: b"dr1 0 " + b"9" * 5000 + b" unsigned\n{}\n", "form: not a letter"),
    "a signature of no letters": (lambda r: b"dr1 0 0 " + b"\xff" * 64 + b"\n{}\n", "form: not a letter"),
    "one byte changed": (lambda r: beat(r).replace(b"beat", b"boat"), SIGNATURE),
    "another's token": (lambda r: beat(r, token=r.good[0].token), NEVER),
    "another's token under this serial": (
        lambda r: beat(r, token=replace(r.good[0].token, serial=r.bad.token.serial)),
        SIGNATURE,
    ),
    "a token of another secret": (lambda r: beat(r, token=forged(r)), SIGNATURE),
    "a token nobody wrote down": (lambda r: beat(r, token=Token.make(SECRET, RUN_ID, r.bad.name)), NEVER),
    "a token that has ended": (lambda r: beat(r, token=ended(r)), "token: it has expired"),
    "a revoked token": (lambda r: beat(r, token=revoked(r)), "token: it has been revoked"),
    "another file's": (lambda r: beat(r, path=letter_path(r.bad.name, 2)), SIGNATURE),
    "in another's name": (lambda r: beat(r, "island-00"), "name: it speaks for 'island-00'"),
    "in nobody's name": (nameless, "name: it speaks for ''"),
    "in a long name": (lambda r: beat(r, "x" * 10**5), f"name: it speaks for '{'x' * 64}'"),
    "no call": (lambda r: said(r, {"epoch": r.epoch}), "form: there is no call 'None'"),
    "a call that there is not": (
        lambda r: said(r, {"call": "fail\x1b[2J", "epoch": r.epoch}),
        r"form: there is no call 'fail\x1b[2J'",
    ),
    "no epoch": (lambda r: said(r, {"call": "measured", "arguments": []}), "form: there is no call 'measured'"),
    "other arguments": (
        lambda r: said(r, {"call": "join", "arguments": [{"island": r.bad.name}], "epoch": r.epoch}),
        "form: 0.process is not as it should be",
    ),
    "a lone surrogate": (
        lambda r: said(r, {"call": "leave", "arguments": [r.bad.name, 1, "\ud800"], "epoch": r.epoch}),
        "form: all of it is not as it should be",
    ),
}


@pytest.mark.parametrize("name", LETTERS)
def test_a_bad_letter_is_refused_with_its_reason_and_the_run_goes_on(room: Room, name: str) -> None:
    make, reason = LETTERS[name]
    members = room.coordinator.state.members
    path = room.put(make(room))
    assert answer_to(room.store, path) == {"refused": reason}
    assert room.notes == [f"a letter of island-02 is refused: {reason}"]
    assert not room.store.exists(path)
    assert room.coordinator.state.members == members
    room.ends_well()


def test_a_letter_larger_than_allowed_is_refused_unread(room: Room) -> None:
    largest = post_office.MAX_HEADER_BYTES + max(room.job.rules.payload_bytes)
    path = room.put(b"x" * (largest + 1))
    reason = f"size: {largest + 1:,} bytes, the largest letter of this run has {largest:,}"
    assert answer_to(room.store, path) == {"refused": reason}
    assert not room.was_read(path)
    room.ends_well()


def test_a_letter_that_grows_after_its_size_was_looked_at_is_read_no_further(room: Room) -> None:
    path = letter_path(room.bad.name)
    room.store.create(path, beat(room))

    costs: list[Cost] = []
    reading = ExitStack()

    def grow(call: IOCall) -> None:
        """On a disk to a gigabyte, of which nothing but the beginning takes room."""
        if call == IOCall("read", path, "before"):
            room.store.write(path, beat(room)[:-1] + b"x" * 20_000_000)
            if room.store.url.startswith("/"):
                os.truncate(f"{room.store.url}/{path}", 10**9)
            costs.append(reading.enter_context(measured()))

    room.tap = grow
    with reading:
        room.office.turn()
    [cost] = costs
    cost.assert_at_most(400_000)
    assert "refused" in answer_to(room.store, path)
    room.ends_well()


def test_what_the_island_is_told_of_a_refusal_ends_it_by_name(quick: Room) -> None:
    revoked(quick)
    with pytest.raises(RunMismatchError, match="the coordinator refuses this island: token: it has been revoked"):
        quick.bad.turn()
    quick.ends_well()
