"""The manifests of k8s/ as tests see them: rendered overlays, entrypoints, and KubeRay's schemas made strict."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
CRDS = Path(os.environ.get("DILOCO_RAY_CRDS", ROOT.parent / "shared" / "crds"))
VERSIONS = ("1.32", "1.37")  # of Kubernetes: what these manifests ask for is in all from the first to the last
INT32 = {"minimum": -(2**31), "maximum": 2**31 - 1}

Document = dict[str, Any]


def render(overlay: str) -> list[Document]:
    """What `kubectl apply -k k8s/overlays/OVERLAY` would send. Skips the test where no renderer is installed."""
    return json.loads(json.dumps(_render(overlay)))  # a copy of its own, without YAML's shared nodes


@cache
def _render(overlay: str) -> list[Document]:
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            done = subprocess.run(
                [*command, str(K8S / "overlays" / overlay)], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            return list(yaml.load_all(done.stdout, yaml.CSafeLoader))
    pytest.skip("overlays are not rendered: neither kubectl nor kustomize is on the PATH")


def only(documents: list[Document], kind: str) -> Document:
    (document,) = [document for document in documents if document["kind"] == kind]
    return document


def entrypoints() -> dict[str, list[str]]:
    """The command of each overlay in words, as the files have it: needs no renderer."""
    commands = {}
    for overlay in OVERLAYS:
        kustomization = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text())
        for patch in kustomization.get("patches", []):
            for change in yaml.safe_load(patch["patch"]):
                if change["path"] == "/spec/entrypoint":
                    commands[overlay] = shlex.split(change["value"])
    with_gpu = [*commands["island"], *words_for_gpus("island")]
    return {overlay: commands.get(overlay, with_gpu) for overlay in OVERLAYS}  # gpu and spot set none


def words_for_gpus(job: str) -> list[str]:
    """What the component `gpu` adds to the command of this RayJob."""
    return shlex.split(yaml.safe_load((K8S / "components" / "gpu" / "gpu.yaml").read_text())["commands"][job])


# ---- KubeRay's schemas ----


@cache
def strict_schema(kind: str) -> Document:
    """The v1 schema of a custom resource, refusing what the API server would silently drop. Skips where it is not."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"custom resources are not validated: no {path} (DILOCO_RAY_CRDS names another folder)")
    versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    _harden(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # `whats_wrong` looks at it
    return schema


def _harden(schema: Document) -> None:
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("format") == "int32":
        schema.update({name: schema.get(name, bound) for name, bound in INT32.items()})
    for child in _children(schema):
        _harden(child)


def _children(schema: Document) -> Iterator[Document]:
    yield from schema.get("properties", {}).values()
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield schema[name]


@cache
def _validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(strict_schema(kind))


def whats_wrong(resource: Document) -> list[str]:
    """Where a custom resource breaks its schema or a CEL rule of it, else Kubernetes' own rules of metadata."""
    errors = [f"{error.json_path}: {error.message}" for error in _validator(resource["kind"]).iter_errors(resource)]
    errors += _broken_rules(strict_schema(resource["kind"]), resource, "$")
    if errors:
        return errors
    carrier = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": resource["metadata"]}
    metadata = whats_wrong_built_in(carrier, VERSIONS[0])  # of a custom resource's metadata its schema says nothing
    return [metadata] if metadata else []


def _broken_rules(schema: Document, value: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule['message']}"
    if isinstance(value, dict):
        for name, child in value.items():
            if name in schema.get("properties", {}):
                yield from _broken_rules(schema["properties"][name], child, f"{path}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _broken_rules(schema.get("items", {}), item, f"{path}[{number}]")


def whats_wrong_built_in(document: Document, version: str) -> str:
    """Where a document of a kind of Kubernetes' own breaks that version's schema, strictly; empty where nowhere."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return ""
