"""What the overlays come to: Kubernetes' own kinds, what KubeRay asks beyond its schema, and what the parts promise."""

import inspect
import re
from typing import Any

import pytest
from ray.dashboard.modules.job.job_supervisor import JobSupervisor

from diloco_ray.runtime import outpost
from diloco_ray.runtime.island_process import FAREWELL_S, LOOK_EVERY_S
from tests.k8s.manifests import K8S, OVERLAYS, ROOT, VERSIONS, Document, only, render, whats_wrong_built_in

RAY_WAITS = "RAY_JOB_STOP_WAIT_TIME_S"  # for a job that it has told to stop; then it kills it
RAY_DRAINS_S = 30  # `ray start` at SIGTERM, which it gets after the hook
JOINS = [name for name in OVERLAYS if "coordinator" not in name]  # what has islands


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return render(request.param)


def groups(documents: list[Document]) -> list[Document]:
    """The head's group and then the workers'."""
    cluster = only(documents, "RayJob")["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def pods(documents: list[Document]) -> list[Document]:
    return [group["template"] for group in groups(documents)]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_its_own_kinds(documents: list[Document], version: str) -> None:
    own = [document for document in documents if not document["apiVersion"].startswith("ray.io/")]
    assert {"Namespace", "ConfigMap", "NetworkPolicy"} <= {document["kind"] for document in own}
    assert {
        d["metadata"]["name"]: whats_wrong_built_in(d, version) for d in own if whats_wrong_built_in(d, version)
    } == {}
    for pod in pods(documents):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **pod["metadata"]}, "spec": pod["spec"]}
        assert whats_wrong_built_in(whole, version) == ""


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("NetworkPolicy", "podSelector", "podSelecter"),
        ("NetworkPolicy", "policyTypes", "policyType"),
        ("PodDisruptionBudget", "minAvailable", "minAvailabe"),
        ("PodDisruptionBudget", "selector", "selectors"),
    ],
)
def test_a_misspelt_name_in_them_is_caught(kind: str, right: str, wrong: str) -> None:
    document = next(d for d in render("coordinator") if d["kind"] == kind)
    document["spec"][wrong] = document["spec"].pop(right)
    assert whats_wrong_built_in(document, "1.32")


