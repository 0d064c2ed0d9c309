"""The commands in the manifests are commands: script, options, recipe and overrides are there."""

import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from diloco_ray.config import RunConfig
from diloco_ray.ids import island_name
from diloco_ray.runtime.cluster import selector_of
from tests.k8s.manifests import K8S, OVERLAYS, ROOT, entrypoints, only, render, words_for_gpus

COMMANDS = entrypoints()


def overrides(words: list[str]) -> list[str]:
    return [value for option, value in pairwise(words) if option == "--set"]


def run_of(overlay: str) -> RunConfig:
    """The run that the overlay's command trains."""
    words = COMMANDS[overlay]
    return RunConfig.from_yaml(ROOT / words[2], overrides(words))


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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_runs_the_command_that_its_files_set(overlay: str) -> None:
    assert shlex.split(only(render(overlay), "RayJob")["spec"]["entrypoint"]) == COMMANDS[overlay]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_its_words_are_the_same_behind_both_shells(overlay: str) -> None:
    """KubeRay's submitter is a line of bash with `ray job submit`, which joins the words for a shell of the head's."""
    line = only(render(overlay), "RayJob")["spec"]["entrypoint"]
    for shell in ("bash", "sh"):
        done = subprocess.run(
            [shell, "-c", f"printf '%s\\n' {line}"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        line = subprocess.list2cmdline(done.stdout.splitlines())
    assert done.stdout.splitlines() == COMMANDS[overlay]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_its_script_and_options_are_there(overlay: str) -> None:
    assert unknown(COMMANDS[overlay]) == []


@pytest.mark.parametrize("overlay", [name for name, words in COMMANDS.items() if words[1] == "jobs/train.py"])
def test_its_recipe_and_overrides_make_a_run_in_a_bucket(overlay: str) -> None:
    assert run_of(overlay).storage.path.startswith("s3://")


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on the PATH")
def test_with_gpus_a_single_cluster_asks_for_them_too(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text("resources: [../single-cluster]\ncomponents: [../../components/gpu]\n")
    done = subprocess.run(["kubectl", "kustomize", str(mine)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    job = only(list(yaml.safe_load_all(done.stdout)), "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words == [*COMMANDS["single-cluster"], *words_for_gpus("training")]
    assert RunConfig.from_yaml(ROOT / words[2], overrides(words)).cluster.island_resources["GPU"] == 1
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    assert [limit["nvidia.com/gpu"] for limit in limits] == ["1"] * 4


def test_an_island_is_of_the_run_that_its_coordinator_has() -> None:
    for coordinator, island in (("coordinator", "island"), ("local-coordinator", "local-island")):
        assert COMMANDS[island][2] == run_of(coordinator).run_url


@pytest.mark.parametrize("overlay", ["coordinator", "local-coordinator"])
def test_a_run_begins_with_the_one_island_that_the_guide_makes(overlay: str) -> None:
    assert run_of(overlay).min_islands == 1


def test_each_island_of_the_single_cluster_has_a_worker_group_for_itself() -> None:
    config = run_of("single-cluster")
    groups = only(render("single-cluster"), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    names = [island_name(number) for number in range(config.max_islands)]
    assert len(groups) == len(names)
    assert [group["replicas"] for group in groups] == [1] * len(names)
    for name in names:
        wanted = selector_of(config.cluster, name).items()
        assert [group["groupName"] for group in groups if wanted <= group["labels"].items()] == [name]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_command_waits_for_the_islands_pods_as_long_as_kuberay_does(overlay: str) -> None:
    spec, words = only(render(overlay), "RayJob")["spec"], COMMANDS[overlay]
    if not spec["rayClusterSpec"].get("workerGroupSpecs"):
        return  # its islands' pods are elsewhere
    is_island = words[1] == "jobs/island.py"
    waits_s = dict(pairwise(words)).get("--wait-s", 0) if is_island else run_of(overlay).cluster.placement_timeout_s
    assert float(waits_s) >= spec["preRunningDeadlineSeconds"]


def test_an_option_that_is_not_there_is_found() -> None:
    assert unknown([*COMMANDS["single-cluster"], "--no-such-option"]) == ["--no-such-option"]
    assert unknown(["python", "jobs/trian.py"]) == ["jobs/trian.py"]
