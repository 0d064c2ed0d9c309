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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diloco_ray.api import create_token
from diloco_ray.document import replica_of
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify

ROOT = Path(__file__).resolve().parents[1]
NEAR, FAR, SERVER = "dr-near", "dr-far", "http://10.77.0.1:5000"
PATIENCE_S = 300.0
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
    with tempfile.TemporaryDirectory(prefix="dr-wan-") as folder, link(arguments.rate), server():
        cuts, problems, lines = run(arguments, Path(folder))
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
    return 1 if problems else 0


def run(arguments: argparse.Namespace, folder: Path) -> tuple[list[Cut], Sequence[str], list[str]]:
    os.environ |= {
        "AWS_ENDPOINT_URL": SERVER,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "DILOCO_RAY_SECRET": "a secret of this benchmark only",
    }
    for name in (NEAR, FAR):
        (folder / name).mkdir()
    RunStore("s3://wan")._fs.mkdir("wan")  # pyright: ignore[reportPrivateUsage]
    fields = {
        "storage.path": "s3://wan/runs",
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
    sets = [part for field, value in fields.items() for part in ("--set", f"{field}={value}")]
    train = [
        sys.executable,
        "-m",
        "diloco_ray.cli",
        "train",
        arguments.recipe,
        "--name",
        "wan",
        "--islands",
        "external",
    ]
    store, cuts = RunStore("s3://wan/runs/wan"), [Cut(seconds) for seconds in arguments.cuts]
    with command(NEAR, [*train, *sets], folder / "coordinator.log") as coordinator:
        wait_for(lambda: store.exists("mail/coordinator.json"), "a coordinator", coordinator)
        with island(NEAR, "near", store, folder), island(FAR, "far", store, folder):
            wait_for(lambda: "far" in last_shares(store), "the far island's first contribution", coordinator)
            for cut in cuts:
                time.sleep(BETWEEN_CUTS_S)
                before = num_records(store)
                link_is("down")
                time.sleep(cut.seconds)
                cut.outer_steps = num_records(store) - before
                link_is("up")
                at, began_s = num_records(store), time.monotonic()
                wait_for(lambda at=at: "far" in shares_after(store, at), "the far island", coordinator)
                cut.back_after_s = time.monotonic() - began_s
            time.sleep(BETWEEN_CUTS_S)
    report = verify(store, replica_of)
    tokens = ", ".join(f"{fate} {number:,}" for fate, number in report.tokens.items())
    whole = "verify: whole, replay bit-equal" if report.ok else f"verify: {'; '.join(report.problems)}"
    incarnations = {s.island: s.incarnation for record in RunLog.open(store).records for s in record.shares}
    lines = [f"{report.num_outer_steps} outer steps; {whole}; tokens: {tokens}", f"incarnations: {incarnations}"]
    return cuts, report.problems, lines


# ---- the run, seen from its log ----


def num_records(store: RunStore) -> int:
    return len(store.list("log"))


def shares_after(store: RunStore, index: int) -> set[str]:
    return {share.island for record in RunLog.open(store).records[index:] for share in record.shares}


def last_shares(store: RunStore) -> set[str]:
    return shares_after(store, -1) if num_records(store) else set()


def wait_for(condition: Callable[[], bool], what: str, process: "subprocess.Popen[bytes]") -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > until_s:
            raise SystemExit(f"{what} did not come in {PATIENCE_S:g} s")
        time.sleep(0.5)


# ---- commands, and the link between them ----


@contextmanager
def island(where: str, name: str, store: RunStore, folder: Path) -> Iterator[Any]:
    token = create_token(store.url, name)
    join = [sys.executable, str(ROOT / "jobs" / "island.py"), store.url]
    environment = {"DILOCO_RAY_TOKEN": token, "HOME": str(folder / where)}
    with command(where, join, folder / f"{name}.log", **environment) as process:
        yield process


@contextmanager
def command(where: str, words: list[str], log: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """In this namespace; ended with all that it has started."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["ip", "netns", "exec", where, *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)


@contextmanager
def server() -> Iterator[None]:
    """An S3 server on the near side, which this process reaches as the near namespace does."""
    words = [sys.executable, "-m", "moto.server", "-H", "10.77.0.1", "-p", "5000"]
    with command(NEAR, words, Path(os.devnull)) as process:
        probe = ["curl", "-s", "-o", os.devnull, SERVER]
        wait_for(lambda: subprocess.run(probe, check=False).returncode == 0, "the S3 server", process)
        yield


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
