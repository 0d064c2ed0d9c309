"""Which tokens a run has given out, and which of them still hold.

    tokens/<island>-<serial>.json     {"expires": ..., "revoked": ...}

Nobody can take part whose token is not written down here, and nothing that is written down here is a secret. Whoever
can write to the whole run store can take a revocation back: give each island credentials for its own prefix only.
"""

import json
import time
from collections.abc import Callable

from diloco_ray.errors import ConfigError
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.letters import ISLAND, NOTICE, LetterError, Token, mark_of

TOKENS = "tokens"
REMEMBERED_S = 10.0  # how long a look at the store is good for


def _path(island: str, serial: str) -> str:
    return f"{TOKENS}/{island}-{serial}.json"


def _write(store: RunStore, island: str, serial: str, expires: int, *, revoked: bool) -> None:
    store.write(_path(island, serial), json.dumps({"expires": expires, "revoked": revoked}).encode())


def create_token(store: RunStore, run_id: str, secret: str, island: str, days: float | None = None) -> Token:
    """A new one, good at once. ConfigError for a name that no island can have."""
    if not ISLAND.fullmatch(island) or NOTICE.endswith(f"/{island}"):
        raise ConfigError(
            f"{island!r} is no name for an island",
            where="--name",
            remedy="take letters, digits, '.', '_' and '-', such as eu-1",
        )
    token = Token.make(secret, run_id, island, expires=0 if days is None else int(time.time() + 86400.0 * days))
    _write(store, island, token.serial, token.expires, revoked=False)
    return token


def revoke_tokens(store: RunStore, island: str) -> int:
    """All that this island has been given; how many those were. What is written there does not matter any more.

    ConfigError where there are none.
    """
    serials = [name[: -len(".json")].rpartition("-") for name in store.list(TOKENS) if name.endswith(".json")]
    mine = [serial for name, _, serial in serials if name == island]
    if not mine:
        names = ", ".join(sorted({name for name, _, _ in serials})) or "nobody"
        what, remedy = f"{island!r} has no token of this run", f"tokens were given to {names}"
        raise ConfigError(what, where=store.url, remedy=remedy)
    for serial in mine:
        _write(store, island, serial, 0, revoked=True)
    return len(mine)


class KeyRing:
    """The keys of the islands' tokens, as long as those hold. Only whoever has the run's secret has one.

    wall_clock: says what has expired, and nothing else. clock: of what is remembered; it never goes back.
    """

    def __init__(
        self,
        store: RunStore,
        run_id: str,
        secret: str,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._store, self._run_id, self._secret = store, run_id, secret
        self._wall_clock, self._now_s = wall_clock, clock
        self._good_until_s: dict[tuple[str, str, int], float] = {}
        self._revoked: set[tuple[str, str]] = set()

    @property
    def mark(self) -> str:
        return mark_of(self._secret, self._run_id)

    def token(self, island: str, serial: str, expires: int) -> Token:
        """LetterError where it does not hold."""
        now_s, name = self._now_s(), (island, serial, expires)
        if expires and self._wall_clock() > expires:
            raise LetterError("token: it has expired")
        if self._good_until_s.get(name, now_s) <= now_s:
            self._look_up(*name)
            self._good_until_s[name] = now_s + REMEMBERED_S
        return Token.make(self._secret, self._run_id, island, serial, expires)

    def _look_up(self, island: str, serial: str, expires: int) -> None:
        data = self._store.read_if_there(_path(island, serial))
        try:
            body = {} if data is None else json.loads(data)
            is_revoked, is_given_out = body.get("revoked", False), body.get("expires") == expires
        except (ValueError, AttributeError) as error:
            raise LetterError("token: what this run wrote down about it is damaged") from error
        if is_revoked:
            self._revoked.add((island, serial))
        if (island, serial) in self._revoked:
            raise LetterError("token: it has been revoked")
        if not is_given_out:
            raise LetterError("token: this run has not given it out")
