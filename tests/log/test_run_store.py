"""One contract for every storage that a run can lie on."""

import errno
import os
import pickle
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diloco_ray.errors import StoreError
from diloco_ray.log.run_store import RunStore


def test_what_is_written_is_read_back_and_replaced(store: RunStore):
    store.write("a/b/one.bin", b"old")
    store.write("a/b/one.bin", memoryview(b"new bytes"))
    assert store.read("a/b/one.bin") == b"new bytes"
    store.write("empty", b"")
    assert store.read("empty") == b""


def test_create_keeps_the_first_bytes(store: RunStore):
    store.create("log/0.json", b"first")
    with pytest.raises(FileExistsError):
        store.create("log/0.json", b"second")
    assert store.read("log/0.json") == b"first"


def test_of_many_who_create_one_file_exactly_one_succeeds(store: RunStore):
    together = Barrier(8)

    def compete(number: int) -> bool:
        together.wait()
        try:
            store.create("log/1.json", b"%d" % number * 1000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(compete, range(8)))
    assert won.count(True) == 1
    assert store.read("log/1.json") == b"%d" % won.index(True) * 1000


def test_list_shows_names_of_files_and_folders_at_once(store: RunStore):
    assert store.list("log") == []
    assert store.list() == []
    for name in ("2.json", "1.json", "deep/3.json"):
        store.create(f"log/{name}", b"x")
        assert name.split("/")[0] in store.list("log")
    assert store.list("log") == ["1.json", "2.json", "deep"]
    assert store.list() == ["log"]
    RunStore(store.url).delete("log/1.json")
    assert store.list("log") == ["2.json", "deep"]


def test_what_another_process_wrote_is_listed_at_once(s3_bucket: str):
    store = RunStore(f"{s3_bucket}/shared run")
    store.create("log/1.json", b"x")
    assert store.list("log") == ["1.json"]
    another = fsspec.filesystem("s3", skip_instance_cache=True)  # has caches of its own
    another.pipe_file("test-bucket/shared run/log/2.json", b"x")
    assert store.list("log") == ["1.json", "2.json"]
    assert store.exists("log/2.json")
    another.rm_file("test-bucket/shared run/log/1.json")
    assert store.list("log") == ["2.json"]
    assert not store.exists("log/1.json")


def test_two_threads_do_not_both_create_in_memory(monkeypatch: pytest.MonkeyPatch):
    """fsspec's memory looks first and writes then; here another thread always comes in between."""
    look = MemoryFileSystem.exists

    def look_and_let_others_go_first(self: MemoryFileSystem, path: str, **kwargs: object) -> bool:
        found = look(self, path, **kwargs)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", look_and_let_others_go_first)
    store = RunStore(f"memory://{uuid.uuid4().hex}")

    def create(number: int) -> bool:
        try:
            store.create("x", b"%d" % number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(create, range(4))).count(True) == 1


def test_exists_and_delete(store: RunStore):
    assert not store.exists("x")
    store.write("x", b"1")
    assert store.exists("x")
    store.delete("x")
    store.delete("x")
    assert not store.exists("x")
    assert store.list() == []


def test_delete_folder_removes_its_files(store: RunStore):
    store.write("snapshots/1/a", b"1")
    store.write("snapshots/1/b", b"1")
    store.write("snapshots/2/a", b"1")
    store.delete_folder("snapshots/1")
    store.delete_folder("snapshots/absent")
    assert store.list("snapshots") == ["2"]


def test_a_missing_file_is_named_in_full(store: RunStore):
    with pytest.raises(StoreError, match="does not exist") as caught:
        store.read("log/7.json")
    assert caught.value.where == store.url_of("log/7.json")
    assert store.url_of("log/7.json").endswith("/log/7.json")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\b", "a\0b"])
def test_no_path_leads_out_of_the_run(store: RunStore, path: str):
    with pytest.raises(StoreError, match="not a path inside"):
        store.read(path)
    with pytest.raises(StoreError, match="not a path inside"):
        store.write(path, b"")


def test_probe_leaves_nothing(store: RunStore):
    store.probe()
    assert store.list() == []


def test_a_store_can_be_sent_to_another_process(store: RunStore):
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


# ---- local folders ----


