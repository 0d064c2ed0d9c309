"""Two network namespaces with a narrow link between them, which is cut in the middle of rounds. Linux, root.

    python -m benchmarks.wan --rate 10mbit --cuts 5 60 180 --out FILE.md

Near: an S3 server (moto), the coordinator with a Ray of its own, and one island from outside with another. Far: a
second island from outside. The link is shaped both ways (`tc tbf`) and cut by taking it down. During a cut the near
island trains on; the far one has to come back by itself. At the end `verify` proves that nothing was lost or doubled.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.places import coordinator, island, num_records, proof, server, shares_after, store_of, wait_for

NEAR, FAR = "dr-near", "dr-far"
BETWEEN_CUTS_S = 15.0


@dataclass
class Cut:
    """Outer steps taken while the link was down, and how long after it was up the far island was in one again."""

    seconds: float
    outer_steps: int = 0
    back_after_s: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="10mbit", help="of the link, each way, as tc writes it")
    parser.add_argument("--cuts", type=float, nargs="+", default=[5.0, 60.0, 180.0], metavar="SECONDS")
    parser.add_argument("--steps", type=int, default=100, help="inner steps of a round")
    parser.add_argument("--recipe", default="jobs/chaos.yaml")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("network namespaces need root")
        return 2
    cuts = [Cut(seconds) for seconds in arguments.cuts]
    with tempfile.TemporaryDirectory(prefix="dr-wan-") as name, link(arguments.rate):
        folder = Path(name)
        with server(NEAR, "10.77.0.1", 5000, folder):
            run(arguments, cuts, folder)
            lines, is_well = proof(store_of("wan"))
    report = [
        f"recipe {arguments.recipe}, {arguments.steps} inner steps a round, link {arguments.rate} each way",
        "",
        "| cut | outer steps during it | the far island is in a step again after |",
        "|---|---|---|",
        *(f"| {cut.seconds:g} s | {cut.outer_steps} | {cut.back_after_s:.1f} s |" for cut in cuts),
        "",
        *lines,
    ]
    print("\n".join(report))
    if arguments.out:
        arguments.out.write_text("\n".join(report) + "\n")
    return 0 if is_well else 1


def run(arguments: argparse.Namespace, cuts: list[Cut], folder: Path) -> None:
    """As far as the cuts go; the run has no end of its own."""
    fields = {
        "storage.snapshot_every_rounds": "50",
        "islands": "[1, 2]",
        "rounds": "100000",
        "inner.steps_per_round": str(arguments.steps),
        "evaluation.every_rounds": "100000",
        "sync.poll_s": "0.5",
        "sync.heartbeat_every_s": "1",
        "sync.heartbeat_timeout_s": "20",
        "sync.coordinator_timeout_s": "600",
    }
    store = store_of("wan")
    with (
        coordinator(NEAR, arguments.recipe, "wan", fields, folder) as process,
        island(NEAR, "near", store, folder),
        island(FAR, "far", store, folder),
    ):
        wait_for(lambda: "far" in shares_after(store, -1), "the far island's first contribution", process)
        for cut in cuts:
            time.sleep(BETWEEN_CUTS_S)
            before = num_records(store)
            link_is("down")
            time.sleep(cut.seconds)
            cut.outer_steps = num_records(store) - before
            link_is("up")
            at, began_s = num_records(store), time.monotonic()
            wait_for(lambda at=at: "far" in shares_after(store, at), "the far island", process)
            cut.back_after_s = time.monotonic() - began_s
        time.sleep(BETWEEN_CUTS_S)


# ---- the link ----


@contextmanager
def link(rate: str) -> Iterator[None]:
    """near 10.77.0.1 <-> 10.77.0.2 far, and a second, unshaped link by which this process sees the near side."""
    commands = [
        *(f"ip netns add {name}" for name in (NEAR, FAR)),
        f"ip -n {NEAR} link add wide type bridge",
        f"ip -n {NEAR} link add narrow0 type veth peer name narrow1",
        f"ip -n {NEAR} link set narrow1 netns {FAR}",
        f"ip -n {NEAR} link set narrow0 master wide",
        f"ip link add dr-watch type veth peer name watch netns {NEAR}",
        f"ip -n {NEAR} link set watch master wide",
        f"ip -n {NEAR} addr add 10.77.0.1/24 dev wide",
        f"ip -n {FAR} addr add 10.77.0.2/24 dev narrow1",
        "ip addr add 10.77.0.3/24 dev dr-watch",
        *(f"ip -n {NEAR} link set {device} up" for device in ("lo", "wide", "narrow0", "watch")),
        *(f"ip -n {FAR} link set {device} up" for device in ("lo", "narrow1")),
        "ip link set dr-watch up",
        f"tc -n {NEAR} qdisc add dev narrow0 root tbf rate {rate} burst 64kb latency 400ms",
        f"tc -n {FAR} qdisc add dev narrow1 root tbf rate {rate} burst 64kb latency 400ms",
    ]
    try:
        for words in commands:
            subprocess.run(words.split(), check=True)
        yield
    finally:
        for name in (NEAR, FAR):
            subprocess.run(["ip", "netns", "del", name], check=False)


def link_is(state: str) -> None:
    subprocess.run(f"ip -n {FAR} link set narrow1 {state}".split(), check=True)


if __name__ == "__main__":
    sys.exit(main())
