"""Letters are signed bytes with a schema: nothing in them is believed before it is proved, and nothing is ever code."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.errors import ConfigError
from diloco_ray.runtime.office import Mail
from diloco_ray.transport.letters import (
    CALLS,
    MAX_HEADER_BYTES,
    Letter,
    LetterError,
    Token,
    plain,
    understood,
    write_letter,
    write_refusal,
)
from diloco_ray.transport.protocol import Beat, Hello
from tests.small_run import RUN_ID, SmallIsland, small_job

SECRET = "a secret of these tests only"
TOKEN = Token.make(SECRET, RUN_ID, "eu-1", "0badcafe", 2_000_000_000)
PATH = f"mail/eu-1/{'a' * 32}-00000001.request"
BODY = {"call": "beat", "arguments": [{"island": "eu-1", "incarnation": 1}], "epoch": 3}


def written(payload: bytes = b"numbers", body: Any = BODY) -> bytes:
    return write_letter(TOKEN, RUN_ID, PATH, body, payload)


def believed(data: bytes, path: str = PATH, run_id: str = RUN_ID, secret: str = SECRET) -> Letter:
    """As the coordinator does it: the key is made of the secret and of what the letter says of its token."""
    letter = Letter.opened(path, data)
    letter.check(Token.make(secret, run_id, "eu-1", letter.serial, letter.expires).key, run_id)
    return letter


# ---- what is written is read ----


@pytest.mark.parametrize("payload", [b"", b"numbers", b"\n", b"a\nb\n\n", bytes(range(256)) * 9])
def test_what_was_written_is_read_and_a_payload_may_have_newlines(payload: bytes) -> None:
    letter = believed(written(payload))
    assert (letter.serial, letter.expires, letter.is_refusal) == (TOKEN.serial, TOKEN.expires, False)
    assert letter.body == BODY
    assert bytes(letter.payload) == payload


def test_every_call_and_every_answer_is_the_same_after_the_way(tmp_path: Path) -> None:
    island = SmallIsland(0, small_job())
    hello = island.hello()
    contribution = Contribution(RUN_ID, "eu-1", 1, 0, 2, 2, 4, "1.2", "int8", "0" * 64, 10**12, {"loss": 2.5})
    sent: dict[str, tuple[tuple[Any, ...], Any]] = {
        "join": ((hello,), None),
        "beat": ((Beat("eu-1", 1, "1.2", {"step": 3.0}),), "abandon"),
        "submit": ((contribution,), Verdict("rejected", "norm: ")),
        "follow": (("eu-1", 1, 7, 0.5, "1.2"), None),
        "leave": (("eu-1", 1, "preempted"), None),
        "measured": ((), {1, 2}),
        "evaluated": ((2, 2, {"loss": 1.5}, "text"), None),
    }
    assert set(sent) == set(CALLS)
    for call, (arguments, answer) in sent.items():
        takes, gives = CALLS[call]
        body = believed(written(body={"arguments": plain(takes, arguments)})).body
        assert understood(takes, body["arguments"]) == arguments
        if answer is not None:
            assert understood(gives, json.loads(json.dumps(plain(gives, answer)))) == answer


def test_a_refusal_says_why_and_proves_nothing() -> None:
    letter = Letter.opened(PATH, write_refusal("token: it has expired"))
    assert letter.is_refusal
    assert letter.body == {"refused": "token: it has expired"}
    with pytest.raises(LetterError, match="signature: "):
        letter.check(TOKEN.key, RUN_ID)


# ---- what was changed is not believed ----


def test_any_changed_byte_before_the_payload_is_refused() -> None:
    data = written()
    for place in range(len(data) - len(b"numbers")):
        for bit in (0x01, 0x80):
            changed = bytearray(data)
            changed[place] ^= bit
            with pytest.raises(LetterError, match=r"^(form|signature): "):
                believed(bytes(changed))


def test_a_payload_is_held_to_the_digest_in_the_header_and_not_to_the_signature() -> None:
    """One digest is enough: the coordinator compares it when it copies the payload."""
    assert believed(written(b"numbers").replace(b"numbers", b"numbness")).body == BODY


@pytest.mark.parametrize(
    "path",
    [
        PATH.replace("eu-1", "eu-2"),
        PATH.replace("01.request", "02.request"),
        PATH.replace(".request", ".answer"),
        PATH.replace("aaaa", "aaab"),
        "",
    ],
)
def test_a_letter_under_another_files_name_is_refused(path: str) -> None:
    with pytest.raises(LetterError, match="signature: "):
        believed(written(), path=path)


def test_a_letter_of_another_run_secret_or_token_is_refused() -> None:
    for wrong in ({"run_id": "6" * 32}, {"secret": "another secret than that"}):
        with pytest.raises(LetterError, match="signature: "):
            believed(written(), **wrong)
    for lie in ({"serial": "0badbabe"}, {"expires": 0}, {"expires": TOKEN.expires + 1}):
        data = write_letter(replace(TOKEN, **lie), RUN_ID, PATH, BODY)  # type: ignore[arg-type]
        with pytest.raises(LetterError, match="signature: "):
            believed(data)


def test_no_two_islands_serials_and_ends_have_one_key() -> None:
    makes = [("eu", "1"), ("eu-1", "1"), ("eu", "11"), ("e", "u1"), ("eu.1", "1")]
    keys = {Token.make(SECRET, RUN_ID, island, serial, 1).key for island, serial in makes}
    assert len(keys | {Token.make(SECRET, RUN_ID, "eu", "1", 11).key}) == len(makes) + 1


# ---- what is no letter ----

FIRST = written().partition(b"\n")[0]


class Code:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\n\n\n",
        b"dr1",
        FIRST,
        FIRST + b"\n{}",
        b"dr2" + FIRST[3:] + b"\n{}\n",
        b"dr1 0badcafe 0 \n{}\n",
        b"dr1 0badcafe -1 unsigned\n{}\n",
        b"dr1 0badcafe 0 unsigned more\n{}\n",
        b"dr1 0badcafe 0 " + b"\xff" * 64 + b"\n{}\n",  # no comparison of signatures takes such text
        b"dr1 0badcafe " + b"9" * 5000 + b" unsigned\n{}\n",  # nor a conversion such a number
        b"dr1 " + b"0" * 5000 + b" 0 unsigned\n{}\n",  # nor a file system such a name
        b"dr1 ../../x 0 unsigned\n{}\n",
        bytes(range(256)) * 100,
        b"\0" * 10**6,
    ],
)
def test_garbage_is_no_letter(data: bytes) -> None:
    with pytest.raises(LetterError, match="form: not a letter"):
        Letter.opened(PATH, data)


def test_a_header_has_no_more_than_a_mebibyte() -> None:
    fits = json.dumps("x" * (MAX_HEADER_BYTES - 2)).encode()
    assert Letter.opened(PATH, FIRST + b"\n" + fits + b"\nnumbers").header == fits
    for data in (FIRST + b"\nx" + fits + b"\nnumbers", FIRST + b"\n" + b" " * 10**7):
        with pytest.raises(LetterError, match="form: not a letter"):
            Letter.opened(PATH, data)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{",
        b"{}{}",
        b"\xff\xfe\x00",
        b'{"a": ' + b"[" * 100_000,
        b'{"epoch": 1' + b"0" * 5000 + b"}",
        b'{"epoch": 1000000000000000000}',
    ],
)
def test_a_header_is_a_json_object_with_numbers_of_some_size(header: bytes) -> None:
    with pytest.raises(LetterError, match="form: no JSON"):
        _ = Letter.opened(PATH, FIRST + b"\n" + header + b"\n").body


def test_a_pickle_is_no_letter_and_as_a_payload_it_stays_bytes(tmp_path: Path) -> None:
    pickled = pickle.dumps(Code(tmp_path / "pwned"))
    with pytest.raises(LetterError, match="form: not a letter"):
        Letter.opened(PATH, pickled)
    with pytest.raises(LetterError, match="form: no JSON"):
        _ = Letter.opened(PATH, FIRST + b"\n" + pickled.replace(b"\n", b" ") + b"\n").body
    assert bytes(believed(written(pickled)).payload) == pickled
    assert not (tmp_path / "pwned").exists()


HELLO = {"island": "eu-1", "process": "p", "pid": 1, "node": "n"}


@pytest.mark.parametrize(
    ("call", "arguments", "where"),
    [
        ("join", None, "all of it"),
        ("join", {}, "all of it"),
        ("join", [], "0"),
        ("join", [HELLO, HELLO], "all of it"),
        ("join", [{**HELLO, "pid": "1"}], "0.pid"),
        ("join", [{**HELLO, "pid": True}], "0.pid"),
        ("join", [{**HELLO, "pid": 1.5}], "0.pid"),
        ("join", [{**HELLO, "node": "\ud800"}], "all of it"),  # no file could be written with it
        ("join", [{**HELLO, "held": [{}]}], "0.held.0.island"),
        ("beat", [{"island": "eu-1", "incarnation": 1, "progress": {"x\x1b[2J": "1"}}], "0.progress.x[2J"),
        ("beat", [{"island": "eu-1", "incarnation": 1, "progress": {"x" * 10**5: "1"}}], "0.progress.x*"),
        ("follow", ["eu-1", 1, 0, "0.5", ""], "3"),
        ("leave", ["eu-1", 1], "2"),
        ("measured", [1], "all of it"),
    ],
)
def test_arguments_of_another_form_are_refused_and_nothing_is_guessed(call: str, arguments: Any, where: str) -> None:
    with pytest.raises(LetterError) as caught:
        understood(CALLS[call][0], arguments)
    assert str(caught.value).isprintable()
    pattern = rf"form: {re.escape(where)} is not as it should be".replace(r"x\*", "x{60,70}")
    assert re.fullmatch(pattern, str(caught.value))


def test_what_an_island_says_besides_is_ignored() -> None:
    """A newer one may say more."""
    assert understood(CALLS["join"][0], [{**HELLO, "mood": "fine"}]) == (Hello("eu-1", "p", 1, "n"),)


# ---- secrets ----


def test_a_token_is_read_from_its_text() -> None:
    assert Token.read(f" {TOKEN.text}\n") == TOKEN


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text + "0",
        lambda text: text.replace("dr1", "dr2"),
        lambda text: text.replace("eu-1", "../eu-1"),
        lambda text: text.replace("eu-1", ""),
        lambda text: text.replace("0badcafe", "0bad/cafe"),
        lambda text: text.replace("2000000000", "²"),
        lambda text: text.replace("2000000000", "9" * 5000),
        lambda text: text.replace(TOKEN.key.hex(), TOKEN.key.hex().upper()),
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(change: Any) -> None:
    text = change(TOKEN.text)
    with pytest.raises(ConfigError, match="this is not an island's token") as caught:
        Token.read(text)
    assert TOKEN.key.hex()[:16] not in str(caught.value).lower()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_token_that_is_not_set_is_missed(text: str) -> None:
    with pytest.raises(ConfigError, match="there is no token") as caught:
        Token.read(text)
    assert caught.value.where == "DILOCO_RAY_TOKEN"


def test_no_text_of_anything_has_a_secret_in_it() -> None:
    letter = believed(written(b"a payload"))
    key = TOKEN.key
    shown = [TOKEN, letter, Mail(SECRET, 1.0, {}), LetterError("signature: not of this island's token, run and file")]
    text = "".join(f"{show!r} {show!s} {[show]} {{'it': {show!r}}}" for show in shown)
    for secret in (SECRET, key.hex(), repr(key), repr(key)[2:-1], "a payload"):
        assert secret not in text
    assert key.hex().encode() not in written()
    assert SECRET.encode() not in written()