def test_kuberay_takes_it(documents: list[Document]) -> None:
    """What KubeRay 1.6 and 1.7 refuse although the schema lets it pass."""
    job = only(documents, "RayJob")
    name, spec = job["metadata"]["name"], job["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47
    assert spec["submissionMode"] == "SidecarMode"
    assert not {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec)
    assert spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never") == "Never"
    assert spec["shutdownAfterJobFinishes"] is True
    assert "networkPolicy" not in spec["rayClusterSpec"], "behind a feature gate"
    for worker in groups(documents)[1:]:
        assert 0 < worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_a_lost_head_and_a_long_wait_have_an_end(documents: list[Document]) -> None:
    spec = only(documents, "RayJob")["spec"]
    assert spec["backoffLimit"] > 0
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    # KubeRay gives up after 300 s without an answer, and then tries no more: the pod must be gone by then.
    for toleration in pods(documents)[0]["spec"]["tolerations"]:
        assert toleration["tolerationSeconds"] <= 120


def test_ray_is_the_tested_one_and_asks_for_a_token(documents: list[Document]) -> None:
    cluster = only(documents, "RayJob")["spec"]["rayClusterSpec"]
    (tested,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == tested
    assert f"ARG BASE=rayproject/ray:{tested}-py311\n" in (K8S / "Dockerfile").read_text()


def test_the_image_has_what_it_copies() -> None:
    for line in re.findall(r"^COPY --chown=\S+ (.+)$", (K8S / "Dockerfile").read_text(), re.MULTILINE):
        *sources, _ = line.split()
        assert [source for source in sources if not (ROOT / source).exists()] == []
        kept = (ROOT / ".dockerignore").read_text().splitlines()
        assert [source for source in sources if f"!{source}" not in kept] == []


def test_every_pod_says_what_it_takes_and_may_do_little(documents: list[Document]) -> None:
    for pod in pods(documents):
        (container,) = pod["spec"]["containers"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        _, colon, tag = container["image"].rpartition(":")
        assert colon
        assert "/" not in tag, "a registry's port is no tag"
        assert tag not in ("", "latest")


def test_nobody_comes_in_from_another_namespace_but_kuberay(documents: list[Document]) -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    assert policies["closed"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    inward: list[tuple[str, Any, Any]] = [
        (name, peer.get("namespaceSelector"), rule.get("ports"))
        for name, policy in policies.items()
        for rule in policy.get("ingress", [])
        for peer in rule["from"]
    ]
    assert inward == [("operator", {}, [{"port": 8265, "protocol": "TCP"}]), ("ray-cluster", None, None)]
    outward = {port["port"] for rule in policies["ray-cluster"]["egress"] for port in rule.get("ports", [])}
    assert outward - {5000} == {53, 443}


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector is for what has these labels, as Kubernetes reads it: an empty one is for all."""
    fits = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, _: key in labels,
        "DoesNotExist": lambda key, _: key not in labels,
    }
    wanted = [fits[e["operator"]](e["key"], e.get("values")) for e in selector.get("matchExpressions", [])]
    return all(wanted) and selector.get("matchLabels", {}).items() <= labels.items()


def comes_in(documents: list[Document], labels: dict[str, str]) -> bool:
    """Whether some policy lets a pod with these labels in from another namespace."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    anybody = [{"namespaceSelector": {}}]
    peers = [peer for policy in policies for rule in policy.get("ingress", []) for peer in rule.get("from") or anybody]
    namespace = {"kubernetes.io/metadata.name": "elsewhere"}
    return any(
        selects(peer["namespaceSelector"], namespace) and selects(peer.get("podSelector", {}), labels)
        for peer in peers
        if "namespaceSelector" in peer  # another peer's pods are of the policy's own namespace
    )


def test_the_operator_comes_in_and_the_pods_of_other_ray_clusters_do_not(documents: list[Document]) -> None:
    """Labels as KubeRay 1.6 and 1.7 set them: its chart, its own kustomization, and its controller on Ray pods."""
    name, component = "app.kubernetes.io/name", {"app.kubernetes.io/component": "kuberay-operator"}
    assert comes_in(documents, {name: "kuberay-operator", "app.kubernetes.io/instance": "kuberay", **component})
    assert comes_in(documents, {name: "kuberay", **component})
    for node_type in ("head", "worker"):
        of_ray = {
            name: "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": node_type,
            "ray.io/cluster": "another",
            "ray.io/group": "another",
        }
        assert not comes_in(documents, of_ray)
    assert not comes_in(documents, {})


@pytest.mark.parametrize(
    ("selector", "is_for_it"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchLabels": {"b": "1"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
        ({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, False),
    ],
)
def test_a_selector_is_read_as_kubernetes_reads_it(selector: Document, is_for_it: bool) -> None:
    assert selects(selector, {"a": "1"}) is is_for_it


def test_a_budget_counts_pods_that_are_there(documents: list[Document]) -> None:
    counted: dict[str, int] = {}
    for group in groups(documents):
        component = group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        counted[component] = counted.get(component, 0) + group.get("replicas", 1)
    for budget in (document["spec"] for document in documents if document["kind"] == "PodDisruptionBudget"):
        component = budget["selector"]["matchLabels"]["app.kubernetes.io/component"]
        assert 0 < budget["minAvailable"] <= counted[component], component


@pytest.mark.parametrize("overlay", JOINS)
def test_a_pod_with_an_island_gives_it_time_to_leave(overlay: str) -> None:
    for pod in pods(render(overlay))[1:]:
        *hook, seconds = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook == ["python", "k8s/leave.py"]
        assert float(seconds) >= LOOK_EVERY_S + FAREWELL_S
        assert pod["spec"]["terminationGracePeriodSeconds"] > float(seconds) + RAY_DRAINS_S


def test_ray_lets_a_job_that_is_stopped_say_goodbye(documents: list[Document]) -> None:
    head = pods(documents)[0]["spec"]["containers"][0]
    (seconds,) = [float(variable["value"]) for variable in head["env"] if variable["name"] == RAY_WAITS]
    assert seconds > outpost.FAREWELL_S
    assert RAY_WAITS in inspect.getsource(JobSupervisor), "Ray reads it under another name"


def test_the_components_reach_every_island() -> None:
    for pod in pods(render("gpu"))[1:]:
        assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    documents = render("spot")
    assert "nodeSelector" not in pods(documents)[0]["spec"], "a head stays where it is not taken away"
    assert all(pod["spec"]["nodeSelector"] for pod in pods(documents)[1:])
    assert [d for d in documents if d["kind"] in ("PodDisruptionBudget", "Gpu", "Spot")] == []


def test_each_part_has_the_secrets_that_are_its_own() -> None:
    def secrets(overlay: str) -> set[str]:
        sources = [source for pod in pods(render(overlay)) for source in pod["spec"]["containers"][0]["envFrom"]]
        return {source["secretRef"]["name"] for source in sources if "secretRef" in source}

    assert secrets("coordinator") == {"bucket", "signing"}
    assert secrets("island") == {"bucket", "token"}
    assert secrets("single-cluster") == {"bucket"}
