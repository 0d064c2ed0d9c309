"""Runs with real processes: of the command line, in a process group of its own, watched through its status file; and
of `fit` in a thread, watched through its own watcher. What they start is ended by pid."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml

from diloco_ray.api import DiLoCoTrainer
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.run import open_run
from diloco_ray.simulation.in_process import train_in_process

CLI = [sys.executable, "-m", "diloco_ray.cli"]
DEADLINE_S = 400.0  # two of them fit into the time-out of a test

_UNINTERRUPTED: dict[str, list[str]] = {}


def write_recipe(folder: Path, body: dict[str, Any]) -> Path:
    path = folder / f"{body['name']}.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def run_folder(body: dict[str, Any]) -> Path:
    return Path(body["storage"]["path"]) / body["name"]


class Command:
    """A command line, running in a process group of its own. environment: beside this process's own."""

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str):
        self._log = log
        with log.open("a") as out:
            self._process = subprocess.Popen(
                list(arguments),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def wait(self) -> tuple[int, str]:
        """The exit code and the output, once the command has ended."""
        try:
            return self._process.wait(timeout=DEADLINE_S), self.output()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over in {DEADLINE_S:g} s:\n{self.output()[-3000:]}") from None

    def output(self) -> str:
        return self._log.read_text()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for_end(self, code: int = 0) -> str:
        """The output, once the command has ended with this exit code."""
        found, text = self.wait()
        assert found == code, f"exit {found}, not {code}:\n{text[-3000:]}"
        return text

    def kill(self) -> None:
        """SIGKILL to the driver. Its local Ray dies with it, a moment later: that moment is part of the story."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)

    def interrupt(self, by: int = signal.SIGINT) -> None:
        """Ctrl-C, or what else there is, to this process alone."""
        os.kill(self._process.pid, by)

    def stop(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(timeout=30)


def wait_for(condition: Callable[[], bool], what: str, command: Command) -> None:
    """Until it holds, while the command runs."""
    until = time.monotonic() + DEADLINE_S
    while True:
        has_ended = command.has_ended()  # asked before the look: what it left last is looked at
        if condition():
            return
        assert not has_ended, f"the command ended before {what}:\n{command.output()[-3000:]}"
        assert time.monotonic() < until, what
        time.sleep(0.05)


class Train(Command):
    """`diloco-ray train RECIPE`, running."""

    def __init__(self, recipe: Path, folder: Path, log: Path):
        super().__init__([*CLI, "train", str(recipe)], log)
        self.folder = folder

    def status(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads((self.folder / "status.json").read_text())
        return None

    def wait_until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """A status document that fulfils the condition. It is written twice a second: a state that is over sooner may
        never be seen."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            status = self.status()
            found[:] = [status] if status is not None and condition(status) else []
            return bool(found)

        wait_for(look, "what is waited for", self)
        return found[0]


@contextmanager
def training(recipe: Path, folder: Path) -> Iterator[Train]:
    train = Train(recipe, folder, recipe.with_suffix(".log"))
    try:
        yield train
    finally:
        train.stop()


class Watched:
    """fit() in a thread, seen through its own watcher. Before Ray is shut down: `stop_all`."""

    _all: ClassVar[list["Watched"]] = []

    def __init__(self, config: RunConfig):
        self._all.append(self)
        self._is_to_stop = False
        self._seen: list[dict[str, Any]] = []
        self._num_looked_at = 0
        self.texts: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, args=(config,), daemon=True)
        self._thread.start()

    def _fit(self, config: RunConfig) -> None:
        try:
            DiLoCoTrainer(config).fit(watch=self._watch)
        except BaseException as error:
            self.error = error

    @classmethod
    def stop_all(cls) -> None:
        """A driver that outlives its test would speak to the next one's Ray."""
        for watched in cls._all:
            watched._is_to_stop = True
            watched._thread.join(timeout=60)
        alive = [watched for watched in cls._all if watched._thread.is_alive()]
        cls._all.clear()
        assert not alive

    def _watch(self, status: Any, events: list[dict[str, Any]]) -> None:
        assert not self._is_to_stop
        self.texts += [event["text"] for event in events if event["event"] == "decision"]
        self._seen += [dict(status)] if status else []

    @property
    def status(self) -> dict[str, Any]:
        """The newest."""
        return self._seen[-1]

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first status that fulfils the condition, of all that came since the one that the last call returned."""
        until = time.monotonic() + DEADLINE_S
        while True:
            is_over = not self._thread.is_alive()
            for status in self._seen[self._num_looked_at :]:
                self._num_looked_at += 1
                if condition(status):
                    return status
            assert self.error is None, self.error
            assert not is_over, f"the run was over before {what}: {self.status}"
            assert time.monotonic() < until, f"{what}: {self.status}"
            time.sleep(0.05)

    def join(self) -> None:
        self._thread.join(timeout=DEADLINE_S)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error


def num_alive(status: dict[str, Any]) -> int:
    return sum(island["state"] == "alive" for island in status["islands"])


def ranks_beside(pid: int) -> list[int]:
    """Processes of Ray Train's workers that have the same parent as this one, which is a rank itself."""
    mine = parent_of(pid)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = b"RayTrainWorker" in (folder / "cmdline").read_bytes()
            if is_rank and int(folder.name) != pid and parent_of(int(folder.name)) == mine:
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def epochs(folder: Path | str) -> list[int]:
    """The fence epochs of the coordinators that wrote the run's records."""
    return [record.fence_epoch for record in RunLog.open(RunStore(str(folder))).records]


def digests(folder: Path | str) -> list[str]:
    """The global model after every outer step of the run in this folder, or at this address."""
    return [record.parameters_digest for record in RunLog.open(RunStore(str(folder))).records]


def uninterrupted(body: dict[str, Any]) -> list[str]:
    """The digests of the same recipe, trained in process; computed once for tests that share a recipe."""
    key = json.dumps({**body, "storage": None}, sort_keys=True)
    if key not in _UNINTERRUPTED:
        reference = {**body, "name": "reference"}
        train_in_process(open_run(RunConfig.from_dict(reference)))
        _UNINTERRUPTED[key] = digests(run_folder(reference))
    return _UNINTERRUPTED[key]


def assert_whole(folder: Path | str, expected: list[str]) -> None:
    report = verify(RunStore(str(folder)), replica_of)
    assert report.problems == ()
    assert digests(folder) == expected
