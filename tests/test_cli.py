"""The command line where something is slightly wrong: no Ray is started, and what is said is of use."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from diloco_ray import __version__
from diloco_ray.cli import main
from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.status import STATUS, other_writer
from tests.processes import CLI, write_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the command line; returns its exit code and its output."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["diloco-ray", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return call


def test_the_version_is_told(said: Any) -> None:
    assert said("--version") == (0, f"diloco-ray {__version__}\n")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_who_has_seen_enough_is_no_failed_run(options: list[str]) -> None:
    """128 + SIGPIPE, as of any command before `head`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [*CLI, "plan", str(ROOT / "jobs" / "quickstart.yaml"), *options]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_number_of_islands_and_a_bad_name_are_refused_with_the_option_that_is_meant(
    said: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    recipe = str(write_recipe(tmp_path, tiny))
    code, text = said("train", recipe, "--islands", "2")
    assert code == 2
    assert "--set islands=2" in text
    for command in ("plan", "train"):
        code, text = said(command, recipe, "--name", "a/b")
        assert code == 2
        assert "where: --name" in text
    assert said("plan", recipe, "--name", "3")[0] == 0


def test_a_model_that_is_misspelt_is_answered_with_the_nearest_and_not_with_all(
    said: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    code, text = said("plan", str(write_recipe(tmp_path, tiny)), "--set", "model.config.model_type=lama")
    assert code == 2
    assert "did you mean llama" in text
    assert len(text) < 400


def test_a_corpus_of_one_small_document_is_refused_with_what_can_help(
    said: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("one short line")
    recipe = {**tiny, "data": {**tiny["data"], "corpus": str(tmp_path / "one.txt")}}
    code, text = said("prepare", str(write_recipe(tmp_path, recipe)))
    assert code == 3
    assert text.startswith("error: none of 1 documents fell into the train part")
    assert "what to do: give more text" in text
    assert "validation_fraction." not in text


def test_the_status_of_a_folder_of_runs_is_that_of_each(said: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_status(tmp_path / name, age_s=1.0)
    code, text = said("status", str(tmp_path))
    assert (code, text.splitlines()) == (0, [f"{tmp_path}/{name}: running, round 3/9" for name in ("one", "two")])
    code, text = said("status", str(tmp_path), "--json")
    assert list(json.loads(text)) == ["one", "two"]
    assert said("status", str(tmp_path / "none"))[0] == 7


@pytest.mark.parametrize(
    ("state", "age_s", "is_told"), [("running", 4.0, True), ("running", 60.0, False), ("succeeded", 4.0, False)]
)
def test_whoever_takes_a_live_run_over_is_told_who_wrote_it_just_now(
    state: str, age_s: float, is_told: bool, tmp_path: Path
) -> None:
    assert other_writer(RunStore(str(tmp_path / "none"))) == ""
    write_status(tmp_path / "run", age_s, state)
    told = other_writer(RunStore(str(tmp_path / "run")))
    assert told.startswith("another coordinator (life 3) wrote this run 4 s ago; taking it over") == is_told
    assert bool(told) == is_told


def write_status(folder: Path, age_s: float, state: str = "running") -> None:
    folder.mkdir()
    status = {
        "state": state,
        "reason": "",
        "rounds": 3,
        "num_rounds": 9,
        "islands": [],
        "coordinator": {"pid": 1, "fence_epoch": 3},
        "updated_at": (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="milliseconds"),
    }
    (folder / STATUS).write_text(json.dumps(status))
