"""Nodes of Ray as processes of their own, as `ray start --block` has them: lost all at once, and ended by pid."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Node:
    """`ray start --block` with these options, and all that it has started. under: the command that starts it, where it
    is not started as it is. environment: beside this process's own."""

    def __init__(self, address: str, *options: str, under: Sequence[str] = (), **environment: str):
        self.address = address
        ray = str(Path(sys.executable).with_name("ray"))
        self._process = subprocess.Popen(
            [*under, ray, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        said = list[str]()
        while not (said and "Ray runtime started" in said[-1]):
            said.append(self._process.stdout.readline())
            assert said[-1], "".join(said)

    def processes(self) -> set[int]:
        """Its own and all below it, by the numbers that this process knows them by."""
        parents = dict[int, int]()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(") ")[2].split()[1])
        found = {self._process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found

    def is_lost(self) -> None:
        """All at once, as when a machine is switched off."""
        if self._process.poll() is not None:
            return
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def head_node(port: int, *options: str, **environment: str) -> Iterator[Node]:
    """With two CPUs, unless the options say otherwise."""
    folder = Path(f"/tmp/dr{port}")  # short, because sockets' paths must be
    own = ("--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false", "--num-cpus=2")
    head = Node(f"127.0.0.1:{port}", *own, *options, **environment)
    try:
        yield head
    finally:
        head.is_lost()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def another_node(head: Node, *options: str, under: Sequence[str] = ()) -> Iterator[Node]:
    """Of the same cluster."""
    node = Node(head.address, f"--address={head.address}", *options, under=under)
    try:
        yield node
    finally:
        node.is_lost()
