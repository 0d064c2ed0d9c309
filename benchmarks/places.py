"""Commands in several places: an S3 server, a coordinator and islands from outside, each with a Ray of its own.

A place is a network namespace of Linux, or "" for this machine as it is.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diloco_ray.api import create_token
from diloco_ray.document import replica_of
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "places"
PATIENCE_S = 300.0

Process = subprocess.Popen[bytes]


@contextmanager
def command(place: str, words: list[str], log: Path, **environment: str) -> Iterator[Process]:
    """Ended with all that it has started."""
    inside = ["ip", "netns", "exec", place] if place else []
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*inside, *words],
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
def server(place: str, host: str, port: int, folder: Path) -> Iterator[None]:
    """An S3 server (moto) with a bucket, to which this process and all that it starts are pointed."""
    url = f"http://{host}:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "DILOCO_RAY_SECRET": "a secret of this benchmark only",
    }
    words = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with command(place, words, folder / "server.log") as process:
        probe = ["curl", "-s", "-o", os.devnull, url]
        wait_for(lambda: subprocess.run(probe, check=False).returncode == 0, "the S3 server", process)
        RunStore(f"s3://{BUCKET}")._fs.mkdir(BUCKET)  # pyright: ignore[reportPrivateUsage]
        yield


@contextmanager
def coordinator(place: str, recipe: str, name: str, fields: Mapping[str, str], folder: Path) -> Iterator[Process]:
    """`diloco-ray train --islands external`, once islands can find it."""
    words = [sys.executable, "-m", "diloco_ray.cli", "train", recipe, "--name", name, "--islands", "external"]
    words += [f"--set={field}={value}" for field, value in {"storage.path": f"s3://{BUCKET}/runs", **fields}.items()]
    with command(place, words, folder / "coordinator.log") as process:
        wait_for(lambda: store_of(name).exists("mail/coordinator.json"), "a coordinator", process)
        yield process


@contextmanager
def island(place: str, name: str, store: RunStore, folder: Path) -> Iterator[Process]:
    """`jobs/island.py`, with a home folder of its own: what it keeps there, no other finds."""
    home = folder / f"home-{name}"
    home.mkdir(exist_ok=True)
    words = [sys.executable, str(ROOT / "jobs" / "island.py"), store.url]
    environment = {"DILOCO_RAY_TOKEN": create_token(store.url, name), "HOME": str(home)}
    with command(place, words, folder / f"{name}.log", **environment) as process:
        yield process


def wait_for(condition: Callable[[], bool], what: str, process: Process, patience_s: float = PATIENCE_S) -> None:
    """While the process runs."""
    until_s = time.monotonic() + patience_s
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"the command ended with {process.poll()} before {what}")
        if time.monotonic() > until_s:
            raise SystemExit(f"{what} did not come in {patience_s:g} s")
        time.sleep(0.5)


# ---- the run, seen from its log ----


def store_of(name: str) -> RunStore:
    return RunStore(f"s3://{BUCKET}/runs/{name}")


def num_records(store: RunStore) -> int:
    return len(store.list("log"))


def shares_after(store: RunStore, index: int) -> set[str]:
    """Islands with a share in a record from this index on."""
    return {share.island for record in RunLog.open(store).records[index:] for share in record.shares}


def proof(store: RunStore) -> tuple[list[str], bool]:
    """What `verify` finds, in lines, and whether all is well."""
    report = verify(store, replica_of)
    tokens = ", ".join(f"{fate} {number:,}" for fate, number in report.tokens.items())
    whole = "verify: whole, replay bit-equal" if report.ok else f"verify: {'; '.join(report.problems)}"
    incarnations = {s.island: s.incarnation for record in RunLog.open(store).records for s in record.shares}
    lines = [f"{report.num_outer_steps} outer steps; {whole}; tokens: {tokens}", f"incarnations: {incarnations}"]
    return lines, report.ok
