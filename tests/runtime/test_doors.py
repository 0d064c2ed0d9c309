"""The doors, as a user comes in: the shell, a Ray job, the Python API in a fresh interpreter."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from diloco_ray.api import create_token
from diloco_ray.data.shards import TokenShards
from diloco_ray.errors import ClusterError
from diloco_ray.island.evaluator import validation_batches
from diloco_ray.model.export import validation_loss
from diloco_ray.run import read_run
from tests.processes import CLI, DEADLINE_S, Command, run_folder, wait_for, write_recipe

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


def cli(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def loss_of_export(folder: Path, run: Path) -> float:
    """As a stranger would measure it: from_pretrained, and the run's held-out sequences."""
    opened = read_run(str(run))
    shards = TokenShards.open(opened.prepared_url)
    settings = opened.config.evaluation
    length = opened.config.data.sequence_length
    batches = validation_batches(shards, length, settings.num_sequences, settings.batch_size)
    return validation_loss(AutoModelForCausalLM.from_pretrained(folder), batches)


def test_the_shell_trains_shows_verifies_exports_and_samples(tiny: dict[str, Any], tmp_path: Path) -> None:
    run = run_folder(tiny)
    output = cli("train", str(write_recipe(tmp_path, tiny)))
    assert len([line for line in output.splitlines() if line.startswith("round ")]) == tiny["rounds"]
    assert f"diloco-ray verify {run}" in output
    status = json.loads(cli("status", str(run), "--json"))
    assert status["state"] == "succeeded"
    assert status["outer_steps"] == tiny["rounds"]
    assert status["validation"]["last"]["loss"] < status["validation"]["first"]["loss"]
    assert "replay bit-equal" in cli("verify", str(run))
    exported = tmp_path / "exported"
    cli("export", str(run), "--to", str(exported))
    assert loss_of_export(exported, run) == status["validation"]["last"]["loss"]
    assert f"{status['validation']['last']['loss']:.4f}" in cli("evaluate", str(run))
    assert AutoTokenizer.from_pretrained(exported).decode([104, 105]) == "hi"
    assert cli("sample", str(run), "--prompt", "the island", "--tokens", "8").startswith("the island")
    before = (run / "status.json").read_bytes()
    assert "4 outer steps" in cli("train", str(tmp_path / "tiny.yaml"))  # done: nothing is started, nothing is written
    assert (run / "status.json").read_bytes() == before
    assert "no run at" in cli("verify", str(tmp_path / "nowhere"), code=7)
    damaged = run / "log" / "00000002.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"island-00", b"island-01", 1))
    assert "log/00000002.json" in cli("verify", str(run), code=5)


SCRIPT = """
import json, sys
from diloco_ray import DiLoCoTrainer, RunConfig

if __name__ == "__main__":
    result = DiLoCoTrainer(RunConfig.from_yaml(sys.argv[1])).fit()
    frame = result.metrics_dataframe
    model = result.model()
    print(json.dumps({
        "loss": result.metrics["loss"], "path": result.path, "rows": len(frame), "error": result.error,
        "last": frame["validation_loss"].iloc[-1], "parameters": sum(p.numel() for p in model.parameters()),
    }))
    model.save_pretrained(sys.argv[2])
"""


