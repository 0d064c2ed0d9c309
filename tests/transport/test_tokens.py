"""A token is good for one island of one run, until it ends or is taken back; only the coordinator's clock says when."""

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from diloco_ray import api
from diloco_ray.config import RunConfig
from diloco_ray.errors import ConfigError, StoreError
from diloco_ray.ids import canonical_json
from diloco_ray.log.run_store import RunStore
from diloco_ray.run import open_run
from diloco_ray.simulation.storage import IOCall, TappedStore
from diloco_ray.transport.letters import NOTICE, LetterError, Notice, Token, mark_of
from diloco_ray.transport.tokens import REMEMBERED_S, TOKENS, KeyRing, create_token, revoke_tokens

SECRET, RUN_ID = "a secret of these tests only", "5" * 32
GONE = "token: it has been revoked"
NEVER = "token: this run has not given it out"


class Room:
    """A store with tokens, and the key ring of a coordinator whose clocks are ours."""

    def __init__(self, url: str):
        self.calls: list[IOCall] = []
        self.store = RunStore(url)
        self.seconds, self.wall_s = 50.0, 1.7e9
        self.ring = self.new_ring()

    def new_ring(self, secret: str = SECRET, run_id: str = RUN_ID) -> KeyRing:
        tapped = TappedStore(self.store.url, self.calls.append)
        return KeyRing(tapped, run_id, secret, lambda: self.wall_s, lambda: self.seconds)

    def create(self, island: str = "eu-1", days: float | None = None) -> Token:
        return create_token(self.store, RUN_ID, SECRET, island, days)

    def says(self, token: Token, ring: KeyRing | None = None) -> str:
        """Why it does not hold, "" if it does."""
        try:
            held = (ring or self.ring).token(token.island, token.serial, token.expires)
        except LetterError as error:
            return str(error)
        return "" if held == token else "another key"


@pytest.fixture
def room() -> Room:
    return Room(f"memory://{uuid.uuid4().hex}/run")


def test_a_new_token_is_good_at_once_and_its_text_is_all_there_is_to_it(room: Room) -> None:
    token = room.create()
    assert room.says(token) == ""
    assert Token.read(token.text) == token


def test_nothing_that_is_written_down_is_a_secret(tmp_path: Path) -> None:
    token = create_token(RunStore(str(tmp_path)), RUN_ID, SECRET, "eu-1")
    (file,) = (tmp_path / TOKENS).iterdir()
    assert json.loads(file.read_text()) == {"expires": 0, "revoked": False}
    assert file.name == f"eu-1-{token.serial}.json"


def test_tokens_of_another_secret_run_island_serial_or_end_do_not_hold(room: Room) -> None:
    token = room.create()
    assert room.says(token, room.new_ring(secret="another secret than that")) == "another key"
    assert room.says(token, room.new_ring(run_id="6" * 32)) == "another key"
    assert room.says(Token("eu-2", token.serial, token.expires, token.key)) == NEVER
    assert room.says(Token("eu-1", "0badcafe", token.expires, token.key)) == NEVER
    assert room.says(Token("eu-1", token.serial, 2_000_000_000, token.key)) == NEVER


