"""The commands in the manifests are commands: script, options, recipe and overrides are there."""

import subprocess
import sys
from functools import cache
from itertools import pairwise

import pytest

from diloco_ray.config import RunConfig
from tests.k8s.manifests import OVERLAYS, ROOT, entrypoints, only, render

COMMANDS = entrypoints()


def overrides(words: list[str]) -> list[str]:
    return [value for option, value in pairwise(words) if option == "--set"]


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def unknown(words: list[str]) -> list[str]:
    """What the script's own --help does not know of the options; the script's name if that is not there."""
    python, script, *arguments = words
    assert python == "python"
    if not (ROOT / script).is_file():
        return [script]
    return [word for word in arguments if word.startswith("--") and word not in help_of(script)]


def test_every_overlay_runs_the_command_that_its_file_sets() -> None:
    for overlay in OVERLAYS:
        set_here = COMMANDS.get(overlay, COMMANDS["island"])  # gpu and spot are the island's
        assert only(render(overlay), "RayJob")["spec"]["entrypoint"].split() == set_here


@pytest.mark.parametrize("overlay", COMMANDS)
def test_its_script_and_options_are_there(overlay: str) -> None:
    missing = unknown(COMMANDS[overlay])
    if set(missing) <= {"jobs/island.py", "--islands"}:  # islands as clusters of their own
        if missing:
            pytest.skip(f"{', '.join(missing)} is still to come")
        return
    assert missing == []


@pytest.mark.parametrize("overlay", [name for name, words in COMMANDS.items() if words[1] == "jobs/train.py"])
def test_its_recipe_and_overrides_make_a_run_in_a_bucket(overlay: str) -> None:
    words = COMMANDS[overlay]
    config = RunConfig.from_yaml(ROOT / words[2], overrides(words))
    assert config.storage.path.startswith("s3://")


def test_an_island_is_of_the_run_that_its_coordinator_has() -> None:
    for coordinator, island in (("coordinator", "island"), ("local-coordinator", "local-island")):
        words = COMMANDS[coordinator]
        assert COMMANDS[island][2] == RunConfig.from_yaml(ROOT / words[2], overrides(words)).run_url


def test_islands_are_placed_on_the_nodes_that_have_the_label() -> None:
    words = COMMANDS["single-cluster"]
    config = RunConfig.from_yaml(ROOT / words[2], overrides(words))
    groups = only(render("single-cluster"), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["labels"] for group in groups] == [config.cluster.label_selector] * config.max_islands


def test_an_option_that_is_not_there_is_found() -> None:
    assert unknown([*COMMANDS["single-cluster"], "--no-such-option"]) == ["--no-such-option"]
    assert unknown(["python", "jobs/trian.py"]) == ["jobs/trian.py"]
