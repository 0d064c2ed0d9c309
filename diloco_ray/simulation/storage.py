"""A run store that tells of every I/O call, before it and after it: where storage can be slow, fail, or see a crash.

    def tap(call: IOCall) -> None:
        if call == IOCall("create", "log/00000002.json", "after"):
            raise Killed  # the record is committed, and nobody was told

The storage underneath is a real one. What a tap raises arrives as if the storage had: an OSError becomes the StoreError
that a full disk would be (`before`: it did not happen; `after`: it did, and the answer was lost). A BaseException that
is no Exception passes every handler of the product, as a kill does; AnswerLostError has a create made again. A tap may
also let virtual time pass, or undo a write in a RunStore of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from diloco_ray.log.run_store import Bytes, RunStore

Act = Literal["read", "write", "create", "exists", "list", "delete"]


@dataclass(frozen=True)
class IOCall:
    """One moment of one call. data: what is being written, empty for other acts."""

    act: Act
    path: str
    moment: Literal["before", "after"]
    data: Bytes = field(default=b"", compare=False, repr=False)

    @property
    def changes(self) -> bool:
        """Whether it may leave the storage other than it was."""
        return self.act in ("write", "create", "delete")


Tap = Callable[[IOCall], None]


class AnswerLostError(BaseException):
    """Of a tap, after a create: the storage's library has had no answer, and makes the same put once more."""


class TappedStore(RunStore):
    """A RunStore whose calls happen one by one, on their caller's thread, each announced to the tap."""

    reads_ahead = False

    def __init__(self, url: str, tap: Tap):
        super().__init__(url)
        self._tap = tap

    def read(self, path: str, at_most: int | None = None) -> bytes:
        self._announce("read", path, "before")
        data = super().read(path, at_most)
        self._announce("read", path, "after")
        return data

    def write(self, path: str, data: Bytes) -> None:
        self._announce("write", path, "before", data)
        super().write(path, data)
        self._announce("write", path, "after", data)

    def create(self, path: str, data: Bytes) -> None:
        self._announce("create", path, "before", data)
        super().create(path, data)
        try:
            self._announce("create", path, "after", data)
        except AnswerLostError:
            super().create(path, data)

    def exists(self, path: str) -> bool:
        self._announce("exists", path, "before")
        found = super().exists(path)
        self._announce("exists", path, "after")
        return found

    def list(self, folder: str = "") -> list[str]:
        self._announce("list", folder, "before")
        names = super().list(folder)
        self._announce("list", folder, "after")
        return names

    def sizes(self, folder: str) -> dict[str, int]:
        self._announce("list", folder, "before")
        sizes = super().sizes(folder)
        self._announce("list", folder, "after")
        return sizes

    def delete(self, path: str) -> None:
        self._announce("delete", path, "before")
        super().delete(path)
        self._announce("delete", path, "after")

    def _announce(self, act: Act, path: str, moment: Literal["before", "after"], data: Bytes = b"") -> None:
        with self._naming(act, path):
            self._tap(IOCall(act, path, moment, data))
