"""Files on a disk, whole and durable: no reader sees half of one, and a power cut loses none that was written.

What is being written has a hidden name until it is whole. A writer that is killed leaves it behind; `sweep` finds it.
"""

import errno
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

Bytes = bytes | bytearray | memoryview

HIDDEN = ".tmp-"  # prefix of files that are not there yet
LEFT_S = 3600.0  # after which nobody is writing a hidden file any more


def write(target: Path, data: Bytes) -> None:
    """Creates or replaces the file."""
    with _temporary_beside(target, data) as temporary:
        os.replace(temporary, target)


def create(target: Path, data: Bytes) -> None:
    """FileExistsError, and nothing changed, if there is one. OSError EOPNOTSUPP where the disk has no hard links."""
    with _temporary_beside(target, data) as temporary:
        _link(temporary, target)


def sweep(folder: Path) -> None:
    """Removes hidden files in the folder and below that are older than an hour; what cannot be removed stays."""
    hidden = [Path(root, name) for root, _, names in os.walk(folder) for name in names if name.startswith(HIDDEN)]
    if not hidden:
        return
    with suppress(OSError), _temporary_beside(folder / "now", b"") as newest:
        now_s = newest.stat().st_mtime  # by the disk's own clock, which is not always this machine's
        for path in hidden:
            with suppress(OSError):
                if now_s - path.stat().st_mtime > LEFT_S:
                    path.unlink()


@contextmanager
def _temporary_beside(target: Path, data: Bytes) -> Generator[Path]:
    """A durable hidden file with these bytes, gone at the end; what was done to the folder meanwhile is durable too."""
    _make_folder(target.parent)
    temporary = target.parent / f"{HIDDEN}{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)
    except FileExistsError:
        # Over NFS a repeated request finds its own first link; the second name in the count tells (open(2)).
        if temporary.stat().st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise OSError(errno.EOPNOTSUPP, "this file system has no hard links") from error


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:  # which elsewhere means a lost race
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder must be", str(folder)) from error
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
