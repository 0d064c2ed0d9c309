"""Every RayJob against KubeRay's own schema, made to refuse what it does not know, and against its CEL rules."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import K8S, OVERLAYS, Document, only, render, whats_wrong

FREE = {"labels", "annotations", "rayStartParams", "limits", "requests", "nodeSelector"}  # whose keys are the user's
Path = tuple[str | int, ...]


@pytest.fixture(params=OVERLAYS)
def job(request: pytest.FixtureRequest) -> Document:
    return only(render(request.param), "RayJob")


def at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


def keys_of(value: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every key whose name the schema knows."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield (*path, name)
            if name not in FREE:
                yield from keys_of(child, (*path, name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from keys_of(item, (*path, number))


def test_it_is_what_kuberay_knows(job: Document) -> None:
    assert whats_wrong(job) == []


def test_a_misspelt_name_is_caught_wherever_it_stands(job: Document) -> None:
    paths = list(keys_of(job["spec"]))
    assert len(paths) > 50
    for *parent, name in paths:
        wrong = copy.deepcopy(job)
        mapping = at(wrong["spec"], tuple(parent))
        mapping[f"{name}x"] = mapping.pop(name)
        assert whats_wrong(wrong), (*parent, name)


def test_a_field_one_level_too_high_is_caught(job: Document) -> None:
    for path in keys_of(job["spec"]):
        if len(path) < 2 or not isinstance(path[-2], str):
            continue
        wrong = copy.deepcopy(job)
        above, parent = at(wrong["spec"], path[:-2]), at(wrong["spec"], path[:-1])
        if path[-1] not in above and path[-2:] != ("template", "metadata"):
            above[path[-1]] = parent.pop(path[-1])
            assert whats_wrong(wrong), path


@pytest.mark.parametrize("overlay", ["coordinator", "island", "single-cluster"])
@pytest.mark.parametrize("shift", [-2, 2])
def test_a_line_that_is_indented_wrongly_is_caught(overlay: str, shift: int) -> None:
    lines = (K8S / "overlays" / overlay / "rayjob.yaml").read_text().splitlines()
    right = yaml.safe_load("\n".join(lines))
    for number, line in enumerate(lines):
        moved = " " * shift + line if shift > 0 else line.removeprefix(" " * -shift)
        try:
            read = yaml.safe_load("\n".join([*lines[:number], moved, *lines[number + 1 :]]))
        except yaml.YAMLError:
            continue
        assert read == right or whats_wrong({**read, "kind": "RayJob"}), line


HEAD = ("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0)
WRONG: dict[str, tuple[Path, Any]] = {
    "a number in words": (("backoffLimit",), "twenty"),
    "a number as text": (("activeDeadlineSeconds",), "3600"),
    "a number that is too large": (("activeDeadlineSeconds",), 2**31),
    "a deadline of no time": (("preRunningDeadlineSeconds",), 0),
    "a word for a truth value": (("shutdownAfterJobFinishes",), "yes"),
    "an unknown way of authentication": (("rayClusterSpec", "authOptions", "mode"), "tokens"),
    "a start parameter that is no text": (("rayClusterSpec", "headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
    "one container instead of a list": (HEAD[:-1], {"name": "ray-head"}),
    "a container without a name": ((*HEAD, "name"), None),
    "an amount that is none": ((*HEAD, "resources", "limits"), {"cpu": "two cores"}),
    "a port in words": ((*HEAD, "ports", 0, "containerPort"), "dashboard"),
    "a toleration for ever in words": (
        ("rayClusterSpec", "headGroupSpec", "template", "spec", "tolerations", 0, "tolerationSeconds"),
        "30s",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_is_caught(what: str) -> None:
    job = only(render("island"), "RayJob")
    (*parent, name), value = WRONG[what]
    at(job["spec"], tuple(parent))[name] = value
    assert whats_wrong(job)


def strategy(**fields: Any) -> Callable[[Document], None]:
    return lambda spec: spec.update(deletionStrategy=fields)


RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}
POLICY = {"policy": "DeleteNone"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda spec: spec.update(managedBy="somebody"), "managedBy field value must be either"),
        (strategy(onSuccess=POLICY, onFailure=POLICY, deletionRules=[RULE]), "cannot be used together"),
        (strategy(onSuccess=POLICY), "requires either BOTH"),
        (strategy(deletionRules=[{**RULE, "condition": {}}]), "requires either the JobStatus"),
    ],
)
def test_a_broken_rule_is_caught(broken: Callable[[Document], None], message: str) -> None:
    job = only(render("coordinator"), "RayJob")
    broken(job["spec"])
    assert any(message in error for error in whats_wrong(job))


def test_a_rule_that_is_kept_is_no_error() -> None:
    job = only(render("coordinator"), "RayJob")
    strategy(deletionRules=[RULE])(job["spec"])
    assert whats_wrong(job) == []
