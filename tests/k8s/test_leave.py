"""The preStop hook of an island's pod, with a process in the island's place and a script in the place of `ray`."""

import importlib.util
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.k8s.manifests import K8S

WAITS = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(1, flush=True); signal.pause()"
)


@pytest.fixture
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leave", K8S / "leave.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def island() -> Iterator["subprocess.Popen[str]"]:
    """A process with a title of its own, which ends at SIGTERM."""
    title = f"ray::IslandOfTest-{uuid.uuid4().hex}"
    arguments = [title, "-c", WAITS]
    process = subprocess.Popen(arguments, executable=sys.executable, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it listens
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a `ray` that writes its arguments down and then runs `then` beside it."""
    script = tmp_path / "ray"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexec sh {tmp_path}/then\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def title_of(process: "subprocess.Popen[str]") -> str:
    return str(process.args[0])  # type: ignore[index]


def test_the_node_is_drained_and_the_island_waited_for(
    hook: ModuleType, island: "subprocess.Popen[str]", ray: Path
) -> None:
    (ray / "then").write_text(f"kill {island.pid}")
    assert hook.leave(30, title_of(island))
    assert "drain-node --reason DRAIN_NODE_REASON_PREEMPTION" in (ray / "arguments").read_text()


def test_where_no_head_answers_the_island_hears_it_itself(
    hook: ModuleType, island: "subprocess.Popen[str]", ray: Path
) -> None:
    (ray / "then").write_text("exit 1")
    assert hook.leave(30, title_of(island))
    assert island.wait(30) == 0


def test_an_island_that_stays_is_not_waited_for_longer(
    hook: ModuleType, island: "subprocess.Popen[str]", ray: Path
) -> None:
    (ray / "then").write_text("exit 0")
    assert not hook.leave(0.5, title_of(island))


def test_a_pod_without_an_island_is_left_alone(hook: ModuleType, ray: Path) -> None:
    (ray / "then").write_text("exit 0")
    assert hook.leave(1, f"ray::IslandOfTest-{uuid.uuid4().hex}")
    assert not (ray / "arguments").exists()


def test_the_hook_looks_for_islands_as_ray_titles_them(hook: ModuleType) -> None:
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    from diloco_ray.runtime.island_actor import IslandActor

    for name in (IslandActor.__ray_metadata__.class_name, RayTrainWorker.__name__):
        assert f"ray::{name}".startswith(hook.ISLANDS)
