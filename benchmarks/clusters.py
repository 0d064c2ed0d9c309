"""Ray clusters that share nothing but a bucket, one of which is lost in the middle of the run and comes back.

    python -m benchmarks.clusters jobs/quickstart.yaml --islands 3 --out FILE.md

An S3 server (moto), the coordinator with a Ray of its own, and each island with another. When a third of the rounds is
done, every process of the first island's cluster is killed; the same command is given again a while later.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from benchmarks.places import (
    Process,
    coordinator,
    island,
    num_records,
    proof,
    server,
    shares_after,
    store_of,
    wait_for,
)
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.status import read_status
from diloco_ray.run import read_run

HERE, RUN = "", "clusters"
END_S = 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--islands", type=int, default=3)
    parser.add_argument("--away", type=float, default=5.0, metavar="SECONDS", help="how long the lost cluster is gone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dr-clusters-") as name:
        folder = Path(name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with server(HERE, "127.0.0.1", port, folder):
            began_s = time.monotonic()
            story = run(arguments, folder)
            seconds = time.monotonic() - began_s
            lines, is_well = proof(store_of(RUN))
            status = read_status(store_of(RUN))
    first, last = (status["validation"][when]["loss"] for when in ("first", "last"))
    report = [
        f"recipe {arguments.recipe}, {arguments.islands} islands, each a Ray cluster of its own; {seconds:.0f} s",
        *story,
        *lines,
        f"{status['state']}; validation loss of the outer parameters {first:.4f} -> {last:.4f}",
    ]
    print("\n".join(report))
    if arguments.out:
        arguments.out.write_text("\n".join(report) + "\n")
    return 0 if is_well and status["state"] == "succeeded" else 1


def run(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """To its end; what happened on the way."""
    store, names = store_of(RUN), [f"site-{number}" for number in range(1, arguments.islands + 1)]
    fields = {
        "islands": f"[1, {arguments.islands}]",
        "sync.poll_s": "0.5",
        "sync.heartbeat_every_s": "1",
        "sync.heartbeat_timeout_s": "10",
    }
    with coordinator(HERE, arguments.recipe, RUN, fields, folder) as process, ExitStack() as others:
        first = others.enter_context(island(HERE, names[0], store, folder))
        rest = [others.enter_context(island(HERE, name, store, folder)) for name in names[1:]]
        wait_for(lambda: shares_after(store, 0) == set(names), "a share of each island", process)
        wait_for(lambda: rounds_done(store) >= 1 / 3, "a third of the run", process, END_S)
        num_killed, at = kill_cluster(first), num_records(store)
        time.sleep(arguments.away)
        back, began_s = num_records(store), time.monotonic()
        with island(HERE, names[0], store, folder) as again:
            wait_for(lambda: names[0] in shares_after(store, back), "the lost island", process)
            back_s = time.monotonic() - began_s
            if process.wait(END_S) or any(each.wait(60) for each in (*rest, again)):
                raise SystemExit(f"a command failed; the logs:\n{tails(folder)}")
    return [
        f"{names[0]}'s cluster, {num_killed} processes, was killed when there were {at} records",
        f"in the {arguments.away:g} s that it was away {back - at} outer steps were taken",
        f"{back_s:.0f} s after its command was given again it had a share in one",
    ]


def rounds_done(store: RunStore) -> float:
    """Their share of the run."""
    return RunLog.open(store).tail.round / read_run(store.url).config.rounds


def kill_cluster(command: Process) -> int:
    """SIGKILL to everything in the command's session, at once; how many processes that were."""
    found = subprocess.run(["pgrep", "-s", str(command.pid)], check=False, capture_output=True, text=True)
    pids = [int(pid) for pid in found.stdout.split()]
    for pid in pids:
        with suppress(ProcessLookupError):  # some end with the one that started them
            os.kill(pid, signal.SIGKILL)
    command.wait(60)
    return len(pids)


def tails(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in sorted(folder.glob("*.log")))


if __name__ == "__main__":
    sys.exit(main())
