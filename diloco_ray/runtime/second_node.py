"""A second node of a local Ray, on the same machine: its raylet can be frozen, or lost, and the driver's own stays."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from diloco_ray.errors import ClusterError
from diloco_ray.runtime.cluster import POLL_S

JOINS_WITHIN_S = 120.0
# Of the head: a node whose raylet does not answer is given up after some 20 s; Ray's own settings take a minute.
HEALTH_CHECKS = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 5,
}


class SecondNode:
    """`ray start`, and what it starts, in a process group of its own. Linux only.

    A raylet that was frozen until Ray gave its node up ends when it wakes, and all of the node with it: `tend` starts
    another one.
    """

    def __init__(self, places: dict[str, float], scratch: str):
        """places: what it offers beside CPUs. scratch: a folder; short, because sockets' paths must be."""
        address = ray.get_runtime_context().gcs_address
        self._command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--block"),
            *(f"--resources={json.dumps(places)}", "--num-gpus=0", "--dashboard-agent-listen-port=0"),
            *(f"--temp-dir={scratch}", "--include-log-monitor=false", "--disable-usage-stats"),
        ]
        self._start()

    def _start(self) -> None:
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(
            self._command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )

    def tend(self) -> None:
        if self._process.poll() is not None:
            self._start()

    def raylet_of(self, pid: int) -> int | None:
        """The raylet under which this worker runs, if it is this node's."""
        with contextlib.suppress(OSError):
            raylet = _parent_of(pid)
            if _parent_of(raylet) == self._process.pid:
                return raylet
        return None

    def stop(self) -> None:
        """Its workers end when they find that their raylet is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def second_node(places: dict[str, float]) -> Iterator[SecondNode]:
    """One that has joined. ClusterError if it does not."""
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as scratch:
        node, until_s = SecondNode(places, scratch), time.monotonic() + JOINS_WITHIN_S
        try:
            while sum(known["Alive"] for known in ray.nodes()) < 2:
                if time.monotonic() > until_s:
                    raise ClusterError(
                        f"a second node did not join within {JOINS_WITHIN_S:g} s",
                        where="ray start",
                        remedy="try again when the machine is less busy",
                    )
                time.sleep(POLL_S)
            yield node
        finally:
            node.stop()


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