def test_what_was_made_with_the_secret_but_not_written_down_does_not_hold(room: Room) -> None:
    assert room.says(Token.make(SECRET, RUN_ID, "eu-1")) == NEVER


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../eu", "eu/1", "eu 1", "eu\n", "-eu", ".eu", "eu:1", "é", "x" * 64, "coordinator.json", "a\0b"],
)
def test_a_name_that_no_island_can_have_gets_no_token(room: Room, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for an island"):
        room.create(name)
    assert room.store.list(TOKENS) == []


# ---- its end ----


def test_a_token_ends_by_the_coordinators_clock_only(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes it has a clock as well, of course: the end is a date."""
    monkeypatch.setattr("diloco_ray.transport.tokens.time.time", lambda: room.wall_s)
    token = room.create(days=2)
    monkeypatch.setattr("diloco_ray.transport.tokens.time.time", lambda: 0.0)  # nobody else is asked
    assert room.says(token) == ""
    room.wall_s = token.expires
    assert room.says(token) == ""
    room.wall_s = token.expires + 0.1
    assert room.says(token) == "token: it has expired"
    assert room.says(Token("eu-1", token.serial, 0, token.key)) == NEVER  # nor is it good for ever now
    room.wall_s -= 3600.0
    assert room.says(token) == ""


def test_no_days_are_no_time_and_no_end_is_for_ever(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diloco_ray.transport.tokens.time.time", lambda: room.wall_s)
    none, always = room.create(days=0), room.create()
    room.wall_s += 1.0
    assert room.says(none) == "token: it has expired"
    room.wall_s += 1e10
    assert room.says(always) == ""


# ---- its revocation ----


def test_a_revoked_token_is_worthless_within_seconds_and_the_store_is_not_asked_for_every_letter(room: Room) -> None:
    token = room.create()
    assert room.says(token) == room.says(token) == ""
    assert len(room.calls) == 2  # before and after one look
    assert revoke_tokens(room.store, "eu-1") == 1
    room.seconds += REMEMBERED_S - 0.1
    assert room.says(token) == ""
    room.seconds += 0.1
    assert room.says(token) == GONE


def test_a_wall_clock_that_is_put_back_does_not_put_off_a_revocation(room: Room) -> None:
    token = room.create()
    assert room.says(token) == ""
    revoke_tokens(room.store, "eu-1")
    room.wall_s -= 3600.0
    room.seconds += REMEMBERED_S
    assert room.says(token) == GONE


def test_a_revoked_token_stays_so_though_its_old_file_is_put_back_while_the_coordinator_lives(room: Room) -> None:
    token = room.create()
    path = f"{TOKENS}/eu-1-{token.serial}.json"
    before = room.store.read(path)
    revoke_tokens(room.store, "eu-1")
    assert room.says(token) == GONE
    room.store.write(path, before)
    for _ in range(3):
        room.seconds += REMEMBERED_S
        assert room.says(token) == GONE
    room.store.delete(path)
    assert room.says(token) == GONE


def test_all_tokens_of_an_island_are_revoked_and_none_of_one_whose_name_begins_so(room: Room) -> None:
    names = ["eu", "eu-1", "eu-1-2", "eu-1.json", "e"]
    tokens = {name: [room.create(name), room.create(name)] for name in names}
    for gone in range(len(names)):
        assert revoke_tokens(room.store, names[gone]) == 2
        ring = room.new_ring()
        said = {name: {room.says(token, ring) for token in tokens[name]} for name in names}
        assert said == {name: {GONE} if number <= gone else {""} for number, name in enumerate(names)}
    with pytest.raises(ConfigError, match=r"'nobody' has no token of this run") as caught:
        revoke_tokens(room.store, "nobody")
    assert caught.value.remedy == "tokens were given to e, eu, eu-1, eu-1-2, eu-1.json"


def test_an_island_whose_tokens_were_revoked_can_be_given_a_new_one(room: Room) -> None:
    old = room.create()
    revoke_tokens(room.store, "eu-1")
    new = room.create()
    assert (room.says(old), room.says(new)) == (GONE, "")


@pytest.mark.parametrize("data", [b"", b"no JSON", b"[]", b"3", b"\xff", b'{"revoked": true'])
def test_a_damaged_file_lets_nobody_in_and_does_not_keep_others_from_being_revoked(room: Room, data: bytes) -> None:
    damaged, sound = room.create(), room.create()
    room.store.write(f"{TOKENS}/eu-1-{damaged.serial}.json", data)
    room.store.write(f"{TOKENS}/README", b"foreign")
    assert room.says(damaged).startswith("token: ")
    assert room.says(sound) == ""
    assert revoke_tokens(room.store, "eu-1") == 2
    room.seconds += REMEMBERED_S
    assert (room.says(damaged), room.says(sound)) == (GONE, GONE)


def test_a_store_that_does_not_answer_is_no_reason_to_believe_anything(room: Room) -> None:
    token, is_down = room.create(), True

    def tap(call: IOCall) -> None:
        if is_down:
            raise OSError("503 slow down")

    ring = KeyRing(TappedStore(room.store.url, tap), RUN_ID, SECRET, lambda: room.wall_s, lambda: room.seconds)
    with pytest.raises(StoreError, match="503 slow down"):
        room.says(token, ring)
    is_down = False
    assert room.says(token, ring) == ""


# ---- its secret ----


def test_a_token_of_another_secret_than_the_coordinators_is_refused_where_it_is_made(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(RunConfig.from_dict(tiny))
    mine, other = "the coordinator's own secret", "a secret of somebody else"
    monkeypatch.setenv(api.SECRET, other)
    assert api.create_token(run.store.url, "eu-1")  # before there is a coordinator
    notice = Notice(1, "running", "", {}, mark_of(mine, run.run_id))
    run.store.write(NOTICE, canonical_json(asdict(notice)))
    with pytest.raises(ConfigError, match="is not the one that the run's coordinator has") as caught:
        api.create_token(run.store.url, "eu-1")
    assert mine not in str(caught.value)
    assert other not in str(caught.value)
    monkeypatch.setenv(api.SECRET, mine)
    assert api.create_token(run.store.url, "eu-1")
