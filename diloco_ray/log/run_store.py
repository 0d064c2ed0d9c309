"""The run store: one run's folder on any fsspec path, with the create-only write that every commit rests on.

`create` is the only linearization point of a run: of all who create one path, exactly one succeeds, and no reader ever
sees half a file. Local folders do it with a hard link, object stores with a conditional put. Transient errors of a
remote store are retried by its fsspec library; what arrives here is final and becomes a StoreError that names the file.
It does not know what the files mean.
"""

# fsspec ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import errno
import os
import re
import shutil
import threading
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from diloco_ray.errors import StoreError
from diloco_ray.log import disk

Bytes = bytes | bytearray | memoryview

_CREDENTIALS = re.compile("Credentials|Token|SSO|Profile|Authentication|InvalidAccessKeyId|SignatureDoesNotMatch")
_MEMORY_LOCK = threading.Lock()  # fsspec's memory file system looks, then writes: two threads could both create


class RunStore:
    """One run's folder. Paths are relative to it, with forward slashes. May be shared by threads."""

    reads_ahead = True  # whether whoever reads many files should ask for several at once

    def __init__(self, url: str):
        """url: a local folder (made absolute; ~ expands) or an fsspec URL. Touches nothing; see `probe`."""
        try:
            opened: tuple[Any, str] = _open(url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"no file system for this address: {error}", where=url, remedy="pip install s3fs, gcsfs or adlfs"
            ) from error
        self._fs, self._root = opened[0], opened[1].rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.url = self._root if self.is_local else url.rstrip("/")

    def url_of(self, path: str) -> str:
        """The full name of a file, for messages and for other programs."""
        return f"{self.url}/{path}" if path else self.url

    def local_path(self, path: str) -> Path | None:
        """The file on this machine's disk; None in a remote store."""
        return Path(self._full(path)) if self.is_local else None

    def read(self, path: str, at_most: int | None = None) -> bytes:
        """The whole file, or its first bytes: at least one, so many at most. StoreError when there is none to read."""
        full = self._full(path)
        with self._naming("read", path):
            if not self.is_local:
                return self._fs.cat_file(full) if at_most is None else self._fs.cat_file(full, start=0, end=at_most)
            with open(full, "rb") as file:
                return file.read() if at_most is None else file.read(at_most)

    def read_if_there(self, path: str) -> bytes | None:
        """The whole file, or None where there is none. StoreError when it cannot be read."""
        try:
            return self.read(path)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def write(self, path: str, data: Bytes) -> None:
        """Creates or replaces the file; readers see the old bytes or the new ones, also after a crash."""
        full = self._full(path)
        with self._naming("write", path):
            if self.is_local:
                disk.write(Path(full), data)
            else:
                self._fs.pipe_file(full, bytes(data))

    def create(self, path: str, data: Bytes) -> None:
        """Writes the file if there is none, whole and durable; FileExistsError, and nothing changed, if there is one.

        A remote library that repeats a put whose answer was lost may report its own first write as FileExistsError:
        who cares compares the stored bytes.
        """
        full = self._full(path)
        with self._naming("create", path):
            if self.is_local:
                disk.create(Path(full), data)
            elif isinstance(self._fs, MemoryFileSystem):
                with _MEMORY_LOCK:
                    self._fs.pipe_file(full, bytes(data), mode="create")
            else:
                self._fs.pipe_file(full, bytes(data), mode="create")

    def exists(self, path: str) -> bool:
        """Whether the file is there now. StoreError when that cannot be found out."""
        full = self._full(path)
        with self._naming("look up", path):
            try:
                self._fs.info(full)
            except FileNotFoundError:
                return False
            return True

    def list(self, folder: str = "") -> list[str]:
        """Sorted names of the files and folders directly in a folder; a missing folder is an empty one."""
        full = self._full(folder)
        with self._naming("list", folder):
            try:
                entries: list[str] = self._fs.ls(full, detail=False)
            except FileNotFoundError:
                return []
        below = full.strip("/")
        names = {entry.strip("/").rsplit("/", 1)[-1] for entry in entries if entry.strip("/") != below}
        return sorted(name for name in names if not name.startswith(disk.HIDDEN))

    def sizes(self, folder: str) -> dict[str, int]:
        """Names of the files directly in a folder, sorted, and their bytes; a missing folder is an empty one."""
        full = self._full(folder)
        with self._naming("list", folder):
            try:
                entries: list[dict[str, Any]] = self._fs.ls(full, detail=True)
            except FileNotFoundError:
                return {}
        below = full.strip("/")  # which the listing of a file consists of
        there = {entry["name"].strip("/"): entry for entry in entries if entry["type"] == "file"}
        files = {name.rsplit("/", 1)[-1]: entry for name, entry in there.items() if name != below}
        return {name: int(files[name]["size"] or 0) for name in sorted(files) if not name.startswith(disk.HIDDEN)}

    def delete(self, path: str) -> None:
        """Removes the file if it is there."""
        full = self._full(path)
        with self._naming("delete", path):
            try:
                self._fs.rm_file(full)
            except FileNotFoundError:
                return

    def delete_folder(self, folder: str) -> None:
        """Removes the files directly in a folder and, on a disk, the folder with all that a killed writer left."""
        for name in self.sizes(folder):
            self.delete(f"{folder}/{name}")
        if self.is_local:
            with self._naming("delete", folder):
                shutil.rmtree(self._full(folder), ignore_errors=True)

    def sweep(self) -> None:
        """On a disk, removes what killed writers have left anywhere in this folder."""
        if self.is_local:
            disk.sweep(Path(self._root))

    def probe(self) -> None:
        """Tries everything that a run needs; StoreError with a remedy if the store cannot be trusted with one."""
        if not _has_atomic_create(self._fs):
            raise StoreError(
                f"fsspec cannot create a file only if it is absent on {self._fs.protocol} storage: two coordinators "
                "could write one run",
                where=self.url,
                remedy="use a local or shared folder, s3://, gs:// or abfs://",
            )
        path = f".probe-{uuid.uuid4().hex}"  # a dot: one that a killed process left is no reason to refuse the folder
        try:
            self.write(path, b"written")
            self.delete(path)
            self.create(path, b"first")
            try:
                self.create(path, b"second")
            except FileExistsError:
                pass
            else:
                raise StoreError(
                    "the storage let the same file be created twice: two coordinators could write one run",
                    where=self.url_of(path),
                    remedy="use storage with conditional puts (If-None-Match), or upgrade the storage server",
                )
            if self.read(path) != b"first" or path not in self.list():
                raise StoreError(
                    "the storage does not give back what was just written",
                    where=self.url_of(path),
                    remedy="switch off client-side caches of this mount or gateway",
                )
        finally:
            with suppress(StoreError):  # that of a storage that refuses everything would hide the first one
                self.delete(path)

    def _full(self, path: str) -> str:
        """The file system's own name. Names can come from stored files, so none may lead out of the run's folder."""
        if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
            raise StoreError(f"{path!r} is not a path inside the run store", where=self.url)
        return f"{self._root}/{path}" if path else self._root

    @contextmanager
    def _naming(self, act: str, path: str) -> Generator[None]:
        """Turns whatever a storage library raises into a StoreError with the file's full name."""
        try:
            yield
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            remedy = "check the address of the run, or that the bucket exists"
            raise StoreError(f"cannot {act}: it does not exist", where=self.url_of(path), remedy=remedy) from error
        except Exception as error:
            what = f"cannot {act}: {type(error).__name__}: {error}"
            raise StoreError(what, where=self.url_of(path), remedy=_remedy(error)) from error