def test_the_python_api_returns_a_result_whose_model_has_the_last_printed_loss(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    recipe = write_recipe(tmp_path, {**tiny, "rounds": 2})
    ipython = [sys.executable, "-m", "IPython", "--colors=NoColor", str(script), "--", str(recipe), str(tmp_path / "m")]
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(ipython, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    *lines, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert result["rows"] == 2
    assert result["error"] is None
    assert result["last"] == result["loss"] == loss_of_export(tmp_path / "m", Path(result["path"]))
    printed = [line for line in lines if "validation loss" in line and line.startswith("outer step")]
    assert f"{result['loss']:.4f}" in printed[-1]


@contextmanager
def head_node(number: int = 0) -> Iterator[tuple[dict[str, str], Path]]:
    """`ray start --head` as the pages say it, in a home that has no token yet, on ports of its own, ended by pid;
    yields the environment that reaches it, and its folder. Its jobs have the variables that are set by now."""
    port, dashboard, agent = (first + 1000 * number + os.getpid() % 1000 for first in (20000, 26000, 31000))
    folder = Path(tempfile.mkdtemp(prefix="dr-", dir="/tmp"))  # short, because sockets' paths must be
    home = Path(tempfile.mkdtemp(prefix="dr-home-", dir="/tmp"))
    known = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment = {**known, "RAY_AUTH_MODE": "token", "HOME": str(home)}
    ray = str(Path(sys.executable).with_name("ray"))
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, capture_output=True, timeout=60, check=True)
    head = subprocess.Popen(
        [
            ray,
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",  # Ray's own may be another Ray's here
            f"--temp-dir={folder}",
            "--disable-usage-stats",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    reaches = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    try:
        yield {**environment, **reaches}, folder
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder)
        shutil.rmtree(home)


SUBMIT = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", ".", "--", sys.executable]


def submitted(words: list[str], environment: dict[str, str], log: Path) -> Command:
    """`ray job submit`, once the dashboard listens and has somebody to give a job to."""
    until_s = time.monotonic() + DEADLINE_S
    while True:
        command = Command([*SUBMIT, *words], log, **environment)
        while not command.has_ended() and "submitted successfully" not in command.output():
            time.sleep(0.1)
        if "submitted successfully" in command.output():
            return command
        assert time.monotonic() < until_s, command.output()[-3000:]


def token_of(environment: dict[str, str]) -> str:
    """Of the cluster that this environment reaches."""
    return (Path(environment["HOME"]) / ".ray" / "auth_token").read_text().strip()


def places_of(secret: str, *folders: Path) -> list[str]:
    """Files below the folders, and command lines of processes, that have it in them."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found: list[str] = []
    for path in [*files, *Path("/proc").glob("[0-9]*/cmdline")]:
        with contextlib.suppress(OSError):  # it may be gone by now
            found += [str(path)] if secret.encode() in path.read_bytes() else []
    return found


def test_a_ray_job_trains_and_logs_one_line_per_round_and_its_token_is_nowhere(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = write_recipe(tmp_path, {**tiny, "rounds": 3})
    job, train = ["jobs/train.py", str(recipe)], [*CLI, "train", str(recipe), "--name", "elsewhere"]
    with head_node() as (environment, rays):
        output = submitted(job, environment, tmp_path / "job.log").wait_for_end()
        refused = [run_as_stranger(words, environment, tmp_path) for words in ([*SUBMIT, *job], train)]
        assert any(rays.rglob("*.log"))
        assert places_of(token_of(environment), rays, tmp_path) == []
    assert "succeeded" in output
    assert len([line for line in output.splitlines() if line.startswith("round ")]) == 3
    assert_refused(*refused)


def test_the_jobs_of_a_run_across_clusters_train_where_each_cluster_wants_a_token_of_its_own(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    secret = f"a-secret-of-this-test-only-{uuid.uuid4().hex}"
    recipe = write_recipe(tmp_path, {**tiny, "islands": 1, "rounds": 3})
    run = run_folder(tiny)
    island = ["jobs/island.py", str(run), "--resource", "CPU=1"]
    monkeypatch.setenv("DILOCO_RAY_SECRET", secret)
    with head_node() as (here, _):
        train = ["jobs/train.py", str(recipe), "--islands", "external"]
        coordinator = submitted(train, here, tmp_path / "coordinator.log")
        wait_for((run / "run.json").exists, "the run has begun", coordinator)
        token = create_token(str(run), "eu-1")
        monkeypatch.setenv("DILOCO_RAY_TOKEN", token)
        monkeypatch.delenv("DILOCO_RAY_SECRET")  # which the island's cluster has not
        with head_node(1) as (there, rays):
            job = submitted(island, there, tmp_path / "island.log")
            commands = [*SUBMIT, *island], [*CLI, "join", *island[1:]]
            refused = [run_as_stranger(words, there, tmp_path) for words in commands]
            assert "the run is over" in job.wait_for_end()
            assert places_of(secret, rays, run) == places_of(token, rays, run) == []
        assert "succeeded" in coordinator.wait_for_end()
    assert "replay bit-equal" in cli("verify", str(run))
    assert_refused(*refused)


def run_as_stranger(words: list[str], environment: dict[str, str], home: Path) -> tuple[int, str]:
    """The command of somebody who has the cluster's address and not its token: exit code and output."""
    known = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        words, cwd=ROOT, env={**known, "HOME": str(home)}, capture_output=True, text=True, timeout=DEADLINE_S
    )
    return done.returncode, done.stdout + done.stderr


def assert_refused(job: tuple[int, str], command: tuple[int, str]) -> None:
    for code, text in (job, command):
        assert code != 0
        assert "RAY_AUTH_MODE" in text
        assert "RAY_AUTH_TOKEN" in text
    assert command[0] == ClusterError.exit_code
