"""The commands in the manifests are commands: script, options, recipe and overrides are there."""

import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from diloco_ray.config import RunConfig
from tests.k8s.manifests import K8S, OVERLAYS, ROOT, entrypoints, only, render

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
        set_here = COMMANDS.get(overlay, [*COMMANDS["island"], "--resource", "GPU=1"])  # gpu and spot
        assert only(render(overlay), "RayJob")["spec"]["entrypoint"].split() == set_here


@pytest.mark.parametrize("overlay", COMMANDS)
def test_its_script_and_options_are_there(overlay: str) -> None:
    assert unknown(COMMANDS[overlay]) == []


@pytest.mark.parametrize("overlay", [name for name, words in COMMANDS.items() if words[1] == "jobs/train.py"])
def test_its_recipe_and_overrides_make_a_run_in_a_bucket(overlay: str) -> None:
    words = COMMANDS[overlay]
    config = RunConfig.from_yaml(ROOT / words[2], overrides(words))
    assert config.storage.path.startswith("s3://")


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on the PATH")
def test_with_gpus_a_single_cluster_asks_for_them_too(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text("resources: [../single-cluster]\ncomponents: [../../components/gpu]\n")
    done = subprocess.run(["kubectl", "kustomize", str(mine)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    job = only(list(yaml.safe_load_all(done.stdout)), "RayJob")
    words = job["spec"]["entrypoint"].split()
    assert words == [*COMMANDS["single-cluster"], "--set", "cluster.island_resources.GPU=1"]
    assert RunConfig.from_yaml(ROOT / words[2], overrides(words)).cluster.island_resources["GPU"] == 1
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    assert [limit["nvidia.com/gpu"] for limit in limits] == ["1"] * 4


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