def test_local_addresses_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunStore("runs/a").url == str(tmp_path / "runs/a")
    assert RunStore("~/runs/b").url == str(tmp_path / "home/runs/b")
    assert RunStore(f"file://{tmp_path}/c").url == str(tmp_path / "c")
    assert RunStore("x/../runs/a").url == str(tmp_path / "runs/a")
    assert RunStore("runs/a").local_path("x/y") == tmp_path / "runs/a/x/y"
    assert RunStore("memory://m").local_path("x") is None
    assert not RunStore("memory://m").is_local


def test_what_a_killed_writer_left_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = RunStore(str(tmp_path))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            store.create("log/1.json", b"half")
    assert len(list((tmp_path / "log").iterdir())) == 1
    assert store.list("log") == []
    assert not store.exists("log/1.json")
    store.create("log/1.json", b"whole")
    assert store.list("log") == ["1.json"]


def test_what_a_killed_writer_left_is_swept_once_nobody_can_be_writing_it(tmp_path: Path):
    store = RunStore(str(tmp_path))
    store.write("log/1.json", b"whole")
    hour_ago = time.time() - 3700
    for name in ("log/.tmp-left", "log/.tmp-new", ".tmp-left", "islands/a/.tmp-left", "islands/a/.keep"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
        if not name.endswith("new"):
            os.utime(tmp_path / name, (hour_ago, hour_ago))
    os.utime(tmp_path / "log/1.json", (hour_ago, hour_ago))
    store.sweep()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["islands/a/.keep", "log/.tmp-new", "log/1.json"]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS repeats the request and reports that the name exists."""
    link = os.link

    def link_and_deny(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_and_deny)
    RunStore(str(tmp_path)).create("x", b"1")
    with pytest.raises(FileExistsError):
        RunStore(str(tmp_path)).create("x", b"2")


def test_a_disk_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreError, match="no hard links") as caught:
        RunStore(str(tmp_path)).probe()
    assert "use another disk" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so_and_leaves_no_half_file(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = RunStore(str(tmp_path))

    def no_space(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StoreError, match=re.escape(os.strerror(number))) as caught:
        store.write("x", b"1")
    assert "free some space or raise the quota" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_not_taken_for_a_lost_race(tmp_path: Path):
    (tmp_path / "log").write_bytes(b"")
    with pytest.raises(StoreError, match="a file is where a folder must be"):
        RunStore(str(tmp_path)).create("log/1.json", b"1")


# ---- storage that cannot be trusted ----


class Forgetful(MemoryFileSystem):
    """Takes every create for an overwrite, as object stores without conditional puts do."""

    protocol = "forgetful"
    store: dict[str, object] = {}  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        super().pipe_file(path, value)


def test_probe_refuses_storage_that_creates_twice():
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    with pytest.raises(StoreError, match="created twice") as caught:
        RunStore("forgetful://run").probe()
    assert "conditional puts" in caught.value.remedy


def test_probe_refuses_storage_without_an_atomic_create():
    fsspec.register_implementation("plain", fsspec.AbstractFileSystem, clobber=True)
    with pytest.raises(StoreError, match="only if it is absent"):
        RunStore("plain://run").probe()


def test_probe_of_a_missing_bucket_says_so(s3_bucket: str):
    with pytest.raises(StoreError, match="does not exist") as caught:
        RunStore("s3://no-such-bucket/run").probe()
    assert "bucket" in caught.value.remedy


def test_probe_names_what_was_refused_first(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden")

    for name in ("pipe_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    with pytest.raises(StoreError, match="cannot write: PermissionError: 403"):
        RunStore("memory://refused").probe()


def test_an_unknown_protocol_is_refused():
    with pytest.raises(StoreError, match="Protocol not known"):
        RunStore("nonsense://x")


@pytest.mark.parametrize("act", ["read", "exists", "list"])
def test_an_outage_is_not_an_empty_store(act: str, monkeypatch: pytest.MonkeyPatch):
    store = RunStore("memory://outage")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden")

    for name in ("cat_file", "info", "ls"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    with pytest.raises(StoreError, match="403 Forbidden") as caught:
        getattr(store, act)("log")
    assert "credentials" in caught.value.remedy
