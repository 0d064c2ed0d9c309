"""The preStop hook of an island's pod: `python k8s/leave.py SECONDS`.

Kubernetes sends SIGTERM to the first process of a container only. `ray start` of Ray 2.60 then drains its node by
itself, if it is that process and not below a shell; older ones end everything at once. With this hook an island has
its notice either way: nothing new is placed on the node, and its islands send what is done, give back the rest and
leave. The hook returns when they have left, or when the seconds are over. It takes every island that it sees for one
of this pod's.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ISLANDS = ("ray::Island", "ray::RayTrainWorker")  # how Ray titles the process of an island, and of a rank of one


def leave(seconds: float, title: str | tuple[str, ...] = ISLANDS) -> bool:
    """Drains this node and waits for the processes of these titles; whether all have left in time."""
    until = time.monotonic() + seconds
    if _present(title):
        command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "its pod is told to end", "--deadline-remaining-seconds", str(int(seconds))]
        try:
            subprocess.run(command, timeout=seconds, check=True)
        except (
            OSError,
            subprocess.SubprocessError,
        ) as error:  # a head that is gone; SIGTERM is what islands know as well
            print(f"the node was not drained: {error}", file=sys.stderr)
            for pid in _present(title):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
    while _present(title):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _present(title: str | tuple[str, ...]) -> list[int]:
    """The processes of these titles. One that has ended, and that nobody has waited for, has no title any more."""
    found = list[int]()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ends meanwhile
            if line.read_text(errors="replace").startswith(title):
                found.append(int(line.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(0 if leave(float(sys.argv[1])) else 1)