def _open(url: str) -> tuple[Any, Any]:
    if "://" not in url:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
    # A listing cache would hide what other processes have written since.
    return url_to_fs(url, use_listings_cache=False)


def _has_atomic_create(fs: Any) -> bool:
    """The default of fsspec looks first and writes then; only its own implementation of pipe_file can be atomic."""
    if isinstance(fs, LocalFileSystem | MemoryFileSystem):
        return True
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._pipe_file is not AsyncFileSystem._pipe_file  # pyright: ignore[reportPrivateUsage]
    return type(fs).pipe_file is not AbstractFileSystem.pipe_file


def _remedy(error: Exception) -> str:
    kinds = _kinds(error)
    if "RequestTimeTooSkewed" in kinds:
        return "set this machine's clock, which requests are signed with"
    if any(map(_CREDENTIALS.search, kinds)):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the credentials of your storage; renew what expired"
    if isinstance(error, PermissionError):
        return "check the permissions of the folder, or the credentials and policy of the bucket"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or raise the quota; the same command then goes on from the last committed record"
    if isinstance(error, OSError) and error.errno == errno.EOPNOTSUPP:
        return "commits need hard links: use another disk or an object store"
    return "the same command goes on from the last committed record when the storage answers again"


def _kinds(error: BaseException | None) -> list[str]:
    """The names of an error and of what it was made of, with the codes of a storage's answers, as botocore has them."""
    if error is None:
        return []
    answer = cast(dict[str, dict[str, str]] | None, getattr(error, "response", None))
    code = answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else ""
    return [type(error).__name__, str(code), *_kinds(error.__cause__)]
