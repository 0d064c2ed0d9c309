"""The tapped store: every call is announced twice, and what the tap raises arrives as the storage's own error."""

import errno
from pathlib import Path

import pytest

from diloco_ray.errors import StoreError
from diloco_ray.log.run_log import read_ahead
from diloco_ray.log.run_store import RunStore
from diloco_ray.simulation.storage import AnswerLostError, IOCall, TappedStore


class Killed(BaseException):
    pass


def test_every_call_is_announced_before_and_after_it_happens(tmp_path: Path) -> None:
    heard: list[IOCall] = []
    store = TappedStore(str(tmp_path), heard.append)
    store.write("a", b"one")
    store.create("b", b"two")
    assert store.read("a") == b"one"
    assert store.exists("b")
    assert store.list() == ["a", "b"]
    store.delete("a")
    calls = [("write", "a"), ("create", "b"), ("read", "a"), ("exists", "b"), ("list", ""), ("delete", "a")]
    assert heard == [IOCall(act, path, moment) for act, path in calls for moment in ("before", "after")]
    assert [call.data for call in heard[:4]] == [b"one", b"one", b"two", b"two"]
    assert [call.changes for call in heard[::2]] == [True, True, False, False, False, True]


def test_files_that_are_read_ahead_are_read_one_by_one(tmp_path: Path) -> None:
    heard: list[IOCall] = []
    store = TappedStore(str(tmp_path), heard.append)
    for name in "abc":
        RunStore(store.url).write(name, name.encode())
    assert list(read_ahead(store, ["c", "a", "b"], 32)) == [b"c", b"a", b"b"]
    assert [call.path for call in heard] == ["c", "c", "a", "a", "b", "b"]


@pytest.mark.parametrize(("moment", "is_there"), [("before", False), ("after", True)])
def test_an_error_of_the_tap_is_one_of_the_storage(tmp_path: Path, moment: str, is_there: bool) -> None:
    def full(call: IOCall) -> None:
        if call.moment == moment:
            raise OSError(errno.ENOSPC, "no space left on device")

    store = TappedStore(str(tmp_path), full)
    with pytest.raises(StoreError, match="cannot create: OSError") as caught:
        store.create("log/1.json", b"x")
    assert "free some space" in caught.value.remedy
    assert RunStore(store.url).exists("log/1.json") == is_there


def test_a_create_without_an_answer_is_made_again_and_finds_itself(tmp_path: Path) -> None:
    heard: list[IOCall] = []

    def lose_the_answer(call: IOCall) -> None:
        heard.append(call)
        if call == IOCall("create", "log/1.json", "after"):
            raise AnswerLostError

    store = TappedStore(str(tmp_path), lose_the_answer)
    with pytest.raises(FileExistsError):
        store.create("log/1.json", b"x")
    assert (RunStore(store.url).read("log/1.json"), len(heard)) == (b"x", 2)


def test_a_kill_passes_every_handler(tmp_path: Path) -> None:
    def kill(call: IOCall) -> None:
        raise Killed

    with pytest.raises(Killed):
        TappedStore(str(tmp_path), kill).exists("a")
