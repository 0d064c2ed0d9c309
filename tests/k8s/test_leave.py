"""The preStop hook of an island's pod: with a process in the island's place and a script in the place of `ray`, and
as it is on a node of a real Ray cluster with a real island."""

import ast
import importlib.util
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import Pace
from tests.k8s.manifests import K8S
from tests.nodes import another_node, head_node
from tests.processes import parent_of, run_folder, training, write_recipe

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

    for name in (IslandActor.__ray_metadata__.class_name, RayTrainWorker.__name__):  # type: ignore[attr-defined]
        assert f"ray::{name}".startswith(hook.ISLANDS)


def test_the_hook_needs_nothing_but_python() -> None:
    names = set[str]()
    for node in ast.walk(ast.parse((K8S / "leave.py").read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    assert names
    assert names - sys.stdlib_module_names == set()


# ---- on a real node ----

POD = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]  # sees no processes but its own, as a pod does
EXEC = ["nsenter", "--user", "--preserve-credentials", "--pid", "--mount", "--target"]


@pytest.mark.ray
def test_on_a_node_like_a_pod_the_hook_drains_that_node_and_its_island_says_goodbye_and_is_gone(
    paced: dict[str, Any], pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subprocess.run([*POD, "true"], capture_output=True).returncode:
        pytest.skip("no node like a pod: `unshare --map-root-user --pid` is not allowed here")
    recipe = {**paced, "islands": 1, "rounds": 1000, "cluster": {"island_resources": {"CPU": 1}}}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    pace.slow_down(0.05)
    port = 25000 + os.getpid() % 2000
    with head_node(port, "--num-cpus=0") as head, another_node(head, "--num-cpus=1", under=POD) as pod:
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        with training(write_recipe(tmp_path, recipe), run_folder(recipe)) as train:
            train.wait_until(lambda s: s["islands"][0]["state"] == "alive" and s["islands"][0]["step"] > 0)
            pace.slow_down(5)  # the island hears of it within a step, and the hook waits for it
            (first,) = [pid for pid in pod.processes() if parent_of(pid) == pod.pid]
            hook = [*EXEC, str(first), sys.executable, str(K8S / "leave.py"), "60"]
            done = subprocess.run(hook, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert "was not drained" not in done.stderr
            assert [pid for pid in pod.processes() if title(pid).startswith("ray::Island")] == []
            status = train.wait_until(lambda s: s["islands"][0]["state"] != "alive")
            assert (status["islands"][0]["state"], status["islands"][0]["reason"]) == ("left", "preempted")


def title(pid: int) -> str:
    line = Path(f"/proc/{pid}/cmdline")
    return line.read_text() if line.exists() else ""
